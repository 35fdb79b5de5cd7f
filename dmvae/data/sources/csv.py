"""Rows from CSV or TSV: a file per modality, joined on an id column."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.csv as pacsv

from dmvae.config.data import CsvSource
from dmvae.data.error import DatasetError
from dmvae.data.rows import Rows
from dmvae.data.sources import table

Array = np.ndarray[Any, np.dtype[Any]]


def read_csv(source: CsvSource) -> Rows:
    """Join the files; the rows are those of `source.rows`, or every id in the order in which it first occurs.

    Raises:
        DatasetError: if a file is absent or no table, an id occurs twice in it, or files have no id in common;
            with file and line.
    """
    special = (source.id, source.label, source.split)
    frames = {name: read_table(group.path, source.id) for name, group in source.modalities.items()}
    paths = {name: group.path for name, group in source.modalities.items()}
    values = {}
    for name, group in source.modalities.items():
        columns = table.matching(group, [column for column in frames[name].column_names if column not in special])
        arrays = [_one(frames[name].column(column)) for column in columns]
        values[name] = table.modality(name, arrays, group, group.path)
    keys = {name: unique_ids(frame, source.id, paths[name]) for name, frame in frames.items()}
    about = None if source.rows is None else read_table(source.rows, source.id)
    ids = _union(keys) if about is None else unique_ids(about, source.id, str(source.rows))
    _check_join(keys, paths, ids, source)
    place = {key: row for row, key in enumerate(ids.tolist())}
    data, present = {}, {}
    for name, (found, observed) in values.items():
        rows = np.fromiter((place[key] for key in keys[name].tolist()), np.int64, len(found))
        data[name] = np.zeros((len(ids), *found.shape[1:]), found.dtype)
        data[name][rows] = found
        present[name] = np.zeros(len(ids), dtype=bool)
        present[name][rows] = observed
    return Rows(
        ids=as_integers(ids),
        data=data,
        present=present,
        labels=None if (column := column_of(about, source.label)) is None else table.labels(column, str(source.rows)),
        splits=None
        if (column := column_of(about, source.split)) is None
        else table.strings("splits", column, str(source.rows)),
    )


def column_of(about: pa.Table | None, name: str) -> pa.Array | None:
    """Return the column of that name, None where there is none."""
    return _one(about.column(name)) if about is not None and name in about.column_names else None


def read_table(path: str, key: str) -> pa.Table:
    """Read a file with a header and a column `key` of ids, which become strings."""
    if not Path(path).is_file():
        raise DatasetError(f"a source is a file that exists; got {path!r}. Correct its path.")
    delimiter = "\t" if Path(path).suffix in (".tsv", ".tab") else ","
    try:
        found = pacsv.read_csv(
            path,
            parse_options=pacsv.ParseOptions(delimiter=delimiter),
            convert_options=pacsv.ConvertOptions(column_types={key: pa.string()}),
        )
    except pa.ArrowException as error:
        raise DatasetError(f"{path}: a source is a table with a header; got: {error}. Correct it.") from error
    if found.column_names.count(key) != 1:
        raise DatasetError(
            f"{path}: a table has one column {key!r} of ids; got {found.column_names[:10]}. Set source.id."
        )
    return found


def _one(column: pa.ChunkedArray) -> pa.Array:
    return column.combine_chunks() if column.num_chunks != 1 else column.chunk(0)


def unique_ids(frame: pa.Table, key: str, path: str) -> Array:
    """Return the ids as strings, each once."""
    ids = np.array(frame.column(key).to_pylist(), dtype=np.str_)
    _, first, counts = np.unique(ids, return_index=True, return_counts=True)
    if (counts > 1).any():
        doubled = ids[first[counts > 1].min()]
        lines = (np.flatnonzero(ids == doubled)[:2] + 2).tolist()
        raise DatasetError(f"{path}, line {lines[1]}: an id occurs once; got {str(doubled)!r} in line {lines[0]} too.")
    if (ids == "").any():
        raise DatasetError(f"{path}, line {int(np.flatnonzero(ids == '')[0]) + 2}: an id is not empty. Fill it in.")
    return ids


def _union(keys: dict[str, Array]) -> Array:
    return np.array(list(dict.fromkeys(key for ids in keys.values() for key in ids.tolist())), dtype=np.str_)


def _check_join(keys: dict[str, Array], paths: dict[str, str], ids: Array, source: CsvSource) -> None:
    for name, own in keys.items():
        if source.rows is not None:
            stray = np.flatnonzero(~np.isin(own, ids))
            if len(stray):
                raise DatasetError(
                    f"{paths[name]}, line {stray[0] + 2}: ids are those of {source.rows}; got {str(own[stray[0]])!r} "
                    f"and {len(stray) - 1} others that are not there. Add them, or remove them here."
                )
        elif len(keys) > 1:
            others = [ids for other, ids in keys.items() if other != name]
            if not np.isin(own, np.concatenate(others)).any():
                raise DatasetError(
                    f"{paths[name]}: tables are joined on {source.id!r}; none of its {len(own)} ids ({_some(own)}) is "
                    f"in another table ({_some(np.concatenate(others))}). Write the ids alike."
                )


def _some(ids: Sequence[str] | Array) -> str:
    return ", ".join(map(repr, [str(key) for key in ids[:2]])) + ", ..."


def as_integers(ids: Array) -> Array:
    """Return int64 where every id is written as an integer is, else the strings."""
    try:
        numbers = ids.astype(np.int64)
    except (ValueError, OverflowError):
        return ids
    return numbers if (numbers.astype(np.str_) == ids).all() else ids
