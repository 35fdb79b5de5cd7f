"""Rows from `.h5mu`, the file of a MuData, read with h5py a few observations at a time.

The format is anndata's: https://anndata.readthedocs.io/en/latest/fileformat-prose.html
"""

from collections.abc import Iterator
from contextlib import contextmanager
from importlib import import_module
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa

from dmvae.config.data import H5muModality, H5muSource
from dmvae.data.errors import DatasetError
from dmvae.data.preparation.rows import Rows
from dmvae.data.preparation.sources import arrow_columns as table
from dmvae.data.preparation.stream import Chunk, SourceLocation, Stream, chunk_rows

Array = np.ndarray[Any, np.dtype[Any]]

_FLOAT = np.dtype("float32")


def read_h5mu(source: H5muSource) -> Stream:
    """Read the observations of all modalities; one that a modality does not have is missing there.

    Integers become float32, since they are counts. The table of observations is held, and a sparse matrix that is
    stored by columns, as it is stored.

    Raises:
        DatasetError: if h5py is not installed, the file is no MuData, or what is asked for is not in it.
    """
    try:
        h5py = import_module("h5py")
    except ImportError as error:
        raise DatasetError("the source 'h5mu' needs h5py. Run pip install 'dmvae[h5mu]'.") from error
    with _open(h5py, source.path) as file:
        about = _about(file, source)
        for name, wanted in _wanted(file, source).items():
            _Matrix(file, name, wanted, source.path)
    ids = about.pop("ids")
    notes = (about.pop("note"),) if "note" in about else ()
    return Stream(_chunks(h5py, source, ids, about), len(ids), notes)


@contextmanager
def _open(h5py: Any, path: str) -> Iterator[Any]:
    if not Path(path).is_file():
        raise DatasetError(f"a source is a file that exists; got {path!r}. Correct source.path.")
    try:
        with h5py.File(path, "r") as file:
            if "mod" not in file or "obs" not in file:
                raise DatasetError(
                    f"{path}: a MuData has observations and modalities; got {sorted(file)}. Of an AnnData, write "
                    f"mudata.MuData({{'rna': adata}})."
                )
            if file.attrs.get("axis", 0) != 0:
                raise DatasetError(f"{path}: modalities share observations; this file's share variables (axis=1).")
            yield file
    except (OSError, KeyError, RuntimeError) as error:
        raise DatasetError(f"{path}: a source is a MuData; got: {error}. Write it again.") from error


def _wanted(file: Any, source: H5muSource) -> dict[str, H5muModality]:
    wanted = source.modalities or {table.named(name, source.path): H5muModality() for name in file["mod"]}
    for name, modality in wanted.items():
        if (modality.key or name) not in file["mod"]:
            raise DatasetError(
                f"{source.path}: a modality is one of the file's; got {modality.key or name!r}. There are "
                f"{sorted(file['mod'])}: set source.modalities.{name}.key."
            )
    return wanted


def _about(file: Any, source: H5muSource) -> dict[str, Any]:
    """Return the ids and what else `Rows` takes of all observations, and perhaps a note."""
    obs, where = file["obs"], f"{source.path}, obs"
    about: dict[str, Any] = {"ids": table.ids(_column(obs, _index_name(obs), where), where)}
    for role, column, default in (
        ("labels", source.label, "label"),
        ("splits", source.split, "split"),
        ("size_factors", source.size_factor, "size_factor"),
        ("groups", source.group, None),
    ):
        if column is None or (column not in obs and column == default):
            continue
        if column not in obs:
            raise DatasetError(f"{where}: {column!r} is a column; there are {sorted(obs)}. Correct source.")
        values = _column(obs, column, where)
        if role == "labels":
            if pa.types.is_dictionary(values.type) and not pa.types.is_integer(values.type.value_type):
                names = enumerate(map(str, values.dictionary.to_pylist()))
                about["note"] = f"labels: {', '.join(f'{number} is {name}' for number, name in names)}"
                values = values.indices
            about[role] = table.labels(values, where)
        elif role == "splits":
            about[role] = table.strings("a split", values, where)
        else:
            about[role] = (
                table.size_factors(values, where)
                if role == "size_factors"
                else table.ids(values, where, what="a group")
            )
    return about


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
            f"{where}, column {name!r}: a column is an array or categorical; got {kind}. Write it again."
        )
    return pa.array(_array(found))


def _array(dataset: Any) -> Array:
    return np.asarray(dataset.asstr()[()] if dataset.dtype.kind == "O" else dataset[()])


def _chunks(h5py: Any, source: H5muSource, ids: Array, about: dict[str, Array]) -> Iterator[Chunk]:
    with _open(h5py, source.path) as file:
        matrices = {
            name: _Matrix(file, name, wanted, source.path, ids) for name, wanted in _wanted(file, source).items()
        }
        step = chunk_rows(sum(matrix.row_bytes for matrix in matrices.values()))
        for start in range(0, len(ids), step):
            part = slice(start, start + step)
            found = {name: matrix.rows(part) for name, matrix in matrices.items()}
            data, present = ({name: pair[index] for name, pair in found.items()} for index in (0, 1))
            special = {role: values[part] for role, values in about.items()}
            yield Chunk(Rows(ids[part], data, present, **special), SourceLocation(source.path, start, "observation"))


class _Matrix:
    """The values of one modality, by the observations of the whole file."""

    def __init__(self, file: Any, name: str, wanted: H5muModality, path: str, ids: Array | None = None) -> None:
        key = wanted.key or name
        own, where = file["mod"][key], f"{path}, modality {key!r}"
        self._where = where
        if wanted.layer is not None and wanted.layer not in own.get("layers", {}):
            raise DatasetError(f"{where}: a layer is one of {sorted(own.get('layers', {}))}; got {wanted.layer!r}.")
        stored = own["X"] if wanted.layer is None else own["layers"][wanted.layer]
        if hasattr(stored, "dtype"):
            self._read, shape, kind = stored.__getitem__, stored.shape, stored.dtype
        else:
            self._read, shape, kind = _sparse_reader(stored, where), stored.attrs["shape"], stored["data"].dtype
        self._features: Any = slice(None)
        if wanted.features is not None:
            if wanted.features not in own["var"]:
                raise DatasetError(f"{where}: features is a column of var; got {wanted.features!r}.")
            chosen = _column(own["var"], wanted.features, where)
            if not pa.types.is_boolean(chosen.type):
                raise DatasetError(
                    f"{where}: features is a column of truth values; got {chosen.type} in {wanted.features!r}."
                )
            self._features = np.flatnonzero(chosen.fill_null(False).to_numpy(zero_copy_only=False))
        self.dtype = np.dtype(wanted.dtype) if wanted.dtype else kind if kind.kind == "f" else _FLOAT
        self.num = len(np.arange(int(shape[1]))[self._features])
        if not self.num:
            raise DatasetError(f"{where}: a modality has features; got none. Choose others.")
        self._places = np.zeros(0, dtype=np.int64) if ids is None else _places(file, own, key, ids, where)

    @property
    def row_bytes(self) -> int:
        return self.num * self.dtype.itemsize

    def rows(self, part: slice) -> table.Values:
        """Return values and presence of some observations of the whole file."""
        places = self._places[part]
        values, present = np.zeros((len(places), self.num), self.dtype), places >= 0
        targets = np.flatnonzero(present)[np.argsort(places[present], kind="stable")]
        # neighbours in the modality are read together
        for run in np.split(targets, np.flatnonzero(np.diff(places[targets]) != 1) + 1):
            if len(run):
                first = int(places[run[0]])
                found = self._read(slice(first, first + len(run)))[:, self._features]
                values[run] = table.converted(found, self.dtype, self._where)
        if values.dtype.kind == "f":
            present &= ~np.isnan(values).all(axis=1)
        return values, present


def _places(file: Any, own: Any, key: str, ids: Array, where: str) -> Array:
    """Return the number in a modality of each observation of the file, -1 where there is none."""
    if key in file.get("obsmap", {}):
        return np.asarray(file["obsmap"][key][()].astype(np.int64).reshape(-1) - 1)
    names = _column(own["obs"], _index_name(own["obs"]), where).to_pylist()
    number = {name: place for place, name in enumerate(names)}
    return np.array([number.get(name, -1) for name in ids.tolist()], dtype=np.int64)


def _sparse_reader(stored: Any, where: str) -> Any:
    """Return what reads some rows of a sparse matrix as a dense one."""
    starts, width = stored["indptr"][()].astype(np.int64), int(stored.attrs["shape"][1])
    columns, numbers = stored["indices"], stored["data"]
    if stored.attrs["encoding-type"] == "csc_matrix":
        by_row = np.argsort(stored["indices"][()], kind="stable")
        counts = np.bincount(stored["indices"][()], minlength=int(stored.attrs["shape"][0]))
        columns, numbers = np.repeat(np.arange(width), np.diff(starts))[by_row], stored["data"][()][by_row]
        starts = np.concatenate(([0], np.cumsum(counts)))
    elif stored.attrs["encoding-type"] != "csr_matrix":
        raise DatasetError(f"{where}: a sparse matrix is CSR or CSC; got {stored.attrs['encoding-type']}.")

    def read(rows: slice) -> Array:
        bounds = starts[rows.start : rows.stop + 1]
        part = slice(int(bounds[0]), int(bounds[-1]))
        dense = np.zeros((len(bounds) - 1, width), dtype=stored["data"].dtype)
        places = np.repeat(np.arange(len(dense)) * width, np.diff(bounds)) + columns[part]
        np.add.at(dense.reshape(-1), places, numbers[part])  # an element that is stored twice is their sum
        return dense

    return read
