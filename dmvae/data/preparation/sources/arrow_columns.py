"""Arrow columns to the arrays of `Rows`: lists, fixed-size binary, or several columns of numbers as one vector."""

import math
from collections.abc import Sequence
from fnmatch import fnmatchcase
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from dmvae.config.data import ColumnGroup
from dmvae.config.section import check_modality_name
from dmvae.data.errors import DatasetError

Array = np.ndarray[Any, np.dtype[Any]]
Values = tuple[Array, Array]
"""`(rows, *shape)` of a type that shards store, and `(rows,)` booleans, true where the row has the modality."""


def named(name: str, where: str) -> str:
    """Return the name that a source gives a modality, if it may be called so.

    Raises:
        DatasetError: if not.
    """
    try:
        return check_modality_name(name)
    except ValueError as error:
        raise DatasetError(
            f"{where}: {str(error).rstrip('.')}, or name it otherwise with source.modalities."
        ) from error


def matching(group: ColumnGroup, columns: Sequence[str]) -> list[str]:
    """Return the columns that a group's pattern takes, in their order.

    Raises:
        DatasetError: if there are none.
    """
    found = [column for column in columns if fnmatchcase(column, group.columns)]
    if not found:
        shown = ", ".join(columns[:10]) + (", ..." if len(columns) > 10 else "")
        raise DatasetError(f"a modality has columns; {group.columns!r} matches none of {shown}. Correct the pattern.")
    return found


def modality(name: str, columns: Sequence[pa.Array], group: ColumnGroup, where: str, first_row: int = 0) -> Values:
    """Convert the columns of one modality.

    Null, and floats that are all NaN, are missing. A null among other numbers of a row is NaN; integers have no NaN.

    Args:
        name: of the modality, for messages.
        columns: one column of lists or of fixed-size binary, or any number of columns of numbers.
        group: type and shape.
        where: the file, for messages.
        first_row: the number in the file of the first row, for messages.

    Raises:
        DatasetError: if a column is of another type, or rows have different shapes; with file and row.
    """
    place = f"{where}, modality {name!r}"
    kind = columns[0].type
    if len(columns) == 1 and pa.types.is_fixed_size_binary(kind):
        values, present = _from_binary(columns[0], group, place)
    elif len(columns) == 1 and isinstance(kind, pa.FixedShapeTensorType):
        values, present = _from_lists(columns[0].storage, place, first_row)
        values = values.reshape(len(values), *kind.shape)
    elif len(columns) == 1 and _is_list(kind):
        values, present = _from_lists(columns[0], place, first_row)
    else:
        values, present = _from_numbers(columns, place, first_row)
    if values.dtype.kind == "f":
        present = present & ~np.isnan(values).reshape(len(values), -1).all(axis=1)
    if group.dtype is not None:
        values[~present] = 0
        values = converted(values, np.dtype(group.dtype), place, first_row)
    return _shaped(values, present, group, place), present


def converted(values: Array, dtype: np.dtype[Any], place: str, first_row: int = 0) -> Array:
    """Return `(rows, ...)` as another type.

    Raises:
        DatasetError: if that is of integers and does not hold a value; with its row.
    """
    with np.errstate(invalid="ignore", over="ignore"):
        found = values.astype(dtype)
    if dtype.kind in "iu" and values.dtype != dtype:
        wrong = found != values
        if wrong.any():
            row = int(np.flatnonzero(wrong.reshape(len(values), -1).any(axis=1))[0])
            raise DatasetError(
                f"{place}, row {first_row + row}: a type holds the values that are converted to it; got "
                f"{values[wrong][0]} for {dtype.name}. Choose another dtype."
            )
    return np.asarray(found)


def ids(column: pa.Array, where: str, first_row: int = 0, what: str = "an id", unit: str = "row") -> Array:
    """Return integers or strings.

    Raises:
        DatasetError: if it is of another type or has a null; with file and row.
    """
    if pa.types.is_dictionary(column.type):
        column = column.cast(column.type.value_type)
    if pa.types.is_integer(column.type):
        _refuse_null(what, column, where, first_row, unit)
        return np.asarray(column.cast(pa.int64()).to_numpy(zero_copy_only=False))
    return strings(what, column, where, first_row, unit)


def strings(what: str, column: pa.Array, where: str, first_row: int = 0, unit: str = "row") -> Array:
    """Return `(rows,)` strings.

    Raises:
        DatasetError: if it is of another type or has a null; with file and row.
    """
    if pa.types.is_dictionary(column.type):
        column = column.cast(column.type.value_type)
    if not (pa.types.is_string(column.type) or pa.types.is_large_string(column.type)):
        raise DatasetError(
            f"{where}: {what} is a string{'' if what == 'a split' else ' or an integer'}; got {column.type}. "
            f"Cast the column."
        )
    _refuse_null(what, column, where, first_row, unit)
    return np.array(column.to_pylist(), dtype=np.str_)


def labels(column: pa.Array, where: str, first_row: int = 0, unit: str = "row") -> Array:
    """Return int64, -1 for null.

    Raises:
        DatasetError: if it is not of integers; with file and row.
    """
    if pa.types.is_null(column.type):
        return np.full(len(column), -1)
    if pa.types.is_dictionary(column.type):
        column = column.cast(column.type.value_type)
    if pa.types.is_floating(column.type):  # as pandas writes integers of which some are missing
        values = np.asarray(column.to_numpy(zero_copy_only=False), dtype=np.float64)
        known = ~np.isnan(values)
        if (np.isfinite(values[known]) & (values[known] == np.rint(values[known]))).all():
            return np.where(known, values, -1).astype(np.int64)
    if not pa.types.is_integer(column.type):
        odd = [(row, found) for row, found in enumerate(column.to_pylist()) if not _is_whole(found)]
        row, found = odd[0] if odd else (0, column[:1].to_pylist()[0] if len(column) else None)
        raise DatasetError(
            f"{where}, {unit} {first_row + row}: labels are integers or null; got {column.type} in column label, such "
            f"as {found!r}. Number the classes from 0."
        )
    return np.asarray(pc.fill_null(column.cast(pa.int64()), -1).to_numpy(zero_copy_only=False))


def size_factors(column: pa.Array, where: str, first_row: int = 0, unit: str = "row") -> Array:
    """Return float64, NaN for null.

    Raises:
        DatasetError: if it is not of positive numbers; with file and row.
    """
    if not (pa.types.is_floating(column.type) or pa.types.is_integer(column.type) or pa.types.is_null(column.type)):
        raise DatasetError(f"{where}: size factors are numbers or null; got {column.type}. Cast the column.")
    return positive(np.asarray(column.cast(pa.float64()).to_numpy(zero_copy_only=False)), where, first_row, unit)


def positive(factors: Array, where: str, first_row: int, unit: str = "row") -> Array:
    """Return size factors as they are.

    Raises:
        DatasetError: if one is neither positive nor NaN; with file and row.
    """
    wrong = np.flatnonzero(~np.isnan(factors) & ~((factors > 0) & (factors < np.inf)))
    if len(wrong):
        raise DatasetError(
            f"{where}, {unit} {first_row + wrong[0]}: a size factor is positive and finite; got {factors[wrong[0]]}. "
            f"Correct it, or make it null."
        )
    return factors


def _is_whole(found: Any) -> bool:
    if isinstance(found, float):
        return math.isnan(found) or found.is_integer()
    return found is None or str(found).removeprefix("-").isdigit()


def _is_list(kind: pa.DataType) -> bool:
    return bool(pa.types.is_list(kind) or pa.types.is_large_list(kind) or pa.types.is_fixed_size_list(kind))


def _refuse_null(what: str, column: pa.Array, where: str, first_row: int, unit: str) -> None:
    if column.null_count:
        row = first_row + int(np.flatnonzero(column.is_null().to_numpy(zero_copy_only=False))[0])
        raise DatasetError(f"{where}, {unit} {row}: {what} is not null. Fill it in, or remove the row.")


def _from_binary(column: pa.Array, group: ColumnGroup, place: str) -> Values:
    dtype = np.dtype(group.dtype or "uint8").newbyteorder("<")
    width = column.type.byte_width
    if width % dtype.itemsize:
        raise DatasetError(f"{place}: {width} bytes hold whole elements of {dtype.name}. Correct dtype.")
    filled = pc.fill_null(column, pa.scalar(b"\0" * width, column.type)) if column.null_count else column
    buffer = filled.buffers()[1]
    raw = np.frombuffer(buffer, np.uint8, count=len(column) * width, offset=filled.offset * width)
    present = column.is_valid().to_numpy(zero_copy_only=False)
    return raw.view(dtype).astype(dtype.newbyteorder("=")).reshape(len(column), -1), present


def _from_lists(column: pa.Array, place: str, first_row: int) -> Values:
    """Stack lists, which may be nested, into one array."""
    present = column.is_valid().to_numpy(zero_copy_only=False)
    inner, shape = column.drop_null(), []
    while _is_list(inner.type):
        lengths = pc.list_value_length(inner).to_numpy(zero_copy_only=False)
        length = int(lengths[0]) if len(lengths) and lengths[0] == lengths[0] else 0
        if (lengths != length).any():
            per_row = len(lengths) // max(1, int(present.sum()))
            odd = int(np.flatnonzero(lengths != length)[0])
            row = first_row + int(np.flatnonzero(present)[odd // per_row])
            raise DatasetError(
                f"{place}, row {row}: all rows have the same shape; got {lengths[odd]:.0f} elements, {length} before. "
                f"Make that row null, or correct it."
            )
        shape.append(length)
        inner = inner.flatten()
    known, _ = _numbers(inner, place, first_row)
    values = np.zeros((len(column), *shape), known.dtype)
    values[present] = known.reshape(int(present.sum()), *shape)
    return values, present


def _from_numbers(columns: Sequence[pa.Array], place: str, first_row: int) -> Values:
    """Put columns of numbers side by side; a row in which all are null is missing."""
    present = np.logical_or.reduce([column.is_valid().to_numpy(zero_copy_only=False) for column in columns])
    parts = []
    for column in columns:
        given = column.filter(pa.array(present)) if not present.all() else column
        known, _ = _numbers(given, place, first_row)
        part = np.zeros(len(column), known.dtype)
        part[present] = known
        parts.append(part)
    kinds = {part.dtype for part in parts}
    dtype = kinds.pop() if len(kinds) == 1 else np.result_type(*parts)
    return np.stack([part.astype(dtype, copy=False) for part in parts], axis=1), present


def _numbers(column: pa.Array, place: str, first_row: int) -> Values:
    kind = column.type
    valid = column.is_valid().to_numpy(zero_copy_only=False)
    if pa.types.is_floating(kind):
        return np.asarray(column.to_numpy(zero_copy_only=False)), valid
    if pa.types.is_null(kind):
        return np.full(len(column), np.nan, np.float32), valid
    if not (pa.types.is_integer(kind) or pa.types.is_boolean(kind)):
        raise DatasetError(
            f"{place}: modalities are numbers, lists of them or fixed-size binary; got {kind}. Leave the column out "
            f"with source.modalities, or cast it."
        )
    if column.null_count:
        raise DatasetError(
            f"{place}, from row {first_row} on: integers of a row are all there or all null; got {column.null_count} "
            f"nulls among others. Make them floats, or fill them in."
        )
    return np.asarray(column.cast(pa.uint8() if kind == pa.uint8() else pa.int64()).to_numpy(False)), valid


def _shaped(values: Array, present: Array, group: ColumnGroup, place: str) -> Array:
    if group.shape is None:
        return values
    if not present.any():  # lists that are null have no size
        return np.zeros((len(values), *group.shape), values.dtype)
    if int(np.prod(group.shape)) != values[:1].size:
        raise DatasetError(f"{place}: a row has {values[:1].size} elements; got shape={group.shape}. Correct it.")
    return values.reshape(len(values), *group.shape)
