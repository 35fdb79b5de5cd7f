"""Tables whose columns differ in kind: turn every cell into a number, and find each column's kind in its values."""

import datetime
from collections.abc import Sequence
from difflib import get_close_matches
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from dmvae.config.likelihoods import UNSEEN
from dmvae.config.sources import ColumnGroup
from dmvae.data.errors import DatasetError
from dmvae.data.format.manifest import ColumnInfo
from dmvae.data.preparation.class_names import ClassNames, are_names, is_text, sort_names
from dmvae.data.preparation.column_stats import ColumnStats
from dmvae.data.preparation.source_location import SourceLocation

Array = np.ndarray[Any, np.dtype[Any]]

NULL_WORDS = ("", "NA", "N/A", "n/a", "#N/A", "NULL", "null", "NaN", "nan", "-nan", "None", ".")
DAY_ZERO = datetime.date(1970, 1, 1)
"""Dates are read as days since this one."""
_MAX_FREE_CLASSES = 50
"""A column of text with more values than this, most of which occur once, is no category."""


def is_table(group: ColumnGroup, types: Sequence[pa.DataType]) -> bool:
    """Tell whether columns of these types are a table of kinds, and not a vector of numbers."""
    told = not isinstance(group.columns, str) or bool(group.kinds or group.classes)
    return told or any(are_names(kind) and not pa.types.is_boolean(kind) for kind in types)


def nearest(name: str, known: Sequence[str]) -> str:
    """Return a hint at the name that was probably meant; empty if none is near."""
    found = get_close_matches(name, known, 1, cutoff=0.6)
    return f" Did you mean {found[0]!r}?" if found else ""


def blank(column: pa.Array, missing: Sequence[float | str]) -> pa.Array:
    """Return a column with null for the numbers, words and dates that stand for a missing cell."""
    if not missing:
        return column
    if pa.types.is_dictionary(column.type):
        column = column.cast(column.type.value_type)
    kind = column.type
    if is_text(kind):
        codes = pa.array([_plain(float(code)) if isinstance(code, float) else code for code in missing], kind)
    elif pa.types.is_date(kind) or pa.types.is_timestamp(kind):
        dates = [code for code in missing if isinstance(code, str) and _is_date(code)]
        codes = pa.array(dates, pa.string()).cast(pa.timestamp("us")).cast(kind)
    elif pa.types.is_integer(kind) or pa.types.is_floating(kind) or pa.types.is_decimal(kind):
        numbers = [float(code) for code in missing if not isinstance(code, str) or _is_number(code)]
        column = column.cast(pa.float64()) if pa.types.is_decimal(kind) else column
        whole = pa.types.is_integer(kind)
        codes = pa.array([int(n) if whole else n for n in numbers if not whole or n.is_integer()], column.type)
    else:
        return column
    return pc.if_else(pc.is_in(column, codes), None, column)


class Table:
    """The columns of one modality while its source is read.

    Args:
        name: the modality.
        columns: their names, in order.
        group: the settings, with kinds, classes and units that were set by hand.
        where: the file, for messages.

    Raises:
        DatasetError: if a setting names a column that is not in the table.
    """

    def __init__(self, name: str, columns: Sequence[str], group: ColumnGroup, where: str) -> None:
        for setting in ("kinds", "classes", "units"):
            for column in getattr(group, setting):
                if column not in columns:
                    raise DatasetError(
                        f"Column {column!r} of source.modalities.{name}.{setting} is not among the columns of "
                        f"{where}.{nearest(column, columns)} Correct the name."
                    )
        if group.dtype is not None and not group.dtype.startswith("float"):
            raise DatasetError(
                f"A table of columns of several kinds is stored as floats, but source.modalities.{name}.dtype is "
                f"{group.dtype}. Remove it."
            )
        self.dtype, self._missing = np.dtype(group.dtype or "float64"), group.missing
        self.columns = [
            TableColumn(f"{column!r} of modality {name!r}", group.kinds.get(column), group.classes.get(column))
            for column in columns
        ]

    def read(self, arrays: Sequence[pa.Array], location: SourceLocation) -> tuple[Array, Array]:
        """Return the cells `(rows, columns)`, NaN where missing, and which rows have any."""
        known = [blank(array, self._missing) for array in arrays]
        cells = [column.read(array, location) for column, array in zip(self.columns, known, strict=True)]
        values = np.stack(cells, axis=1).astype(self.dtype)
        return values, ~np.isnan(values).all(axis=1)

    def describe(self, trained: Sequence[Array]) -> tuple[ColumnInfo, ...]:
        """Return the kind of each column, given the values that training rows have; `recode` can be called then.

        Raises:
            DatasetError: if a column has no kind.
        """
        return tuple(column.describe(values) for column, values in zip(self.columns, trained, strict=True))

    def recode(self, values: Array) -> Array:
        """Number the classes of cells as `describe` ordered them."""
        values = values.copy()
        for place, column in enumerate(self.columns):
            if column.codes is not None:
                stored, codes = column.codes
                known = ~np.isnan(values[:, place])
                values[known, place] = codes[np.searchsorted(stored, values[known, place])]
        return values


class TableColumn:
    """One column of a table.

    Attributes:
        codes: the values as read, sorted, and the number of each one's class; None for numbers. `describe` sets it.
    """

    def __init__(self, name: str, kind: str | None, classes: Sequence[str] | None) -> None:
        self._name, self._kind, self._given = name, kind or ("category" if classes else None), classes
        self._names = ClassNames(classes)
        self._stats = ColumnStats()
        self._is_day = self._is_text = False
        self._odd: str | None = None
        self.codes: tuple[Array, Array] | None = None

    @property
    def may_have_classes(self) -> bool:
        """Whether the column may be a category."""
        return self._is_text or (self._kind is None and bool(len(self._stats.values)))

    def read(self, column: pa.Array, location: SourceLocation) -> Array:
        """Return the cells as float64, NaN where missing; classes by their number in the order of reading.

        Raises:
            DatasetError: naming the cell that is not of the column's kind.
        """
        if pa.types.is_null(column.type):
            return np.full(len(column), np.nan)
        if pa.types.is_dictionary(column.type) and not is_text(column.type.value_type):
            column = column.cast(column.type.value_type)
        text = is_text(column.type) or (pa.types.is_dictionary(column.type) and is_text(column.type.value_type))
        if text and self._kind in ("real", "positive", "count", "date") and pa.types.is_dictionary(column.type):
            column = column.cast(column.type.value_type)
        if is_text(column.type):
            column = pc.if_else(pc.is_in(column, pa.array(NULL_WORDS, column.type)), None, column)
        if self._kind == "date" or pa.types.is_date(column.type) or pa.types.is_timestamp(column.type):
            values = self._days(column, location)
        elif self._kind in ("category", "binary") or (self._kind is None and are_names(column.type)):
            values = self._classes(column, location)
        else:
            values = self._numbers(self._parsed(column, location) if text else column, location)
        self._stats.add(values)
        return values

    def _days(self, column: pa.Array, location: SourceLocation) -> Array:
        self._is_day = True
        try:
            moments = column.cast(pa.timestamp("us"), safe=False)
        except pa.ArrowInvalid:
            for row, value in enumerate(column.to_pylist()):
                if value is not None and not _is_date(value):
                    raise DatasetError(
                        f"Column {self._name} must hold dates such as 2024-05-31, but got {value!r} in "
                        f"{location.of(row)}. Correct it, or leave it empty."
                    ) from None
            raise
        known = moments.is_valid().to_numpy(zero_copy_only=False)
        microseconds = np.asarray(pc.fill_null(moments.cast(pa.int64()), 0).to_numpy(zero_copy_only=False))
        return np.where(known, microseconds / 86_400_000_000, np.nan)

    def _numbers(self, column: pa.Array, location: SourceLocation) -> Array:
        if not (
            pa.types.is_integer(column.type)
            or pa.types.is_floating(column.type)
            or pa.types.is_decimal(column.type)
            or pa.types.is_boolean(column.type)
        ):
            raise DatasetError(
                f"Column {self._name} must hold numbers, text, booleans or dates, but got {column.type} in "
                f"{location.where}. Cast the column, or leave it out with source.modalities."
            )
        column = column.cast(pa.int8()) if pa.types.is_boolean(column.type) else column
        values = np.asarray(column.cast(pa.float64()).to_numpy(zero_copy_only=False), dtype=np.float64)
        wrong, law = np.isinf(values), "finite"
        if self._kind == "positive":
            wrong, law = wrong | (values <= 0), "above 0"
        elif self._kind == "count":
            wrong, law = wrong | (values < 0) | (values != np.floor(values)) & ~np.isnan(values), "whole numbers from 0"
        if wrong.any():
            row = int(wrong.argmax())
            raise DatasetError(
                f"Values of column {self._name} must be {law}, but got {values[row]:g} in {location.of(row)}. Correct "
                f"it, or leave it empty."
            )
        return values

    def _classes(self, column: pa.Array, location: SourceLocation) -> Array:
        if pa.types.is_floating(column.type):
            column = pc.if_else(pc.is_nan(column), None, column)
        known = set(self._names.in_order)
        codes = self._names.encode(column)
        fresh = [name for name in self._names.in_order if name not in known]
        if self._given is not None and fresh:
            row = int((codes == self._names.in_order.index(fresh[0])).argmax())
            raise DatasetError(
                f"Unknown class {fresh[0]!r} of column {self._name} in {location.of(row)}. Known: "
                f"{', '.join(self._given)}.{nearest(fresh[0], self._given)} Correct it, or add it to classes."
            )
        if self._odd is None:
            odd = next((name for name in fresh if not _is_number(name) and not _is_date(name)), None)
            if odd is not None:
                row = int((codes == self._names.in_order.index(odd)).argmax())
                self._odd = f"{odd!r} in {location.of(row)}"
        self._is_text = True
        return np.where(codes < 0, np.nan, codes.astype(np.float64))

    def _parsed(self, column: pa.Array, location: SourceLocation) -> pa.Array:
        """Return text as numbers."""
        try:
            return column.cast(pa.float64())
        except pa.ArrowInvalid:
            row, value = next(
                (row, value)
                for row, value in enumerate(column.to_pylist())
                if value is not None and not _is_number(str(value))
            )
            raise DatasetError(
                f"Column {self._name} must hold numbers, but got {value!r} in {location.of(row)}. Correct it, leave it "
                f"empty, or change its kind."
            ) from None

    def describe(self, trained: Array) -> ColumnInfo:
        """Return the column's kind, found in the values unless it was set, with the reason.

        Args:
            trained: the values that training rows have, as `read` returned them.

        Raises:
            DatasetError: if text is neither a category nor numbers or dates.
        """
        if self._is_day:
            return ColumnInfo(kind="real", reason=f"dates, in days since {DAY_ZERO}", since=str(DAY_ZERO))
        if self._is_text:
            return self._describe_classes(trained)
        kind, reason = (self._kind, "set by hand") if self._kind else self._stats.kind()
        if kind not in ("binary", "category"):
            return ColumnInfo(kind=kind, reason=reason)
        stored = self._stats.values
        return self._coded(kind, stored, [_plain(value) for value in stored], trained, reason)

    def _describe_classes(self, trained: Array) -> ColumnInfo:
        names, num = self._names.in_order, len(self._names.in_order)
        reason = f"{num} names"
        if self._kind is None:
            parsed = sum(_is_number(name) for name in names), sum(_is_date(name) for name in names)
            for what, count, kind in (("numbers", parsed[0], "real"), ("dates", parsed[1], "date")):
                if 2 * count >= num and self._odd is not None and count:
                    raise DatasetError(
                        f"Column {self._name} holds {what}, but also {self._odd}. Correct it or leave it empty; or set "
                        f"its kind to 'category'."
                    )
                if count == num and num > _MAX_FREE_CLASSES:
                    raise DatasetError(f"Column {self._name} holds {what} written as text. Set its kind to {kind!r}.")
            if num > _MAX_FREE_CLASSES and 2 * num > self._stats.count:
                raise DatasetError(
                    f"Column {self._name} has {num} different texts in {self._stats.count} cells: names or free text, "
                    f"and no category. Leave it out with columns, or set its kind to 'category'."
                )
        else:
            reason = "set by hand"
        kind = self._kind or ("binary" if num <= 2 else "category")
        if kind == "binary" and num > 2:
            raise DatasetError(
                f"Column {self._name} has {num} classes ({', '.join(names[:5])}, ...), but its kind is set to "
                f"'binary'. Set it to 'category'."
            )
        order = self._names.final
        return self._coded(kind, np.arange(num, dtype=np.float64), list(names), trained, reason, order)

    def _coded(
        self, kind: str, stored: Array, names: Sequence[str], trained: Array, reason: str, order: Array | None = None
    ) -> ColumnInfo:
        """Number the classes: those of training rows in their order, then one for all others."""
        ranks = {name: rank for rank, name in enumerate(sort_names(names))}
        order = np.array([ranks[name] for name in names], dtype=np.int64) if order is None else order
        kept = np.ones(len(names), dtype=bool)
        if kind == "category" and self._given is None:
            kept = np.isin(stored, trained)
        kept_order = sorted(np.flatnonzero(kept).tolist(), key=lambda place: order[place])
        codes = np.full(len(names), len(kept_order), dtype=np.float64)
        codes[kept_order] = np.arange(len(kept_order))
        self.codes = stored, codes
        classes = tuple(names[place] for place in kept_order)
        if kind == "binary" and len(classes) < 2:
            classes = (*classes, UNSEEN)
        return ColumnInfo(kind=kind, classes=classes, reason=reason)


def _plain(value: float) -> str:
    return str(int(value)) if value.is_integer() else repr(float(value))


def _is_number(text: str) -> bool:
    try:
        float(text)
    except ValueError:
        return False
    return True


def _is_date(text: Any) -> bool:
    try:
        datetime.datetime.fromisoformat(str(text))
    except ValueError:
        return False
    return not str(text).isdigit()
