"""Statistics of the observed values of one modality, accumulated block by block."""

import math
from collections.abc import Sequence
from typing import Any

import numpy as np

from dmvae.data.format.schema import missing_cells

Array = np.ndarray[Any, np.dtype[Any]]


MAX_CLASSES = 1 << 16
"""Classes are counted one by one up to this number."""


class ValueStats:
    """Statistics of each feature over stored rows of one modality.

    The first four moments are kept as sums of powers of (x - pivot) / unit. With a pivot near the mean this is accurate
    enough, and the sums of parts with the same pivot can be added.

    Attributes:
        rows: the number of observed rows that count: all but those in `non_finite`.
        cells: the number of observed cells of each feature in these rows.
        non_finite: the number of observed rows with infinity, or with NaN where no cell may be missing.
        first_non_finite: the position of the first such row; -1 if there is none.
        zeros: the number of elements that are 0.
        zero_rows: the number of rows in which all observed elements are 0.
        are_whole: whether every element is a whole number.
        are_binary: whether every element is either 0 or the maximum of its type (1; for uint8, 255).
        low, high: minimum and maximum of each feature.
        low_at, high_at: the positions of the rows that have them.
        classes: how often each class occurs; for int64 only, and empty if there may be more than `MAX_CLASSES`.
    """

    pivot: Array
    unit: Array

    def __init__(
        self, like: "ValueStats | Array", num_classes: int | None = None, may_miss_cells: bool = False
    ) -> None:
        """Start empty, with the pivot of `like`: other statistics, or the first rows `(row, feature)`."""
        self._may_miss_cells: bool = like._may_miss_cells if isinstance(like, ValueStats) else may_miss_cells
        self.pivot, self.unit = (like.pivot, like.unit) if isinstance(like, ValueStats) else _spread(like)
        size = len(self.pivot)
        if isinstance(like, ValueStats) or (num_classes or 0) > MAX_CLASSES:
            num_classes = like.num_classes if isinstance(like, ValueStats) else None
        self.num_classes: int | None = num_classes
        self.rows = self.zeros = self.zero_rows = 0
        self.cells = np.zeros(size, dtype=np.int64)
        self.non_finite, self.first_non_finite = 0, -1
        self.are_whole = self.are_binary = True
        self.low, self.high = np.full(size, np.inf), np.full(size, -np.inf)
        self.low_at, self.high_at = np.full((2, size), -1)
        self._powers = np.zeros((4, size))
        self.classes = np.zeros(self.num_classes or 0, dtype=np.int64)

    def add(self, values: Array, positions: Array) -> None:
        """Add observed rows `(row, feature)`, given their positions in the split; see `missing_cells`."""
        top = 255 if values.dtype == np.uint8 else 1
        if values.dtype.kind == "f":
            finite = ~np.isinf(values).any(axis=1) if self._may_miss_cells else np.isfinite(values).all(axis=1)
            if not finite.all():
                if not self.non_finite:
                    self.first_non_finite = int(positions[~finite][0])
                self.non_finite += int((~finite).sum())
                values, positions = values[finite], positions[finite]
        if not len(values):
            return
        self.rows += len(values)
        gone = missing_cells(values)
        self.cells += len(values) - gone.sum(axis=0)
        is_zero = values == 0
        self.zeros += int(is_zero.sum())
        self.zero_rows += int((is_zero | gone).all(axis=1).sum())
        self.are_binary = self.are_binary and bool((is_zero | (values == top) | gone).all())
        is_whole = values.dtype.kind != "f" or bool(((values == np.rint(values)) | gone).all())
        self.are_whole = self.are_whole and is_whole
        if self.num_classes:
            known = values[(values >= 0) & (values < self.num_classes)]
            self.classes += np.bincount(known.ravel(), minlength=self.num_classes)
        if gone.any():
            values = np.where(gone, np.nan, values.astype(np.float64))
        self._find_extremes(values, positions)
        self._add_powers(np.where(gone, self.pivot, values) if gone.any() else values)

    def _find_extremes(self, values: Array, positions: Array) -> None:
        lows, highs = (
            (np.nan_to_num(values, nan=end) if values.dtype.kind == "f" else values) for end in (np.inf, -np.inf)
        )
        for extremes, where, found, is_further in (
            (self.low, self.low_at, lows.argmin(axis=0), np.less),
            (self.high, self.high_at, highs.argmax(axis=0), np.greater),
        ):
            candidates = values[found, np.arange(len(extremes))].astype(np.float64)
            further = is_further(candidates, extremes)
            extremes[further] = candidates[further]
            where[further] = positions[found][further]

    def _add_powers(self, values: Array) -> None:
        with np.errstate(over="ignore", invalid="ignore"):
            distance = (values - self.pivot) / self.unit
            power = distance
            for sums in self._powers:
                sums += power.sum(axis=0)
                power = power * distance

    @property
    def mean(self) -> Array:
        """The mean of each feature."""
        return np.asarray(self.pivot + self.unit * self._powers[0] / np.maximum(self.cells, 1))

    @property
    def std(self) -> Array:
        """The standard deviation of each feature; exactly 0 for a constant one."""
        with np.errstate(over="ignore", invalid="ignore"):
            first, second = self._powers[:2] / np.maximum(self.cells, 1)
            return np.asarray(np.where(self.is_constant, 0.0, self.unit * np.sqrt(np.maximum(second - first**2, 0))))

    @property
    def kurtosis(self) -> Array:
        """The kurtosis of each feature: 3 for a normal, 6 for a Laplace distribution; NaN for a constant feature."""
        with np.errstate(all="ignore"):
            first, second, third, fourth = self._powers / np.maximum(self.cells, 1)
            central = fourth - 4 * first * third + 6 * first**2 * second - 3 * first**4
            return np.asarray(np.where(self.is_constant, np.nan, central / (second - first**2) ** 2))

    @property
    def is_constant(self) -> Array:
        """Which features are constant."""
        return np.asarray(self.low >= self.high)

    @property
    def bits(self) -> float:
        """An upper estimate of the bits in a row: those of whole numbers in the range, or 16 for each measurement."""
        if not self.rows:
            return 0.0
        kinds = 2 if self.are_binary else self.high.max() - self.low.min() + 1 if self.are_whole else 2.0**16
        return len(self.low) * math.log2(kinds)

    @property
    def are_counts(self) -> bool:
        """Whether all values are whole numbers of 0 or more, and some are above 1."""
        return bool(self.rows and self.are_whole and self.low.min() >= 0 and self.high.max() > 1)

    @property
    def overall(self) -> tuple[float, float]:
        """The mean and standard deviation over all elements of all rows."""
        mean = float(self.mean.mean())
        with np.errstate(over="ignore", invalid="ignore"):
            return mean, float(np.sqrt((self.std**2 + (self.mean - mean) ** 2).mean()))

    @staticmethod
    def merge(parts: Sequence["ValueStats"]) -> "ValueStats":
        """Merge statistics with the same pivot; positions are meaningless in the result."""
        whole = ValueStats(parts[0])
        for part in parts:
            whole.rows += part.rows
            whole.cells += part.cells
            whole.zeros += part.zeros
            whole.zero_rows += part.zero_rows
            whole.non_finite += part.non_finite
            whole.are_whole &= part.are_whole
            whole.are_binary &= part.are_binary
            whole.low, whole.high = np.minimum(whole.low, part.low), np.maximum(whole.high, part.high)
            whole._powers += part._powers
            whole.classes += part.classes
        return whole


def _spread(rows: Array) -> tuple[Array, Array]:
    """Return mean and standard deviation of each feature over finite cells; 0 and 1 if there are none."""
    finite = np.where(missing_cells(rows) | np.isinf(rows), np.nan, rows.astype(np.float64))
    num = np.maximum((~np.isnan(finite)).sum(axis=0), 1)
    mean = np.nansum(finite, axis=0) / num
    std = np.sqrt(np.nansum((finite - mean) ** 2, axis=0) / num)
    return mean, np.where(std > 0, std, 1.0)
