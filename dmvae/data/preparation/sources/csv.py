"""Rows from CSV or TSV: one file for each modality, joined on a column of ids."""

import re
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.csv as pacsv

from dmvae.config.sources import CsvSource, CsvTable, ImagesSource
from dmvae.data.errors import DatasetError
from dmvae.data.preparation.class_names import ClassNames
from dmvae.data.preparation.rows import Rows
from dmvae.data.preparation.sources.arrow_columns import (
    Array,
    Values,
    find_row_columns,
    match_columns,
    read_modality,
    read_row_column,
    shown,
)
from dmvae.data.preparation.stream import Chunk, SourceLocation, Stream, chunk_rows
from dmvae.data.preparation.tables import Table, is_table

_BLOCK_BYTES = 8 << 20
"""Also the longest line that can be read."""


def read(source: CsvSource, seed: int, scratch: Path) -> Stream:
    """Join the files; the rows are those of `source.rows`, or every id in the order of its first occurrence.

    The ids of all files stay in memory. Values are written to files in `scratch` first, and taken from there by row.

    Raises:
        DatasetError: if a file is absent or is not a table, an id occurs twice in it, or files have no id in common.
    """
    row_table = None if source.rows is None else read_row_table(source.rows, source)
    files = {
        name: _ModalityFile(name, group, source, scratch / f"{name}.values")
        for name, group in source.modalities.items()
    }
    ids = pc.unique(pa.concat_arrays([file.ids for file in files.values()])) if row_table is None else row_table.ids
    _check_join(files, ids, source)
    return Stream(
        _chunks(files, ids, row_table, source),
        len(ids),
        features={name: file.features for name, file in files.items()},
        units={name: group.units for name, group in source.modalities.items()},
        labels=ClassNames() if row_table is None else row_table.labels,
        tables={name: file.table for name, file in files.items() if file.table is not None},
    )


def _chunks(
    files: "dict[str, _ModalityFile]", ids: pa.Array, row_table: "RowTable | None", source: CsvSource
) -> Iterator[Chunk]:
    rows_of = {name: pc.fill_null(pc.index_in(ids, value_set=file.ids), -1).to_numpy() for name, file in files.items()}
    names, step = parse_ids(ids), chunk_rows(sum(file.row_bytes for file in files.values()))
    paths = ", ".join(group.path for group in source.modalities.values())
    for start in range(0, len(ids), step):
        part = slice(start, start + step)
        found = {name: file.take(rows_of[name][part]) for name, file in files.items()}
        data, present = ({name: pair[index] for name, pair in found.items()} for index in (0, 1))
        location = SourceLocation(paths, start) if row_table is None else row_table.location(start)
        fields = {} if row_table is None else row_table.fields(part)
        yield Chunk(Rows(ids_to_numpy(names[part]), data, present, **fields), location)
    for file in files.values():
        file.scratch.unlink()


class _ModalityFile:
    """The file of one modality: its ids in memory, and its values in a scratch file, row by row."""

    def __init__(self, name: str, group: CsvTable, source: CsvSource, scratch: Path) -> None:
        self.name, self.group, self.scratch = name, group, scratch
        reserved = (source.id, source.label, source.split, source.size_factor, source.group)
        available = [column for column in _header(group.path, source.id) if column not in reserved]
        columns = match_columns(name, group, available, group.path)
        self.features = tuple(columns)
        self.table: Table | None = None
        types = _find_types(group.path, columns, group)
        while (failed := self._read(source.id, types)) is not None:
            types[failed] = pa.float64() if pa.types.is_integer(types[failed]) else pa.string()
        _check_ids(self.ids, group.path)

    @property
    def row_bytes(self) -> int:
        return int(np.prod(self._shape)) * self._dtype.itemsize

    def take(self, rows: Array) -> Values:
        """Return values and presence of some rows; -1 stands for an absent row."""
        if not len(self._present):
            return np.zeros((len(rows), *self._shape), self._dtype), np.zeros(len(rows), dtype=bool)
        mapped = np.memmap(self.scratch, self._dtype, "r", shape=(len(self._present), *self._shape))
        return np.array(mapped[rows]), self._present[rows] & (rows >= 0)

    def _read(self, id_column: str, types: dict[str, pa.DataType]) -> str | None:
        """Read all rows; return the name of a column whose type does not fit a value, None if all do."""
        group, columns = self.group, list(types)
        self.table = Table(self.name, columns, group, group.path) if is_table(group, [*types.values()]) else None
        if self.table is None:
            wide = group.dtype is not None or not all(map(pa.types.is_integer, types.values()))
            types = dict.fromkeys(columns, pa.float64() if wide else pa.int64())
        convert = pacsv.ConvertOptions(
            column_types={id_column: pa.string(), **types}, include_columns=[id_column, *columns]
        )
        ids, present, line = [pa.array([], pa.string())], [np.zeros(0, dtype=bool)], 2
        self._shape, self._dtype = (len(columns),), np.dtype(group.dtype or "float64")
        try:
            with self.scratch.open("wb") as file:
                for batch in _batches(group.path, convert):
                    arrays = [batch.column(column) for column in columns]
                    location = SourceLocation(group.path, line, "line")
                    if self.table is None:
                        values, observed = read_modality(self.name, arrays, group, location)
                    else:
                        values, observed = self.table.read(arrays, location)
                    values.tofile(file)
                    self._shape, self._dtype = values.shape[1:], values.dtype
                    ids.append(batch.column(id_column))
                    present.append(observed)
                    line += len(batch)
        except pa.ArrowInvalid as error:
            found = re.match(r"In CSV column #(\d+): .*conversion error", str(error))
            if found is None:
                raise _unreadable(group.path, error) from error
            return _header(group.path, id_column)[int(found[1])]
        self.ids, self._present = pa.concat_arrays(ids), np.concatenate(present)
        return None


def _find_types(path: str, columns: list[str], group: CsvTable) -> dict[str, pa.DataType]:
    """Return the types of columns as a file's first block suggests them; what is set to classes or dates is text."""
    read_options = pacsv.ReadOptions(block_size=_BLOCK_BYTES, use_threads=False)
    with pacsv.open_csv(path, read_options, _parse_options(path)) as reader:
        found = {column: reader.schema.field(column).type for column in columns}
    as_text = {column for column, kind in group.kinds.items() if kind in ("category", "binary", "date")}
    # what is neither a number nor text is a boolean, a date or a time; without any value it may still become a number
    return {
        column: pa.string()
        if column in as_text or column in group.classes
        else pa.int64()
        if pa.types.is_null(kind)
        else kind
        for column, kind in found.items()
    }


@dataclass(frozen=True)
class RowTable:
    """A table with one line for each row of the dataset: the ids and, optionally, labels, splits and the like.

    Attributes:
        path: the file.
        table: all of it.
        ids: its column of ids, as strings.
        columns: the column of each field of `Rows`.
        labels: the classes of labels that are no integers.
    """

    path: str
    table: pa.Table
    ids: pa.Array
    columns: dict[str, str]
    labels: ClassNames = field(default_factory=ClassNames)

    def location(self, start: int) -> SourceLocation:
        """Return the location of rows that begin with number `start`; the header is line 1."""
        return SourceLocation(self.path, start + 2, "line")

    def fields(self, part: slice) -> dict[str, Array]:
        """Return the fields of `Rows` that the table has, for some rows."""
        found = {}
        for name, column in self.columns.items():
            values = _one_array(self.table.column(column).slice(part.start, part.stop - part.start))
            found[name] = read_row_column(name, _empty_as_null(values), self.location(part.start), self.labels)
        return found


def read_row_table(path: str, source: CsvSource | ImagesSource) -> RowTable:
    """Read a table that has one line for each row.

    Raises:
        DatasetError: if it is absent or is not a table, an id occurs twice, or a column is absent.
    """
    _header(path, source.id)
    try:
        convert = pacsv.ConvertOptions(column_types={source.id: pa.string()})
        table = pacsv.read_csv(path, parse_options=_parse_options(path), convert_options=convert)
    except pa.ArrowException as error:
        raise _unreadable(path, error) from error
    ids = _one_array(table.column(source.id))
    _check_ids(ids, path)
    settings = ("label", "split", "size_factor", "group")
    return RowTable(path, table, ids, find_row_columns(source, settings, table.column_names, path))


def _parse_options(path: str) -> pacsv.ParseOptions:
    return pacsv.ParseOptions(delimiter="\t" if Path(path).suffix in (".tsv", ".tab") else ",")


def _batches(path: str, convert: pacsv.ConvertOptions) -> Iterator[pa.RecordBatch]:
    read_options = pacsv.ReadOptions(block_size=_BLOCK_BYTES, use_threads=False)
    with pacsv.open_csv(path, read_options, _parse_options(path), convert) as reader:
        yield from reader


def _header(path: str, id_column: str) -> list[str]:
    """Return the column names, after checking that `id_column` is one of them."""
    if not Path(path).is_file():
        raise DatasetError(f"Source file not found: {path}. Correct its path in the settings of source.")
    try:
        read_options = pacsv.ReadOptions(block_size=_BLOCK_BYTES, use_threads=False)
        with pacsv.open_csv(path, read_options, _parse_options(path)) as reader:
            names: list[str] = reader.schema.names
    except (pa.ArrowException, OSError, UnicodeDecodeError) as error:
        raise _unreadable(path, error) from error
    repeated = sorted({name for name in names if names.count(name) > 1})
    if repeated:
        raise DatasetError(f"Duplicate column names in {path}: {shown(repeated)}. Rename them.")
    if id_column not in names:
        raise DatasetError(f"Id column {id_column!r} not found in {path}, which has {shown(names)}. Set source.id.")
    return names


def _unreadable(path: str, error: Exception) -> DatasetError:
    return DatasetError(
        f"Cannot read {path} as a table with a header: {error}. Correct the file, and save it in UTF-8."
    )


def _one_array(column: pa.ChunkedArray) -> pa.Array:
    return column.combine_chunks() if column.num_chunks != 1 else column.chunk(0)


def _empty_as_null(values: pa.Array) -> pa.Array:
    if not pa.types.is_string(values.type):
        return values
    return pc.if_else(pc.equal(values, ""), pa.scalar(None, values.type), values)


def _check_ids(ids: pa.Array, path: str) -> None:
    """Refuse an id that is empty or occurs twice."""
    empty = pc.index(ids, "").as_py()
    if empty >= 0:
        raise DatasetError(f"Missing id in {path}, line {empty + 2}. Fill it in, or remove the line.")
    if len(pc.unique(ids)) == len(ids):
        return
    first: dict[str, int] = {}
    for row, name in enumerate(ids.to_pylist()):
        if name in first:
            raise DatasetError(
                f"Duplicate id {name!r} in {path}, lines {first[name] + 2} and {row + 2}. Remove one of them."
            )
        first[name] = row


def _check_join(files: dict[str, _ModalityFile], ids: pa.Array, source: CsvSource) -> None:
    for name, file in files.items():
        if source.rows is not None:
            stray = np.flatnonzero(~pc.is_in(file.ids, value_set=ids).to_numpy(zero_copy_only=False))
            if len(stray):
                raise DatasetError(
                    f"{len(stray)} ids of {file.group.path} are not in {source.rows}, the first one "
                    f"{file.ids[int(stray[0])].as_py()!r} in line {stray[0] + 2}. Add them there, or remove them here."
                )
        elif len(files) > 1:
            others = pa.concat_arrays([other.ids for key, other in files.items() if key != name])
            if not pc.any(pc.is_in(file.ids, value_set=others)).as_py():
                raise DatasetError(
                    f"No id of {file.group.path} occurs in another file: it has {_examples(file.ids)}, the others have "
                    f"{_examples(others)} in column {source.id!r}. Write ids the same way in every file."
                )


def _examples(ids: pa.Array) -> str:
    return ", ".join(repr(str(key)) for key in ids[:2]) + ", ..."


def parse_ids(ids: pa.Array) -> pa.Array:
    """Return int64 if every id is written as an integer is, else the strings."""
    try:
        numbers = ids.cast(pa.int64())
    except pa.ArrowInvalid:
        return ids
    return numbers if numbers.cast(pa.string()).equals(ids) else ids


def ids_to_numpy(ids: pa.Array) -> Array:
    """Return int64 or strings as `Rows` takes them."""
    if pa.types.is_integer(ids.type):
        return np.asarray(ids.to_numpy(zero_copy_only=False))
    return np.array(ids.to_pylist(), dtype=np.str_)
