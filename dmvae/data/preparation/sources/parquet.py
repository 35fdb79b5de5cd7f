"""Rows from Parquet: one file, or many that are read as one table."""

import math
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from dmvae.config.sources import ColumnGroup, ImageColumn, ParquetSource
from dmvae.data.errors import DatasetError
from dmvae.data.preparation.class_names import ClassNames
from dmvae.data.preparation.rows import Rows
from dmvae.data.preparation.sources.arrow_columns import (
    Values,
    check_source_name,
    find_row_columns,
    is_array,
    match_columns,
    not_taken,
    read_modality,
    read_row_column,
    shown,
)
from dmvae.data.preparation.sources.image_decoding import ImageDecoder
from dmvae.data.preparation.sources.parquet_files import ParquetFiles, find_parquet
from dmvae.data.preparation.sources.sequences import Sequences, are_ragged, measure
from dmvae.data.preparation.stream import Chunk, SourceLocation, Stream, chunk_rows
from dmvae.data.preparation.tables import Table, is_table, nearest

_BUFFER_BYTES = 1 << 20


def read(source: ParquetSource, seed: int, scratch: Path) -> Stream:
    """Read the columns of all modalities; without a column of ids, rows are numbered from 0.

    Raises:
        DatasetError: if a file is absent or is not Parquet, or a column is absent or has the wrong type.
    """
    with _readable(source.path):
        layout = _layout(source, find_parquet(source.path, source.split))
        measured, decoders = _sequences(layout), _decoders(source, layout)
        notes = [note for lines in decoders.values() for note in lines[1]]
        notes += [found.note for found in measured.values()]
        layout = replace(layout, sequences=measured, decoders={name: lines[0] for name, lines in decoders.items()})
        num_rows = layout.files.num_rows
    remarks: list[str] = []
    return Stream(
        _chunks(source.path, layout, remarks),
        num_rows,
        notes=(*layout.files.notes, *layout.notes, *notes),
        remarks=remarks,
        pads={name: found.pad for name, found in measured.items() if found.pad is not None},
        features=layout.features,
        units={name: g.units for name, (g, _) in layout.modalities.items() if isinstance(g, ColumnGroup)},
        labels=layout.labels,
        tables=layout.tables,
    )


@contextmanager
def _readable(path: str) -> Iterator[None]:
    try:
        yield
    except FileNotFoundError as error:
        raise DatasetError(
            f"No Parquet file found at {path}. Set source.path to a Parquet file, or to a folder of them."
        ) from error
    except (pa.ArrowException, OSError) as error:
        if "Expected all lists to be of size" in str(error):
            raise DatasetError(
                f"Cannot read nulls of fixed-size lists in {path}: {error}. Write the column as variable-size lists, "
                f"with column.cast(pyarrow.list_(pyarrow.float32()))."
            ) from error
        raise DatasetError(f"Cannot read {path} as Parquet: {error}. Write the file again.") from error


@dataclass(frozen=True)
class _Layout:
    """The files and what their columns are.

    Attributes:
        files: all of them.
        modalities: the settings and the columns of each modality.
        row_columns: the column of each other field of `Rows`.
        labels: the classes of labels that are no integers.
        tables: the modalities whose columns differ in kind.
        notes: what was decided, for the user.
        sequences: the modalities whose rows are padded.
        decoders: the modalities that are images.
    """

    files: ParquetFiles
    modalities: dict[str, tuple[ColumnGroup | ImageColumn, list[str]]]
    row_columns: dict[str, str]
    labels: ClassNames
    tables: dict[str, Table]
    notes: tuple[str, ...]
    sequences: dict[str, Sequences] = field(default_factory=dict)
    decoders: dict[str, ImageDecoder] = field(default_factory=dict)

    @property
    def features(self) -> dict[str, tuple[str, ...]]:
        """The names of the features of each modality that is made of columns of numbers."""
        schema = self.files.schema
        return {
            name: tuple(columns)
            for name, (group, columns) in self.modalities.items()
            if isinstance(group, ColumnGroup) and not is_array(schema.field(columns[0]).type)
        }

    def batches(self, columns: list[str], row_bytes: int) -> Iterator[tuple[SourceLocation, pa.RecordBatch]]:
        """Yield some columns of all files, one chunk of rows at a time."""
        for path, row, batch in self.files.batches(columns, chunk_rows(row_bytes), _BUFFER_BYTES):
            yield SourceLocation(path, row), batch

    def read_modality(self, name: str, batch: pa.RecordBatch, location: SourceLocation) -> Values:
        """Return values and presence of one modality."""
        group, columns = self.modalities[name]
        if isinstance(group, ImageColumn):
            return self.decoders[name].decode(_bytes(batch.column(columns[0])), location)
        if name in self.sequences:
            return self.sequences[name].read(batch.column(columns[0]))
        if name in self.tables:
            return self.tables[name].read([batch.column(column) for column in columns], location)
        return read_modality(name, [batch.column(column) for column in columns], group, location)


def _layout(source: ParquetSource, files: ParquetFiles) -> _Layout:
    names, notes = files.schema.names, []
    settings = ("id", "label", "split", "size_factor", "group")
    row_columns = find_row_columns(source, settings, names, source.path)
    if "ids" not in row_columns and files.index:
        if len(files.index) > 1:
            raise DatasetError(
                f"The pandas index of {source.path} has several columns ({shown(files.index)}), and an id is one. Set "
                f"source.id to a column that is unique."
            )
        row_columns["ids"] = files.index[0]
        notes.append(f"ids: the pandas index, column {files.index[0]!r}")
    others = [name for name in names if name not in row_columns.values()]
    if not others:
        raise DatasetError(
            f"No modality found in {source.path}: its columns are {shown(names)}. Add a column for each modality."
        )
    groups: Mapping[str, ColumnGroup | ImageColumn] = source.modalities or {
        check_source_name(name, source.path): ColumnGroup(columns=_escaped(name))
        for name in others
        if name not in files.index
    }
    modalities = {name: (group, _columns_of(name, group, others, source.path, files)) for name, group in groups.items()}
    taken = {column for _, columns in modalities.values() for column in columns}
    notes += not_taken([name for name in others if name not in taken])
    tables = {
        name: Table(name, columns, group, source.path)
        for name, (group, columns) in modalities.items()
        if isinstance(group, ColumnGroup)
        and not is_array(files.schema.field(columns[0]).type)
        and is_table(group, [files.schema.field(column).type for column in columns])
    }
    return _Layout(files, modalities, row_columns, ClassNames(), tables, tuple(notes))


def _columns_of(
    name: str, group: ColumnGroup | ImageColumn, others: list[str], path: str, files: ParquetFiles
) -> list[str]:
    """Return the columns of a modality, after checking that images are bytes."""
    if isinstance(group, ColumnGroup):
        return match_columns(name, group, others, path)
    if group.column not in others:
        raise DatasetError(
            f"Column {group.column!r} not found in {path}, which has {shown(others)}.{nearest(group.column, others)} "
            f"Correct source.modalities.{name}.column."
        )
    kind = files.schema.field(group.column).type
    inner = kind.field("bytes").type if pa.types.is_struct(kind) and kind.get_field_index("bytes") >= 0 else kind
    if not (pa.types.is_binary(inner) or pa.types.is_large_binary(inner)):
        raise DatasetError(
            f"Column {group.column!r} of {path} must hold the bytes of images, but got {kind}. For names of files, use "
            f"kind = 'images'."
        )
    return [group.column]


def _bytes(column: pa.Array) -> list[bytes | None]:
    return list((pc.struct_field(column, "bytes") if pa.types.is_struct(column.type) else column).to_pylist())


def _sequences(layout: _Layout) -> dict[str, Sequences]:
    """Return how modalities are padded whose first rows are lists of different lengths, or whose length is set."""
    found = {}
    for name, (group, columns) in layout.modalities.items():
        if not isinstance(group, ColumnGroup) or len(columns) != 1:
            continue
        first = next((batch.column(0) for _, batch in layout.batches(columns, 1 << 16)), None)
        if first is not None and (group.length is not None or are_ragged(first)):
            lists = (batch.column(0) for _, batch in layout.batches(columns, 1 << 10))
            found[name] = measure(name, lists, group.length)
    return found


def _decoders(source: ParquetSource, layout: _Layout) -> dict[str, tuple[ImageDecoder, list[str]]]:
    """Return the decoder of each modality of images, and lines on their bits."""
    found = {}
    for name, (group, columns) in layout.modalities.items():
        if isinstance(group, ImageColumn):
            decoder = ImageDecoder(name, group)
            batches = (_bytes(batch.column(0)) for _, batch in layout.batches(columns, 1 << 16))
            known = ([content for content in batch if content is not None] for batch in batches)
            found[name] = decoder, decoder.find_bits(known)
    return found


def _escaped(name: str) -> str:
    """Return the pattern that matches `name` only."""
    return "".join(f"[{letter}]" if letter in "*?[" else letter for letter in name)


def _chunks(path: str, layout: _Layout, remarks: list[str]) -> Iterator[Chunk]:
    with _readable(path):
        shapes = {name: _shape(layout, name) for name in layout.modalities}
        of_modalities = [column for _, columns in layout.modalities.values() for column in columns]
        columns = list(dict.fromkeys([*layout.row_columns.values(), *of_modalities]))
        done = 0
        # the largest modality may be missing in the first rows
        row_bytes = max(_row_bytes(layout, columns), 4 * sum(map(math.prod, shapes.values())))
        for location, batch in layout.batches(columns, row_bytes):
            values = {
                name: _with_shape(shapes[name], layout.read_modality(name, batch, location), name, location)
                for name in shapes
            }
            fields = {"ids": np.arange(done, done + len(batch))} | {
                name: read_row_column(name, batch.column(column), location, layout.labels)
                for name, column in layout.row_columns.items()
            }
            data, present = ({name: pair[index] for name, pair in values.items()} for index in (0, 1))
            yield Chunk(Rows(data=data, present=present, **fields), location)
            done += len(batch)
        for decoder in layout.decoders.values():
            remarks += decoder.remarks()
            decoder.close()


def _row_bytes(layout: _Layout, columns: list[str]) -> int:
    """Estimate the bytes of a row in memory from the first rows."""
    for _, batch in layout.batches(columns, 1 << 16):
        return int(batch.nbytes // len(batch)) + 1
    return 1


def _shape(layout: _Layout, name: str) -> tuple[int, ...]:
    """Return the shape of a modality, from the first rows that have it; null lists have no shape."""
    columns = layout.modalities[name][1]
    if name in layout.tables:
        return (len(columns),)
    if name in layout.decoders:
        return layout.decoders[name].shape
    if name in layout.sequences:
        return (layout.sequences[name].length,)
    shape: tuple[int, ...] | None = None
    for location, batch in layout.batches(columns, 1 << 16):
        values, present = layout.read_modality(name, batch, location)
        if shape is None or present.any():
            shape = values.shape[1:]
        if present.any():
            break
    return shape or ()


def _with_shape(shape: tuple[int, ...], found: Values, name: str, location: SourceLocation) -> Values:
    """Return values of the shape that a modality has elsewhere; rows that are all missing may come without it."""
    values, present = found
    if values.shape[1:] == shape:
        return found
    if present.any():
        raise DatasetError(
            f"Rows of modality {name!r} must have the same shape: expected {shape}, got {values.shape[1:]} in "
            f"{location.of(int(np.flatnonzero(present)[0]))}. Correct that row, or set it to null."
        )
    return np.zeros((len(values), *shape), values.dtype), present
