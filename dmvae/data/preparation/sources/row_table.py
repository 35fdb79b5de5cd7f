"""The table with one line for each row of a dataset: its ids, labels, splits and the like."""

from dataclasses import dataclass, field

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from dmvae.config.sources import CsvSource, ImagesSource, TextSource
from dmvae.data.errors import DatasetError
from dmvae.data.preparation.class_names import ClassNames
from dmvae.data.preparation.sources.arrow_columns import Array, find_row_columns, read_row_column, shown
from dmvae.data.preparation.sources.dialect import ROW_NAMES, Dialect, find_dialect
from dmvae.data.preparation.stream import SourceLocation
from dmvae.data.preparation.tables import nearest


@dataclass(frozen=True)
class RowTable:
    """A table with one line for each row of the dataset: the ids and, optionally, labels, splits and the like.

    Attributes:
        path: the file.
        table: all of it.
        id: the name of its column of ids; None if rows are numbered.
        ids: the ids, as strings.
        columns: the column of each field of `Rows`.
        dialect: how the file is written.
        labels: the classes of labels that are no integers.
    """

    path: str
    table: pa.Table
    id: str | None
    ids: pa.Array
    columns: dict[str, str]
    dialect: Dialect
    labels: ClassNames = field(default_factory=ClassNames)

    def location(self, start: int) -> SourceLocation:
        """Return the location of rows that begin with number `start`."""
        return SourceLocation(self.path, self.dialect.line(start), "line")

    @property
    def notes(self) -> list[str]:
        """How the file is written, if that is unusual."""
        return [self.dialect.note] * bool(self.dialect.note)

    def fields(self, part: slice) -> dict[str, Array]:
        """Return the fields of `Rows` that the table has, for some rows."""
        found = {}
        for name, column in self.columns.items():
            values = _empty_as_null(self.column(column, part))
            found[name] = read_row_column(name, values, self.location(part.start), self.labels)
        return found

    def column(self, name: str, part: slice) -> pa.Array:
        """Return a column of some rows."""
        return _one_array(self.table.column(name).slice(part.start, part.stop - part.start))


def read_row_table(path: str, source: CsvSource | ImagesSource) -> RowTable:
    """Read a table that has one line for each row.

    Raises:
        DatasetError: if it is absent or is not a table, an id occurs twice, or a column is absent.
    """
    dialect = find_dialect(path, source.dialect, source.id)
    name = find_id(dialect, source)
    try:
        table = dialect.read_all({} if name is None else {name: pa.string()})
    except (pa.ArrowException, OSError, UnicodeDecodeError) as error:
        raise unreadable(dialect, error) from error
    ids = numbered(0, len(table)) if name is None else _one_array(table.column(name))
    check_ids(ids, dialect)
    settings = ("label", "split", "size_factor", "group")
    return RowTable(path, table, name, ids, find_row_columns(source, settings, table.column_names, path), dialect)


def numbered(first: int, num: int) -> pa.Array:
    """Return the numbers of rows as ids."""
    return pa.array(np.arange(first, first + num)).cast(pa.string())


def find_id(dialect: Dialect, source: CsvSource | ImagesSource | TextSource) -> str | None:
    """Return the column of ids; None if rows are joined by their order.

    Raises:
        DatasetError: if there is none, or two columns have the same name.
    """
    names = dialect.columns
    repeated = sorted({name for name in names if names.count(name) > 1})
    if repeated:
        raise DatasetError(f"Duplicate column names in {dialect.path}: {shown(repeated)}. Rename them.")
    if isinstance(source, CsvSource) and source.join == "order":
        return None
    if source.id in names:
        return source.id
    if source.id == "id" and names[0] == ROW_NAMES:
        return ROW_NAMES
    raise DatasetError(
        f"Id column {source.id!r} not found in {dialect.path}, which has {shown(names)}.{nearest(source.id, names)} "
        f"Set source.id" + (", or source.join = 'order' to number the rows." if isinstance(source, CsvSource) else ".")
    )


def unreadable(dialect: Dialect, error: Exception) -> DatasetError:
    """Return the error of a file that is no table of text."""
    if "UTF8" in str(error) or isinstance(error, UnicodeDecodeError):
        return DatasetError(
            f"Cannot read {dialect.path} as text in {dialect.encoding}: {error}. Set source.dialect.encoding, such as "
            f"'cp1252'."
        )
    return DatasetError(
        f"Cannot read {dialect.path} as a table with a header in line {dialect.header} and delimiter "
        f"{dialect.delimiter!r}: {error}. Correct the file, or set source.dialect."
    )


def _one_array(column: pa.ChunkedArray) -> pa.Array:
    return column.combine_chunks() if column.num_chunks != 1 else column.chunk(0)


def _empty_as_null(values: pa.Array) -> pa.Array:
    if not pa.types.is_string(values.type):
        return values
    return pc.if_else(pc.equal(values, ""), pa.scalar(None, values.type), values)


def check_ids(ids: pa.Array, dialect: Dialect) -> None:
    """Refuse an id that is empty or occurs twice.

    Raises:
        DatasetError: naming the line.
    """
    empty = pc.index(pc.fill_null(ids, ""), "").as_py()
    if empty >= 0:
        raise DatasetError(f"Missing id in {dialect.path}, line {dialect.line(empty)}. Fill it in, or remove the line.")
    if len(pc.unique(ids)) == len(ids):
        return
    first: dict[str, int] = {}
    for row, name in enumerate(ids.to_pylist()):
        if name in first:
            raise DatasetError(
                f"Duplicate id {name!r} in {dialect.path}, lines {dialect.line(first[name])} and {dialect.line(row)}. "
                f"Remove one of them."
            )
        first[name] = row


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
