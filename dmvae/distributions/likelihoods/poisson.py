"""Poisson counts."""

import torch
from jaxtyping import Float
from torch import Tensor

from dmvae.distributions.likelihoods.counts import Counts
from dmvae.distributions.likelihoods.likelihood import gram
from dmvae.distributions.likelihoods.registry import register


class Poisson(Counts):
    """Independent Poisson counts: x log mu - mu - log x!."""

    def log_prob(self, output: Tensor, value: Tensor, cells: Tensor | None = None) -> Float[Tensor, "..."]:
        """Return the log-probability in nats, summed over the modality's elements."""
        counts, log_mean = self._split(output, value)
        # a term per row and not per draw: cheap even in float64, where sums of large terms keep their digits; 0 for a
        # missing cell, whose count is read as 0
        normaliser = torch.lgamma(counts.double() + 1).sum(-1).to(output.dtype)
        elements = counts * log_mean - log_mean.exp()
        return (elements if cells is None else elements * self._flat(cells)).sum(-1) - normaliser

    def score(self, output: Float[Tensor, "row ..."], value: Tensor) -> Float[Tensor, "row ..."]:
        """Return x - mu."""
        counts, log_mean = self._split(output, value)
        return (counts - log_mean.exp()).view_as(output)

    def information(
        self, tangents: Float[Tensor, "row tangent ..."], output: Float[Tensor, "row ..."], value: Tensor
    ) -> Float[Tensor, "row tangent tangent"]:
        """Return J' diag(mu) J."""
        _, log_mean = self._split(output, value)
        return gram(tangents.flatten(2) * torch.exp(0.5 * log_mean).unsqueeze(1))


register("poisson", Poisson)
