"""The common part of normal and Laplace distributions: a location from the decoder, and a scale."""

import math

import torch
from torch import Tensor, nn

from dmvae.distributions.likelihoods.likelihood import Likelihood


class LocationScale(Likelihood):
    """A location from the decoder and one scale for the whole modality, fixed or learned.

    Attributes:
        log_scale: a number, or a parameter if the scale is learned.
    """

    is_continuous = True

    def __init__(self, shape: tuple[int, ...], scale: float | int | str = 1.0) -> None:
        super().__init__(shape)
        # a fixed scale stays a Python number, exact in every dtype
        learned = scale == "learned"
        self.log_scale: Tensor | float = nn.Parameter(torch.zeros(())) if learned else math.log(float(scale))

    def mean(self, output: Tensor) -> Tensor:
        """Return the location, which is the mean."""
        return output

    def _log_density(self, distance: Tensor, power: int, log_normaliser: float) -> Tensor:
        """-distance / (power s^power) - size (log s + log_normaliser), for a distance summed over elements."""
        log_scale = self.log_scale
        precision = torch.exp(-power * log_scale) if isinstance(log_scale, Tensor) else math.exp(-power * log_scale)
        return distance * precision * (-1.0 / power) - math.prod(self.shape) * (log_scale + log_normaliser)

    @property
    def scale(self) -> Tensor | float:
        """The scale, in the data's units: a number, or a tensor if it is learned."""
        return torch.exp(self.log_scale) if isinstance(self.log_scale, Tensor) else math.exp(self.log_scale)
