"""Rows from the `.h5mu` file of a MuData object, read with h5py a few observations at a time.

The format is specified by anndata: https://anndata.readthedocs.io/en/latest/fileformat-prose.html
"""

from collections.abc import Iterator
from contextlib import contextmanager
from importlib import import_module
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa

from dmvae.config.sources import H5muModality, H5muSource
from dmvae.data.errors import DatasetError
from dmvae.data.preparation.class_names import ClassNames
from dmvae.data.preparation.rows import Rows
from dmvae.data.preparation.sources.arrow_columns import (
    Values,
    check_source_name,
    convert,
    find_row_columns,
    read_row_column,
    shown,
)
from dmvae.data.preparation.stream import Chunk, SourceLocation, Stream, chunk_rows

Array = np.ndarray[Any, np.dtype[Any]]

_FLOAT = np.dtype("float32")


def read(source: H5muSource, seed: int, scratch: Path) -> Stream:
    """Read the observations of all modalities; a modality is missing in the observations that it lacks.

    Integers are counts and become float32. The table of observations stays in memory, and so does a sparse matrix
    that is stored by columns.

    Raises:
        DatasetError: if h5py is not installed, the file is not a MuData file, or something in the settings is absent.
    """
    try:
        h5py = import_module("h5py")
    except ImportError as error:
        raise DatasetError("The source 'h5mu' needs h5py. Run pip install 'dmvae[h5mu]'.") from error
    with _open(h5py, source.path) as file:
        labels = ClassNames()
        fields = _row_fields(file, source, labels)
        features = {
            name: _Matrix(file, name, settings, source.path).features
            for name, settings in _modalities(file, source).items()
        }
    ids = fields.pop("ids")
    return Stream(_chunks(h5py, source, ids, fields), len(ids), features=features, labels=labels)


@contextmanager
def _open(h5py: Any, path: str) -> Iterator[Any]:
    if not Path(path).is_file():
        raise DatasetError(f"Source file not found: {path}. Correct source.path.")
    try:
        with h5py.File(path, "r") as file:
            if "mod" not in file or "obs" not in file:
                raise DatasetError(
                    f"{path} is not a MuData file: expected 'obs' and 'mod', got {shown(sorted(file))}. "
                    f"Convert an AnnData object with mudata.MuData({{'rna': adata}})."
                )
            if file.attrs.get("axis", 0) != 0:
                raise DatasetError(
                    f"Modalities of {path} share variables (axis=1), but must share observations. "
                    f"Write the file with axis=0."
                )
            yield file
    except (OSError, KeyError, RuntimeError) as error:
        raise DatasetError(f"Cannot read {path} as MuData: {error}. Write the file again.") from error


def _modalities(file: Any, source: H5muSource) -> dict[str, H5muModality]:
    """Return the settings of each modality to read."""
    found = source.modalities or {check_source_name(name, source.path): H5muModality() for name in file["mod"]}
    for name, settings in found.items():
        key = settings.key or name
        if key not in file["mod"]:
            raise DatasetError(
                f"Modality {key!r} not found in {source.path}, which has {shown(sorted(file['mod']))}. "
                f"Set source.modalities.{name}.key."
            )
    return found


def _row_fields(file: Any, source: H5muSource, labels: ClassNames) -> dict[str, Array]:
    """Return ids, labels and the like of all observations, by field of `Rows`."""
    obs, where = file["obs"], f"{source.path}, obs"
    location = SourceLocation(where, 0, "observation")
    columns = {"ids": _index_name(obs)} | find_row_columns(
        source, ("label", "split", "size_factor", "group"), obs, where
    )
    return {
        field: read_row_column(field, _column(obs, column, where), location, labels)
        for field, column in columns.items()
    }


def _index_name(frame: Any) -> str:
    return str(frame.attrs.get("_index", "_index"))


def _column(frame: Any, name: str, where: str) -> pa.Array:
    """Return a column of a table."""
    found = frame[name]
    kind = found.attrs.get("encoding-type", "array")
    if kind == "categorical":
        codes = found["codes"][()]
        categories = _column(found, "categories", where)
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


def _chunks(h5py: Any, source: H5muSource, ids: Array, fields: dict[str, Array]) -> Iterator[Chunk]:
    with _open(h5py, source.path) as file:
        matrices = {
            name: _Matrix(file, name, settings, source.path, ids)
            for name, settings in _modalities(file, source).items()
        }
        step = chunk_rows(sum(matrix.row_bytes for matrix in matrices.values()))
        for start in range(0, len(ids), step):
            part = slice(start, start + step)
            found = {name: matrix.rows(part) for name, matrix in matrices.items()}
            data, present = ({name: pair[index] for name, pair in found.items()} for index in (0, 1))
            others = {field: values[part] for field, values in fields.items()}
            yield Chunk(Rows(ids[part], data, present, **others), SourceLocation(source.path, start, "observation"))


class _Matrix:
    """The values of one modality, indexed by the observations of the whole file."""

    def __init__(self, file: Any, name: str, settings: H5muModality, path: str, ids: Array | None = None) -> None:
        key = settings.key or name
        self._name, self._path = name, path
        modality, where = file["mod"][key], f"modality {key!r} of {path}"
        stored = _stored(modality, name, settings.layer, where)
        if hasattr(stored, "dtype"):
            self._read, shape, kind = stored.__getitem__, stored.shape, stored.dtype
        else:
            self._read, shape, kind = _sparse_reader(stored, where), stored.attrs["shape"], stored["data"].dtype
        self._features = _features(modality, name, settings.features, where)
        self.features = _feature_names(modality, self._features, where)
        self.dtype = np.dtype(settings.dtype) if settings.dtype else kind if kind.kind == "f" else _FLOAT
        self.num_features = len(np.arange(int(shape[1]))[self._features])
        if not self.num_features:
            raise DatasetError(f"No features left in {where}. Choose others with source.modalities.{name}.features.")
        self._positions = np.zeros(0, dtype=np.int64) if ids is None else _positions(file, modality, key, ids, where)

    @property
    def row_bytes(self) -> int:
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


def _stored(modality: Any, name: str, layer: str | None, where: str) -> Any:
    """Return the matrix to read: `X`, or a layer."""
    if layer is None:
        return modality["X"]
    layers = modality.get("layers", {})
    if layer not in layers:
        raise DatasetError(
            f"Layer {layer!r} not found in {where}, which has {shown(sorted(layers)) or 'no layers'}. "
            f"Correct source.modalities.{name}.layer."
        )
    return layers[layer]


def _features(modality: Any, name: str, column: str | None, where: str) -> Any:
    """Return the index of the features to read, given the name of a boolean column of `var`."""
    if column is None:
        return slice(None)
    remedy = f"Correct source.modalities.{name}.features."
    if column not in modality["var"]:
        raise DatasetError(f"Column {column!r} not found in var of {where}. {remedy}")
    chosen = _column(modality["var"], column, where)
    if not pa.types.is_boolean(chosen.type):
        raise DatasetError(f"Column {column!r} of var must be boolean, but is {chosen.type} in {where}. {remedy}")
    return np.flatnonzero(chosen.fill_null(False).to_numpy(zero_copy_only=False))


def _feature_names(modality: Any, chosen: Any, where: str) -> tuple[str, ...]:
    names = np.asarray(_column(modality["var"], _index_name(modality["var"]), where).to_pylist(), dtype=np.str_)
    return tuple(names[chosen].tolist())


def _positions(file: Any, modality: Any, key: str, ids: Array, where: str) -> Array:
    """Return the position in a modality of each observation of the file; -1 where the modality lacks it."""
    if key in file.get("obsmap", {}):
        return np.asarray(file["obsmap"][key][()].astype(np.int64).reshape(-1) - 1)
    names = _column(modality["obs"], _index_name(modality["obs"]), where).to_pylist()
    position = {name: index for index, name in enumerate(names)}
    return np.array([position.get(name, -1) for name in ids.tolist()], dtype=np.int64)


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
