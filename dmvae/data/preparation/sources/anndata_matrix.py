"""Matrices and tables as anndata stores them in HDF5, read a few observations at a time.

The format is specified by anndata: https://anndata.readthedocs.io/en/latest/fileformat-prose.html
"""

from typing import Any

import numpy as np
import pyarrow as pa

from dmvae.config.sources import H5muModality
from dmvae.data.errors import DatasetError
from dmvae.data.preparation.sources.arrow_columns import Values, convert, shown
from dmvae.data.preparation.stream import SourceLocation

Array = np.ndarray[Any, np.dtype[Any]]

_FLOAT = np.dtype("float32")


def index_name(frame: Any) -> str:
    """Return the name of the column that holds a table's index."""
    return str(frame.attrs.get("_index", "_index"))


def read_column(frame: Any, name: str, where: str) -> pa.Array:
    """Return a column of a table."""
    found = frame[name]
    kind = found.attrs.get("encoding-type", "array")
    if kind == "categorical":
        codes = found["codes"][()]
        categories = read_column(found, "categories", where)
        return pa.DictionaryArray.from_arrays(pa.array(codes.astype(np.int32), mask=codes < 0), categories)
    if kind.startswith("nullable-"):
        return pa.array(_array(found["values"]), mask=found["mask"][()])
    if not hasattr(found, "dtype"):
        raise DatasetError(
            f"Column {name!r} of {where} must be an array or categorical, but is of type {kind}. Write it again."
        )
    return pa.array(_array(found))


def _array(dataset: Any) -> Array:
    return np.asarray(dataset.asstr()[()] if dataset.dtype.kind == "O" else dataset[()])


class Matrix:
    """The values of one modality, indexed by the observations of the whole file.

    Args:
        modality: the group that holds the modality: one of a MuData file, or an AnnData file.
        name: the modality's name, for messages.
        settings: what to read of it.
        key: its name in the file.
        path: the file.
        positions: the position in the modality of each observation of the file; -1 where the modality lacks it.
    """

    def __init__(
        self, modality: Any, name: str, settings: H5muModality, key: str, path: str, positions: Array | None = None
    ) -> None:
        self._name, self._path = name, path
        where = f"modality {key!r} of {path}"
        self.stored_as, stored = _stored(modality, name, settings.layer, where)
        if "dataframe" in str(stored.attrs.get("encoding-type")):
            stored = _frame_values(stored, where)
        if hasattr(stored, "dtype"):
            self._read, shape, kind = stored.__getitem__, stored.shape, stored.dtype
        else:
            self._read, shape, kind = _sparse_reader(stored, where), stored.attrs["shape"], stored["data"].dtype
        self._features = _features(modality, name, settings.features, where)
        self.features = _feature_names(modality, self.stored_as, self._features, where)
        self.dtype = np.dtype(settings.dtype) if settings.dtype else kind if kind.kind == "f" else _FLOAT
        self.num_features = len(np.arange(int(shape[1]))[self._features])
        if not self.num_features:
            raise DatasetError(f"No features left in {where}. Choose others with source.modalities.{name}.features.")
        self._positions = np.zeros(0, dtype=np.int64) if positions is None else positions

    @property
    def row_bytes(self) -> int:
        """The bytes of one row."""
        return self.num_features * self.dtype.itemsize

    def rows(self, part: slice) -> Values:
        """Return values and presence of some observations of the whole file."""
        positions = self._positions[part]
        values, present = np.zeros((len(positions), self.num_features), self.dtype), positions >= 0
        targets = np.flatnonzero(present)[np.argsort(positions[present], kind="stable")]
        # neighbours in the modality are read together
        for run in np.split(targets, np.flatnonzero(np.diff(positions[targets]) != 1) + 1):
            if len(run):
                first = int(positions[run[0]])
                found = self._read(slice(first, first + len(run)))[:, self._features]
                location = SourceLocation(self._path, first, "observation")
                values[run] = convert(self._name, found, self.dtype, location)
        if values.dtype.kind == "f":
            present &= ~np.isnan(values).all(axis=1)
        return values, present


def _stored(modality: Any, name: str, layer: str | None, where: str) -> tuple[str, Any]:
    """Return the matrix to read and its path: `X`, the only layer if there is no `X`, or what `layer` names."""
    layers, arrays = modality.get("layers", {}), modality.get("obsm", {})
    if layer is None:
        if has_x(modality):
            return "X", modality["X"]
        if len(layers) != 1:
            raise DatasetError(
                f"No X in {where}, which has layers {shown(sorted(layers)) or 'none'} and obsm "
                f"{shown(sorted(arrays)) or 'none'}. Set source.modalities.{name}.layer to one of them."
            )
        layer = next(iter(layers))
    for group, found in (("layers", layers), ("obsm", arrays)):
        if layer in found:
            return f"{group}/{layer}", found[layer]
    raise DatasetError(
        f"Layer {layer!r} not found in {where}, which has {shown(sorted([*layers, *arrays])) or 'no layers'}. "
        f"Correct source.modalities.{name}.layer."
    )


def has_x(modality: Any) -> bool:
    """Tell whether a modality has a matrix `X`; anndata also writes an empty one."""
    return "X" in modality and modality["X"].attrs.get("encoding-type") != "null"


def _frame_values(frame: Any, where: str) -> Array:
    """Return the numeric columns of a table side by side."""
    columns = [read_column(frame, name, where).to_numpy(zero_copy_only=False) for name in frame_columns(frame)]
    values = np.stack(columns, axis=1) if columns else np.zeros((0, 0))
    if values.dtype.kind not in "fiub":
        raise DatasetError(f"Columns of a table in obsm must be numbers, but got {values.dtype} in {where}.")
    return values


def frame_columns(frame: Any) -> list[str]:
    """Return the names of a table's columns, in order, without its index."""
    return [str(name) for name in frame.attrs.get("column-order", ())]


def _features(modality: Any, name: str, column: str | None, where: str) -> Any:
    """Return the index of the features to read, given the name of a boolean column of `var`."""
    if column is None:
        return slice(None)
    remedy = f"Correct source.modalities.{name}.features."
    if column not in modality["var"]:
        raise DatasetError(f"Column {column!r} not found in var of {where}. {remedy}")
    chosen = read_column(modality["var"], column, where)
    if not pa.types.is_boolean(chosen.type):
        raise DatasetError(f"Column {column!r} of var must be boolean, but is {chosen.type} in {where}. {remedy}")
    return np.flatnonzero(chosen.fill_null(False).to_numpy(zero_copy_only=False))


def _feature_names(modality: Any, stored_as: str, chosen: Any, where: str) -> tuple[str, ...]:
    """Return the names of the features that are read; none for an array of obsm, which has none."""
    if stored_as.startswith("obsm/"):
        stored = modality[stored_as]
        return tuple(frame_columns(stored)) if "dataframe" in str(stored.attrs.get("encoding-type")) else ()
    names = read_column(modality["var"], index_name(modality["var"]), where).to_pylist()
    return tuple(np.asarray(names, dtype=np.str_)[chosen].tolist())


def _sparse_reader(stored: Any, where: str) -> Any:
    """Return a function that reads a slice of rows of a sparse matrix as a dense one."""
    starts, width = stored["indptr"][()].astype(np.int64), int(stored.attrs["shape"][1])
    columns, numbers = stored["indices"], stored["data"]
    if stored.attrs["encoding-type"] == "csc_matrix":
        by_row = np.argsort(stored["indices"][()], kind="stable")
        counts = np.bincount(stored["indices"][()], minlength=int(stored.attrs["shape"][0]))
        columns, numbers = np.repeat(np.arange(width), np.diff(starts))[by_row], stored["data"][()][by_row]
        starts = np.concatenate(([0], np.cumsum(counts)))
    elif stored.attrs["encoding-type"] != "csr_matrix":
        raise DatasetError(
            f"Sparse matrices must be CSR or CSC, but got {stored.attrs['encoding-type']} in {where}. Convert it."
        )

    def read(rows: slice) -> Array:
        bounds = starts[rows.start : rows.stop + 1]
        part = slice(int(bounds[0]), int(bounds[-1]))
        dense = np.zeros((len(bounds) - 1, width), dtype=stored["data"].dtype)
        elements = np.repeat(np.arange(len(dense)) * width, np.diff(bounds)) + columns[part]
        np.add.at(dense.reshape(-1), elements, numbers[part])  # an element that is stored twice counts as the sum
        return dense

    return read
