"""Sequences of different lengths in a column of lists, padded to one length."""

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from dmvae.data.preparation.sources.arrow_columns import Values

Array = np.ndarray[Any, np.dtype[Any]]


@dataclass(frozen=True)
class Sequences:
    """How the sequences of one modality are padded, at their end.

    Attributes:
        length: the length of all rows; longer ones are cut.
        pad: the class after the largest one; None for floats, which are padded with missing cells.
        note: what is done, for the user.
    """

    length: int
    pad: int | None
    note: str

    def read(self, column: pa.Array) -> Values:
        """Return `(rows, length)` int64 or floats, and which rows are not null."""
        present = column.is_valid().to_numpy(zero_copy_only=False)
        lengths = pc.fill_null(pc.list_value_length(column), 0).to_numpy(zero_copy_only=False)
        flat = column.flatten()
        dtype = np.dtype(np.int64) if self.pad is not None else flat.type.to_pandas_dtype()
        values = np.full((len(column), self.length), np.nan if self.pad is None else self.pad, dtype)
        places = np.arange(lengths.sum()) - np.repeat(np.cumsum(lengths) - lengths, lengths)
        kept = places < self.length
        rows = np.repeat(np.arange(len(column)), lengths)[kept]
        values[rows, places[kept]] = flat.to_numpy(zero_copy_only=False)[kept]
        if self.pad is None:
            present = present & ~np.isnan(values).all(axis=1)
        return values, present


def are_ragged(column: pa.Array) -> bool:
    """Tell whether lists of numbers have different lengths; nested lists never do here."""
    kind = column.type
    if not (pa.types.is_list(kind) or pa.types.is_large_list(kind)):
        return False
    if not (pa.types.is_integer(kind.value_type) or pa.types.is_floating(kind.value_type)):
        return False
    return len(pc.unique(pc.list_value_length(column).drop_null())) > 1


def measure(name: str, columns: Iterable[pa.Array], length: int | None) -> Sequences:
    """Read all sequences once, and return how they are padded.

    Args:
        name: the modality, for messages.
        columns: the lists, in pieces.
        length: the length to pad or cut to; None for that of the longest.
    """
    shortest, longest, largest, num_cut, is_float = None, 0, -1, 0, False
    for column in columns:
        lengths = pc.list_value_length(column)
        found = pc.min_max(lengths).as_py()
        if found["max"] is not None:
            shortest = found["min"] if shortest is None else min(shortest, found["min"])
            longest = max(longest, found["max"])
            num_cut += pc.sum(pc.greater(lengths, length)).as_py() or 0 if length else 0
        is_float = pa.types.is_floating(column.type.value_type)
        if not is_float:
            largest = max(largest, pc.max(column.flatten()).as_py() or 0)
    length = length or max(longest, 1)
    pad = None if is_float else largest + 1
    what = "missing cells" if pad is None else f"class {pad}"
    note = f"{name}: sequences of {shortest or 0} to {longest} elements, padded at the end to {length} with {what}"
    return Sequences(length, pad, f"{note}; {num_cut} were cut" if num_cut else note)
