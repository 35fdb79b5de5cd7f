"""Rows from delimited text: one file for each modality, joined on a column of ids or by the order of rows."""

import re
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from dmvae.config.sources import CsvSource, CsvTable
from dmvae.data.errors import DatasetError
from dmvae.data.preparation.class_names import ClassNames
from dmvae.data.preparation.rows import Rows
from dmvae.data.preparation.sources.arrow_columns import (
    Array,
    Values,
    match_columns,
    not_taken,
    read_modality,
)
from dmvae.data.preparation.sources.dialect import find_dialect
from dmvae.data.preparation.sources.joins import check_written_alike, join_report
from dmvae.data.preparation.sources.number_marks import parse_grouped
from dmvae.data.preparation.sources.row_table import (
    RowTable,
    check_ids,
    find_id,
    ids_to_numpy,
    numbered,
    parse_ids,
    read_row_table,
    unreadable,
)
from dmvae.data.preparation.stream import Chunk, SourceLocation, Stream, chunk_rows
from dmvae.data.preparation.tables import Table, is_table


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
    notes = [] if row_table is None else list(row_table.notes)
    for file in files.values():
        notes += file.notes
    if row_table is None and len(files) > 1 and source.join == "id":
        notes += join_report({file.group.path: file.ids for file in files.values()}, ids)
    return Stream(
        _chunks(files, ids, row_table, source),
        len(ids),
        notes=tuple(dict.fromkeys(notes)),
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
        self._dialect = find_dialect(group.path, group.dialect or source.dialect, source.id)
        self._id = find_id(self._dialect, source)
        reserved = (self._id or source.id, source.label, source.split, source.size_factor, source.group)
        available = [column for column in self._dialect.columns if column not in reserved]
        columns = match_columns(name, group, available, group.path)
        self._dialect.check_clear(columns)
        self.features = tuple(columns)
        left = [column for column in self._dialect.columns if column != self._id and column not in columns]
        note = self._dialect.note
        self.notes = [note] * bool(note) + [f"{group.path}: {line}" for line in not_taken(left)]
        self.table: Table | None = None
        types = self._find_types(columns)
        self._grouped = {c for c in columns if self._may_be_grouped(c, types[c])}
        types |= dict.fromkeys(self._grouped, pa.string())
        while (failed := self._read(types)) is not None:
            # columns that are not grouped numbers after all stay text
            is_whole = failed not in self._grouped and pa.types.is_integer(types[failed])
            types[failed] = pa.float64() if is_whole else pa.string()
            self._grouped.discard(failed)
        check_ids(self.ids, self._dialect)

    def line(self, row: int) -> int:
        """Return the number of the line of a row."""
        return self._dialect.line(row)

    @property
    def row_bytes(self) -> int:
        return int(np.prod(self._shape)) * self._dtype.itemsize

    def take(self, rows: Array) -> Values:
        """Return values and presence of some rows; -1 stands for an absent row."""
        if not len(self._present):
            return np.zeros((len(rows), *self._shape), self._dtype), np.zeros(len(rows), dtype=bool)
        mapped = np.memmap(self.scratch, self._dtype, "r", shape=(len(self._present), *self._shape))
        return np.array(mapped[rows]), self._present[rows] & (rows >= 0)

    def _may_be_grouped(self, column: str, kind: pa.DataType) -> bool:
        """Tell whether a column may hold numbers with marks between thousands."""
        is_set = self.group.kinds.get(column) in ("category", "binary", "date") or column in self.group.classes
        is_other = pa.types.is_date(kind) or pa.types.is_timestamp(kind) or pa.types.is_boolean(kind)
        return self._dialect.thousands is not None and not is_set and not is_other

    def _read(self, types: dict[str, pa.DataType]) -> str | None:
        """Read all rows; return the name of a column whose type does not fit a value, None if all do."""
        group, columns = self.group, list(types)
        numeric = {column: pa.float64() if column in self._grouped else kind for column, kind in types.items()}
        self.table = Table(self.name, columns, group, group.path) if is_table(group, [*numeric.values()]) else None
        if self.table is None:
            wide = group.dtype is not None or not all(map(pa.types.is_integer, numeric.values()))
            types = {c: pa.string() if c in self._grouped else pa.float64() if wide else pa.int64() for c in columns}
        with_id = {} if self._id is None else {self._id: pa.string()}
        ids, present, row = [pa.array([], pa.string())], [np.zeros(0, dtype=bool)], 0
        self._shape, self._dtype = (len(columns),), np.dtype(group.dtype or "float64")
        try:
            with (
                self.scratch.open("wb") as file,
                self._dialect.open({**with_id, **types}, [*with_id, *columns]) as all_,
            ):
                for batch in all_:
                    arrays = [batch.column(column) for column in columns]
                    for place, column in enumerate(columns):
                        if column in self._grouped:
                            parsed = self._parse_grouped(arrays[place])
                            if parsed is None:
                                return column
                            arrays[place] = parsed
                    location = SourceLocation(group.path, self._dialect.line(row), "line")
                    if self.table is None:
                        values, observed = read_modality(self.name, arrays, group, location)
                    else:
                        values, observed = self.table.read(arrays, location)
                    values.tofile(file)
                    self._shape, self._dtype = values.shape[1:], values.dtype
                    ids.append(numbered(row, len(batch)) if self._id is None else batch.column(self._id))
                    present.append(observed)
                    row += len(batch)
        except pa.ArrowInvalid as error:
            found = re.match(r"In CSV column #(\d+): .*conversion error", str(error))
            if found is None or "invalid UTF8" in str(error):
                raise unreadable(self._dialect, error) from error
            return self._dialect.columns[int(found[1])]
        self.ids, self._present = pa.concat_arrays(ids), np.concatenate(present)
        return None

    def _parse_grouped(self, column: pa.Array) -> pa.Array | None:
        column = pc.if_else(pc.is_in(column, pa.array(self._dialect.nulls, column.type)), None, column)
        return parse_grouped(column, self._dialect.thousands or "", self._dialect.decimal)

    def _find_types(self, columns: list[str]) -> dict[str, pa.DataType]:
        """Return the types of columns as the first block suggests them; what is set to classes or dates is text."""
        try:
            with self._dialect.open(only=columns) as reader:
                found = {column: reader.schema.field(column).type for column in columns}
        except (pa.ArrowException, OSError, UnicodeDecodeError) as error:
            raise unreadable(self._dialect, error) from error
        group = self.group
        as_text = {column for column, kind in group.kinds.items() if kind in ("category", "binary", "date")}
        # whole numbers are read as text to keep leading zeros; floats are not, so that 3.0 is the class 3
        as_text -= {column for column, kind in found.items() if pa.types.is_floating(kind)}
        # what is neither a number nor text is a boolean, a date or a time; without any value it may become a number
        return {
            column: pa.string()
            if column in as_text or column in group.classes
            else pa.int64()
            if pa.types.is_null(kind)
            else kind
            for column, kind in found.items()
        }


def _check_join(files: dict[str, _ModalityFile], ids: pa.Array, source: CsvSource) -> None:
    if source.join == "order":
        for file in files.values():
            if len(file.ids) != len(ids):
                raise DatasetError(
                    f"Files that are joined by the order of rows must have the same number of rows, but "
                    f"{file.group.path} has {len(file.ids)} and another one {len(ids)}. Add the missing rows, or "
                    f"join on a column of ids."
                )
        return
    of_files = {file.group.path: file.ids for file in files.values()}
    check_written_alike(of_files if source.rows is None else {**of_files, source.rows: ids})
    for name, file in files.items():
        if source.rows is not None:
            stray = np.flatnonzero(~pc.is_in(file.ids, value_set=ids).to_numpy(zero_copy_only=False))
            if len(stray):
                raise DatasetError(
                    f"{len(stray)} ids of {file.group.path} are not in {source.rows}, the first one "
                    f"{file.ids[int(stray[0])].as_py()!r} in line {file.line(int(stray[0]))}. Add them there, "
                    f"or remove them here."
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
