"""Scale the values of a modality for the model, and back: each scaling, its inverse and its Jacobian."""

import math
from collections.abc import Sequence
from typing import Protocol, runtime_checkable

import torch
from torch import Tensor


@runtime_checkable
class Column(Protocol):
    """A description of a table's column."""

    @property
    def kind(self) -> str: ...  # noqa: D102


@runtime_checkable
class Scaled(Protocol):
    """A description of a modality's values, as manifests and registered models have it."""

    @property
    def shape(self) -> tuple[int, ...]: ...  # noqa: D102
    @property
    def dtype(self) -> str: ...  # noqa: D102
    @property
    def scaling(self) -> str: ...  # noqa: D102
    @property
    def mean(self) -> tuple[float, ...] | None: ...  # noqa: D102
    @property
    def std(self) -> tuple[float, ...] | None: ...  # noqa: D102
    @property
    def low(self) -> tuple[float, ...] | None: ...  # noqa: D102
    @property
    def high(self) -> tuple[float, ...] | None: ...  # noqa: D102
    @property
    def columns(self) -> Sequence[Column] | None: ...  # noqa: D102


class Scale:
    """The scaling of one modality.

        none         s = x
        unit         s = x / 255 for uint8, (x - low) / (high - low) for floats
        standardise  s = (x - mean) / std
        log1p        s = log(1 + x)
        columns      s = (x - mean) / std for real and (log x - mean) / std for positive columns of a table, else s = x

    Here x is the stored value and s the scaled one. `low`, `high`, `mean` and `std` are statistics of each element over
    the observed training rows; where low equals high, their difference is taken as 1.
    """

    def __init__(self, info: Scaled) -> None:
        self._is_log, self._is_byte = info.scaling == "log1p", info.dtype == "uint8"
        self._size = math.prod(info.shape)
        self._offset = self._spread = None
        positive = [column.kind == "positive" for column in info.columns or ()]
        self._positive = torch.tensor(positive) if any(positive) else None
        if info.scaling in ("standardise", "columns"):
            assert info.mean is not None
            assert info.std is not None
            self._offset, self._spread = _table(info.mean, info), _table(info.std, info)
        elif info.scaling == "unit" and not self._is_byte:
            assert info.low is not None
            assert info.high is not None
            self._offset = _table(info.low, info)
            spread = _table(info.high, info) - self._offset
            self._spread = torch.where(spread > 0, spread, 1.0)

    @property
    def moves_zero(self) -> bool:
        """Whether the stored value zero is scaled to another value."""
        return self._offset is not None

    def read(self, values: Tensor, dtype: torch.dtype = torch.float32) -> Tensor:
        """Scale stored values `(..., *shape)` for the model; the result may be the argument itself."""
        if self._is_byte:
            scaled = values.to(dtype)
            return scaled / 255 if scaled is values else scaled.div_(255)
        if not self._is_log and self._offset is None:
            return values.to(dtype)
        # in the wider of both types, because float64 values with a large mean would lose their digits
        wide = values.to(torch.promote_types(values.dtype, dtype))
        if self._offset is None or self._spread is None:
            return wide.log1p().to(dtype)
        if self._positive is not None:
            positive = self._positive.to(wide.device)
            wide = torch.where(positive, torch.where(positive, wide, 1.0).log(), wide)
        return ((wide - self._offset.to(wide)) / self._spread.to(wide)).to(dtype)

    def show(self, values: Tensor) -> Tensor:
        """Invert `read`: return scaled values `(..., *shape)` in the units of the data; with log1p, at least 0."""
        if self._is_byte:
            return values * 255
        if self._is_log:
            return values.expm1().clamp(min=0)
        if self._offset is None or self._spread is None:
            return values
        shown = values * self._spread.to(values) + self._offset.to(values)
        if self._positive is None:
            return shown
        positive = self._positive.to(shown.device)
        return torch.where(positive, torch.where(positive, shown, 0.0).exp(), shown)

    def log_jacobian(self, values: Tensor, cells: Tensor | None = None) -> Tensor:
        """Return log |d x / d s| for each row of scaled values `(rows, *shape)`, in nats.

        Add it to -log p(s) to get -log p(x), since p(x) = p(s) / |d x / d s|. With `cells`, true where a value is
        observed, it is that of the observed cells.
        """
        if cells is not None:
            return self._log_jacobian_of(values).masked_fill(~cells, 0).flatten(1).sum(1)
        if self._is_log:  # x = exp(s) - 1
            return values.flatten(1).double().sum(1)
        constant = self._size * math.log(255) if self._is_byte else 0.0
        if self._spread is not None:
            constant = math.fsum(self._spread.log().flatten().tolist())
        jacobian = torch.full((len(values),), constant, dtype=torch.float64)
        if self._positive is not None:  # x = exp(std s + mean)
            jacobian = jacobian.to(values.device) + self.show(values.double())[:, self._positive].log().sum(1)
        return jacobian

    def _log_jacobian_of(self, values: Tensor) -> Tensor:
        """Return log |d x / d s| of each scaled value."""
        if self._is_log:
            return values.double()
        each = torch.full_like(values, math.log(255) if self._is_byte else 0.0, dtype=torch.float64)
        if self._spread is not None:
            each = each + self._spread.log().to(each)
        if self._positive is not None:
            each[:, self._positive] += self.show(values.double())[:, self._positive].log()
        return each


def _table(flat: tuple[float, ...], info: Scaled) -> Tensor:
    return torch.tensor(flat, dtype=torch.float64).reshape(info.shape)
