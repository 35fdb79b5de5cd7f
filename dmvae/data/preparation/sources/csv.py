"""Rows from CSV or TSV: a file per modality, joined on an id column."""

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.csv as pacsv

from dmvae.config.data import CsvSource, CsvTable, ImagesSource
from dmvae.data.errors import DatasetError
from dmvae.data.preparation.rows import Rows
from dmvae.data.preparation.sources import arrow_columns as table
from dmvae.data.preparation.stream import Chunk, SourceLocation, Stream, chunk_rows

Array = np.ndarray[Any, np.dtype[Any]]

_BLOCK_BYTES = 8 << 20  # a line is no longer than that


def read_csv(source: CsvSource, scratch: Path) -> Stream:
    """Join the files; the rows are those of `source.rows`, or every id in the order in which it first occurs.

    The ids of all files are held. The values are written to `scratch` as they are read, and taken from there by row.

    Raises:
        DatasetError: if a file is absent or no table, an id occurs twice in it, or files have no id in common;
            with file and line.
    """
    about = None if source.rows is None else read_about(source.rows, source)
    values = {
        name: _Values(name, group, source, scratch / f"{name}.values") for name, group in source.modalities.items()
    }
    ids = pc.unique(pa.concat_arrays([own.ids for own in values.values()])) if about is None else about.ids
    _check_join(values, ids, source)
    return Stream(_chunks(values, ids, about, source), len(ids))


def _chunks(values: "dict[str, _Values]", ids: pa.Array, about: "About | None", source: CsvSource) -> Iterator[Chunk]:
    rows_of = {name: pc.fill_null(pc.index_in(ids, value_set=own.ids), -1).to_numpy() for name, own in values.items()}
    names, step = as_integers(ids), chunk_rows(sum(own.row_bytes for own in values.values()))
    files = ", ".join(group.path for group in source.modalities.values())
    for start in range(0, len(ids), step):
        part = slice(start, start + step)
        found = {name: own.take(rows_of[name][part]) for name, own in values.items()}
        data, present = ({name: pair[index] for name, pair in found.items()} for index in (0, 1))
        spot = SourceLocation(files, start) if source.rows is None else SourceLocation(source.rows, start + 2, "line")
        special = {} if about is None else about.special(part)
        yield Chunk(Rows(to_numpy(names[part]), data, present, **special), spot)
    for own in values.values():
        own.file.unlink()


class _Values:
    """One file: its ids, and its values in another file, row by row."""

    def __init__(self, name: str, group: CsvTable, source: CsvSource, file: Path) -> None:
        self.name, self.group, self.file = name, group, file
        special = (source.id, source.label, source.split, source.size_factor, source.group)
        columns = table.matching(group, [name for name in _header(group.path, source.id) if name not in special])
        floats = group.dtype is not None and group.dtype.startswith("float")
        if floats or not self._read(source.id, columns, pa.int64()):
            self._read(source.id, columns, pa.float64())
        _check_ids(self.ids, group.path)

    @property
    def row_bytes(self) -> int:
        return int(np.prod(self._shape)) * self._dtype.itemsize

    def take(self, rows: Array) -> table.Values:
        """Return values and presence of some rows; -1 is a row that is not there."""
        if not len(self._present):
            return np.zeros((len(rows), *self._shape), self._dtype), np.zeros(len(rows), dtype=bool)
        mapped = np.memmap(self.file, self._dtype, "r", shape=(len(self._present), *self._shape))
        return np.array(mapped[rows]), self._present[rows] & (rows >= 0)

    def _read(self, key: str, columns: list[str], kind: pa.DataType) -> bool:
        """Read all rows; return whether they are integers, if integers are asked for."""
        convert = pacsv.ConvertOptions(
            column_types={key: pa.string(), **dict.fromkeys(columns, kind)}, include_columns=[key, *columns]
        )
        ids, present, line = [pa.array([], pa.string())], [np.zeros(0, dtype=bool)], 2
        self._shape, self._dtype = (len(columns),), np.dtype(self.group.dtype or "float64")
        try:
            with self.file.open("wb") as file:
                for batch in _batches(self.group.path, convert):
                    arrays = [batch.column(column) for column in columns]
                    values, observed = table.modality(self.name, arrays, self.group, self.group.path, line)
                    values.tofile(file)
                    self._shape, self._dtype = values.shape[1:], values.dtype
                    ids.append(batch.column(key))
                    present.append(observed)
                    line += len(batch)
        except pa.ArrowInvalid as error:
            if "conversion error" not in str(error):
                raise _no_table(self.group.path, error) from error
            if pa.types.is_integer(kind):
                return False
            raise DatasetError(
                f"{self.group.path}, modality {self.name!r}: modalities are numbers; got: {error}. Leave the column "
                f"out with source.modalities.{self.name}.columns, or correct it."
            ) from error
        self.ids, self._present = pa.concat_arrays(ids), np.concatenate(present)
        return True


@dataclass(frozen=True)
class About:
    """A table with a line for each row of the dataset: the ids, and perhaps labels, splits, size factors and groups."""

    path: str
    frame: pa.Table
    ids: pa.Array
    columns: dict[str, str]

    def special(self, part: slice) -> dict[str, Array]:
        """Return what the table says of some rows, as `Rows` takes it."""
        found, line = {}, part.start + 2
        for role, column in self.columns.items():
            values = _one(self.frame.column(column).slice(part.start, part.stop - part.start))
            if role == "labels":
                found[role] = table.labels(values, self.path, line, "line")
            elif role == "size_factors":
                found[role] = table.size_factors(values, self.path, line, "line")
            elif role == "splits":
                found[role] = table.strings("a split", _empty_as_null(values), self.path, line, "line")
            else:
                found[role] = table.ids(_empty_as_null(values), self.path, line, "a group", "line")
        return found


def read_about(path: str, source: CsvSource | ImagesSource) -> About:
    """Read a table of rows.

    Raises:
        DatasetError: if it is absent or no table, an id occurs twice, or a column is not there.
    """
    _header(path, source.id)
    try:
        convert = pacsv.ConvertOptions(column_types={source.id: pa.string()})
        frame = pacsv.read_csv(path, parse_options=_parse_options(path), convert_options=convert)
    except pa.ArrowException as error:
        raise _no_table(path, error) from error
    ids = _one(frame.column(source.id))
    _check_ids(ids, path)
    columns: dict[str, str] = {}
    for role, default, column in (
        ("labels", "label", source.label),
        ("splits", "split", source.split),
        ("size_factors", "size_factor", source.size_factor if isinstance(source, CsvSource) else "size_factor"),
        ("groups", None, source.group),
    ):
        if column is not None and column in frame.column_names:
            columns[role] = column
        elif column != default:
            raise DatasetError(f"{path}: {column!r} is a column; got {frame.column_names}. Correct source.")
    return About(path, frame, ids, columns)


def _parse_options(path: str) -> pacsv.ParseOptions:
    return pacsv.ParseOptions(delimiter="\t" if Path(path).suffix in (".tsv", ".tab") else ",")


def _batches(path: str, convert: pacsv.ConvertOptions) -> Iterator[pa.RecordBatch]:
    read = pacsv.ReadOptions(block_size=_BLOCK_BYTES, use_threads=False)
    with pacsv.open_csv(path, read, _parse_options(path), convert) as reader:
        yield from reader


def _header(path: str, key: str) -> list[str]:
    """Return the names of the columns; `key`, that of the ids, is one of them."""
    if not Path(path).is_file():
        raise DatasetError(f"a source is a file that exists; got {path!r}. Correct its path.")
    try:
        read = pacsv.ReadOptions(block_size=_BLOCK_BYTES, use_threads=False)
        with pacsv.open_csv(path, read, _parse_options(path)) as reader:
            names: list[str] = reader.schema.names
    except (pa.ArrowException, OSError, UnicodeDecodeError) as error:
        raise _no_table(path, error) from error
    doubled = sorted({name for name in names if names.count(name) > 1})
    if doubled:
        raise DatasetError(f"{path}: a column's name occurs once; got {doubled[:10]} more than once. Rename them.")
    if key not in names:
        raise DatasetError(f"{path}: a table has one column {key!r} of ids; got {names[:10]}. Set source.id.")
    return names


def _no_table(path: str, error: Exception) -> DatasetError:
    return DatasetError(f"{path}: a source is a table with a header; got: {error}. Correct it, and write it in UTF-8.")


def _one(column: pa.ChunkedArray) -> pa.Array:
    return column.combine_chunks() if column.num_chunks != 1 else column.chunk(0)


def _empty_as_null(values: pa.Array) -> pa.Array:
    if not pa.types.is_string(values.type):
        return values
    return pc.if_else(pc.equal(values, ""), pa.scalar(None, values.type), values)


def _check_ids(ids: pa.Array, path: str) -> None:
    """Refuse an id that is empty or occurs twice."""
    empty = pc.index(ids, "").as_py()
    if empty >= 0:
        raise DatasetError(f"{path}, line {empty + 2}: an id is not empty. Fill it in.")
    if len(pc.unique(ids)) == len(ids):
        return
    first: dict[str, int] = {}
    for row, name in enumerate(ids.to_pylist()):
        if name in first:
            raise DatasetError(
                f"{path}, line {row + 2}: an id occurs once; got {name!r} in line {first[name] + 2} too. Remove one."
            )
        first[name] = row


def _check_join(values: dict[str, _Values], ids: pa.Array, source: CsvSource) -> None:
    for name, own in values.items():
        if source.rows is not None:
            stray = np.flatnonzero(~pc.is_in(own.ids, value_set=ids).to_numpy(zero_copy_only=False))
            if len(stray):
                raise DatasetError(
                    f"{own.group.path}, line {stray[0] + 2}: ids are those of {source.rows}; got "
                    f"{own.ids[int(stray[0])].as_py()!r} and {len(stray) - 1} others that are not there. Add them, or "
                    f"remove them here."
                )
        elif len(values) > 1:
            others = pa.concat_arrays([other.ids for key, other in values.items() if key != name])
            if not pc.any(pc.is_in(own.ids, value_set=others)).as_py():
                raise DatasetError(
                    f"{own.group.path}: tables are joined on {source.id!r}; none of its {len(own.ids)} ids "
                    f"({_some(own.ids)}) is in another table ({_some(others)}). Write the ids alike."
                )


def _some(ids: pa.Array) -> str:
    return ", ".join(repr(str(key)) for key in ids[:2]) + ", ..."


def as_integers(ids: pa.Array) -> pa.Array:
    """Return int64 where every id is written as an integer is, else the strings."""
    try:
        numbers = ids.cast(pa.int64())
    except pa.ArrowInvalid:
        return ids
    return numbers if numbers.cast(pa.string()).equals(ids) else ids


def to_numpy(ids: pa.Array) -> Array:
    """Return int64 or strings as `Rows` takes them."""
    if pa.types.is_integer(ids.type):
        return np.asarray(ids.to_numpy(zero_copy_only=False))
    return np.array(ids.to_pylist(), dtype=np.str_)
