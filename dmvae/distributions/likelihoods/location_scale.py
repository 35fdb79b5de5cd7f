"""The common part of normal and Laplace distributions: a location from the decoder, and a scale."""

import math
from typing import ClassVar

import torch
from jaxtyping import Bool, Float
from torch import Tensor, nn

from dmvae.distributions.likelihoods.likelihood import Likelihood

SCALE_FLOOR = 0.05
"""Default floor of a learned scale, as a share of the training deviation."""
_RATE_FACTOR = 10.0
"""Adam moves log s by at most the learning rate a step, and divergences weigh too much until s arrives."""


class LocationScale(Likelihood):
    """A location from the decoder, and a scale that is fixed or learned, for each feature or for the whole modality.

    A scale s that is learned per feature or per modality has a floor f: s^2 = exp(2 log_scale) + f^2, which is smooth,
    so that s can leave the floor again. `initialize` starts both at the training deviation.

    Args:
        shape: of one row.
        scale: a number; "learned_per_feature"; "learned_per_modality"; or "learned", one for the modality that starts
            at 1 and has no floor.
        scale_floor: as a share of the training deviation; 0: no floor.

    Attributes:
        log_scale: a number, or a parameter if the scale is learned.
    """

    is_continuous = True
    scale_of_unit_deviation: ClassVar[float] = 1.0

    def __init__(
        self, shape: tuple[int, ...], scale: float | int | str = 1.0, scale_floor: float | int = SCALE_FLOOR
    ) -> None:
        super().__init__(shape)
        # a fixed scale stays a Python number, exact in every dtype
        self.log_scale: Tensor | float
        if not isinstance(scale, str):
            self.log_scale = math.log(float(scale))
            return
        self.log_scale = nn.Parameter(torch.zeros(shape if scale == "learned_per_feature" else ()))
        if scale != "learned":
            self.rate_factor = _RATE_FACTOR
            self.register_buffer("log_floor", torch.full_like(self.log_scale, float(scale_floor)).log().detach())

    def initialize(self, value: Float[Tensor, "row ..."], cells: Bool[Tensor, "row ..."] | None = None) -> None:
        """Start a scale that has a floor at the deviation of training rows, and the floor at its share of it.

        A feature that does not vary, or has no observed cell, gets the root mean square deviation of the others.
        """
        floor = self._buffers.get("log_floor")
        if not isinstance(self.log_scale, Tensor) or floor is None or len(value) < 2:
            return
        variance = _variance(value.double(), cells)
        overall = variance[variance.isfinite()].mean()
        overall = overall if overall > 0 else variance.new_ones(())
        variance = torch.where(variance > 1e-12 * overall, variance, overall) if self.log_scale.dim() else overall
        log_deviation = 0.5 * variance.log() + math.log(self.scale_of_unit_deviation)
        with torch.no_grad():
            floor += (log_deviation - self.log_scale).to(floor)
            self.log_scale.copy_(log_deviation)

    def mean(self, output: Tensor) -> Tensor:
        """Return the location, which is the mean."""
        return output

    def _log_density(self, distances: Tensor, power: int, log_normaliser: float, cells: Tensor | None = None) -> Tensor:
        """-sum_j d_j / (power s_j^power) - sum_j (log s_j + log_normaliser), for the distances d of observed cells."""
        log_scale, size = self._log_scale_above_floor, math.prod(self.shape)
        if cells is not None:
            # weights and not `masked_fill`, so that sums stay products with vectors
            observed = cells.to(distances.dtype)
            each = torch.as_tensor(log_scale, dtype=distances.dtype, device=distances.device).expand(self.shape)
            fit = (distances * observed).flatten(-len(self.shape)) @ torch.exp(-power * each).flatten()
            return fit * (-1.0 / power) - observed.flatten(-len(self.shape)) @ (each + log_normaliser).flatten()
        if isinstance(log_scale, Tensor) and log_scale.dim():
            weighted = distances.flatten(-len(self.shape)) @ torch.exp(-power * log_scale).flatten()
            return weighted * (-1.0 / power) - (log_scale.sum() + size * log_normaliser)
        precision = torch.exp(-power * log_scale) if isinstance(log_scale, Tensor) else math.exp(-power * log_scale)
        return self._sum(distances) * precision * (-1.0 / power) - size * (log_scale + log_normaliser)

    @property
    def scale(self) -> Tensor | float:
        """The scale, in the data's units: a number, or a tensor without dimensions or of the modality's shape."""
        log_scale = self._log_scale_above_floor
        return torch.exp(log_scale) if isinstance(log_scale, Tensor) else math.exp(log_scale)

    @property
    def _log_scale_above_floor(self) -> Tensor | float:
        floor = self._buffers.get("log_floor")
        if isinstance(self.log_scale, Tensor) and floor is not None:
            return 0.5 * torch.logaddexp(2 * self.log_scale, 2 * floor)
        return self.log_scale


def _variance(value: Float[Tensor, "row ..."], cells: Bool[Tensor, "row ..."] | None) -> Float[Tensor, "..."]:
    """Return the variance of each element over its observed cells; NaN without any."""
    if cells is None:
        return value.var(0, unbiased=False)
    num = cells.sum(0)
    mean = value.where(cells, 0.0).sum(0) / num
    return (value - mean).square().where(cells, 0.0).sum(0) / num
