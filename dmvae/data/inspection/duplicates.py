"""Find duplicate rows by their hashes, without keeping the rows in memory."""

import hashlib
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import numpy as np
from jaxtyping import Bool, UInt32, UInt64

Array = np.ndarray[Any, np.dtype[Any]]


class RowHash:
    """A random hash of rows of bytes; two different rows collide with probability 2^-64.

    With 64-bit keys k and 32-bit words w, each half of the hash is the upper half of k_0 + sum_i k_i w_i modulo 2^64.

    Source: Lemire & Kaser 2014, Strongly universal string hashing is fast.
    """

    def __init__(self, row_bytes: int, seed: int) -> None:
        self._row_bytes, self._words = row_bytes, -(-row_bytes // 4)
        keys = np.random.default_rng(seed).integers(0, 2**64, (self._words + 1, 2), dtype=np.uint64)
        self._first, self._keys = keys[0], keys[1:]

    def __call__(self, rows: Array) -> UInt64[np.ndarray, " row"]:
        """Hash the bytes of each of `rows`, `(row, ...)`; never 0."""
        found = np.frombuffer(np.ascontiguousarray(rows).tobytes(), dtype=np.uint8).reshape(-1, self._row_bytes)
        padding = 4 * self._words - self._row_bytes
        words: UInt32[np.ndarray, "row word"] = np.pad(found, ((0, 0), (0, padding))).view(np.uint32)
        upper = (self._first + words.astype(np.uint64) @ self._keys) >> np.uint64(32)
        return np.asarray(np.maximum(upper[:, 0] << np.uint64(32) | upper[:, 1], np.uint64(1)))


def hash_ids(ids: Array) -> UInt64[np.ndarray, " row"]:
    """Return a number for each id: the integer itself, or 64 bits of the BLAKE2b hash of a string."""
    if ids.dtype == np.int64:
        return ids.view(np.uint64)
    digests = b"".join(hashlib.blake2b(text.encode(), digest_size=8).digest() for text in ids.tolist())
    return np.frombuffer(digests, dtype=np.uint64)


@dataclass(frozen=True, eq=False)
class Hashes:
    """Hashes of the rows of one split.

    Attributes:
        ids: of each row's id.
        contents: of all values of each row, and of which modalities are missing.
        values: by modality, of each row's values; 0 if they are missing or all zero. Empty for the largest split, whose
            rows are compared with those of the other splits while they are read.
    """

    ids: UInt64[np.ndarray, " row"]
    contents: UInt64[np.ndarray, " row"]
    values: dict[str, UInt64[np.ndarray, " row"]]

    @staticmethod
    def of(rows: int, modalities: Iterable[str]) -> "Hashes":
        """Allocate hashes of `rows` rows, with values of `modalities`."""
        return Hashes(_zeros(rows), _zeros(rows), {name: _zeros(rows) for name in modalities})


def _zeros(rows: int) -> UInt64[np.ndarray, " row"]:
    return np.zeros(rows, dtype=np.uint64)


def repeated(hashes: UInt64[np.ndarray, " row"]) -> Bool[np.ndarray, " row"]:
    """Return which rows have the same hash as an earlier row."""
    order = np.argsort(hashes, kind="stable")
    later = np.zeros(len(hashes), dtype=bool)
    later[order[1:]] = hashes[order[1:]] == hashes[order[:-1]]
    return later


class SplitOverlap:
    """Finds the values of the smaller splits that also occur in the largest one."""

    def __init__(self, smaller: list[Hashes], modality: str) -> None:
        values = np.concatenate([hashes.values[modality] for hashes in smaller])
        self._known = np.unique(values[values > 0])
        self._seen = np.zeros(len(self._known), dtype=bool)

    def add(self, hashes: UInt64[np.ndarray, " row"]) -> None:
        """Add rows of the largest split; 0 is ignored."""
        if len(self._known):
            index = np.searchsorted(self._known, hashes).clip(max=len(self._known) - 1)
            self._seen[index[self._known[index] == hashes]] = True

    def contains(self, hashes: UInt64[np.ndarray, " row"]) -> Bool[np.ndarray, " row"]:
        """Return which rows of a smaller split have values that were added."""
        if not len(self._known):
            return np.zeros(len(hashes), dtype=bool)
        index = np.searchsorted(self._known, hashes).clip(max=len(self._known) - 1)
        return np.asarray(self._seen[index] & (self._known[index] == hashes))
