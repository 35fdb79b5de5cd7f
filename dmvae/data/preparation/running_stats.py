"""Mean, standard deviation, minimum and maximum of each feature, in one pass over blocks of rows."""

from typing import Any

import numpy as np

Array = np.ndarray[Any, np.dtype[Any]]


class RunningStats:
    """Statistics of each element over the rows added so far, flat and in float64.

    Attributes:
        rows: the number of rows added.
        mean: the mean of each element (Chan et al. 1979).
        low: the minimum of each element.
        high: the maximum of each element.
    """

    def __init__(self, size: int) -> None:
        self.rows = 0
        self.mean, self._squares = np.zeros(size), np.zeros(size)
        self.low, self.high = np.full(size, np.inf), np.full(size, -np.inf)

    def add(self, values: Array) -> None:
        """Add observed rows `(rows, *shape)`."""
        if not len(values):
            return
        values = values.reshape(len(values), -1).astype(np.float64)
        self.low, self.high = np.minimum(self.low, values.min(axis=0)), np.maximum(self.high, values.max(axis=0))
        block_mean = values.mean(axis=0)
        shift, total = block_mean - self.mean, self.rows + len(values)
        self._squares += ((values - block_mean) ** 2).sum(axis=0) + shift**2 * (self.rows * len(values) / total)
        self.mean += shift * (len(values) / total)
        self.rows = total

    @property
    def std(self) -> Array:
        """The standard deviation of each element; 1 for a constant element."""
        std = np.sqrt(self._squares / self.rows)
        constant = std <= 1e-12 * np.maximum(np.abs(self.mean), 1e-300)
        return np.where(constant, 1.0, std)
