"""Shuffle any number of rows in bounded memory: an external sort by a hash of their ids.

The order is that of the hashes, so it depends on the ids and a seed alone: not on the order of the source, nor on how
rows are cut into chunks. Rows stay in memory while they fit. Then they are distributed over 256 files by the first
byte of their hash. Each file is sorted by itself, or distributed again by the next byte if it does not fit in memory.
"""

import hashlib
import shutil
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.ipc

from dmvae.data.format.schema import Columns
from dmvae.data.preparation.rows import Rows

Array = np.ndarray[Any, np.dtype[Any]]

HELD_BYTES = 64 << 20
"""Bytes of rows in memory, before they go to files and while a file is sorted."""
_FILES = 256


def hash_keys(names: Array, seed: int) -> Array:
    """Hash `(rows,)` integers or strings to uint64 with BLAKE2b, keyed by the seed."""
    keyed = hashlib.blake2b(digest_size=8, key=seed.to_bytes(8, "little"))
    digests = bytearray()
    for name in names.tolist():
        hasher = keyed.copy()
        hasher.update(str(name).encode())
        digests += hasher.digest()
    return np.frombuffer(bytes(digests), dtype="<u8").astype(np.uint64)


@dataclass
class _Keyed:
    """Rows with their sort keys and their numbers in the source."""

    rows: Rows
    keys: Array
    numbers: Array

    def take(self, index: Array) -> "_Keyed":
        return _Keyed(self.rows.take(index), self.keys[index], self.numbers[index])

    def by_key(self) -> "_Keyed":
        return self.take(np.lexsort((self.numbers, self.keys)))

    @classmethod
    def join(cls, parts: "Sequence[_Keyed]") -> "_Keyed":
        return cls(
            Rows.join([part.rows for part in parts]),
            np.concatenate([part.keys for part in parts]),
            np.concatenate([part.numbers for part in parts]),
        )


class ExternalShuffle:
    """Takes rows in any order, and yields them in the order of their keys.

    Args:
        columns: the columns of the rows.
        folder: for temporary files; created when needed.
        shift: the number of key bits below the byte that rows are distributed by.
    """

    def __init__(self, columns: Columns, folder: Path, shift: int = 56) -> None:
        self._columns, self._folder, self._shift = columns, folder, shift
        self._held: list[_Keyed] = []
        self._held_rows = 0
        self._rows = np.zeros(_FILES, dtype=np.int64)

    def add(self, rows: Rows, keys: Array, numbers: Array) -> None:
        """Add rows with their keys; rows with equal keys are sorted by their numbers."""
        self._held.append(_Keyed(rows, keys, numbers))
        self._held_rows += len(rows)
        if not self._fits(self._held_rows):
            self._flush()

    def sorted(self, keep: bool = False) -> Iterator[tuple[Rows, Array]]:
        """Yield all rows in the order of their keys, with their numbers, in pieces that fit in memory.

        Args:
            keep: keep the files, so that rows can be read again; else files are removed as they are read.
        """
        if not self._folder.exists():
            if self._held:
                found = _Keyed.join(self._held).by_key()
                yield found.rows, found.numbers
            return
        self._flush()
        for digit in np.flatnonzero(self._rows).tolist():
            file = self._folder / f"{digit:02x}"
            if self._fits(int(self._rows[digit])) or not self._shift:
                found = _Keyed.join(list(self._read(file))).by_key()
                yield found.rows, found.numbers
            else:
                finer = ExternalShuffle(self._columns, file.with_suffix(".finer"), self._shift - 8)
                for part in self._read(file):
                    finer.add(part.rows, part.keys, part.numbers)
                yield from finer.sorted()
                finer.remove()
            if not keep:
                file.unlink()

    def remove(self) -> None:
        """Remove the remaining files."""
        if self._folder.exists():
            shutil.rmtree(self._folder)

    def _fits(self, num_rows: int) -> bool:
        return num_rows * self._columns.row_bytes <= HELD_BYTES

    def _flush(self) -> None:
        """Distribute the rows in memory over the files."""
        if not self._held:
            return
        found = _Keyed.join(self._held)
        self._held, self._held_rows = [], 0
        digits = (found.keys >> np.uint64(self._shift)).astype(np.uint8)
        counts = np.bincount(digits, minlength=_FILES)
        batch = self._batch(found.take(np.argsort(digits, kind="stable")))
        self._folder.mkdir(exist_ok=True)
        for digit, start in zip(range(_FILES), (np.cumsum(counts) - counts).tolist(), strict=True):
            if counts[digit]:
                with (self._folder / f"{digit:02x}").open("ab") as file, pa.ipc.new_stream(file, batch.schema) as out:
                    out.write_batch(batch.slice(start, int(counts[digit])))
        self._rows += counts

    def _batch(self, part: _Keyed) -> pa.RecordBatch:
        batch = part.rows.record_batch(self._columns.arrow_schema())
        return batch.append_column("key", pa.array(part.keys)).append_column("number", pa.array(part.numbers))

    def _read(self, file: Path) -> Iterator[_Keyed]:
        """Yield the record batches of a file, which is a sequence of Arrow streams."""
        size = file.stat().st_size
        with file.open("rb") as opened:
            while opened.tell() < size:
                with pa.ipc.open_stream(opened) as reader:
                    for batch in reader:
                        rows = Rows.of_batch(batch, self._columns)
                        yield _Keyed(rows, batch.column("key").to_numpy(), batch.column("number").to_numpy())
