"""Rows from the arrays of one `.npz` file; the convention is that of `NpzSource`."""

import math
import struct
import tokenize
import zipfile
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from dmvae.config.data import NpzSource
from dmvae.data.errors import DatasetError
from dmvae.data.preparation.rows import Rows
from dmvae.data.preparation.sources.arrow_columns import positive
from dmvae.data.preparation.stream import Chunk, SourceLocation, Stream, chunk_rows

Array = np.ndarray[Any, np.dtype[Any]]


# what zipfile and numpy raise on damaged files, by what is damaged
_UNREADABLE = (
    ValueError, OSError, EOFError, LookupError, SyntaxError, MemoryError, ArithmeticError, TypeError, RuntimeError,
    struct.error, tokenize.TokenError, zlib.error, zipfile.BadZipFile,
)  # fmt: skip


def read_npz(source: NpzSource) -> Stream:
    """Read the file; rows without `id` are numbered from 0.

    Unsigned and small integers other than uint8 become int64, booleans too; a modality `(rows,)` becomes `(rows, 1)`.
    An array in Fortran's order has no rows that lie together, and is held as a whole.

    Raises:
        DatasetError: if the file is absent or no `.npz`, holds Python objects, or its arrays do not fit together.
    """
    path = Path(source.path)
    if not path.is_file():
        raise DatasetError(f"a source is a file that exists; got {str(path)!r}. Correct source.path.")
    with _readable(path):
        if not zipfile.is_zipfile(path):
            array = np.load(path, allow_pickle=False)
            assert isinstance(array, np.ndarray)
            raise DatasetError("a source holds named arrays; got one array. Save it with numpy.savez.")
        with zipfile.ZipFile(path) as file:
            members = {name.removesuffix(".npy"): _Member(file, name) for name in file.namelist()}
        layout = _layout(source, members)
    return Stream(_chunks(path, members, layout), layout.num_rows)


@contextmanager
def _readable(path: Path) -> Iterator[None]:
    """Name the file in what is raised."""
    try:
        yield
    except DatasetError as error:
        raise DatasetError(f"{path}: {error}") from error
    except _UNREADABLE as error:
        raise DatasetError(
            f"{path}: a source is an .npz file of numbers and strings; got: {error}. Save it with numpy.savez."
        ) from error


class _Member:
    """One array of the file: its shape and type, and its rows from the first on."""

    def __init__(self, file: zipfile.ZipFile, name: str) -> None:
        self.name = name
        with file.open(name) as stream:
            self.shape, self._fortran, self.dtype = _header(stream)
        if self.dtype.hasobject or self.dtype.names:
            raise ValueError(f"an array of {self.dtype} in {name}")

    @property
    def row_bytes(self) -> int:
        return math.prod(self.shape[1:]) * self.dtype.itemsize

    def rows(self, file: zipfile.ZipFile, step: int) -> Iterator[Array]:
        """Yield the array, `step` rows at a time."""
        with file.open(self.name) as stream:
            if self._fortran:
                whole = np.lib.format.read_array(stream, allow_pickle=False)
            else:
                _header(stream)
            for start in range(0, self.shape[0], step):
                shape = (min(step, self.shape[0] - start), *self.shape[1:])
                if self._fortran:
                    array = whole[start : start + step]
                else:
                    size = shape[0] * self.row_bytes
                    array = np.frombuffer(_read(stream, size), self.dtype, math.prod(shape)).reshape(shape)
                if self.dtype.kind == "u" and array.max(initial=0) > np.iinfo(np.int64).max:
                    raise ValueError(f"{array.max()} in {self.name}, where an integer has 64 bits with its sign")
                yield array.astype(self.dtype.newbyteorder("="), copy=False)


def _header(stream: Any) -> tuple[tuple[int, ...], bool, np.dtype[Any]]:
    version = np.lib.format.read_magic(stream)
    if version == (1, 0):
        return np.lib.format.read_array_header_1_0(stream)
    if version == (2, 0):
        return np.lib.format.read_array_header_2_0(stream)
    raise ValueError(f"format {version} of numpy")


def _read(stream: Any, size: int) -> bytes:
    found: bytes = stream.read(size)
    if len(found) != size:
        raise EOFError(f"{len(found)} bytes where there should be {size}")
    return found


class _Layout(NamedTuple):
    """The names of the arrays by what they are."""

    modalities: list[str]
    masks: list[str]
    special: dict[str, str]
    num_rows: int
    row_bytes: int


def _layout(source: NpzSource, members: dict[str, _Member]) -> _Layout:
    if source.group is not None and source.group not in members:
        raise DatasetError(f"source.group is an array; got {source.group!r}. There are {sorted(members)}.")
    roles = {"id": "id", "label": "label", "split": "split", "size_factor": "size_factor", "group": source.group}
    special = {role: name for role, name in roles.items() if name in members and name is not None}
    masks = [name.removeprefix("mask.") for name in members if name.startswith("mask.")]
    modalities = [name for name in members if name not in special.values() and not name.startswith("mask.")]
    if not modalities:
        raise DatasetError(f"rows have at least one modality; got arrays {sorted(members)}. Add an array of its name.")
    stray = sorted(set(masks) - set(modalities))
    if stray:
        raise DatasetError(f"a mask belongs to a modality; got masks for {stray}. Modalities: {sorted(modalities)}.")
    for name, member in members.items():
        if not member.shape:
            raise DatasetError(f"a modality is (rows, *shape); got a single number for {name!r}. Leave it out.")
    lengths = {name: member.shape[0] for name, member in members.items()}
    if len(set(lengths.values())) > 1:
        raise DatasetError(f"all arrays have the same number of rows; got {lengths}.")
    row_bytes = sum(member.row_bytes for member in members.values())
    return _Layout(modalities, masks, special, next(iter(lengths.values())), row_bytes)


def _chunks(path: Path, members: dict[str, _Member], layout: _Layout) -> Iterator[Chunk]:
    step = chunk_rows(layout.row_bytes)
    with _readable(path), zipfile.ZipFile(path) as file:
        readers = {name: member.rows(file, step) for name, member in members.items()}
        for start in range(0, layout.num_rows, step):
            arrays = {name: next(reader) for name, reader in readers.items()}
            yield Chunk(_rows(arrays, layout, start), SourceLocation(str(path), start))


def _rows(arrays: dict[str, Array], layout: _Layout, start: int) -> Rows:
    special = {role: arrays[name] for role, name in layout.special.items()}
    modalities = {name: _modality(arrays[name]) for name in layout.modalities}
    num_rows = len(next(iter(arrays.values())))
    return Rows(
        ids=_ids(special["id"]) if "id" in special else np.arange(start, start + num_rows),
        data=modalities,
        present={
            name: _mask(name, arrays[f"mask.{name}"]) if name in layout.masks else _not_all_nan(values)
            for name, values in modalities.items()
        },
        labels=_integers("label", special["label"]) if "label" in special else None,
        splits=_strings("split", special["split"]) if "split" in special else None,
        size_factors=_floats("size_factor", special["size_factor"], start) if "size_factor" in special else None,
        groups=_ids(special["group"], "group") if "group" in special else None,
    )


def _modality(array: Array) -> Array:
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


def _ids(array: Array, name: str = "id") -> Array:
    return _integers(name, array) if array.dtype.kind in "iu" else _strings(name, array)


def _integers(name: str, array: Array) -> Array:
    if array.dtype.kind not in "iu" or array.ndim != 1:
        raise DatasetError(f"{name} is (rows,) integers; got {array.dtype}{array.shape}. Convert it.")
    return array.astype(np.int64)


def _floats(name: str, array: Array, start: int) -> Array:
    if array.dtype.kind not in "fiu" or array.ndim != 1:
        raise DatasetError(f"{name} is (rows,) numbers; got {array.dtype}{array.shape}. Convert it.")
    return positive(array.astype(np.float64), name, start)


def _strings(name: str, array: Array) -> Array:
    if array.dtype.kind not in "SU" or array.ndim != 1:
        raise DatasetError(f"{name} is (rows,) strings; got {array.dtype}{array.shape}. Convert it.")
    return np.char.decode(array, "utf-8") if array.dtype.kind == "S" else array
