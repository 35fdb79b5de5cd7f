"""Mean, standard deviation, minimum and maximum of each feature, in one pass over blocks of rows."""

from typing import Any

import numpy as np

Array = np.ndarray[Any, np.dtype[Any]]


class RunningStats:
    """Statistics of each element over its observed cells in the rows added so far, flat and in float64.

    Attributes:
        rows: the number of rows added.
        cells: the number of observed cells of each element.
        mean: the mean of each element (Chan et al. 1979).
        low: the minimum of each element.
        high: the maximum of each element.
    """

    def __init__(self, size: int) -> None:
        self.rows, self.cells = 0, np.zeros(size, dtype=np.int64)
        self.mean, self._squares = np.zeros(size), np.zeros(size)
        self.low, self.high = np.full(size, np.inf), np.full(size, -np.inf)

    def add(self, values: Array) -> None:
        """Add observed rows `(rows, *shape)`; a missing cell is NaN."""
        if not len(values):
            return
        values = values.reshape(len(values), -1).astype(np.float64)
        known = ~np.isnan(values)
        self.rows += len(values)
        if known.all():
            self._add(values, np.full(len(self.cells), len(values)), values.mean(axis=0))
            return
        added = known.sum(axis=0)
        means = np.where(known, values, 0).sum(axis=0) / np.maximum(added, 1)
        self._add(np.where(known, values, means), added, means, known)

    def _add(self, values: Array, added: Array, means: Array, known: Array | None = None) -> None:
        """Add `added` cells of each element with these means; a missing cell has the mean's value."""
        lows, highs = (values, values) if known is None else (np.where(known, values, end) for end in (np.inf, -np.inf))
        self.low, self.high = np.minimum(self.low, lows.min(axis=0)), np.maximum(self.high, highs.max(axis=0))
        shift, total = means - self.mean, self.cells + added
        some = np.maximum(total, 1)
        self._squares += ((values - means) ** 2).sum(axis=0) + shift**2 * (self.cells * added / some)
        self.mean += shift * (added / some)
        self.cells = total

    @property
    def std(self) -> Array:
        """The standard deviation of each element; 1 for a constant element."""
        std = np.sqrt(self._squares / np.maximum(self.cells, 1))
        constant = std <= 1e-12 * np.maximum(np.abs(self.mean), 1e-300)
        return np.where(constant, 1.0, std)
