"""The modalities of Python objects: their values, the ids of their rows and the names of their features.

Objects are recognised by what they offer, so that neither pandas nor anndata is imported.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from dmvae.config.section import check_modality_name
from dmvae.data.errors import DatasetError

Array = np.ndarray[Any, np.dtype[Any]]


@dataclass(frozen=True, eq=False)
class Part:
    """One modality: values by row, the ids of its rows and the names of its features, where it has them."""

    values: Any
    ids: Array | None = None
    features: tuple[str, ...] | None = None

    def __len__(self) -> int:
        return int(self.values.shape[0]) if hasattr(self.values, "shape") else len(self.values)


def find_parts(data: Any) -> tuple[dict[str, Part], Any]:
    """Return each modality, and the table of observations if there is one."""
    if hasattr(data, "mod") and hasattr(data, "obs_names"):  # MuData
        return {_check_name(name): _part(name, single) for name, single in data.mod.items()}, data.obs
    if hasattr(data, "obs_names"):  # AnnData
        return {"X": _part("X", data)}, data.obs
    if not isinstance(data, Mapping):
        raise DatasetError(
            "data must be a dict with an array, a tensor or a data frame for each modality, an AnnData, a MuData, a "
            f"Batch or the folder of a dataset, but got {type(data).__name__}."
        )
    if not data:
        raise DatasetError("data has no modality. Add an array for each one.")
    return {_check_name(name): _part(name, values) for name, values in data.items()}, None


def _check_name(name: Any) -> str:
    try:
        return check_modality_name(str(name))
    except ValueError as error:
        raise DatasetError(str(error)) from error


def _part(name: str, values: Any) -> Part:
    if hasattr(values, "obs_names"):  # AnnData
        if values.X is None:
            layers = ", ".join(values.layers) or "none"
            raise DatasetError(f"data[{name!r}] is an AnnData without X. Set its X to a layer (it has: {layers}).")
        features = tuple(map(str, values.var_names))
        return Part(_dense(values.X), as_ids(values.obs_names, f"data[{name!r}]"), features)
    if hasattr(values, "iloc"):  # a data frame or a series of pandas
        frame = values.to_frame() if not hasattr(values, "columns") else values
        repeated = sorted({str(column) for column in frame.columns[frame.columns.duplicated()]})
        if repeated:
            raise DatasetError(f"Columns of data[{name!r}] must have different names, but {repeated} occur twice.")
        return Part(frame, as_ids(frame.index, f"data[{name!r}]"), tuple(map(str, frame.columns)))
    return Part(_dense(values))


def _dense(values: Any) -> Any:
    if hasattr(values, "toarray"):  # a sparse matrix
        return values.toarray()
    return values if hasattr(values, "shape") else _stack(values)


def _stack(values: Any) -> Any:
    """Return a list of rows, of which some may be None, as an array."""
    rows = list(values)
    like = next((np.asarray(row) for row in rows if row is not None), None)
    if like is None or like.dtype == object or any(row is None for row in rows) is False:
        return np.asarray(rows)
    nothing = np.full(like.shape, np.nan)
    return np.stack([nothing if row is None else np.asarray(row) for row in rows])


def as_ids(index: Any, where: str) -> Array:
    """Return ids as int64 or strings.

    Raises:
        DatasetError: if one occurs twice.
    """
    values = index.cpu().numpy() if isinstance(index, torch.Tensor) else np.asarray(index)
    found = values.astype(np.int64) if values.dtype.kind in "iu" else np.array([str(value) for value in values])
    names, _first, counts = np.unique(found, return_index=True, return_counts=True)
    if len(names) < len(found):
        twice = names[counts > 1][0]
        raise DatasetError(
            f"Duplicate id {twice.item()!r} in {where}: it occurs {int(counts[counts > 1][0])} times, in {len(found)} "
            "rows. Make ids unique, or reset the index."
        )
    return found
