"""Rows from Parquet: one file, or a folder of files with the same columns."""

import math
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.dataset as ds
import pyarrow.parquet as pq

from dmvae.config.data import ColumnGroup, ParquetSource
from dmvae.data.errors import DatasetError
from dmvae.data.preparation.rows import Rows
from dmvae.data.preparation.sources import arrow_columns as table
from dmvae.data.preparation.stream import Chunk, SourceLocation, Stream, chunk_rows

Array = np.ndarray[Any, np.dtype[Any]]

_BUFFER_BYTES = 1 << 20


def read_parquet(source: ParquetSource) -> Stream:
    """Read the columns that make modalities; rows without ids are numbered from 0.

    Raises:
        DatasetError: if a file is absent or no Parquet, or its columns break a law; with file and row.
    """
    with _readable(source.path):
        files = ds.dataset(source.path, format="parquet")
        if not Path(source.path).exists() or not files.files:
            raise FileNotFoundError
        files = files.replace_schema(_all_columns(files))
        layout = _layout(source, files)
        num_rows = files.count_rows()
    return Stream(_chunks(source.path, layout), num_rows)


@contextmanager
def _readable(path: str) -> Iterator[None]:
    try:
        yield
    except FileNotFoundError as error:
        raise DatasetError(
            f"a source is a Parquet file or a folder of them; got {path!r}. Correct source.path."
        ) from error
    except (pa.ArrowException, OSError) as error:
        if "Expected all lists to be of size" in str(error):
            raise DatasetError(
                f"{path}: Parquet does not keep nulls of fixed-size lists; got: {error}. Write the column as lists: "
                f"column.cast(pyarrow.list_(pyarrow.float32()))."
            ) from error
        raise DatasetError(f"{path}: a source is Parquet; got: {error}. Write it again.") from error


def _all_columns(files: ds.FileSystemDataset) -> pa.Schema:
    """Return the columns of all files, each of the type that it has in the first file where it is not all null."""
    schema = files.schema
    for field in (field for fragment in files.get_fragments() for field in fragment.physical_schema):
        place = schema.get_field_index(field.name)
        if field.name not in schema.names:
            schema = schema.append(field)
        elif place >= 0 and pa.types.is_null(schema.field(place).type):
            schema = schema.set(place, field)
    return schema


@dataclass(frozen=True)
class _Layout:
    """The files, each modality's group with its columns, and the columns of ids, labels, splits and groups."""

    files: ds.FileSystemDataset
    modalities: dict[str, tuple[ColumnGroup, list[str]]]
    special: dict[str, str]

    def batches(self, columns: list[str], row_bytes: int) -> Iterator[tuple[SourceLocation, pa.RecordBatch]]:
        """Yield some columns of all files, so many rows at a time as make a chunk.

        A column that a file does not have is null there.
        """
        types = [self.files.schema.field(column).type for column in columns]
        for path in self.files.files:
            row = 0
            # buffered: a column of a row group is not read as a whole
            with pq.ParquetFile(path, buffer_size=_BUFFER_BYTES, pre_buffer=False) as file:
                here = [column for column in columns if column in file.schema_arrow.names]
                for batch in file.iter_batches(chunk_rows(row_bytes), columns=here):
                    arrays = [
                        batch.column(column).cast(kind) if column in here else pa.nulls(len(batch), kind)
                        for column, kind in zip(columns, types, strict=True)
                    ]
                    yield SourceLocation(path, row), pa.record_batch(arrays, names=columns)
                    row += len(batch)

    def convert(self, name: str, batch: pa.RecordBatch, spot: SourceLocation) -> table.Values:
        """Return values and presence of one modality."""
        group, columns = self.modalities[name]
        return table.modality(name, [batch.column(column) for column in columns], group, spot.where, spot.first)


def _layout(source: ParquetSource, files: ds.FileSystemDataset) -> _Layout:
    names = files.schema.names
    doubled = sorted({name for name in names if names.count(name) > 1})
    if doubled:
        raise DatasetError(f"{source.path}: a column's name occurs once; got {doubled} twice. Rename them.")
    special = {}
    for role in ("id", "label", "split", "size_factor", "group"):
        column = getattr(source, role)
        if column in names:
            special[role] = column
        elif column not in (role, None):
            raise DatasetError(f"{source.path}: source.{role} is a column; got {column!r}. There are {names[:20]}.")
    left = [name for name in names if name not in special.values()]
    if not left:
        raise DatasetError(f"{source.path}: rows have at least one modality; got columns {names}. Add one.")
    chosen = source.modalities or {table.named(name, source.path): ColumnGroup(columns=_escaped(name)) for name in left}
    return _Layout(files, {name: (group, table.matching(group, left)) for name, group in chosen.items()}, special)


def _escaped(name: str) -> str:
    """Return the pattern that matches `name` alone."""
    return "".join(f"[{letter}]" if letter in "*?[" else letter for letter in name)


def _chunks(path: str, layout: _Layout) -> Iterator[Chunk]:
    with _readable(path):
        shapes = {name: _shape(layout, name) for name in layout.modalities}
        of_modalities = [column for _, columns in layout.modalities.values() for column in columns]
        columns = list(dict.fromkeys([*layout.special.values(), *of_modalities]))
        done = 0
        # the first rows may miss what is large
        row_bytes = max(_row_bytes(layout, columns), 4 * sum(map(math.prod, shapes.values())))
        for spot, batch in layout.batches(columns, row_bytes):
            values = {name: _as_shape(layout.convert(name, batch, spot), name, shapes[name], spot) for name in shapes}
            special = {role: _special(role, batch.column(column), spot) for role, column in layout.special.items()}
            rows = Rows(
                ids=special.get("id", np.arange(done, done + len(batch))),
                data={name: found for name, (found, _) in values.items()},
                present={name: present for name, (_, present) in values.items()},
                labels=special.get("label"),
                splits=special.get("split"),
                size_factors=special.get("size_factor"),
                groups=special.get("group"),
            )
            yield Chunk(rows, spot)
            done += len(batch)


def _row_bytes(layout: _Layout, columns: list[str]) -> int:
    """Return the bytes of a row in memory, judged by the first rows."""
    for _, batch in layout.batches(columns, 1 << 16):
        return int(batch.nbytes // len(batch)) + 1
    return 1


def _shape(layout: _Layout, name: str) -> tuple[int, ...]:
    """Return the shape of a modality's first rows that have it at all; lists that are null have none."""
    columns = layout.modalities[name][1]
    shape: tuple[int, ...] | None = None
    for spot, batch in layout.batches(columns, 1 << 16):
        values, present = layout.convert(name, batch, spot)
        if shape is None or present.any():
            shape = values.shape[1:]
        if present.any():
            break
    return shape or ()


def _as_shape(found: table.Values, name: str, shape: tuple[int, ...], spot: SourceLocation) -> table.Values:
    values, present = found
    if values.shape[1:] == shape:
        return found
    if present.any():
        raise DatasetError(
            f"{spot.of(int(np.flatnonzero(present)[0]))}: all rows have the same shape; got {values.shape[1:]} for "
            f"{name!r}, {shape} before. Correct them."
        )
    return np.zeros((len(values), *shape), values.dtype), present


def _special(role: str, column: pa.Array, spot: SourceLocation) -> Array:
    if role in ("id", "group"):
        return table.ids(column, spot.where, spot.first, "an id" if role == "id" else "a group")
    if role == "label":
        return table.labels(column, spot.where, spot.first)
    if role == "size_factor":
        return table.size_factors(column, spot.where, spot.first)
    return table.strings("a split", column, spot.where, spot.first)
