"""One memory-mapped shard; rows are gathered by byte offset, without a loop over rows or record batches."""

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.ipc
from jaxtyping import Bool, Int64, UInt64

from dmvae.data.errors import DatasetError
from dmvae.data.format.gather import Addresses, Gatherer
from dmvae.data.format.schema import Columns, read_columns

Array = np.ndarray[Any, np.dtype[Any]]


def open_reader(path: Path) -> tuple[pa.ipc.RecordBatchFileReader, pa.Buffer]:
    """Map `path` into memory, and return a reader and a buffer of the whole file.

    Raises:
        DatasetError: if it is not an Arrow IPC file.
    """
    try:
        with pa.memory_map(str(path)) as source:
            buffer = source.read_buffer(source.size())
        reader = pa.ipc.open_file(buffer)
        _ = reader.schema.names  # fails if damaged names are not text
        return reader, buffer
    except (pa.ArrowException, OSError, ValueError) as error:
        raise DatasetError(
            f"Cannot read {path} as an Arrow IPC file (not a stream, not Feather v1): {error}. Copy the shard again, "
            f"or prepare the dataset again."
        ) from error


class MappedShard:
    """The rows of one shard, by position.

    Args:
        path: the file.
        where: its name in messages; None for `path`.
        hold: an object that must live as long as the file is mapped.

    Raises:
        DatasetError: if the file is not a shard, is compressed, has a null id, or its record batches differ in size
            (the last may be shorter).
    """

    def __init__(self, path: Path, where: str | None = None, hold: object = None) -> None:
        self.path, self.where = path, where or str(path)
        self._hold = hold
        reader, self._buffer = open_reader(path)
        self.columns: Columns = read_columns(reader.schema, self.where)
        try:
            batches = [reader.get_batch(index) for index in range(reader.num_record_batches)]
            for batch in batches:
                batch.validate()  # that buffers are long enough for their arrays
                batch.column("id").validate(full=True)  # that strings lie within their buffer
        except (pa.ArrowException, OSError, ValueError) as error:
            raise DatasetError(f"Cannot read shard {self.where}: {error}. Copy it again.") from error
        sizes = np.array([batch.num_rows for batch in batches], dtype=np.int64)
        self.rows = int(sizes.sum())
        self.record_batch_rows = int(sizes[0]) if len(sizes) else 1
        self._check_sizes(sizes)
        self._starts = self._group_starts(batches)
        self._ids = pa.chunked_array([batch.column("id") for batch in batches], reader.schema.field("id").type)
        if self._ids.null_count:
            row = self._ids.is_null().to_pylist().index(True)
            raise DatasetError(f"Missing id in {self.where}, row {row}. Give the row an id.")
        self._addresses = {
            name: self._locate([batch.column(name) for batch in batches], name) for name in self.columns.fixed_size
        }
        self._rows = Gatherer(self.columns, [self.rows], [self.record_batch_rows])
        self.enter(self._rows, 0)

    def enter(self, gatherer: Gatherer, file: int) -> None:
        """Add this shard to the gatherer of several; the gatherer must not be used after this object is gone."""
        start = int(self._buffer.address)
        gatherer.add(file, self._addresses, start, start + int(self._buffer.size))

    def gather(self, name: str, rows: Int64[np.ndarray, " row"]) -> Array:
        """Copy the values of a column, `(rows, *shape)`; values of missing rows are undefined."""
        return self._rows.values(name, self._rows.locate(rows))

    def present(self, name: str, rows: Int64[np.ndarray, " row"]) -> Bool[np.ndarray, " row"]:
        """Return which of `rows` have a value in column `name`."""
        return self._rows.present(name, self._rows.locate(rows))

    def ids(self, rows: Int64[np.ndarray, " row"]) -> Array:
        """Return the ids, int64 or strings."""
        if self.columns.id_type == "int64":
            return self.gather("id", rows)
        return np.asarray(self._ids.take(pa.array(rows)).to_pylist(), dtype=str)

    @property
    def num_groups(self) -> int:
        """The number of record batches."""
        return len(self._starts) - 1

    def word_sums(self, first: int, last: int) -> UInt64[np.ndarray, " group"]:
        """Return the sum, modulo 2^64, of the 64-bit words of each record batch from `first` up to `last`.

        The sums cover the whole file: what lies before a record batch counts to the one before it. A flipped bit always
        changes a sum. It takes a tenth of the time of SHA-256, but does not tell who changed a file on purpose.
        """
        if not self._words:
            return np.zeros(0, dtype=np.uint64)
        memory = np.frombuffer(self._buffer, dtype=np.uint64, count=self._words)
        rest = int.from_bytes(memoryview(self._buffer)[8 * self._words :], "little")
        sums = [memory[a:b].sum(dtype=np.uint64) for a, b in pairwise(self._starts[first : last + 1].tolist())]
        if last == self.num_groups:
            sums[-1] += np.uint64(rest)
        return np.array(sums, dtype=np.uint64)

    def _group_starts(self, batches: Sequence[pa.RecordBatch]) -> Int64[np.ndarray, " start"]:
        """Return where each record batch begins in the file, in words of 64 bits; the first begins with the file."""
        self._words = int(self._buffer.size) // 8
        starts = [
            min(b.address for column in batch.columns for b in column.buffers() if b is not None and b.size)
            for batch in batches
        ]
        inner = (np.array(starts[1:], dtype=np.int64) - self._buffer.address) // 8
        found = np.array([0, *inner.tolist(), self._words][: len(batches) + 1 if batches else 2], dtype=np.int64)
        if (np.diff(found) < 0).any() or (len(inner) and not 0 <= inner.min() <= inner.max() <= self._words):
            raise DatasetError(f"Record batches of {self.where} must be in order. Prepare the dataset again.")
        return found

    def _check_sizes(self, sizes: Int64[np.ndarray, " group"]) -> None:
        even = len(sizes) == 0 or (bool((sizes[:-1] == sizes[0]).all()) and 0 < sizes[-1] <= sizes[0])
        if not even:
            raise DatasetError(
                f"Record batches of {self.where} must have the same number of rows (the last may have fewer), but have "
                f"{sizes[:8].tolist()}. Write it with combine_chunks() and write_table(table, max_chunksize=...)."
            )

    def _locate(self, arrays: list[pa.Array], name: str) -> Addresses:
        values, bits = np.zeros((2, len(arrays)), dtype=np.int64)
        for group, array in enumerate(arrays):
            buffers = array.buffers()
            if len(buffers) == 3 and array.storage.values.null_count:
                raise DatasetError(
                    f"Modality {name!r} has null elements inside rows in {self.where}. Fill them in, or make the whole "
                    f"row null."
                )
            values[group] = self._address(buffers[-1], array, name)
            bits[group] = 0 if array.null_count == 0 else self._address(buffers[0], array, name)
        return Addresses(values, bits)

    def _address(self, buffer: pa.Buffer, array: pa.Array, name: str) -> int:
        offset = int(buffer.address - self._buffer.address)
        if array.offset or not 0 <= offset <= self._buffer.size - buffer.size:
            raise DatasetError(
                f"Cannot map {self.where} into memory: column {name!r} is compressed. Write it again without "
                f"IpcWriteOptions(compression=...)."
            )
        return int(buffer.address)


@dataclass(frozen=True)
class ShardFile:
    """The file of a shard on this node.

    Attributes:
        path: the file.
        where: its origin, for messages.
        is_verified: whether its SHA-256 was compared with the manifest just now, when it was copied here.
        hold: an object that keeps the file from being removed.
    """

    path: Path
    where: str
    is_verified: bool = False
    hold: object = None

    def map(self) -> MappedShard:
        """Map the file into memory."""
        return MappedShard(self.path, self.where, self.hold)
