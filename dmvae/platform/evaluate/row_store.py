"""Keep per-row results on disk: a Parquet file per few blocks during an evaluation, one file at its end."""

import hashlib
import time
from collections.abc import Mapping
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

Columns = dict[str, np.ndarray]
"""One value per row, by column name."""

BLOCK_ROWS = 64
"""Rows per block, the unit of work. It is fixed, so that a row's results do not depend on the number of workers."""
_FLUSH_SECONDS = 10
_KEY = b"dmvae.key"


class RowStore:
    """The blocks of one evaluation; blocks of another model, dataset or other settings are ignored.

    Attributes:
        file: `rows.parquet`, one row per row of the split, in its order; written once all blocks are finished.

    Args:
        folder: where the results are written.
        key: identifies everything that the results depend on.
    """

    def __init__(self, folder: Path, key: str) -> None:
        self.file = folder / "rows.parquet"
        self._parts = folder / f"rows-{hashlib.sha256(key.encode()).hexdigest()[:16]}"
        self._key = key
        self._unwritten: dict[int, Columns] = {}
        self._last_flush = time.monotonic()

    def blocks(self) -> dict[int, Columns]:
        """Return the finished blocks by number."""
        if self.file.is_file() and (pq.read_schema(self.file).metadata or {}).get(_KEY) == self._key.encode():
            columns = _read(self.file)
            starts = range(0, len(columns["id"]), BLOCK_ROWS)
            return {start // BLOCK_ROWS: _cut(columns, slice(start, start + BLOCK_ROWS)) for start in starts}
        blocks: dict[int, Columns] = {}
        for part in sorted(self._parts.glob("*.parquet")):
            columns = _read(part)
            numbers = columns.pop("block")
            blocks |= {int(number): _cut(columns, numbers == number) for number in np.unique(numbers)}
        return blocks

    def add(self, number: int, block: Columns) -> None:
        """Add a finished block; it is written within seconds, or by `flush`."""
        self._unwritten[number] = block
        if time.monotonic() - self._last_flush > _FLUSH_SECONDS:
            self.flush()

    def flush(self) -> None:
        """Write the blocks that are not on disk yet to one file."""
        self._last_flush = time.monotonic()
        if not self._unwritten:
            return
        blocks, self._unwritten = self._unwritten, {}
        lengths = [len(block["id"]) for block in blocks.values()]
        columns = {"block": np.repeat(list(blocks), lengths), **_join(list(blocks.values()))}
        self._write(columns, self._parts / f"{min(blocks):08d}-{max(blocks):08d}.parquet")

    def finish(self, columns: Columns) -> None:
        """Write all rows to `rows.parquet` and remove the files of the blocks."""
        self._write(columns, self.file)
        for part in self._parts.glob("*.parquet"):
            part.unlink()
        if self._parts.is_dir():
            self._parts.rmdir()

    def _write(self, columns: Columns, file: Path) -> None:
        file.parent.mkdir(parents=True, exist_ok=True)
        table = pa.table({name: pa.array(values) for name, values in columns.items()})
        partial = file.with_suffix(".partial")
        pq.write_table(table.replace_schema_metadata({_KEY: self._key.encode()}), partial)
        partial.replace(file)


def _read(file: Path) -> Columns:
    table = pq.read_table(file)
    columns = {name: table[name].to_numpy() for name in table.column_names}
    # strings come back as Python objects
    return {name: values.astype(str) if values.dtype == object else values for name, values in columns.items()}


def _cut(columns: Mapping[str, np.ndarray], rows: slice | np.ndarray) -> Columns:
    return {name: values[rows] for name, values in columns.items()}


def _join(blocks: list[Columns]) -> Columns:
    return {name: np.concatenate([block[name] for block in blocks]) for name in blocks[0]}
