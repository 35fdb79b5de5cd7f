"""Normals with full covariances, one for each row, and their mixtures."""

import math
from dataclasses import dataclass

import torch
from jaxtyping import Float, Int64
from torch import Tensor


@dataclass(frozen=True, eq=False)
class FullGaussian:
    """Normals of every row with a full covariance, `factor` its Cholesky factor; a spread multiplies the covariance."""

    mean: Float[Tensor, "row dim"]
    factor: Float[Tensor, "row dim dim"]
    inverse: Float[Tensor, "row dim dim"]

    @classmethod
    def from_covariance(
        cls, mean: Float[Tensor, "row dim"], covariance: Float[Tensor, "row dim dim"]
    ) -> "FullGaussian":
        """Factor the covariances; the identity stands for one that is not positive definite."""
        factor = cholesky_or_identity(covariance)
        identity = torch.eye(factor.shape[-1], dtype=factor.dtype, device=factor.device)
        return cls(mean, factor, torch.linalg.solve_triangular(factor, identity.expand_as(factor), upper=False))

    def sample(self, noise: Float[Tensor, "row draw dim"], spread: float = 1.0) -> Float[Tensor, "row draw dim"]:
        """Return the mean plus standard-normal noise in the covariance times `spread`."""
        return self.mean.unsqueeze(1) + math.sqrt(spread) * noise @ self.factor.mT

    def log_density(self, z: Float[Tensor, "row draw dim"], spread: float) -> Float[Tensor, "row draw"]:
        """Return the log-density in nats, covariances times `spread`."""
        normaliser = z.shape[-1] * math.log(2 * math.pi * spread) + 2 * self.log_scale.unsqueeze(1)
        return -0.5 * (self.distance(z) / spread + normaliser)

    def distance(self, z: Float[Tensor, "row draw dim"]) -> Float[Tensor, "row draw"]:
        """Return the squared distance from the mean in units of the covariance."""
        return ((z - self.mean.unsqueeze(1)) @ self.inverse.mT).square().sum(-1)

    def select(self, rows: Int64[Tensor, " chosen"]) -> "FullGaussian":
        """Return the normals of some rows."""
        return FullGaussian(self.mean[rows], self.factor[rows], self.inverse[rows])

    @property
    def log_scale(self) -> Float[Tensor, " row"]:
        """Half the log-determinant of the covariance."""
        return self.factor.diagonal(dim1=-2, dim2=-1).log().sum(-1)

    @property
    def covariance(self) -> Float[Tensor, "row dim dim"]:
        """The covariance."""
        return self.factor @ self.factor.mT


@dataclass(frozen=True, eq=False)
class Components:
    """Mixtures of normals with full covariances, one for each row."""

    weights: Float[Tensor, "row component"]
    gaussians: tuple[FullGaussian, ...]

    def select(self, rows: Int64[Tensor, " chosen"]) -> "Components":
        """Return the mixtures of some rows."""
        return Components(self.weights[rows], tuple(gaussian.select(rows) for gaussian in self.gaussians))

    def sample(
        self, noise: Float[Tensor, "row draw dim"], choice: Float[Tensor, "row draw 1"]
    ) -> Float[Tensor, "row draw dim"]:
        """Turn standard-normal noise into draws; that of `choice` chooses the component."""
        # rounding may leave the last sum below 1
        ends = self.weights.cumsum(1)[:, :-1].unsqueeze(1)
        chosen = (torch.special.ndtr(choice) > ends).sum(-1, keepdim=True)
        latents = noise
        for number, gaussian in enumerate(self.gaussians):
            latents = torch.where(chosen == number, gaussian.sample(noise), latents)
        return latents

    def log_density(self, z: Float[Tensor, "row draw dim"], spread: float) -> Float[Tensor, "row draw"]:
        """Return the log-density in nats, covariances times `spread`."""
        parts = torch.stack([gaussian.log_density(z, spread) for gaussian in self.gaussians], dim=-1)
        return torch.logsumexp(parts + self.weights.log().unsqueeze(1), dim=-1)

    @property
    def heaviest_factor(self) -> Float[Tensor, "row dim dim"]:
        """Cholesky factor of the component with the largest weight."""
        factors = torch.stack([gaussian.factor for gaussian in self.gaussians], dim=1)
        return factors[torch.arange(len(factors), device=factors.device), self.weights.argmax(1)]


def cholesky_or_identity(matrix: Float[Tensor, "row dim dim"]) -> Float[Tensor, "row dim dim"]:
    """Return the Cholesky factor; the identity for a matrix that is not positive definite or not finite."""
    factor, info = torch.linalg.cholesky_ex(0.5 * (matrix + matrix.mT))
    sound = (info == 0) & factor.isfinite().flatten(1).all(1)
    return torch.where(
        sound[:, None, None], factor, torch.eye(matrix.shape[-1], dtype=matrix.dtype, device=matrix.device)
    )
