"""The fitted prior: Gaussian mixtures of the latents, fitted after training, in place of the standard normal.

The aggregated posterior of a trained model differs from the prior: z_s has clusters, and private latents depend on it.
Mixtures are fitted to q(z_s) and, per modality, to q(z_s, z_p), which gives p(z_p | z_s) in closed form. Decoders that
were trained with z_p from the standard normal, beside a z_s that does not know their modality, keep that.
"""

import math
import warnings
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

DENSITY_FILE = "density.safetensors"
_ROWS_AT_ONCE = 4096  # limits memory
_RIDGE = 1e-4  # added to the diagonal of covariances; latents have a scale of about 1


@dataclass(frozen=True, eq=False)
class GaussianMixture:
    """A mixture of Gaussians with full covariances, in float64 on the CPU."""

    weights: Float[Tensor, " component"]
    means: Float[Tensor, "component dim"]
    covariances: Float[Tensor, "component dim dim"]

    @classmethod
    def fit(cls, points: Float[Tensor, "row dim"], num_components: int, seed: int = 0) -> "GaussianMixture":
        """Fit by EM, with at least ten points per component: fewer points give fewer components.

        Raises:
            ValueError: for fewer than two points.
            ImportError: if scikit-learn is not installed.
        """
        try:
            from sklearn.exceptions import ConvergenceWarning
            from sklearn.mixture import GaussianMixture as Mixture
            from threadpoolctl import threadpool_limits
        except ImportError as error:
            raise ImportError("scikit-learn not found. Run pip install 'dmvae[report]'.") from error
        if len(points) < 2:
            raise ValueError(f"Cannot fit a mixture: expected at least 2 points, got {len(points)}.")
        components = max(1, min(num_components, len(points) // 10))
        mixture = Mixture(components, reg_covar=_RIDGE, random_state=seed, max_iter=100, tol=1e-3)
        # the last bits of k-means depend on the number of threads
        with warnings.catch_warnings(), threadpool_limits(1):
            warnings.simplefilter("ignore", ConvergenceWarning)  # a fit that has not converged is a density too
            mixture.fit(points.detach().cpu().double().numpy())
        return cls(*(torch.from_numpy(np.array(part)) for part in (
            mixture.weights_, mixture.means_, mixture.covariances_)))  # fmt: skip

    def beside_standard_normal(self, dim: int) -> "GaussianMixture":
        """Return the mixture of more dimensions: the last `dim` are standard normal, whatever the others are."""
        components, known = self.means.shape
        covariances = torch.eye(known + dim, dtype=self.means.dtype).repeat(components, 1, 1)
        covariances[:, :known, :known] = self.covariances
        means = torch.cat((self.means, self.means.new_zeros(components, dim)), dim=1)
        return GaussianMixture(self.weights, means, covariances)

    @property
    def mean(self) -> Float[Tensor, " dim"]:
        """The mixture's mean."""
        return self.weights @ self.means

    def sample(self, num: int, generator: torch.Generator | None = None) -> Float[Tensor, "{num} dim"]:
        """Draw from the mixture; `generator` must be on the CPU."""
        return self.sample_given(torch.empty(num, 0, dtype=torch.float64), generator)

    def log_density(self, points: Float[Tensor, "row dim"]) -> Float[Tensor, " row"]:
        """Return the log-density in nats."""
        return (self.weights.log() + self._log_components(points)).logsumexp(1)

    def sample_given(
        self, given: Float[Tensor, "row known"], generator: torch.Generator | None = None
    ) -> Float[Tensor, "row rest"]:
        """Draw the last dimensions given the first ones; `generator` must be on the CPU."""
        uniform = torch.rand(len(given), dtype=torch.float64, generator=generator)
        rest = self.means.shape[1] - given.shape[1]
        noise = torch.randn(len(given), rest, dtype=torch.float64, generator=generator)
        return self.transform(given, uniform, noise)

    def transform(
        self, given: Float[Tensor, "*row known"], uniform: Float[Tensor, "*row"], noise: Float[Tensor, "*row rest"]
    ) -> Float[Tensor, "*row rest"]:
        """Turn noise into draws of the last dimensions given the first ones, with its dtype and device.

        Args:
            given: the first dimensions; none: draws are from the mixture.
            uniform: in [0, 1); chooses the component.
            noise: standard normal.
        """
        rows, drawn = uniform.numel(), []
        flat = (x.reshape(rows, *x.shape[uniform.dim() :]).to("cpu", torch.float64) for x in (given, uniform, noise))
        for some, choice, normal in zip(*(torch.split(x, _ROWS_AT_ONCE) for x in flat), strict=True):
            shares, means, covariance = self._condition(some)
            component = torch.searchsorted(shares.cumsum(1), choice.unsqueeze(1), right=True)
            component = component.clamp(max=len(self.weights) - 1)  # rounding may leave the shares' sum below 1
            chosen = means.gather(1, component.unsqueeze(-1).expand(-1, -1, means.shape[2])).squeeze(1)
            drawn.append(chosen + _scale(torch.linalg.cholesky(covariance)[component.squeeze(1)], normal))
        return torch.cat(drawn).reshape(noise.shape).to(noise)

    def mean_given(self, given: Float[Tensor, "row known"]) -> Float[Tensor, "row rest"]:
        """Return the mean of the last dimensions given the first ones."""
        parts = (self._condition(some) for some in torch.split(given, _ROWS_AT_ONCE))
        return torch.cat([(shares.unsqueeze(-1) * means).sum(1) for shares, means, _ in parts])

    def _condition(self, given: Float[Tensor, "row known"]) -> tuple[Tensor, Tensor, Tensor]:
        """Return each component's share `(row, component)`, mean `(row, component, rest)` and covariance."""
        known = given.shape[1]
        first = GaussianMixture(self.weights, self.means[:, :known], self.covariances[:, :known, :known])
        shares = (self.weights.log() + first._log_components(given)).softmax(1)
        cross = self.covariances[:, known:, :known]
        gain = torch.linalg.solve(first.covariances, cross.mT).mT
        offsets = self.means[:, known:] - (gain @ first.means.unsqueeze(-1)).squeeze(-1)
        means = torch.einsum("cij,rj->rci", gain, given) + offsets
        return shares, means, self.covariances[:, known:, known:] - gain @ cross.mT

    def _log_components(self, points: Float[Tensor, "row dim"]) -> Float[Tensor, "row component"]:
        factor = torch.linalg.cholesky(self.covariances)
        identity = torch.eye(points.shape[1], dtype=points.dtype)
        inverse = torch.linalg.solve_triangular(factor, identity.expand_as(factor), upper=False)
        centres = (inverse @ self.means.unsqueeze(-1)).squeeze(-1)
        distance = (torch.einsum("cij,rj->rci", inverse, points) - centres).square().sum(-1)
        log_det = factor.diagonal(dim1=-2, dim2=-1).log().sum(-1)
        log_p: Tensor = -0.5 * (distance + points.shape[1] * math.log(2 * math.pi)) - log_det
        return log_p


@dataclass(frozen=True, eq=False)
class FittedPrior:
    """A replacement of the standard-normal prior: q(z_s), and q(z_s, z_p) of every modality."""

    shared: GaussianMixture
    joint: Mapping[str, GaussianMixture]

    def sample(self, num: int, generator: torch.Generator | None = None) -> tuple[Tensor, dict[str, Tensor]]:
        """Draw z_s, and each z_p given it."""
        shared = self.shared.sample(num, generator)
        return shared, {name: self.private(name, shared, generator=generator) for name in self.joint}

    def private(
        self,
        modality: str,
        shared: Float[Tensor, "*row shared"],
        return_mean: bool = False,
        generator: torch.Generator | None = None,
    ) -> Float[Tensor, "*row private"]:
        """Draw z_p given z_s, or return its mean, with the dtype and device of `shared`."""
        given = shared.reshape(-1, shared.shape[-1]).to("cpu", torch.float64)
        mixture = self.joint[modality]
        drawn = mixture.mean_given(given) if return_mean else mixture.sample_given(given, generator)
        return drawn.reshape(*shared.shape[:-1], drawn.shape[-1]).to(shared)

    def tensors(self) -> dict[str, Tensor]:
        """Return all tensors by name, none of them shared."""
        parts = {"shared": self.shared, **{f"joint/{name}": mixture for name, mixture in self.joint.items()}}
        return {f"{name}/{key}": value.clone() for name, part in parts.items() for key, value in vars(part).items()}

    @classmethod
    def from_tensors(cls, tensors: Mapping[str, Tensor]) -> "FittedPrior":
        """Return the prior whose `tensors` these are."""
        parts: dict[str, dict[str, Any]] = {}
        for name, tensor in tensors.items():
            part, _, key = name.rpartition("/")
            parts.setdefault(part, {})[key] = tensor
        mixtures = {name: GaussianMixture(**own) for name, own in sorted(parts.items())}
        return cls(mixtures.pop("shared"), {name.removeprefix("joint/"): part for name, part in mixtures.items()})

    def save(self, folder: str | Path) -> None:
        """Write `density.safetensors` into a folder atomically."""
        from safetensors.torch import save_file

        partial = Path(folder) / f".{DENSITY_FILE}.partial"
        save_file(self.tensors(), partial)
        partial.replace(Path(folder) / DENSITY_FILE)

    @classmethod
    def load(cls, folder: str | Path) -> "FittedPrior":
        """Read what `save` wrote.

        Raises:
            FileNotFoundError: if the folder has no such file.
        """
        from safetensors.torch import load_file

        file = Path(folder) / DENSITY_FILE
        if not file.is_file():
            raise FileNotFoundError(f"Fitted prior not found: {folder} has no {DENSITY_FILE}.")
        return cls.from_tensors(load_file(file))


def _scale(factor: Float[Tensor, "row dim dim"], noise: Float[Tensor, "row dim"]) -> Float[Tensor, "row dim"]:
    return (factor @ noise.unsqueeze(-1)).squeeze(-1)
