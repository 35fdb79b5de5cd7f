"""Rows from a column of texts in a delimited file or in Parquet files."""

from collections.abc import Iterator
from pathlib import Path

import pyarrow as pa

from dmvae.config.sources import TextSource
from dmvae.data.errors import DatasetError
from dmvae.data.preparation.class_names import ClassNames
from dmvae.data.preparation.rows import Rows
from dmvae.data.preparation.sources.arrow_columns import not_taken, read_row_column, shown
from dmvae.data.preparation.sources.dialect import find_dialect
from dmvae.data.preparation.sources.parquet_files import find_parquet
from dmvae.data.preparation.sources.row_table import find_id, unreadable
from dmvae.data.preparation.stream import Chunk, SourceLocation, Stream
from dmvae.data.preparation.tables import nearest
from dmvae.data.preparation.texts import Text

_BATCH_ROWS = 8192
_BUFFER_BYTES = 1 << 20
_TEXT_SUFFIXES = {".csv", ".tsv", ".tab", ".txt"}


def read(source: TextSource, seed: int, scratch: Path) -> Stream:
    """Read texts as sequences of classes.

    Raises:
        DatasetError: if the file is absent or is no table, or a column is absent or is no text.
    """
    texts = {name: Text(text.unit, text.length, text.vocabulary) for name, text in source.modalities.items()}
    columns = {name: text.column for name, text in source.modalities.items()}
    is_delimited = bool(_TEXT_SUFFIXES & set(Path(source.path).suffixes))
    available, id_column, notes, batches = (_of_delimited if is_delimited else _of_parquet)(source, columns)
    for name, column in columns.items():
        if column not in available:
            raise DatasetError(
                f"Column {column!r} not found in {source.path}, which has {shown(available)}."
                f"{nearest(column, available)} Correct source.modalities.{name}.column."
            )
    notes += not_taken([name for name in available if name != id_column and name not in columns.values()])
    remarks: list[str] = []
    return Stream(_chunks(source, texts, id_column, batches, remarks), notes=tuple(notes), remarks=remarks, texts=texts)


Opened = tuple[list[str], str, list[str], Iterator[tuple[SourceLocation, pa.RecordBatch]]]
"""Columns, the column of ids, lines for the user, and the rows."""


def _of_delimited(source: TextSource, columns: dict[str, str]) -> Opened:
    dialect = find_dialect(source.path, source.dialect, source.id)
    name = find_id(dialect, source)
    assert name is not None
    wanted = [name, *dict.fromkeys(columns.values())]

    def batches() -> Iterator[tuple[SourceLocation, pa.RecordBatch]]:
        row = 0
        try:
            with dialect.open(dict.fromkeys(wanted, pa.string()), wanted) as reader:
                for batch in reader:
                    yield SourceLocation(source.path, dialect.line(row), "line"), batch
                    row += len(batch)
        except (pa.ArrowException, UnicodeDecodeError) as error:
            raise unreadable(dialect, error) from error

    return list(dialect.columns), name, [dialect.note] * bool(dialect.note), batches()


def _of_parquet(source: TextSource, columns: dict[str, str]) -> Opened:
    try:
        files = find_parquet(source.path, "split")
    except (OSError, pa.ArrowException) as error:
        raise DatasetError(f"Cannot read {source.path} as Parquet: {error}. Correct source.path.") from error
    names = files.schema.names
    name = source.id if source.id in names else files.index[0] if len(files.index) == 1 else None
    if name is None:
        raise DatasetError(
            f"Id column {source.id!r} not found in {source.path}, which has {shown(names)}. Set source.id."
        )

    def batches() -> Iterator[tuple[SourceLocation, pa.RecordBatch]]:
        wanted = [name, *dict.fromkeys(columns.values())]
        for path, row, batch in files.batches(wanted, _BATCH_ROWS, _BUFFER_BYTES):
            yield SourceLocation(path, row), batch

    return names, name, list(files.notes), batches()


def _chunks(
    source: TextSource,
    texts: dict[str, Text],
    id_column: str,
    batches: Iterator[tuple[SourceLocation, pa.RecordBatch]],
    remarks: list[str],
) -> Iterator[Chunk]:
    for location, batch in batches:
        data, present = {}, {}
        for name, text in texts.items():
            column = batch.column(source.modalities[name].column)
            kind = column.type.value_type if pa.types.is_dictionary(column.type) else column.type
            if not (pa.types.is_string(kind) or pa.types.is_large_string(kind) or pa.types.is_null(kind)):
                raise DatasetError(
                    f"Column {source.modalities[name].column!r} must hold text, but got {kind} in {location.where}. "
                    f"Cast the column."
                )
            data[name], present[name] = text.read(column.to_pylist())
        ids = read_row_column("ids", batch.column(id_column), location, ClassNames())
        yield Chunk(Rows(ids, data, present), location)
    for name, text in texts.items():
        if text.num_cut:
            length = source.modalities[name].length
            remarks.append(f"{name}: cut {text.num_cut} texts after {length} {source.modalities[name].unit}")
