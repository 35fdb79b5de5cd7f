"""Gather rows from any number of memory-mapped files at once, with one copy for each column."""

import ctypes
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from jaxtyping import Bool, Int64, UInt8

from dmvae.data.format.schema import Columns

Array = np.ndarray[Any, np.dtype[Any]]


@dataclass(frozen=True)
class Addresses:
    """The memory addresses of a column's record batches in one file.

    Attributes:
        values: the address of the first row's value.
        bits: the address of the validity bits; 0 if the record batch has no null.
    """

    values: Int64[np.ndarray, " group"]
    bits: Int64[np.ndarray, " group"]


@dataclass(frozen=True)
class Located:
    """Where rows are stored.

    Attributes:
        position: the row's position, counted through all files.
        file: the file.
        group: the record batch, counted through all files.
        offset: the row's position in its record batch.
        byte: the byte of its validity bit.
        bit: a mask that selects the bit.
    """

    position: Int64[np.ndarray, " row"]
    file: Int64[np.ndarray, " row"]
    group: Int64[np.ndarray, " row"]
    offset: Int64[np.ndarray, " row"]
    byte: Int64[np.ndarray, " row"]
    bit: UInt8[np.ndarray, " row"]


class Gatherer:
    """Gathers rows from files with the same columns, by their position counted through all files.

    Args:
        columns: the columns of every file.
        rows: the number of rows of each file.
        record_batch_rows: the rows of each file's record batches; the last one may have fewer.
    """

    def __init__(self, columns: Columns, rows: Sequence[int], record_batch_rows: Sequence[int]) -> None:
        self._types = columns.fixed_size
        self._row_start = np.cumsum([0, *rows])
        self._group_rows = np.array(record_batch_rows, dtype=np.int64)
        self._group_start = np.cumsum([0, *(-(-n // size) for n, size in zip(rows, record_batch_rows, strict=True))])
        total = int(self._group_start[-1])
        self._addresses = {
            name: Addresses(np.zeros(total, dtype=np.int64), np.zeros(total, dtype=np.int64)) for name in self._types
        }
        self._span = 1 << 62, 0

    def add(self, file: int, columns: Mapping[str, Addresses], low: int, high: int) -> None:
        """Add a file that is mapped from address `low` to `high`; other files may be read at the same time."""
        groups = slice(self._group_start[file], self._group_start[file + 1])
        for name, found in columns.items():
            self._addresses[name].values[groups] = found.values
            self._addresses[name].bits[groups] = found.bits
        self._span = min(low, self._span[0]), max(high, self._span[1])

    def locate(self, positions: Int64[np.ndarray, " row"]) -> Located:
        """Return where rows are stored."""
        if len(self._group_rows) == 1:
            file = np.zeros_like(positions)
            group, offset = np.divmod(positions, self._group_rows[0])
        else:
            file = np.searchsorted(self._row_start, positions, side="right") - 1
            group, offset = np.divmod(positions - self._row_start[file], self._group_rows[file])
            group += self._group_start[file]
        return Located(positions, file, group, offset, offset >> 3, np.left_shift(1, offset & 7).astype(np.uint8))

    def values(self, name: str, rows: Located) -> Array:
        """Copy the values of a column, `(rows, *shape)`, from files that were added and are still mapped.

        Values of missing rows are undefined.
        """
        dtype, shape = self._types[name]
        size = dtype.itemsize * int(np.prod(shape, dtype=np.int64))
        if not len(rows.group):
            return np.empty((0, *shape), dtype=dtype)
        low, high = self._span  # read once, since a thread that maps another file changes it
        offsets = self._addresses[name].values[rows.group]
        offsets += rows.offset * size
        offsets -= low
        return np.asarray(_memory(low, high, size)[offsets].view(dtype).reshape(-1, *shape))

    def present(self, name: str, rows: Located) -> Bool[np.ndarray, " row"]:
        """Return which rows have a value in a column, of files that were added and are still mapped."""
        start = self._addresses[name].bits[rows.group]
        has_bits = start != 0
        if not has_bits.any():
            return np.ones(len(start), dtype=bool)
        low, high = self._span
        offsets = np.where(has_bits, start + rows.byte, low) - low
        return np.asarray(((_memory(low, high, 1)[offsets].view(np.uint8) & rows.bit) != 0) | ~has_bits)


def _memory(low: int, high: int, size: int) -> Array:
    """View memory as an array with an item of `size` bytes at every byte, whether mapped or not."""
    memory = memoryview((ctypes.c_uint8 * (high - low)).from_address(low))
    return np.ndarray((high - low - size + 1,), f"V{size}", memory, strides=(1,))
