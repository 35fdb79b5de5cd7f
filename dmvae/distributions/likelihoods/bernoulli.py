"""Bernoulli variables; of grey values, binary cross entropy."""

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor

from dmvae.distributions.likelihoods.likelihood import Likelihood, gram
from dmvae.distributions.likelihoods.registry import register


class Bernoulli(Likelihood):
    """Independent Bernoulli variables with the decoder's output as logits.

    Grey values in [0, 1] are accepted; `log_prob` is then a binary cross entropy and not a density.
    """

    support = "numbers in [0, 1]"

    def log_prob(self, output: Tensor, value: Tensor, cells: Tensor | None = None) -> Float[Tensor, "..."]:
        """Return x log p + (1 - x) log(1 - p), summed over the modality's elements."""
        return self._sum(value * output - F.softplus(output), cells)

    def mean(self, output: Tensor) -> Tensor:
        """Return the probabilities of 1."""
        return torch.sigmoid(output)

    def sample(self, output: Tensor, generator: torch.Generator | None = None) -> Tensor:
        """Draw 0 or 1."""
        return torch.bernoulli(self.mean(output), generator=generator)

    def in_support(self, value: Tensor) -> bool:
        """Tell whether every value lies in [0, 1]."""
        return bool(((value >= 0) & (value <= 1)).all())

    def is_density(self, value: Tensor) -> bool:
        """Tell whether every value is 0 or 1."""
        return bool(((value == 0) | (value == 1)).all())

    def score(self, output: Float[Tensor, "row ..."], value: Tensor) -> Float[Tensor, "row ..."]:
        """Return x - p."""
        return value - torch.sigmoid(output)

    def information(
        self, tangents: Float[Tensor, "row tangent ..."], output: Float[Tensor, "row ..."], value: Tensor
    ) -> Float[Tensor, "row tangent tangent"]:
        """Return J' diag(p (1 - p)) J."""
        p = torch.sigmoid(output)
        return gram(tangents * torch.sqrt(p * (1 - p)).unsqueeze(1))


register("bernoulli", Bernoulli)
