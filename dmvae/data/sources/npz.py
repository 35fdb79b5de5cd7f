"""Rows from the arrays of one `.npz` file; the convention is that of `NpzSource`."""

import struct
import tokenize
import zipfile
import zlib
from pathlib import Path
from typing import Any

import numpy as np

from dmvae.config.data import NpzSource
from dmvae.data.error import DatasetError
from dmvae.data.rows import Rows

Array = np.ndarray[Any, np.dtype[Any]]


def read_npz(source: NpzSource) -> Rows:
    """Read the file; rows without `id` are numbered from 0.

    Unsigned and small integers other than uint8 become int64, booleans too; a modality `(rows,)` becomes `(rows, 1)`.

    Raises:
        DatasetError: if the file is absent or no `.npz`, holds Python objects, or its arrays do not fit together.
    """
    arrays = _load(Path(source.path))
    try:
        return _rows(arrays)
    except DatasetError as error:
        raise DatasetError(f"{source.path}: {error}") from error


# what zipfile and numpy raise on damaged files, by what is damaged
_UNREADABLE = (
    ValueError, OSError, EOFError, LookupError, SyntaxError, MemoryError, ArithmeticError, TypeError, RuntimeError,
    struct.error, tokenize.TokenError, zlib.error, zipfile.BadZipFile,
)  # fmt: skip


def _load(path: Path) -> dict[str, Array]:
    if not path.is_file():
        raise DatasetError(f"a source is a file that exists; got {str(path)!r}. Correct source.path.")
    try:
        with path.open("rb") as stream:
            file = np.load(stream, allow_pickle=False)
            if isinstance(file, np.ndarray):
                raise DatasetError(f"{path}: a source holds named arrays; got one array. Save it with numpy.savez.")
            with file:
                return {name: file[name] for name in file.files}
    except DatasetError:
        raise
    except _UNREADABLE as error:
        raise DatasetError(
            f"{path}: a source is an .npz file of numbers and strings; got: {error}. Save it with numpy.savez."
        ) from error


def _rows(arrays: dict[str, Array]) -> Rows:
    masks = {name.removeprefix("mask."): array for name, array in arrays.items() if name.startswith("mask.")}
    special = {name: arrays.get(name) for name in ("id", "label", "split")}
    modalities = {
        name: _modality(name, array)
        for name, array in arrays.items()
        if name not in special and not name.startswith("mask.")
    }
    if not modalities:
        raise DatasetError(f"rows have at least one modality; got arrays {sorted(arrays)}. Add an array of its name.")
    stray = sorted(masks.keys() - modalities.keys())
    if stray:
        raise DatasetError(f"a mask belongs to a modality; got masks for {stray}. Modalities: {sorted(modalities)}.")
    num_rows = len(next(iter(modalities.values())))
    return Rows(
        ids=np.arange(num_rows) if special["id"] is None else _ids(special["id"]),
        data=modalities,
        present={
            name: _mask(name, masks[name]) if name in masks else _not_all_nan(values)
            for name, values in modalities.items()
        },
        labels=None if special["label"] is None else _integers("label", special["label"]),
        splits=None if special["split"] is None else _strings("split", special["split"]),
    )


def _modality(name: str, array: Array) -> Array:
    if array.ndim == 0:
        raise DatasetError(f"a modality is (rows, *shape); got a single number for {name!r}. Leave it out.")
    if array.dtype == bool or (array.dtype.kind in "iu" and array.dtype != np.uint8):
        array = array.astype(np.int64)
    return array.reshape(len(array), 1) if array.ndim == 1 else array


def _mask(name: str, array: Array) -> Array:
    flat = array.reshape(-1) if array.ndim == 2 and array.shape[1] == 1 else array
    if flat.ndim != 1 or not (flat.dtype == bool or np.isin(flat, (0, 1)).all()):
        raise DatasetError(f"a mask is (rows,), boolean or 0/1; got {array.dtype}{array.shape} for mask.{name}.")
    return flat.astype(bool)


def _not_all_nan(values: Array) -> Array:
    if values.dtype.kind != "f":
        return np.ones(len(values), dtype=bool)
    return np.asarray(~np.isnan(values).reshape(len(values), -1).all(axis=1))


def _ids(array: Array) -> Array:
    return _integers("id", array) if array.dtype.kind in "iu" else _strings("id", array)


def _integers(name: str, array: Array) -> Array:
    if array.dtype.kind not in "iu" or array.ndim != 1:
        raise DatasetError(f"{name} is (rows,) integers; got {array.dtype}{array.shape}. Convert it.")
    return array.astype(np.int64)


def _strings(name: str, array: Array) -> Array:
    if array.dtype.kind not in "SU" or array.ndim != 1:
        raise DatasetError(f"{name} is (rows,) strings; got {array.dtype}{array.shape}. Convert it.")
    return np.char.decode(array, "utf-8") if array.dtype.kind == "S" else array
