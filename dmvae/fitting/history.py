"""The metrics of a run as a table."""

import json
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any


class History:
    """Metrics by step and name."""

    def __init__(self) -> None:
        self._rows: dict[int, dict[str, float]] = {}

    def add(self, step: int, metrics: Mapping[str, float]) -> None:
        """Add metrics at a step; an earlier value of the same step is replaced."""
        self._rows.setdefault(step, {}).update(metrics)

    @classmethod
    def read(cls, file: Path) -> "History":
        """Read the metrics that a run logged."""
        history = cls()
        for line in file.read_text().splitlines():
            entry = json.loads(line)
            history.add(entry.get("step", 0), entry.get("metrics", {}))
        return history

    @property
    def table(self) -> Any:
        """A data frame with a row for each step and a column for each metric; NaN where a step has no value."""
        import pandas as pd

        names = list(dict.fromkeys(name for metrics in self._rows.values() for name in metrics))
        steps = sorted(step for step, metrics in self._rows.items() if metrics)
        values = [[self._rows[step].get(name, math.nan) for name in names] for step in steps]
        return pd.DataFrame(values, index=pd.Index(steps, name="step"), columns=names, dtype=float)
