"""Diagonal Gaussians: samples, densities, divergences from the prior, and products of experts."""

import math
from dataclasses import dataclass

import torch
from jaxtyping import Bool, Float
from torch import Tensor


@dataclass(frozen=True, eq=False)
class DiagGaussian:
    """Independent normals: `mean` and natural-log variance `log_var`, both `(..., dim)`."""

    mean: Float[Tensor, "*batch dim"]
    log_var: Float[Tensor, "*batch dim"]

    def sample(self, noise: Float[Tensor, "*batch dim"]) -> Float[Tensor, "*batch dim"]:
        """Return mean + std * noise: the reparameterised sample of standard-normal `noise`."""
        return torch.addcmul(self.mean, torch.exp(0.5 * self.log_var), noise)

    def kl_from_prior(self) -> Float[Tensor, "*batch"]:
        """Return KL(self || N(0, I)) in nats, summed over dimensions.

        0.5 * sum(exp(log_var) + mean^2 - 1 - log_var)
        """
        return 0.5 * (torch.exp(self.log_var) + self.mean.square() - 1.0 - self.log_var).sum(-1)

    def log_density(self, z: Float[Tensor, "*batch dim"]) -> Float[Tensor, "*batch"]:
        """Return log q(z) in nats, summed over dimensions."""
        # the standard deviation is in range where its square is not
        scaled = (z - self.mean) * torch.exp(-0.5 * self.log_var)
        return -0.5 * (scaled.square() + self.log_var + math.log(2 * math.pi)).sum(-1)


def log_prior(z: Float[Tensor, "*batch dim"]) -> Float[Tensor, "*batch"]:
    """Return log N(z; 0, I) in nats, summed over dimensions."""
    return -0.5 * (z.square() + math.log(2 * math.pi)).sum(-1)


def product_of_experts(
    mean: Float[Tensor, "expert row dim"],
    log_var: Float[Tensor, "expert row dim"],
    present: Bool[Tensor, "expert row"],
) -> DiagGaussian:
    """Multiply the experts that a row has and the standard-normal prior into one Gaussian per row.

        precision = 1 + sum_e present_e / var_e
        mean      = (sum_e present_e * mean_e / var_e) / precision

    Computed relative to the largest log-precision, in float32 or better, so that no finite log-variance
    overflows. A row without any expert has the prior. Values of an absent expert are never read.

    Source: Lee & Pavlovic 2021, q(z_s|X).
    """
    here = present.unsqueeze(-1)
    mean = torch.where(here, at_least_float32(mean), 0.0)
    log_precision = torch.where(here, -at_least_float32(log_var), -math.inf)
    # the reference cancels in the result: no gradient through it
    reference = log_precision.detach().amax(0).clamp(min=0.0)
    weight = torch.exp(log_precision - reference)
    total = torch.exp(-reference) + weight.sum(0)
    return DiagGaussian(mean=(weight * mean).sum(0) / total, log_var=-(reference + torch.log(total)))


def at_least_float32(x: Tensor) -> Tensor:
    """Convert half precision, which networks return under autocast, to float32."""
    # in half precision a sum over the elements of a modality keeps no accurate digit
    return x.float() if x.dtype in (torch.float16, torch.bfloat16) else x
