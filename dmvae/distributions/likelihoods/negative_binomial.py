"""Negative binomial counts, whose variance exceeds their mean."""

import math

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn

from dmvae.distributions.likelihoods.counts import Counts
from dmvae.distributions.likelihoods.likelihood import gram
from dmvae.distributions.likelihoods.registry import register


class NegativeBinomial(Counts):
    """Independent negative binomial counts of mean mu and variance mu + mu^2 / r, with dispersion r.

        log p = log Gamma(x + r) / (Gamma(r) r^x x!) + x log mu - (x + r) log(1 + mu / r)

    Poisson counts are the limit of large r.

    Args:
        shape: of one row.
        dispersion: r, a number, or "learned" for one of each element.
        size_factor: as of `Counts`.
        rate: as of `Counts`.

    Source: Lopez et al. 2018 (scVI), whose inverse dispersion theta is r.
    """

    def __init__(
        self,
        shape: tuple[int, ...],
        dispersion: float | int | str = "learned",
        size_factor: float = 1.0,
        rate: float | None = None,
    ) -> None:
        super().__init__(shape, size_factor, rate)
        learned = dispersion == "learned"
        self.log_dispersion: Tensor | float = (
            nn.Parameter(torch.zeros(math.prod(shape))) if learned else math.log(float(dispersion))
        )

    def log_prob(self, output: Tensor, value: Tensor, cells: Tensor | None = None) -> Float[Tensor, "..."]:
        """Return the log-probability in nats, summed over the modality's elements."""
        counts, log_mean = self._split(output, value)
        log_r = torch.as_tensor(self.log_dispersion, dtype=torch.float64, device=output.device)
        normaliser = _log_normaliser(counts, log_r.expand(counts.shape[-1])).to(output.dtype)
        log_r = log_r.to(output.dtype)
        elements = counts * log_mean - (counts + log_r.exp()) * F.softplus(log_mean - log_r)
        # a missing cell has a normaliser of 0, since its count is read as 0
        return (elements if cells is None else elements * self._flat(cells)).sum(-1) + normaliser

    def score(self, output: Float[Tensor, "row ..."], value: Tensor) -> Float[Tensor, "row ..."]:
        """Return (x - mu) r / (mu + r)."""
        counts, log_mean = self._split(output, value)
        r = self._dispersion(output)
        return (counts - (counts + r) * torch.sigmoid(log_mean - r.log())).view_as(output)

    def information(
        self, tangents: Float[Tensor, "row tangent ..."], output: Float[Tensor, "row ..."], value: Tensor
    ) -> Float[Tensor, "row tangent tangent"]:
        """Return J' diag(mu r / (mu + r)) J."""
        _, log_mean = self._split(output, value)
        r = self._dispersion(output)
        weight = r * torch.sigmoid(log_mean - r.log())
        return gram(tangents.flatten(2) * weight.sqrt().unsqueeze(1))

    def sample(self, output: Tensor, generator: torch.Generator | None = None) -> Tensor:
        """Draw Poisson counts whose means are gamma distributed, at `size_factor`."""
        r = self._dispersion(output).expand(math.prod(self.shape)).view(self.shape).expand_as(output)
        means = torch._standard_gamma(r, generator=generator) * self.mean(output) / r
        return torch.poisson(means, generator=generator)

    def _dispersion(self, output: Tensor) -> Tensor:
        return torch.as_tensor(self.log_dispersion, dtype=output.dtype, device=output.device).exp()


def _log_normaliser(counts: Float[Tensor, "*row size"], log_r: Float[Tensor, " size"]) -> Float[Tensor, "*row"]:
    """Return log Gamma(x + r) / (Gamma(r) r^x x!) in float64, summed over elements; it is 0 where x = 0."""
    flat = counts.reshape(-1, counts.shape[-1])
    row, element = flat.nonzero(as_tuple=True)  # few counts of a cell are not 0, and the gamma function is slow
    x, r = flat[row, element].double(), log_r.exp()
    terms = torch.lgamma(x + r[element]) - torch.lgamma(r)[element] - x * log_r[element] - torch.lgamma(x + 1)
    return terms.new_zeros(len(flat)).index_add(0, row, terms).view(counts.shape[:-1])


register("negative_binomial", NegativeBinomial)
