"""Find the Parquet files of a source, and what the names of folders and files say of their rows."""

import glob
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path, PurePath
from typing import Any
from urllib.parse import unquote

import pyarrow as pa
import pyarrow.parquet as pq

from dmvae.data.errors import DatasetError
from dmvae.data.preparation.sources.arrow_columns import shown
from dmvae.data.preparation.sources.named_splits import find_splits

_SUFFIXES = (".parquet", ".parq", ".pq")
_MAGIC = b"PAR1"
_NULL_PARTITION = "__HIVE_DEFAULT_PARTITION__"


@dataclass(frozen=True)
class ParquetFiles:
    """Parquet files that are read as one table.

    Attributes:
        paths: the files, sorted.
        schema: the columns of all files, then those that folders name.
        constants: for each file, the value of each column that folders or file names say.
        index: the columns that pandas wrote its index to.
        notes: what was found, for the user.
    """

    paths: tuple[str, ...]
    schema: pa.Schema
    constants: dict[str, dict[str, Any]]
    index: tuple[str, ...]
    notes: tuple[str, ...]

    @property
    def num_rows(self) -> int:
        """The number of rows of all files."""
        return sum(pq.read_metadata(path).num_rows for path in self.paths)

    def batches(self, columns: Sequence[str], rows: int, buffer: int) -> Iterator[tuple[str, int, pa.RecordBatch]]:
        """Yield some columns of all files with the file and the number of the first row; at most `rows` rows at a time.

        A column that a file lacks is null there.
        """
        fields = [self.schema.field(column) for column in columns]
        for path in self.paths:
            row, constants = 0, self.constants[path]
            # buffered, so that a column of a row group is not read whole
            with pq.ParquetFile(path, buffer_size=buffer, pre_buffer=False) as file:
                here = [name for name in columns if name in file.schema_arrow.names and name not in constants]
                for batch in file.iter_batches(rows, columns=here):
                    arrays = [
                        _cast(batch.column(field.name), field, path)
                        if field.name in here
                        else pa.repeat(pa.scalar(constants.get(field.name), field.type), len(batch))
                        for field in fields
                    ]
                    yield path, row, pa.record_batch(arrays, names=list(columns))
                    row += len(batch)


def _cast(column: pa.Array, field: pa.Field, path: str) -> pa.Array:
    try:
        return column.cast(field.type)
    except pa.ArrowInvalid as error:
        raise DatasetError(
            f"Column {field.name!r} is {column.type} in {path}, but {field.type} in other files, and a value does not "
            f"fit: {error}. Write the column with one type."
        ) from error


def find_parquet(path: str, split: str) -> ParquetFiles:
    """Return the files at `path`: a file, a folder with all below it, or a pattern such as `data/*.parquet`.

    Folders named `KEY=VALUE` are columns. Files or folders that are named after splits, as `train-00000.parquet`, are
    the column `split`, unless there is one.

    Raises:
        FileNotFoundError: if there is no file.
        DatasetError: if only some files are named after splits, or a column has types that do not go together.
    """
    root, candidates = _candidates(path)
    found = [file for file in candidates if file.suffix in _SUFFIXES or _is_parquet(file)]
    if not found:
        raise FileNotFoundError(path)
    notes = []
    if others := [str(file.relative_to(root)) for file in candidates if file not in set(found)]:
        notes.append(f"not taken: {len(others)} files that are not Parquet ({shown(others)})")
    paths = tuple(map(str, found))
    schemas = {name: pq.read_schema(name) for name in paths}
    schema, drift = _unify(schemas)
    partitions = _partitions([file.relative_to(root) for file in found])
    if shadowed := sorted(partitions.keys() & set(schema.names)):
        notes.append(f"not taken: partitions {shown(shadowed)}, which are columns of the files, too")
    partitions = {key: values for key, values in partitions.items() if key not in shadowed}
    if partitions:
        notes.append(f"columns from the names of folders: {', '.join(partitions)}")
    if split not in schema.names and split not in partitions and len(found) > 1:
        names = find_splits([str(file.relative_to(root)) for file in found], path)
        if names is not None:
            partitions[split] = names
            notes.append(f"splits from the names of files: {', '.join(dict.fromkeys(names))}")
    constants = {name: {key: values[row] for key, values in partitions.items()} for row, name in enumerate(paths)}
    for key, values in partitions.items():
        schema = schema.append(pa.field(key, pa.array(values).type))
    return ParquetFiles(paths, schema, constants, _pandas_index(schemas[paths[0]]), (*notes, *drift))


def _candidates(path: str) -> tuple[Path, list[Path]]:
    """Return the folder that all files are below, and the files; hidden ones and those with `_` are no data."""
    if Path(path).is_file():
        return Path(path).parent, [Path(path)]
    root, found = Path(path), [Path(path)]
    if not root.is_dir():
        parts = PurePath(path).parts
        wild = next((place for place, part in enumerate(parts) if glob.has_magic(part)), len(parts))
        root, found = Path(*parts[:wild]), [Path(file) for file in glob.glob(path, recursive=True)]  # noqa: PTH207
    files = {below for file in found for below in ([file] if file.is_file() else file.rglob("*")) if below.is_file()}
    return root, sorted(f for f in files if not any(part[0] in "._" for part in f.relative_to(root).parts))


def _is_parquet(file: Path) -> bool:
    with file.open("rb") as opened:
        return opened.read(len(_MAGIC)) == _MAGIC


def _partitions(files: Sequence[Path]) -> dict[str, list[Any]]:
    """Return the value of each key of folders `KEY=VALUE` for each file; whole numbers if all of them are."""
    of_files = [dict(part.split("=", 1) for part in file.parent.parts if "=" in part) for file in files]
    found: dict[str, list[Any]] = {}
    for key in dict.fromkeys(key for values in of_files for key in values):
        texts = [unquote(values.get(key, _NULL_PARTITION)) for values in of_files]
        known = [text for text in texts if text != _NULL_PARTITION]
        numbers = all(str(int(text)) == text for text in known) if all(map(_is_whole, known)) else False
        found[key] = [None if text == _NULL_PARTITION else int(text) if numbers else text for text in texts]
    return found


def _is_whole(text: str) -> bool:
    return text.removeprefix("-").isdecimal()


def _unify(schemas: dict[str, pa.Schema]) -> tuple[pa.Schema, list[str]]:
    """Return the columns of all files, each with a type that holds every file's, and what differs."""
    fields: dict[str, tuple[pa.Field, str]] = {}
    drift: list[str] = []
    first = next(iter(schemas))
    for path, schema in schemas.items():
        repeated = sorted({name for name in schema.names if schema.names.count(name) > 1})
        if repeated:
            raise DatasetError(f"Duplicate column names in {path}: {shown(repeated)}. Rename them.")
        for field in schema:
            known, where = fields.setdefault(field.name, (field, path))
            if known.type.equals(field.type):
                continue
            fields[field.name] = (_common(known, field, where, path), where if field.type == known.type else path)
            if not pa.types.is_null(known.type) and not pa.types.is_null(field.type):
                drift.append(
                    f"column {field.name!r} is {known.type} in {where} and {field.type} in {path}: read as "
                    f"{fields[field.name][0].type}"
                )
    for path, schema in schemas.items():
        if absent := [name for name in fields if name not in schema.names]:
            drift.append(f"{path} lacks {shown(absent)}: missing in its rows")
    metadata = schemas[first].metadata
    return pa.schema([field for field, _ in fields.values()], metadata), _few(drift)


def _few(lines: list[str], most: int = 5) -> list[str]:
    return lines if len(lines) <= most else [*lines[:most], f"and {len(lines) - most} more differences between files"]


def _common(known: pa.Field, field: pa.Field, where: str, path: str) -> pa.Field:
    """Return the field with a type that holds the values of both."""
    kinds = [known.type, field.type]
    if all(pa.types.is_integer(kind) or pa.types.is_floating(kind) or pa.types.is_null(kind) for kind in kinds):
        both = pa.unify_schemas([pa.schema([known]), pa.schema([field])], promote_options="permissive")
        return both.field(0)
    plain = [kind.value_type if pa.types.is_dictionary(kind) else kind for kind in kinds]
    for kind, other in (plain, plain[::-1]):
        if pa.types.is_null(kind) or kind.equals(other) or _is_longer(other, kind):
            return pa.field(field.name, other)
    raise DatasetError(
        f"Column {field.name!r} must have one type, but is {known.type} in {where} and {field.type} in {path}. Write "
        f"it with one type, or leave it out by naming the files or the columns."
    )


def _is_longer(kind: pa.DataType, other: pa.DataType) -> bool:
    return bool(
        (pa.types.is_large_string(kind) and pa.types.is_string(other))
        or (pa.types.is_large_list(kind) and pa.types.is_list(other))
    )


def _pandas_index(schema: pa.Schema) -> tuple[str, ...]:
    """Return the columns that hold a pandas index; none if it only numbers the rows."""
    columns = (schema.pandas_metadata or {}).get("index_columns", [])
    return tuple(name for name in columns if isinstance(name, str) and name in schema.names)
