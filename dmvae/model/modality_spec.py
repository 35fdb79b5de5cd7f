"""What a model knows of the values of one modality: shape, type, scaling, and the names of features and classes."""

import math
from collections.abc import Mapping, Sequence
from functools import cached_property
from typing import Any

import torch
from pydantic import BaseModel, ConfigDict
from torch import Tensor

from dmvae.data.scaling import Scale
from dmvae.model.named_values import ColumnSpec, in_order, number_of, written


class ModalitySpec(BaseModel):
    """The shape, type and scaling of a modality; the fields of the manifest with the same names."""

    model_config = ConfigDict(extra="ignore", frozen=True)

    shape: tuple[int, ...]
    dtype: str
    likelihood: str = "normal"
    classes: int | None = None
    scaling: str = "none"
    mean: tuple[float, ...] | None = None
    std: tuple[float, ...] | None = None
    low: tuple[float, ...] | None = None
    high: tuple[float, ...] | None = None
    features: tuple[str, ...] | None = None
    units: dict[str, str] | None = None
    columns: tuple[ColumnSpec, ...] | None = None
    has_size_factor: bool = False
    """Whether training rows had size factors; if not, a row's size factor is the total of its counts."""

    @cached_property
    def _scale(self) -> Scale:
        return Scale(self)

    def read(self, values: Tensor, dtype: torch.dtype | None = None) -> Tensor:
        """Convert values `(rows, *shape)` from the data's units to the model's, as `dtype` or their own."""
        return self._scale.read(values, dtype or values.dtype)

    def show(self, values: Tensor) -> Tensor:
        """Convert values `(..., *shape)` from the model's units to the data's."""
        return self._scale.show(values)

    def log_jacobian(self, values: Tensor, cells: Tensor | None = None) -> Tensor:
        """Return the nats to add to -log p of each row of values in the model's units, for that in the data's units.

        With `cells`, true where a value is observed, -log p is that of the observed cells.
        """
        return self._scale.log_jacobian(values, cells)

    def parsed(self, given: Any, where: str) -> list[Any]:
        """Return the values of a row as numbers in the order of the features, NaN where one is missing.

        Args:
            given: a list, or a dict by the names of the features; classes by their names.
            where: the row, for messages.

        Raises:
            ValueError: naming the feature that does not exist, or that has no such value.
        """
        assert self.features is not None
        cells = in_order(given, self.features, where) if isinstance(given, Mapping) else list(given)
        columns: Sequence[ColumnSpec | None] = self.columns or [None] * len(cells)
        if self.columns is not None and len(cells) != len(columns):
            raise ValueError(f"{where}: expected {len(columns)} values, got {len(cells)}.")
        return [
            math.nan if cell is None else cell if column is None else number_of(cell, column, f"{where}.{feature}")
            for cell, column, feature in zip(cells, columns, self.features, strict=False)
        ]

    def written(self, values: Tensor) -> Any:
        """Return a row's values as JSON: by name if the features have names, and classes by theirs."""
        numbers = values.tolist()
        if self.features is None:
            return numbers
        if self.columns is not None:
            numbers = [written(number, column) for number, column in zip(numbers, self.columns, strict=True)]
        return dict(zip(self.features, numbers, strict=True))

    def numbers(self, values: Tensor) -> Any:
        """Return numbers of a row's features as JSON like `written`, but none of columns with classes."""
        if self.features is None:
            return values.tolist()
        columns: Sequence[ColumnSpec | None] = self.columns or [None] * len(self.features)
        each = zip(self.features, values.tolist(), columns, strict=True)
        return {feature: number for feature, number, column in each if column is None or not column.classes}
