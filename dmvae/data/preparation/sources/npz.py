"""Rows from the arrays of one `.npz` file, which `NpzSource` describes."""

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
import pyarrow as pa

from dmvae.config.sources import NpzSource
from dmvae.data.errors import DatasetError
from dmvae.data.preparation.class_names import ClassNames
from dmvae.data.preparation.rows import Rows
from dmvae.data.preparation.sources.arrow_columns import (
    Array,
    check_size_factors,
    find_row_columns,
    read_row_column,
    shown,
)
from dmvae.data.preparation.stream import Chunk, SourceLocation, Stream, chunk_rows

# what zipfile and numpy raise on damaged files
_UNREADABLE = (
    ValueError, OSError, EOFError, LookupError, SyntaxError, MemoryError, ArithmeticError, TypeError, RuntimeError,
    struct.error, tokenize.TokenError, zlib.error, zipfile.BadZipFile,
)  # fmt: skip


def read(source: NpzSource, seed: int, scratch: Path) -> Stream:
    """Read the file; without `id`, rows are numbered from 0.

    Booleans and integers other than uint8 become int64; a modality `(rows,)` becomes `(rows, 1)`. An array in Fortran
    order is read whole, because its rows are not contiguous.

    Raises:
        DatasetError: if the file is absent or is not `.npz`, holds Python objects, or its arrays do not fit together.
    """
    path = Path(source.path)
    if not path.is_file():
        raise DatasetError(f"Source file not found: {path}. Correct source.path.")
    with _readable(path):
        if not zipfile.is_zipfile(path):
            array = np.load(path, allow_pickle=False)
            assert isinstance(array, np.ndarray)
            raise DatasetError("Expected named arrays, got a single one. Save it with numpy.savez.")
        with zipfile.ZipFile(path) as file:
            members = {name.removesuffix(".npy"): _Member(file, name) for name in file.namelist()}
        layout = _layout(source, members)
    labels = ClassNames()
    return Stream(_chunks(path, members, layout, labels), layout.num_rows, labels=labels)


@contextmanager
def _readable(path: Path) -> Iterator[None]:
    """Name the file in errors."""
    try:
        yield
    except DatasetError as error:
        raise DatasetError(f"Cannot read {path}: {error}") from error
    except _UNREADABLE as error:
        raise DatasetError(
            f"Cannot read {path} as an .npz file of numbers and strings: {error}. Save it with numpy.savez."
        ) from error


class _Member:
    """One array of the file: its shape, its type, and its rows in order."""

    def __init__(self, file: zipfile.ZipFile, name: str) -> None:
        self.name = name
        with file.open(name) as stream:
            self.shape, self._fortran, self.dtype = _header(stream)
        if self.dtype.hasobject or self.dtype.names:
            raise ValueError(f"array {name!r} is of type {self.dtype}")

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
                    raise ValueError(f"array {self.name!r} has {array.max()}, which does not fit in int64")
                yield array.astype(self.dtype.newbyteorder("="), copy=False)


def _header(stream: Any) -> tuple[tuple[int, ...], bool, np.dtype[Any]]:
    version = np.lib.format.read_magic(stream)
    if version == (1, 0):
        return np.lib.format.read_array_header_1_0(stream)
    if version == (2, 0):
        return np.lib.format.read_array_header_2_0(stream)
    raise ValueError(f"version {version} of the .npy format is unknown")


def _read(stream: Any, size: int) -> bytes:
    found: bytes = stream.read(size)
    if len(found) != size:
        raise EOFError(f"expected {size} bytes, got {len(found)}")
    return found


class _Layout(NamedTuple):
    """What each array is.

    `fields` gives the array of each field of `Rows` besides the modalities and their masks.
    """

    modalities: list[str]
    masks: list[str]
    fields: dict[str, str]
    num_rows: int
    row_bytes: int


def _layout(source: NpzSource, members: dict[str, _Member]) -> _Layout:
    settings = ("id", "label", "split", "size_factor", "group")
    fields = find_row_columns(source, settings, members, source.path, "array")
    masks = [name.removeprefix("mask.") for name in members if name.startswith("mask.")]
    modalities = [name for name in members if name not in fields.values() and not name.startswith("mask.")]
    if not modalities:
        raise DatasetError(f"No modality among the arrays {shown(sorted(members))}. Add an array for each modality.")
    stray = sorted(set(masks) - set(modalities))
    if stray:
        raise DatasetError(f"Unknown modalities {stray} in masks. Rename them; modalities are {sorted(modalities)}.")
    for name, member in members.items():
        if not member.shape:
            raise DatasetError(f"Array {name!r} must have rows, but is a single number. Remove it.")
    lengths = {name: member.shape[0] for name, member in members.items()}
    if len(set(lengths.values())) > 1:
        raise DatasetError(f"Arrays must have the same number of rows, but got {lengths}.")
    row_bytes = sum(member.row_bytes for member in members.values())
    return _Layout(modalities, masks, fields, next(iter(lengths.values())), row_bytes)


def _chunks(path: Path, members: dict[str, _Member], layout: _Layout, labels: ClassNames) -> Iterator[Chunk]:
    step = chunk_rows(layout.row_bytes)
    with _readable(path), zipfile.ZipFile(path) as file:
        readers = {name: member.rows(file, step) for name, member in members.items()}
        for start in range(0, layout.num_rows, step):
            arrays = {name: next(reader) for name, reader in readers.items()}
            location = SourceLocation(str(path), start)
            yield Chunk(_rows(arrays, layout, location, labels), location)


def _rows(arrays: dict[str, Array], layout: _Layout, location: SourceLocation, labels: ClassNames) -> Rows:
    modalities = {name: _modality(arrays[name]) for name in layout.modalities}
    num_rows = len(next(iter(arrays.values())))
    fields = {"ids": np.arange(location.first, location.first + num_rows)} | {
        field: _field(field, name, arrays[name], location, labels) for field, name in layout.fields.items()
    }
    present = {
        name: _mask(name, arrays[f"mask.{name}"]) if name in layout.masks else _not_all_nan(values)
        for name, values in modalities.items()
    }
    return Rows(data=modalities, present=present, **fields)


def _field(field: str, name: str, array: Array, location: SourceLocation, labels: ClassNames) -> Array:
    """Return an array as the field of `Rows` with that name."""
    if field == "labels":
        known = _check_kind(name, array, "iuSUbf", "integers, strings, booleans or whole numbers")
        texts = np.char.decode(known, "utf-8") if known.dtype.kind == "S" else known
        where = SourceLocation(f"array {name!r}", location.first)
        return read_row_column(field, pa.array(texts.tolist() if texts.dtype.kind == "U" else texts), where, labels)
    if field in ("ids", "groups") and array.dtype.kind in "iu":
        return _check_kind(name, array, "iu", "integers").astype(np.int64)
    if field == "size_factors":
        numbers = _check_kind(name, array, "fiu", "numbers").astype(np.float64)
        return check_size_factors(numbers, SourceLocation(f"array {name!r}", location.first))
    strings = _check_kind(name, array, "SU", "strings" if field == "splits" else "strings or integers")
    return np.char.decode(strings, "utf-8") if strings.dtype.kind == "S" else strings


def _check_kind(name: str, array: Array, kinds: str, expected: str) -> Array:
    if array.dtype.kind not in kinds or array.ndim != 1:
        raise DatasetError(
            f"Array {name!r} must hold {expected}, one for each row, but got {array.dtype} of shape "
            f"(rows{''.join(f', {size}' for size in array.shape[1:])}). Convert it."
        )
    return array


def _modality(array: Array) -> Array:
    if array.dtype == bool or (array.dtype.kind in "iu" and array.dtype != np.uint8):
        array = array.astype(np.int64)
    return array.reshape(len(array), 1) if array.ndim == 1 else array


def _mask(name: str, array: Array) -> Array:
    flat = array.reshape(-1) if array.ndim == 2 and array.shape[1] == 1 else array
    if flat.ndim != 1 or not (flat.dtype == bool or np.isin(flat, (0, 1)).all()):
        raise DatasetError(
            f"Array 'mask.{name}' must be boolean or 0/1, one for each row, but got {array.dtype} of shape "
            f"{array.shape}. Convert it."
        )
    return flat.astype(bool)


def _not_all_nan(values: Array) -> Array:
    if values.dtype.kind != "f":
        return np.ones(len(values), dtype=bool)
    return np.asarray(~np.isnan(values).reshape(len(values), -1).all(axis=1))
