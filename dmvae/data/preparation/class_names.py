"""Number the classes of a column while it is read, and put them in order at the end."""

from collections.abc import Sequence
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

Array = np.ndarray[Any, np.dtype[Any]]


def are_names(kind: pa.DataType) -> bool:
    """Tell whether values of an Arrow type name classes: text, categoricals, booleans or dates."""
    if pa.types.is_dictionary(kind):
        kind = kind.value_type
    return bool(is_text(kind) or pa.types.is_boolean(kind) or pa.types.is_date(kind) or pa.types.is_timestamp(kind))


def is_text(kind: pa.DataType) -> bool:
    """Tell whether an Arrow type holds strings."""
    return bool(pa.types.is_string(kind) or pa.types.is_large_string(kind) or pa.types.is_string_view(kind))


class ClassNames:
    """The classes of one column, numbered in the order in which they are first read.

    Classes of a categorical keep its order. Others are sorted at the end, as numbers if all of them are.

    Args:
        given: all classes in order, if they are known; None to take them from the column.
    """

    def __init__(self, given: Sequence[str] | None = None) -> None:
        self._numbers = {name: number for number, name in enumerate(given or ())}
        self._keeps_order = given is not None

    def encode(self, column: pa.Array) -> Array:
        """Return the number of each value, int64; -1 for null and for empty text."""
        if not pa.types.is_dictionary(column.type):
            column = column.dictionary_encode()
        elif not pa.types.is_boolean(column.type.value_type):
            self._keeps_order = True
        names = [written(value) for value in column.dictionary.to_pylist()]
        numbers = [self._numbers.setdefault(name, len(self._numbers)) if name else -1 for name in names]
        indices = np.asarray(pc.fill_null(column.indices, -1).to_numpy(zero_copy_only=False), dtype=np.int64)
        return np.array([*numbers, -1], dtype=np.int64)[indices]

    @property
    def in_order(self) -> tuple[str, ...]:
        """The names in the order in which they were read."""
        return tuple(self._numbers)

    @property
    def names(self) -> tuple[str, ...]:
        """The names in their final order."""
        return self.in_order if self._keeps_order else tuple(sort_names(self.in_order))

    @property
    def final(self) -> Array:
        """The place in `names` of each class, by the number that `encode` gave it."""
        places = {name: place for place, name in enumerate(self.names)}
        return np.array([places[name] for name in self.in_order], dtype=np.int64)


def sort_names(names: Sequence[str]) -> list[str]:
    """Sort names of classes: as numbers if all are numbers, else as text."""
    try:
        return sorted(names, key=lambda name: (float(name), name))
    except ValueError:
        return sorted(names)


def written(value: Any) -> str:
    """Return how a value is written as the name of a class."""
    if value is None:
        return ""
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, float) and value.is_integer():
        return str(int(value))
    return str(value)
