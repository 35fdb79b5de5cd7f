"""Rows from Python objects: dicts of arrays, tensors, data frames and AnnData, a MuData, or a batch."""

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import pyarrow as pa
import torch

from dmvae.config.likelihoods import UNSEEN, values_of
from dmvae.config.sources import ColumnGroup
from dmvae.data.batch import Batch, has
from dmvae.data.errors import DatasetError
from dmvae.data.format.manifest import ColumnInfo, ModalityInfo
from dmvae.data.preparation.class_names import ClassNames, written
from dmvae.data.preparation.object_parts import Part, as_ids, find_parts
from dmvae.data.preparation.object_rows import ObjectRows
from dmvae.data.preparation.rows import Rows
from dmvae.data.preparation.source_location import SourceLocation
from dmvae.data.preparation.sources.arrow_columns import read_modality, read_row_column
from dmvae.data.preparation.tables import Table, is_table

Array = np.ndarray[Any, np.dtype[Any]]

_LARGEST_WHOLE_FLOAT32 = 1 << 24


def read_objects(
    data: Any,
    labels: Any = None,
    ids: Any = None,
    likelihood: Mapping[str, str] | None = None,
    known: Mapping[str, ModalityInfo] | None = None,
) -> ObjectRows:
    """Read rows from Python objects.

    Rows are joined on their ids: the index of data frames, the names of observations. A row that an object lacks lacks
    the modality; so does one that is all NaN or None. Arrays have no ids: their rows follow those of the others.
    Integers are read as floats, unless the likelihood is one of classes.

    Args:
        data: a dict of arrays, tensors, data frames or AnnData by modality, an AnnData, a MuData, or a `Batch`.
        labels: one for each row, of any type; or the name of a column of `obs`.
        ids: one for each row.
        likelihood: by modality, as far as it is set.
        known: what a model was trained on; features are put in its order, and its classes are kept.

    Raises:
        DatasetError: naming the part of `data` that cannot be read.
    """
    if isinstance(data, Batch):
        return _of_batch(data, labels, ids)
    parts, observations = find_parts(data)
    ids = data.obs_names if ids is None and observations is not None else ids
    if known is not None:
        unknown = sorted(parts.keys() - known.keys())
        if unknown:
            raise DatasetError(f"Unknown modalities {unknown} in data. The model has {', '.join(known)}.")
        parts = {name: _in_order(name, part, known[name]) for name, part in parts.items()}
    order = _order(parts, ids)
    found: dict[str, Array] = {}
    present: dict[str, Array] = {}
    features: dict[str, tuple[str, ...]] = {}
    tables: dict[str, Table] = {}
    for name, part in parts.items():
        classes = values_of((likelihood or {}).get(name)) == "classes"
        info = None if known is None else known[name]
        values, there, table = _read(name, part, classes or (info is not None and info.classes is not None), info)
        if part.features is not None:
            features[name] = part.features
        if table is not None:
            tables[name] = table
        found[name], present[name] = _place(part, values, there, order)
    names = ClassNames()
    return ObjectRows(
        Rows(ids=order, data=found, present=present, labels=_labels(labels, observations, order, names)),
        features,
        tables,
        names,
    )


def _of_batch(batch: Batch, labels: Any, ids: Any) -> ObjectRows:
    data, present = {}, {}
    for name, values in batch.data.items():
        array = _numbers(name, values, classes=not values.is_floating_point() and values.dtype != torch.uint8)
        cells = (batch.cells or {}).get(name)
        if cells is not None and array.dtype.kind == "f":
            array = np.where(cells.cpu().numpy(), array, np.nan).astype(array.dtype)
        data[name], present[name] = array, has(batch, name).numpy()
    given = batch.ids if ids is None else ids
    factors = batch.size_factors
    names = ClassNames()
    order = np.arange(len(batch)) if given is None else as_ids(given, "ids")
    rows = Rows(
        ids=order,
        data=data,
        present=present,
        labels=_labels(labels if batch.labels is None else batch.labels, None, order, names),
        size_factors=None if factors is None else factors.cpu().double().numpy(),
    )
    return ObjectRows(rows, {}, {}, names)


def _order(parts: Mapping[str, Part], ids: Any) -> Array:
    """Return the ids of all rows, in the order of the first object that has them."""
    indexed = {name: part.ids for name, part in parts.items() if part.ids is not None}
    plain = {name: len(part) for name, part in parts.items() if part.ids is None}
    if ids is not None:
        order = as_ids(ids, "ids")
    elif indexed:
        kinds = {name: index.dtype.kind for name, index in indexed.items()}
        if len(set(kinds.values())) > 1:
            raise DatasetError(f"Ids must all be integers or all text, but got {kinds} by modality. Convert an index.")
        order = np.array(list(dict.fromkeys(name for index in indexed.values() for name in index.tolist())))
        differ = [name for name, index in indexed.items() if len(index) != len(order)]
        if plain and differ:
            raise DatasetError(
                f"Cannot tell which rows {sorted(plain)} belong to: they have no ids, and {differ} lack some of the "
                "others. Give data frames with an index, or set ids."
            )
    else:
        order = np.arange(next(iter(plain.values())))
    wrong = {name: length for name, length in plain.items() if length != len(order)}
    if wrong:
        lengths = {name: len(part) for name, part in parts.items()}
        raise DatasetError(
            f"Arrays in data must have the same number of rows, but got {lengths}. Rows without a modality are NaN, or "
            "are left out of a data frame whose index holds ids."
        )
    return order if order.dtype == np.int64 or order.dtype.kind == "U" else order.astype(np.int64)


def _place(part: Part, values: Array, present: Array, order: Array) -> tuple[Array, Array]:
    """Put a part's rows in the places of their ids."""
    if part.ids is None or (len(part.ids) == len(order) and bool((part.ids == order).all())):
        return values, present
    places = {name: row for row, name in enumerate(part.ids.tolist())}
    unknown = sorted(set(places) - set(order.tolist()))
    if unknown:
        raise DatasetError(f"Unknown id {unknown[0]!r} in a data frame: ids has no such row. Add it, or drop the row.")
    rows = np.array([places.get(name, -1) for name in order.tolist()], dtype=np.int64)
    there = rows >= 0
    return np.where(there.reshape(-1, *(1,) * (values.ndim - 1)), values[rows], 0).astype(values.dtype), np.where(
        there, present[rows], False
    )


def _read(name: str, part: Part, classes: bool, known: ModalityInfo | None) -> tuple[Array, Array, Table | None]:
    """Return values, presence, and the table if columns differ in kind."""
    if not hasattr(part.values, "iloc"):
        values = _numbers(name, part.values, classes)
        return values, _not_all_nan(values), None
    location = SourceLocation(f"data[{name!r}]", 0)
    assert part.features is not None
    try:
        columns = [pa.array(part.values.iloc[:, i], from_pandas=True) for i in range(part.values.shape[1])]
    except (pa.ArrowInvalid, pa.ArrowTypeError, pa.ArrowNotImplementedError) as error:
        raise DatasetError(
            f"data[{name!r}] has a column of objects: {str(error).splitlines()[0]}. Convert it to numbers, text, "
            "categories or dates, or leave it out."
        ) from error
    columns = [column.combine_chunks() if isinstance(column, pa.ChunkedArray) else column for column in columns]
    group = _group(part, known)
    if (known is not None and known.columns is not None) or is_table(group, [column.type for column in columns]):
        table = Table(name, part.features, group, location.where)
        if known is not None and known.columns is not None:
            columns = [_seen(column, info) for column, info in zip(columns, known.columns, strict=True)]
        return *table.read(columns, location), table
    group = ColumnGroup(columns="*", dtype=None if classes else "float64")
    values, present = read_modality(name, columns, group, location)
    if not classes and all(column.type in (pa.float32(), pa.float16()) for column in columns):
        values = values.astype(np.float32)
    return values, present, None


def _group(part: Part, known: ModalityInfo | None) -> ColumnGroup:
    if known is None or known.columns is None or known.features is None:
        return ColumnGroup(columns="*")
    described = dict(zip(known.features, known.columns, strict=True))
    return ColumnGroup(
        columns="*",
        kinds={name: "date" if column.since else column.kind for name, column in described.items()},
        classes={
            name: (*column.classes, UNSEEN) if column.kind == "category" else column.classes
            for name, column in described.items()
            if column.classes
        },
    )


def _seen(column: pa.Array, known: ColumnInfo) -> pa.Array:
    """Replace classes of a category that no training row had by the one that stands for them."""
    if known.kind != "category":
        return column
    names = [written(value) for value in column.to_pylist()]
    return pa.array([name if name in known.classes else UNSEEN if name else None for name in names], pa.string())


def _numbers(name: str, values: Any, classes: bool) -> Array:
    """Return an array `(rows, *shape)` of a type that shards store."""
    if isinstance(values, torch.Tensor):
        values = values.detach().cpu()
        values = (values.float() if values.dtype == torch.bfloat16 else values).numpy()
    array = np.asarray(values)
    if array.dtype == object:
        try:
            array = array.astype(np.float64)  # None becomes NaN
        except (TypeError, ValueError):
            array = np.array(array.tolist(), dtype=object) if array.ndim == 1 else array
            odd = next((value for value in array.reshape(-1) if not isinstance(value, int | float | None)), None)
            raise DatasetError(
                f"data[{name!r}] must hold numbers, but has objects such as {odd!r}. Convert them, or give a data "
                "frame, whose columns may hold text and categories."
            ) from None
    if array.dtype.kind not in "biuf":
        raise DatasetError(
            f"data[{name!r}] must hold numbers, but got type {array.dtype}. Convert them, or give a data frame, whose "
            "columns may hold text and categories."
        )
    if array.ndim == 0:
        raise DatasetError(f"data[{name!r}] must have rows, but is a single number.")
    array = array.reshape(len(array), 1) if array.ndim == 1 else array
    if classes:
        if array.dtype.kind == "f" and bool((array != np.floor(array)).any()):
            raise DatasetError(f"data[{name!r}] must hold whole numbers, its classes, but has others. Convert it.")
        return array.astype(np.int64)
    if array.dtype.kind in "bi" or (array.dtype.kind == "u" and array.dtype != np.uint8):
        large = array.dtype.kind != "b" and bool(np.abs(array).max(initial=0) > _LARGEST_WHOLE_FLOAT32)
        return array.astype(np.float64 if large else np.float32)
    return array


def _not_all_nan(values: Array) -> Array:
    if values.dtype.kind != "f":
        return np.ones(len(values), dtype=bool)
    return np.asarray(~np.isnan(values).reshape(len(values), -1).all(axis=1))


def _in_order(name: str, part: Part, known: ModalityInfo) -> Part:
    """Put the features of a part in the order of those that a model was trained on."""
    if known.features is None or part.features is None or part.features == known.features:
        return part
    absent = [feature for feature in known.features if feature not in part.features]
    if absent:
        raise DatasetError(
            f"data[{name!r}] lacks {len(absent)} of the features that the model was trained on, such as "
            f"{absent[0]!r}. Add them, as NaN where they are unknown."
        )
    places = [part.features.index(feature) for feature in known.features]
    values = part.values.iloc[:, places] if hasattr(part.values, "iloc") else part.values[:, places]
    return replace(part, values=values, features=known.features)


def _labels(labels: Any, observations: Any, order: Array, names: ClassNames) -> Array | None:
    if labels is None:
        return None
    if isinstance(labels, str):
        if observations is None or labels not in observations.columns:
            known = "there is no obs" if observations is None else ", ".join(map(str, observations.columns))
            raise DatasetError(f"Column {labels!r} of obs not found for labels ({known}). Give one label for each row.")
        labels = observations[labels]
    if hasattr(labels, "iloc") and not hasattr(labels, "columns") and len(labels) != len(order):
        labels = labels.reindex(order)
    if len(labels) != len(order):
        raise DatasetError(f"labels must have one entry for each row, {len(order)}, but got {len(labels)}.")
    column = labels.cpu().numpy() if isinstance(labels, torch.Tensor) else labels
    column = column.tolist() if isinstance(column, np.ndarray) and column.dtype.kind == "U" else column
    array = pa.array(column, from_pandas=True) if not isinstance(column, Sequence) else pa.array(column)
    array = array.combine_chunks() if isinstance(array, pa.ChunkedArray) else array
    return read_row_column("labels", array, SourceLocation("labels", 0), names)
