"""What the observed rows of one modality hold, added up block by block."""

import math
from collections.abc import Sequence
from typing import Any

import numpy as np

Array = np.ndarray[Any, np.dtype[Any]]


MAX_CLASSES = 1 << 16
"""Of a modality whose classes are counted one by one."""


class Values:
    """Sums, extremes and counts over rows of one modality, as stored, feature by feature.

    The first four moments are kept as sums of powers of (x - pivot) / unit; with a pivot near the mean that is as
    exact as it needs to be, and sums of several parts with one pivot add.

    Attributes:
        rows: observed rows whose values are all finite; the others enter nothing but `broken`.
        broken: observed rows with NaN or infinity, and the position of the first one.
        zeros: elements that are 0.
        zero_rows: rows all of whose elements are 0.
        are_whole: every element is a whole number.
        are_binary: every element is either 0 or the largest value of the modality's type (1; of uint8, 255).
        low, high: smallest and largest value of each feature.
        low_at, high_at: the positions of the rows that have them.
        classes: how often each class occurs; of int64 only, and empty where there may be more than `MAX_CLASSES`.
    """

    pivot: Array
    unit: Array

    def __init__(self, like: "Values | Array", num_classes: int | None = None) -> None:
        """Start with nothing, and the pivot of `like`: other values, or the first rows `(row, feature)`."""
        self.pivot, self.unit = (like.pivot, like.unit) if isinstance(like, Values) else _spread(like)
        size = len(self.pivot)
        if isinstance(like, Values) or (num_classes or 0) > MAX_CLASSES:
            num_classes = like.num_classes if isinstance(like, Values) else None
        self.num_classes: int | None = num_classes
        self.rows = self.zeros = self.zero_rows = 0
        self.broken, self.first_broken = 0, -1
        self.are_whole = self.are_binary = True
        self.low, self.high = np.full(size, np.inf), np.full(size, -np.inf)
        self.low_at, self.high_at = np.full((2, size), -1)
        self._powers = np.zeros((4, size))
        self.classes = np.zeros(self.num_classes or 0, dtype=np.int64)

    def add(self, values: Array, positions: Array) -> None:
        """Take in rows `(row, feature)` that have the modality, and their positions in the split."""
        top = 255 if values.dtype == np.uint8 else 1
        if values.dtype.kind == "f":
            finite = np.isfinite(values).all(axis=1)
            if not finite.all():
                self.first_broken = int(positions[~finite][0]) if not self.broken else self.first_broken
                self.broken += int((~finite).sum())
                values, positions = values[finite], positions[finite]
        if not len(values):
            return
        self.rows += len(values)
        is_zero = values == 0
        self.zeros += int(is_zero.sum())
        self.zero_rows += int(is_zero.all(axis=1).sum())
        self.are_binary = self.are_binary and bool((is_zero | (values == top)).all())
        self.are_whole = self.are_whole and (values.dtype.kind != "f" or bool((values == np.rint(values)).all()))
        if self.num_classes:
            known = values[(values >= 0) & (values < self.num_classes)]
            self.classes += np.bincount(known.ravel(), minlength=self.num_classes)
        self._find_extremes(values, positions)
        self._add_powers(values)

    def _find_extremes(self, values: Array, positions: Array) -> None:
        for ends, places, found, is_further in (
            (self.low, self.low_at, values.argmin(axis=0), np.less),
            (self.high, self.high_at, values.argmax(axis=0), np.greater),
        ):
            candidates = values[found, np.arange(len(ends))].astype(np.float64)
            further = is_further(candidates, ends)
            ends[further] = candidates[further]
            places[further] = positions[found][further]

    def _add_powers(self, values: Array) -> None:
        with np.errstate(over="ignore", invalid="ignore"):
            distance = (values - self.pivot) / self.unit
            power = distance
            for sums in self._powers:
                sums += power.sum(axis=0)
                power = power * distance

    @property
    def mean(self) -> Array:
        """Mean of each feature."""
        return np.asarray(self.pivot + self.unit * self._powers[0] / max(self.rows, 1))

    @property
    def std(self) -> Array:
        """Standard deviation of each feature; exactly 0 where it is constant."""
        with np.errstate(over="ignore", invalid="ignore"):
            first, second = self._powers[:2] / max(self.rows, 1)
            return np.asarray(np.where(self.is_constant, 0.0, self.unit * np.sqrt(np.maximum(second - first**2, 0))))

    @property
    def kurtosis(self) -> Array:
        """Kurtosis of each feature: 3 of a normal, 6 of a Laplace distribution; NaN where it is constant."""
        with np.errstate(all="ignore"):
            first, second, third, fourth = self._powers / max(self.rows, 1)
            central = fourth - 4 * first * third + 6 * first**2 * second - 3 * first**4
            return np.asarray(np.where(self.is_constant, np.nan, central / (second - first**2) ** 2))

    @property
    def is_constant(self) -> Array:
        """Which features have one value only."""
        return np.asarray(self.low >= self.high)

    @property
    def bits(self) -> float:
        """How many bits a row has at most, about: those of whole numbers in the range, or 16 for each measurement."""
        if not self.rows:
            return 0.0
        kinds = 2 if self.are_binary else self.high.max() - self.low.min() + 1 if self.are_whole else 2.0**16
        return len(self.low) * math.log2(kinds)

    @property
    def are_counts(self) -> bool:
        """Whether all are whole numbers from 0, with some above 1."""
        return bool(self.rows and self.are_whole and self.low.min() >= 0 and self.high.max() > 1)

    @property
    def overall(self) -> tuple[float, float]:
        """Mean and standard deviation over all elements of all rows."""
        mean = float(self.mean.mean())
        with np.errstate(over="ignore", invalid="ignore"):
            return mean, float(np.sqrt((self.std**2 + (self.mean - mean) ** 2).mean()))

    @staticmethod
    def together(parts: Sequence["Values"]) -> "Values":
        """Return what several parts with one pivot hold together; positions are meaningless then."""
        whole = Values(parts[0])
        for part in parts:
            whole.rows += part.rows
            whole.zeros += part.zeros
            whole.zero_rows += part.zero_rows
            whole.broken += part.broken
            whole.are_whole &= part.are_whole
            whole.are_binary &= part.are_binary
            whole.low, whole.high = np.minimum(whole.low, part.low), np.maximum(whole.high, part.high)
            whole._powers += part._powers
            whole.classes += part.classes
        return whole


def _spread(rows: Array) -> tuple[Array, Array]:
    """Return mean and standard deviation of each feature over finite rows, 0 and 1 for want of them."""
    finite = rows[np.isfinite(rows).all(axis=1)].astype(np.float64)
    if not len(finite):
        return np.zeros(rows.shape[1]), np.ones(rows.shape[1])
    std = finite.std(axis=0)
    return finite.mean(axis=0), np.where(std > 0, std, 1.0)
