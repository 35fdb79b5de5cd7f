"""Rows from the arrays of one `.npz` file, which `NpzSource` describes."""

import math
import struct
import tokenize
import zipfile
import zlib
from collections import Counter
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
    convert,
    find_row_columns,
    not_taken,
    read_row_column,
    shown,
)
from dmvae.data.preparation.stream import Chunk, SourceLocation, Stream, chunk_rows
from dmvae.data.preparation.tables import nearest

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
    return Stream(_chunks(path, members, layout, labels), layout.num_rows, layout.notes, labels=labels)


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

    @property
    def row_bytes(self) -> int:
        return math.prod(self.shape[1:]) * self.dtype.itemsize

    @property
    def is_numeric(self) -> bool:
        """Whether the array holds numbers or booleans."""
        return self.dtype.kind in "fiub"

    @property
    def kind(self) -> str:
        """The type and shape of the array, for messages."""
        return f"{self.dtype}{list(self.shape)}"

    def fits(self, num_rows: int | None) -> bool:
        """Tell whether the array can be a modality of so many rows."""
        return self.is_numeric and bool(self.shape) and self.shape[0] == num_rows

    def check(self) -> None:
        """Refuse an array that cannot be read by rows.

        Raises:
            DatasetError: if it holds Python objects or is a single number.
        """
        name = self.name.removesuffix(".npy")
        if self.dtype.hasobject or self.dtype.names:
            raise DatasetError(f"Array {name!r} must hold numbers or strings, but got {self.dtype}. Convert it.")
        if not self.shape:
            raise DatasetError(f"Array {name!r} must have rows, but is a single number. Remove it.")

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

    `modalities` gives the array and the type of each modality, `masks` the modalities that have one, `fields` the array
    of each other field of `Rows`.
    """

    modalities: dict[str, tuple[str, str | None]]
    masks: list[str]
    fields: dict[str, str]
    num_rows: int
    row_bytes: int
    notes: tuple[str, ...]

    @property
    def arrays(self) -> list[str]:
        """The arrays that are read."""
        chosen = [array for array, _ in self.modalities.values()]
        return list(dict.fromkeys([*chosen, *self.fields.values(), *(f"mask.{name}" for name in self.masks)]))


def _layout(source: NpzSource, members: dict[str, _Member]) -> _Layout:
    settings = ("id", "label", "split", "size_factor", "group")
    fields = find_row_columns(source, settings, members, source.path, "array")
    masks = [name.removeprefix("mask.") for name in members if name.startswith("mask.")]
    others = [name for name in members if name not in fields.values() and not name.startswith("mask.")]
    if source.modalities is None:
        _refuse_split_arrays(others)
        known = [members[name] for name in (*fields.values(), *(f"mask.{name}" for name in masks))]
        num_rows = _num_rows(known or [members[name] for name in others if members[name].is_numeric], members)
        # what is named in a mask is meant, and is checked below
        taken = [name for name in others if name in masks or members[name].fits(num_rows)]
        _refuse_other_rows({name: members[name] for name in others if name not in taken}, num_rows or 0)
        chosen: dict[str, tuple[str, str | None]] = {name: (name, None) for name in taken}
    else:
        chosen = {name: (array.array or name, array.dtype) for name, array in source.modalities.items()}
    if not chosen:
        raise DatasetError(f"No modality among the arrays {shown(sorted(members))}. Add an array for each modality.")
    for name, (array, _) in chosen.items():
        if array not in members:
            raise DatasetError(
                f"Array {array!r} not found: the file has {shown(sorted(members))}.{nearest(array, list(members))} "
                f"Set source.modalities.{name}.array."
            )
    stray = sorted(set(masks) - set(chosen))
    if stray and source.modalities is None:
        raise DatasetError(f"Unknown modalities {stray} in masks. Rename them; modalities are {sorted(chosen)}.")
    found = _Layout(chosen, [name for name in masks if name in chosen], fields, 0, 0, ())
    for array in found.arrays:
        members[array].check()
    lengths = {array: members[array].shape[0] for array in found.arrays}
    if len(set(lengths.values())) > 1:
        raise DatasetError(
            f"Arrays must have the same number of rows, but got {lengths}. Choose arrays with source.modalities."
        )
    return found._replace(
        num_rows=next(iter(lengths.values())),
        row_bytes=sum(members[array].row_bytes for array in found.arrays),
        notes=tuple(not_taken([f"{name} {members[name].kind}" for name in members if name not in lengths], "arrays")),
    )


def _refuse_split_arrays(names: list[str]) -> None:
    """Refuse arrays such as `x_train` and `x_test`, whose rows are no rows of one another."""
    for name in names:
        if name.endswith("_train") and (test := f"{name.removesuffix('train')}test") in names:
            raise DatasetError(
                f"Arrays {name!r} and {test!r} are splits of one modality. Concatenate them, and add an array 'split' "
                f"with the split of each row."
            )


def _refuse_other_rows(arrays: dict[str, _Member], num_rows: int) -> None:
    """Refuse an array of numbers that has nearly as many rows as the others: rows are lost in it or in them."""
    for name, array in arrays.items():
        if array.is_numeric and array.shape and num_rows < 2 * array.shape[0] and array.shape[0] < 2 * num_rows:
            raise DatasetError(
                f"Arrays must have the same number of rows, but {name!r} has {array.shape[0]} and others {num_rows}. "
                f"Correct it, or choose arrays with source.modalities."
            )


def _num_rows(arrays: list[_Member], members: dict[str, _Member]) -> int | None:
    """Return the number of rows that most arrays have; None if there is none.

    Raises:
        DatasetError: if as many arrays have another number.
    """
    counts = Counter(array.shape[0] for array in arrays if array.shape).most_common(2)
    if len(counts) > 1 and counts[0][1] == counts[1][1]:
        raise DatasetError(
            f"Arrays must have the same number of rows, but got "
            f"{ {name: member.shape for name, member in members.items()} }. Choose arrays with source.modalities."
        )
    return counts[0][0] if counts else None


def _chunks(path: Path, members: dict[str, _Member], layout: _Layout, labels: ClassNames) -> Iterator[Chunk]:
    step = chunk_rows(layout.row_bytes)
    with _readable(path), zipfile.ZipFile(path) as file:
        readers = {name: members[name].rows(file, step) for name in layout.arrays}
        for start in range(0, layout.num_rows, step):
            arrays = {name: next(reader) for name, reader in readers.items()}
            location = SourceLocation(str(path), start)
            yield Chunk(_rows(arrays, layout, location, labels), location)


def _rows(arrays: dict[str, Array], layout: _Layout, location: SourceLocation, labels: ClassNames) -> Rows:
    modalities = {
        name: _modality(name, arrays[array], dtype, location) for name, (array, dtype) in layout.modalities.items()
    }
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


def _modality(name: str, array: Array, dtype: str | None, location: SourceLocation) -> Array:
    if dtype is not None:
        array = convert(name, array, np.dtype(dtype), location)
    elif array.dtype == bool or (array.dtype.kind in "iu" and array.dtype != np.uint8):
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
