"""Convert Arrow columns to the arrays of `Rows`: ids, labels and the like, and modalities."""

import math
from collections.abc import Collection, Sequence
from fnmatch import fnmatchcase
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from dmvae.config.section import Section, check_modality_name
from dmvae.config.sources import ColumnGroup
from dmvae.data.errors import DatasetError
from dmvae.data.format.schema import MISSING_INTEGER, missing_cells
from dmvae.data.preparation.class_names import ClassNames, are_names
from dmvae.data.preparation.stream import SourceLocation
from dmvae.data.preparation.tables import blank, nearest

Array = np.ndarray[Any, np.dtype[Any]]
Values = tuple[Array, Array]
"""`(rows, *shape)` of a type that shards store, and `(rows,)` booleans, true where the row has the modality."""

ROW_FIELDS = {"id": "ids", "label": "labels", "split": "splits", "size_factor": "size_factors", "group": "groups"}
"""The field of `Rows` that each setting of a source names a column for."""


def find_row_columns(
    source: Section, settings: Collection[str], available: Collection[str], where: str, what: str = "column"
) -> dict[str, str]:
    """Return the column of each field of `Rows` among `settings`; optional columns may be absent.

    Raises:
        DatasetError: if a column that was named in the settings is absent.
    """
    found = {}
    for setting in settings:
        column = getattr(source, setting, setting)
        if column is None:
            continue
        if column in available:
            found[ROW_FIELDS[setting]] = column
        elif column != setting:
            raise DatasetError(
                f"{what.capitalize()} {column!r} not found in {where}, which has {shown(available)}. "
                f"Correct source.{setting}."
            )
    return found


def shown(names: Collection[str]) -> str:
    """Return the first few of `names`, for a message."""
    return ", ".join(list(names)[:10]) + (", ..." if len(names) > 10 else "")


def not_taken(names: Sequence[str], what: str = "columns") -> list[str]:
    """Return the line that says what a source holds and no setting takes; none if everything is taken."""
    return [f"not taken: {len(names)} {what} ({shown(names)})"] if names else []


def check_source_name(name: str, where: str) -> str:
    """Return the name that a source gives a modality.

    Raises:
        DatasetError: if a modality cannot have this name.
    """
    try:
        return check_modality_name(name)
    except ValueError as error:
        raise DatasetError(f"Cannot read {where}: {error} Or set names in source.modalities.") from error


def match_columns(name: str, group: ColumnGroup, columns: Sequence[str], where: str) -> list[str]:
    """Return the columns of modality `name`: those that a pattern matches in their order, a list's in its own.

    Raises:
        DatasetError: if a name or a pattern matches none.
    """
    found: list[str] = []
    for pattern in (group.columns,) if isinstance(group.columns, str) else group.columns:
        matched = [pattern] if pattern in columns else [c for c in columns if fnmatchcase(c, pattern)]
        if not matched:
            is_name = not set(pattern) & set("*?[")
            raise DatasetError(
                f"{'Column' if is_name else 'Pattern'} {pattern!r} "
                f"{'not found in' if is_name else 'matches no column of'} {where}, which has {shown(columns)}."
                f"{nearest(pattern, columns) if is_name else ''} Correct source.modalities.{name}.columns."
            )
        found += [column for column in matched if column not in found]
    return found


def read_modality(name: str, columns: Sequence[pa.Array], group: ColumnGroup, location: SourceLocation) -> Values:
    """Convert the columns of one modality.

    Null is missing, and so is a row of floats that are all NaN. A null among other numbers of a row is a missing cell:
    NaN in floats, `MISSING_INTEGER` in integers.

    Args:
        name: the modality, for messages.
        columns: one column of lists or of fixed-size binary, or any number of numeric columns.
        group: type and shape of the result.
        location: where the rows come from, for messages.

    Raises:
        DatasetError: if a column has another type, bytes have some nulls, or rows have different shapes.
    """
    kind = columns[0].type
    if len(columns) == 1 and pa.types.is_fixed_size_binary(kind):
        values, present = _read_binary(name, columns[0], group, location)
    elif len(columns) == 1 and isinstance(kind, pa.FixedShapeTensorType):
        values, present = _read_lists(name, columns[0].storage, location)
        values = values.reshape(len(values), *kind.shape)
    elif len(columns) == 1 and _is_list(kind):
        values, present = _read_lists(name, columns[0], location)
    else:
        values, present = _read_numbers(name, [blank(column, group.missing) for column in columns], group, location)
    if values.dtype.kind == "f":
        present = present & ~np.isnan(values).reshape(len(values), -1).all(axis=1)
    if group.dtype is not None:
        values[~present] = 0
        values = convert(name, values, np.dtype(group.dtype), location)
    return _reshape(name, values, present, group, location), present


def convert(name: str, values: Array, dtype: np.dtype[Any], location: SourceLocation) -> Array:
    """Return the values `(rows, ...)` of modality `name` as another type.

    Raises:
        DatasetError: if an integer type cannot hold a value.
    """
    with np.errstate(invalid="ignore", over="ignore"):
        found = values.astype(dtype)
    if values.dtype == np.int64 and dtype.kind == "f":
        found[missing_cells(values)] = np.nan
    if dtype == np.int64 and values.dtype.kind == "f":
        found[missing_cells(values)], values = MISSING_INTEGER, np.where(missing_cells(values), MISSING_INTEGER, values)
    if dtype.kind in "iu" and values.dtype != dtype:
        wrong = found != values
        if wrong.any():
            row = int(np.flatnonzero(wrong.reshape(len(values), -1).any(axis=1))[0])
            raise DatasetError(
                f"Cannot convert {values[wrong][0]} to {dtype.name} for modality {name!r} in {location.of(row)}. "
                f"Choose another source.modalities.{name}.dtype."
            )
    return np.asarray(found)


def read_row_column(field: str, column: pa.Array, location: SourceLocation, names: ClassNames) -> Array:
    """Convert a column to the field of `Rows` with that name: `ids`, `labels`, `splits`, `groups` or `size_factors`.

    A null label becomes -1, and a null size factor NaN. Labels that are no integers are numbered with `names`.

    Raises:
        DatasetError: if the column has another type, or a null that is not allowed.
    """
    if field == "labels":
        return _read_labels(column, location, names)
    if pa.types.is_dictionary(column.type):
        column = column.cast(column.type.value_type)
    if field == "size_factors":
        return _read_size_factors(column, location)
    what = field.removesuffix("s")
    if pa.types.is_integer(column.type) and field != "splits":
        _check_no_null(what, column, location)
        return np.asarray(column.cast(pa.int64()).to_numpy(zero_copy_only=False))
    if not (pa.types.is_string(column.type) or pa.types.is_large_string(column.type)):
        expected = "strings" if field == "splits" else "strings or integers"
        raise DatasetError(
            f"The {what} column must hold {expected}, but got {column.type} in {location.where}. Cast the column."
        )
    _check_no_null(what, column, location)
    return np.array(column.to_pylist(), dtype=np.str_)


def check_size_factors(factors: Array, location: SourceLocation) -> Array:
    """Return the size factors unchanged.

    Raises:
        DatasetError: if one is neither a positive finite number nor NaN.
    """
    wrong = np.flatnonzero(~np.isnan(factors) & ~((factors > 0) & (factors < np.inf)))
    if len(wrong):
        raise DatasetError(
            f"Size factors must be positive and finite, but got {factors[wrong[0]]} in {location.of(int(wrong[0]))}. "
            f"Correct it, or set it to null."
        )
    return factors


def _read_labels(column: pa.Array, location: SourceLocation, names: ClassNames) -> Array:
    if are_names(column.type):
        return names.encode(column)
    if pa.types.is_dictionary(column.type):
        column = column.cast(column.type.value_type)
    if pa.types.is_decimal(column.type):
        column = column.cast(pa.float64())
    if pa.types.is_null(column.type):
        return np.full(len(column), -1)
    if pa.types.is_floating(column.type):  # as pandas writes integers of which some are missing
        values = np.asarray(column.to_numpy(zero_copy_only=False), dtype=np.float64)
        known = ~np.isnan(values)
        if (np.isfinite(values[known]) & (values[known] == np.rint(values[known]))).all():
            return np.where(known, values, -1).astype(np.int64)
    if not pa.types.is_integer(column.type):
        odd = [(row, found) for row, found in enumerate(column.to_pylist()) if not _is_whole(found)]
        row, found = odd[0] if odd else (0, column[:1].to_pylist()[0] if len(column) else None)
        raise DatasetError(
            f"Labels must be integers, text, booleans, dates or null, but got {found!r} in {location.of(row)}. "
            f"Cast the column to one of them."
        )
    return np.asarray(pc.fill_null(column.cast(pa.int64()), -1).to_numpy(zero_copy_only=False))


def _read_size_factors(column: pa.Array, location: SourceLocation) -> Array:
    if not (pa.types.is_floating(column.type) or pa.types.is_integer(column.type) or pa.types.is_null(column.type)):
        raise DatasetError(
            f"Size factors must be numbers or null, but got {column.type} in {location.where}. Cast the column."
        )
    return check_size_factors(np.asarray(column.cast(pa.float64()).to_numpy(zero_copy_only=False)), location)


def _is_whole(found: Any) -> bool:
    if isinstance(found, float):
        return math.isnan(found) or found.is_integer()
    return found is None or str(found).removeprefix("-").isdigit()


def is_array(kind: pa.DataType) -> bool:
    """Tell whether each value of an Arrow type holds all elements of a modality's row."""
    return bool(pa.types.is_fixed_size_binary(kind) or isinstance(kind, pa.FixedShapeTensorType) or _is_list(kind))


def _is_list(kind: pa.DataType) -> bool:
    return bool(pa.types.is_list(kind) or pa.types.is_large_list(kind) or pa.types.is_fixed_size_list(kind))


def _check_no_null(what: str, column: pa.Array, location: SourceLocation) -> None:
    if column.null_count:
        row = int(np.flatnonzero(column.is_null().to_numpy(zero_copy_only=False))[0])
        raise DatasetError(f"Missing {what} in {location.of(row)}. Fill it in, or remove the row.")


def _read_binary(name: str, column: pa.Array, group: ColumnGroup, location: SourceLocation) -> Values:
    dtype = np.dtype(group.dtype or "uint8").newbyteorder("<")
    width = column.type.byte_width
    if width % dtype.itemsize:
        raise DatasetError(
            f"Cannot read {width} bytes as {dtype.name} for modality {name!r} in {location.where}. "
            f"Correct source.modalities.{name}.dtype."
        )
    filled = pc.fill_null(column, pa.scalar(b"\0" * width, column.type)) if column.null_count else column
    buffer = filled.buffers()[1]
    raw = np.frombuffer(buffer, np.uint8, count=len(column) * width, offset=filled.offset * width)
    present = column.is_valid().to_numpy(zero_copy_only=False)
    return raw.view(dtype).astype(dtype.newbyteorder("=")).reshape(len(column), -1), present


def _read_lists(name: str, column: pa.Array, location: SourceLocation) -> Values:
    """Stack lists, which may be nested, into one array."""
    present = column.is_valid().to_numpy(zero_copy_only=False)
    inner, shape = column.drop_null(), []
    while _is_list(inner.type):
        lengths = pc.list_value_length(inner).to_numpy(zero_copy_only=False)
        length = int(lengths[0]) if len(lengths) and lengths[0] == lengths[0] else 0
        if (lengths != length).any():
            per_row = len(lengths) // max(1, int(present.sum()))
            odd = int(np.flatnonzero(lengths != length)[0])
            row = int(np.flatnonzero(present)[odd // per_row])
            raise DatasetError(
                f"Rows of modality {name!r} must have the same shape: expected {length} elements, got "
                f"{lengths[odd]:.0f} in {location.of(row)}. Correct that row, or set it to null."
            )
        shape.append(length)
        inner = inner.flatten()
    known = _to_numpy(name, inner, location)
    values = np.zeros((len(column), *shape), known.dtype)
    values[present] = known.reshape(int(present.sum()), *shape)
    return values, present


def _read_numbers(name: str, columns: Sequence[pa.Array], group: ColumnGroup, location: SourceLocation) -> Values:
    """Put numeric columns side by side; a row in which all are null is missing."""
    present = np.logical_or.reduce([column.is_valid().to_numpy(zero_copy_only=False) for column in columns])
    parts = []
    for column in columns:
        given = column.filter(pa.array(present)) if not present.all() else column
        if pa.types.is_decimal(column.type) or (given.null_count and str(group.dtype).startswith("float")):
            given = given.cast(pa.float64())
        known = _to_numpy(name, given, location)
        part = np.zeros(len(column), known.dtype)
        part[present] = known
        parts.append(part)
    kinds = {part.dtype for part in parts}
    dtype = kinds.pop() if len(kinds) == 1 else np.result_type(*parts)
    return np.stack([convert(name, part, dtype, location) for part in parts], axis=1), present


def _to_numpy(name: str, column: pa.Array, location: SourceLocation) -> Array:
    kind = column.type
    if pa.types.is_floating(kind):
        return np.asarray(column.to_numpy(zero_copy_only=False))
    if pa.types.is_null(kind):
        return np.full(len(column), np.nan, np.float32)
    if not (pa.types.is_integer(kind) or pa.types.is_boolean(kind)):
        raise DatasetError(
            f"Modality {name!r} must hold numbers, lists of numbers or fixed-size binary, but got {kind} in "
            f"{location.where}. Cast the column, or leave it out with source.modalities."
        )
    if kind == pa.uint8() and not column.null_count:
        return np.asarray(column.to_numpy(False))
    return np.asarray(pc.fill_null(column.cast(pa.int64()), MISSING_INTEGER).to_numpy(False))


def _reshape(name: str, values: Array, present: Array, group: ColumnGroup, location: SourceLocation) -> Array:
    if group.shape is None:
        return values
    if not present.any():  # lists that are null have no size
        return np.zeros((len(values), *group.shape), values.dtype)
    if int(np.prod(group.shape)) != values[:1].size:
        raise DatasetError(
            f"Cannot reshape modality {name!r} to {list(group.shape)}: a row has {values[:1].size} elements in "
            f"{location.where}. Correct source.modalities.{name}.shape."
        )
    return values.reshape(len(values), *group.shape)
