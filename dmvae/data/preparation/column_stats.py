"""Statistics of one column of numbers, and the kind that they suggest."""

import math
from typing import Any

import numpy as np

from dmvae.config.likelihoods import ColumnKind

Array = np.ndarray[Any, np.dtype[Any]]

_MAX_CODES = 8
"""Consecutive whole numbers of at most this many values are taken for the codes of a category."""
_SKEWED = 1.0
"""Skewness from which positive values are taken as logarithms, if these are less skewed; 2 of an exponential."""

_WIDE = 10
"""Ratio of the largest to the smallest value below which logarithms change little."""


class ColumnStats:
    """Statistics of the cells of one column.

    Attributes:
        count: the number of cells with a value.
    """

    def __init__(self) -> None:
        self.count = 0
        self._low, self._high = math.inf, -math.inf
        self._are_whole = True
        self._values: Array | None = np.zeros(0)
        self._raw, self._log = _Moments(), _Moments()

    def add(self, values: Array) -> None:
        """Add cells; NaN is missing."""
        values = values[~np.isnan(values)]
        if not len(values):
            return
        self.count += len(values)
        self._low, self._high = min(self._low, float(values.min())), max(self._high, float(values.max()))
        self._are_whole = self._are_whole and bool((values == np.floor(values)).all())
        if self._values is not None:
            self._values = np.union1d(self._values, values)
            if len(self._values) > _MAX_CODES:
                self._values = None
        self._raw.add(values)
        if self._low > 0:
            self._log.add(np.log(values))

    @property
    def values(self) -> Array:
        """The different values, if they are few; else none."""
        return np.zeros(0) if self._values is None else self._values

    def kind(self) -> tuple[ColumnKind, str]:
        """Return the kind that the values suggest, and why."""
        low, high, few = self._low, self._high, self.values
        if not self.count:
            return "real", "no values"
        if self._are_whole and len(few) == 2:
            return "binary", f"only {few[0]:g} and {few[1]:g}"
        if self._are_whole and len(few) > 2 and low in (0, 1) and high - low == len(few) - 1:
            return "category", f"only the whole numbers {low:g} to {high:g}"
        if self._are_whole and low == 0 and high > 1:
            return "count", f"whole numbers from 0 to {high:g}"
        if low > 0:
            raw, log = self._raw.skewness, self._log.skewness
            if high > _WIDE * low and raw > _SKEWED and abs(log) < raw:
                return "positive", f"above 0, with skewness {raw:.1f} ({log:.1f} of logarithms)"
        what = "whole numbers" if self._are_whole else "numbers"
        return "real", f"{what} from {low:g} to {high:g}"


class _Moments:
    """The first three moments, about the first value."""

    def __init__(self) -> None:
        self._pivot = math.nan
        self._sums = np.zeros(4)

    def add(self, values: Array) -> None:
        if math.isnan(self._pivot):
            self._pivot = float(values[0])
        distance = values - self._pivot
        with np.errstate(over="ignore"):
            self._sums += [len(values), distance.sum(), (distance**2).sum(), (distance**3).sum()]

    @property
    def skewness(self) -> float:
        """The third central moment over the cubed standard deviation; 0 for a constant."""
        count, *sums = self._sums
        first, second, third = (part / count for part in sums)
        variance = second - first**2
        if not variance > 1e-12 * second:
            return 0.0
        return float((third - 3 * first * second + 2 * first**3) / variance**1.5)
