"""Rows from Parquet: one file, or a folder of files with the same columns."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pyarrow as pa
import pyarrow.dataset as ds

from dmvae.config.data import ColumnGroup, ParquetSource
from dmvae.data.error import DatasetError
from dmvae.data.rows import Rows
from dmvae.data.sources import table

Array = np.ndarray[Any, np.dtype[Any]]

BATCH_ROWS = 16384
"""Rows that are converted together; Arrow holds no more than a few such batches."""


def read_parquet(source: ParquetSource) -> Rows:
    """Read the columns that make modalities, a batch of rows at a time; rows without ids are numbered from 0.

    Raises:
        DatasetError: if a file is absent or no Parquet, or its columns break a law; with file and row.
    """
    try:
        files = ds.dataset(source.path, format="parquet")
        if not Path(source.path).exists() or not files.files:
            raise FileNotFoundError
        groups, special = _layout(source, files.schema.names)
        return _stack(source, list(_blocks(files, groups, special)))
    except FileNotFoundError as error:
        raise DatasetError(
            f"a source is a Parquet file or a folder of them; got {source.path!r}. Correct source.path."
        ) from error
    except (pa.ArrowException, OSError) as error:
        raise DatasetError(f"{source.path}: a source is Parquet; got: {error}. Write it again.") from error


def _layout(source: ParquetSource, names: list[str]) -> tuple[dict[str, tuple[ColumnGroup, list[str]]], dict[str, str]]:
    """Return each modality's group with its columns, and the columns of ids, labels and splits."""
    doubled = sorted({name for name in names if names.count(name) > 1})
    if doubled:
        raise DatasetError(f"{source.path}: a column's name occurs once; got {doubled} twice. Rename them.")
    special = {}
    for role in ("id", "label", "split"):
        column = getattr(source, role)
        if column in names:
            special[role] = column
        elif column != role:
            raise DatasetError(f"{source.path}: source.{role} is a column; got {column!r}. There are {names[:20]}.")
    left = [name for name in names if name not in special.values()]
    if not left:
        raise DatasetError(f"{source.path}: rows have at least one modality; got columns {names}. Add one.")
    chosen = source.modalities or {name: ColumnGroup(columns=_escaped(name)) for name in left}
    return {name: (group, table.matching(group, left)) for name, group in chosen.items()}, special


def _escaped(name: str) -> str:
    """Return the pattern that matches `name` alone."""
    return "".join(f"[{letter}]" if letter in "*?[" else letter for letter in name)


class Block(NamedTuple):
    """Some rows: modalities, ids and the like, and where they are, for messages."""

    values: dict[str, table.Values]
    extra: dict[str, Array]
    where: str


def _convert(role: str, column: pa.Array, where: str) -> Array:
    if role == "id":
        return table.ids(column, where)
    return table.labels(column, where) if role == "label" else table.strings("splits", column, where)


def _blocks(
    files: ds.FileSystemDataset, groups: dict[str, tuple[ColumnGroup, list[str]]], special: dict[str, str]
) -> Iterator[Block]:
    columns = list(dict.fromkeys([*special.values(), *(name for _, names in groups.values() for name in names)]))
    for file in files.get_fragments():
        row = 0
        for batch in file.to_batches(schema=files.schema, columns=columns, batch_size=BATCH_ROWS):
            if not len(batch):
                continue
            values = {
                name: table.modality(name, [batch.column(c) for c in names], group, file.path, row)
                for name, (group, names) in groups.items()
            }
            extra = {role: _convert(role, batch.column(c), file.path) for role, c in special.items()}
            yield Block(values, extra, f"{file.path}, from row {row} on")
            row += len(batch)


def _stack(source: ParquetSource, blocks: list[Block]) -> Rows:
    if not blocks:
        raise DatasetError(f"{source.path}: a source has rows; got none. Correct source.path.")
    roles = list(blocks[0].extra)
    data, present = {}, {}
    for name in list(blocks[0].values):
        shape = _shape(name, blocks)
        present[name] = np.concatenate([block.values[name][1] for block in blocks])
        data[name] = np.concatenate([_as_shape(block, name, shape) for block in blocks])
        for block in blocks:
            del block.values[name]
    extra = {role: np.concatenate([block.extra[role] for block in blocks]) for role in roles}
    return Rows(
        ids=extra["id"] if "id" in extra else np.arange(len(next(iter(data.values())))),
        data=data,
        present=present,
        labels=extra.get("label"),
        splits=extra.get("split"),
    )


def _shape(name: str, blocks: list[Block]) -> tuple[int, ...]:
    """Return the shape of the first block that has the modality at all."""
    seen = (block.values[name][0].shape[1:] for block in blocks if block.values[name][1].any())
    return next(seen, blocks[0].values[name][0].shape[1:])


def _as_shape(block: Block, name: str, shape: tuple[int, ...]) -> Array:
    values, present = block.values[name]
    if values.shape[1:] == shape:
        return values
    if present.any():
        raise DatasetError(
            f"{block.where}: all rows have the same shape; got {values.shape[1:]} for {name!r}, {shape} before. "
            f"Correct them."
        )
    return np.zeros((len(values), *shape), values.dtype)
