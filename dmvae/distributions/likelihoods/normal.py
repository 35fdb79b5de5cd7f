"""Normal distributions."""

import math

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor

from dmvae.distributions.likelihoods.likelihood import gram
from dmvae.distributions.likelihoods.location_scale import LocationScale
from dmvae.distributions.likelihoods.registry import register


class Normal(LocationScale):
    """Independent normals: -0.5 ((x - y) / s)^2 - log s - 0.5 log(2 pi)."""

    def log_prob(self, output: Tensor, value: Tensor, cells: Tensor | None = None) -> Float[Tensor, "..."]:
        """Return the log-density in nats, summed over the modality's elements."""
        return self._log_density(_squares(output, value), 2, 0.5 * math.log(2 * math.pi), cells)

    def score(self, output: Float[Tensor, "row ..."], value: Tensor) -> Float[Tensor, "row ..."]:
        """Return (x - y) / s^2."""
        return (value - output) / self.scale**2

    def information(
        self, tangents: Float[Tensor, "row tangent ..."], output: Float[Tensor, "row ..."], value: Tensor
    ) -> Float[Tensor, "row tangent tangent"]:
        """Return J' J / s^2."""
        return gram(tangents / self.scale)

    def sample(self, output: Tensor, generator: torch.Generator | None = None) -> Tensor:
        """Draw y + s * noise."""
        return torch.empty_like(output).normal_(generator=generator).mul_(self.scale).add_(output)


def _squares(output: Tensor, value: Tensor) -> Tensor:
    # one kernel each way
    output, value = torch.broadcast_tensors(output, value)  # type: ignore[no-untyped-call]
    return F.mse_loss(output, value, reduction="none")


register("normal", Normal)
