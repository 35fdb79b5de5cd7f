"""Laplace distributions."""

import math

import torch
from jaxtyping import Float
from torch import Tensor

from dmvae.distributions.likelihoods.likelihood import gram
from dmvae.distributions.likelihoods.location_scale import LocationScale
from dmvae.distributions.likelihoods.registry import register


class Laplace(LocationScale):
    """Independent Laplace distributions: -|x - y| / s - log(2 s)."""

    scale_of_unit_deviation = math.sqrt(0.5)

    def log_prob(self, output: Tensor, value: Tensor, cells: Tensor | None = None) -> Float[Tensor, "..."]:
        """Return the log-density in nats, summed over the modality's elements."""
        return self._log_density((value - output).abs(), 1, math.log(2), cells)

    def score(self, output: Float[Tensor, "row ..."], value: Tensor) -> Float[Tensor, "row ..."]:
        """Return (x - y) / (s r), the score of the density smoothed near its kink; r as in `information`."""
        return (value - output) * self._weight(output, value)

    def information(
        self, tangents: Float[Tensor, "row tangent ..."], output: Float[Tensor, "row ..."], value: Tensor
    ) -> Float[Tensor, "row tangent tangent"]:
        """Return J' diag(1 / (s r)) J with r = sqrt((x - y)^2 + (s / 2)^2): iteratively reweighted least squares.

        The Fisher information 1 / s^2 is the mean curvature, but at a value the curvature is 0 almost everywhere: a
        Gaussian with it is far too narrow where x - y is large.
        """
        return gram(tangents * self._weight(output, value).sqrt().unsqueeze(1))

    def sample(self, output: Tensor, generator: torch.Generator | None = None) -> Tensor:
        """Draw y + s * noise, the noise being exponential with a random sign."""
        noise = torch.empty_like(output).exponential_(generator=generator)
        sign = torch.empty_like(output).bernoulli_(generator=generator).mul_(2).sub_(1)
        return noise.mul_(sign).mul_(self.scale).add_(output)

    def _weight(self, output: Tensor, value: Tensor) -> Tensor:
        scale = self.scale
        return 1 / (scale * torch.sqrt((value - output).square() + 0.25 * scale**2))


register("laplace", Laplace)
