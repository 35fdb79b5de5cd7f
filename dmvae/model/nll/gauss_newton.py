"""Proposals of the latents for importance sampling: the encoders' posteriors, and a fit to each row's posterior.

Encoders are trained for the bound, so their posteriors are narrow: importance sampling from them misses most of
p(x_A). The refined proposal is a Gaussian at the row's posterior mode, its covariance from the decoders' Jacobians
(Gauss-Newton), in a mixture with a wider Gaussian and the encoders' posteriors.

    u = (z_s, z_i for i in A),   H = I + sum_i S_i' J_i' F_i J_i S_i,   S_i u = (z_s, z_i),   C = H^-1
    r_i(z_i|z_s) = (1 - e) N(m_i + C_is C_ss^-1 (z_s - m_s), s H_ii^-1) + e q(z_i | x_i),   e = min(.15, .3 / |A|)
    q(u) = (.8 N(z_s; m_s, s C_ss) + .1 N(z_s; m_s, w C_ss)) prod_i r_i + .1 q(z_s | x_A) prod_i q(z_i | x_i)

with s slightly and w clearly above 1, the less so the more latents there are (`spreads`).

Given z_s the private latents are independent in the model and hence under H, so this is a fit to the full covariance.
The last component bounds the weights by ten times those of draws from the encoders alone (a defensive mixture).

Rows whose posterior this does not fit go on to `dmvae.model.nll.mixture_proposal`.

Source: Hesterberg 1995 for the mixture.
"""

import math
from dataclasses import dataclass
from statistics import NormalDist
from typing import Protocol, runtime_checkable

import torch
from jaxtyping import Float, Int64
from torch import Tensor

from dmvae.distributions.gaussian import DiagGaussian
from dmvae.distributions.noise import chain, standard_normal
from dmvae.model.nll.full_gaussian import FullGaussian, cholesky_or_identity
from dmvae.model.nll.importance import strata
from dmvae.model.nll.log_joint import PatternRows

_SPREAD, _WIDE_SPREAD = (
    0.4,
    4.0,
)  # what a fitted covariance is widened by, in standard deviations of the squared distance
_MAX_SPREAD, _MAX_WIDE_SPREAD = 1.15, 2.5
_ENCODER_SHARE, _MAX_ENCODER_SHARE = 0.3, 0.15  # of all private latents together, of one
_ENCODERS = 2  # the last of the three strata


@runtime_checkable
class Proposal(Protocol):
    """A distribution of all latents u of every row of a group, drawn in strata of fixed sizes, one after the other."""

    counts: tuple[int, ...]

    def draw(
        self, keys: Int64[Tensor, " row"], start: int, num: int
    ) -> tuple[Float[Tensor, "row draw latent"], Float[Tensor, "row draw"]]:
        """Return draws `start` to `start + num` and their log-density in nats.

        The density is that of the mixture of all strata (the balance heuristic: Veach and Guibas 1995).
        """
        ...


def normals(
    keys: Int64[Tensor, " row"], latent: int, start: int, num: int, dim: int
) -> Float[Tensor, "row {num} {dim}"]:
    """Return the noise of one latent for draws `start` to `start + num`: each row reads its own stream."""
    noise = standard_normal(chain(keys, latent), num * dim, start=start * dim, dtype=torch.float64)
    return noise.view(len(keys), num, dim)


class EncoderProposal:
    """q(z_s | x_A) prod_i q(z_i | x_i)."""

    def __init__(self, rows: PatternRows, num_draws: int) -> None:
        self.counts: tuple[int, ...] = (num_draws,)
        parts = [rows.shared, *(term.private for term in rows.terms)]
        self._places = (0, *(term.place for term in rows.terms))
        self._dims = [part.mean.shape[1] for part in parts]
        self._all = _for_draws(
            DiagGaussian(torch.cat([p.mean for p in parts], dim=1), torch.cat([p.log_var for p in parts], dim=1))
        )

    def draw(
        self, keys: Int64[Tensor, " row"], start: int, num: int
    ) -> tuple[Float[Tensor, "row draw latent"], Float[Tensor, "row draw"]]:
        """Return draws `start` to `start + num` and their log-density in nats."""
        noise = self._noise(keys, start, num)
        # the density in terms of the noise: no division by the variance
        normaliser = self._all.log_var.sum(-1) + noise.shape[-1] * math.log(2 * math.pi)
        return self._all.sample(noise), -0.5 * (torch.linalg.vecdot(noise, noise) + normaliser)

    def log_density(self, latents: Float[Tensor, "row draw latent"]) -> Float[Tensor, "row draw"]:
        """Return log q of latents in nats."""
        return self._all.log_density(latents)

    def _noise(self, keys: Int64[Tensor, " row"], start: int, num: int) -> Float[Tensor, "row draw latent"]:
        """Return the noise of all latents, like `normals` of each; those of one dimension are drawn together."""
        noise = torch.empty(len(keys), num, sum(self._dims), dtype=torch.float64, device=keys.device)
        parts = torch.split(noise, self._dims, dim=-1)
        for dim in set(self._dims):
            alike = [place for place, own in enumerate(self._dims) if own == dim]
            streams = torch.cat([chain(keys, self._places[place]) for place in alike])
            drawn = standard_normal(streams, num * dim, start=start * dim).view(len(alike), len(keys), num, dim)
            for place, own in zip(alike, drawn.unbind(), strict=True):
                parts[place].copy_(own)
        return noise


@dataclass(frozen=True, eq=False)
class GaussianFit:
    """A Gaussian of all latents u of every row."""

    mean: Float[Tensor, "row latent"]
    covariance: Float[Tensor, "row latent latent"]


def setup_cost(probes: int, iterations: int) -> int:
    """Return the decoder rows per modality and data row that `gauss_newton` takes."""
    return (iterations + 1) * probes + iterations


def spreads(dim: int) -> tuple[float, float]:
    """Return the factors on a fitted covariance of `dim` latents: of a proposal's main and of its wide component.

    Importance sampling wants a proposal somewhat wider than its target. The squared distance of a draw from the mean is
    dim, give or take sqrt(2 dim). The excess is in units of that: a factor that did not shrink would lose draws at a
    rate that is exponential in dim.
    """
    unit = math.sqrt(2 / dim)
    return min(_MAX_SPREAD, 1 + _SPREAD * unit), min(_MAX_WIDE_SPREAD, 1 + _WIDE_SPREAD * unit)


def encoder_means(rows: PatternRows) -> Float[Tensor, "row latent"]:
    """Return the means of q(z_s | x_A) and of each q(z_i | x_i)."""
    return torch.cat([rows.shared.mean, *(term.private.mean for term in rows.terms)], dim=1)


def gauss_newton(rows: PatternRows, mode: Float[Tensor, "row latent"], iterations: int) -> GaussianFit:
    """Fit a Gaussian to each row's posterior: from `mode` on damped Gauss-Newton steps, and the covariance H^-1.

    A step that does not raise log p(x_A, u) is taken back and the damping raised (Levenberg-Marquardt), row by row.
    A row whose H is not finite gets H = I, the prior's.
    """
    damping = torch.zeros_like(mode[:, 0])
    for _ in range(iterations):
        energy, gradient, hessian = rows.linearise(mode)
        root, _ = torch.linalg.cholesky_ex(
            hessian + torch.diag_embed(damping.unsqueeze(1) * hessian.diagonal(dim1=-2, dim2=-1))
        )
        moved = mode - torch.cholesky_solve(gradient.unsqueeze(-1), root).squeeze(-1)
        # false for a row without a finite step: a comparison with NaN is
        better = -rows.log_joint(moved.unsqueeze(1)).squeeze(1) < energy
        mode = torch.where(better.unsqueeze(1), moved, mode)
        damping = torch.where(better, damping / 3, (4 * damping).clamp(min=0.5))
    _, _, hessian = rows.linearise(mode)
    return GaussianFit(mode, torch.cholesky_inverse(cholesky_or_identity(hessian)))


class GaussNewtonProposal:
    """A `GaussianFit` mixed with a wider one and the encoders' posteriors; see the top of this module.

    Its three parts are strata of fixed sizes; within the fit a private latent is at random drawn from its encoder.
    """

    def __init__(self, rows: PatternRows, fit: GaussianFit, num_draws: int) -> None:
        # two draws have a variance; the density uses the counts as they are, so any counts are unbiased
        few = max(2, round(0.1 * num_draws))
        self.counts: tuple[int, ...] = (num_draws - 2 * few, few, few)
        self._encoder_shared = _for_draws(rows.shared)
        self._terms = [(term.place, _for_draws(term.private)) for term in rows.terms]
        self._spread, self._wide_spread = spreads(fit.mean.shape[1])
        self._encoder_share = min(_MAX_ENCODER_SHARE, _ENCODER_SHARE / len(rows.terms))
        shared, *private = rows.blocks
        within = fit.covariance[:, shared, shared]
        self._shared = FullGaussian.from_covariance(fit.mean[:, shared], within)
        self._gains, self._privates = [], []
        for own in private:
            between = fit.covariance[:, shared, own]
            gain = torch.cholesky_solve(between, self._shared.factor)
            given = fit.covariance[:, own, own] - between.mT @ gain
            self._gains.append(gain)
            self._privates.append(FullGaussian.from_covariance(fit.mean[:, own], given))

    def draw(
        self, keys: Int64[Tensor, " row"], start: int, num: int
    ) -> tuple[Float[Tensor, "row draw latent"], Float[Tensor, "row draw"]]:
        """Return draws `start` to `start + num` and their log-density in nats."""
        stratum = strata(self.counts, start, num, keys.device)
        from_encoders = (stratum == _ENCODERS).unsqueeze(-1)
        shared = self._draw_shared(keys, start, stratum)
        offset = shared - self._shared.mean.unsqueeze(1)
        latents, log_encoders = [shared], self._encoder_shared.log_density(shared)
        log_fitted = torch.zeros_like(log_encoders)
        strays_below = NormalDist().inv_cdf(self._encoder_share)
        for (place, encoder), gain, gaussian in zip(self._terms, self._gains, self._privates, strict=True):
            shift = offset @ gain
            noise = normals(keys, place, start, num, gaussian.mean.shape[1] + 1)
            noise, strays = noise[..., :-1], noise[..., -1:] < strays_below
            z = torch.where(from_encoders | strays, encoder.sample(noise), gaussian.sample(noise, self._spread) + shift)
            log_encoder = encoder.log_density(z)
            log_fitted = log_fitted + torch.logaddexp(
                gaussian.log_density(z - shift, self._spread) + math.log(1 - self._encoder_share),
                log_encoder + math.log(self._encoder_share),
            )
            log_encoders = log_encoders + log_encoder
            latents.append(z)
        components = (
            self._shared.log_density(shared, self._spread) + log_fitted,
            self._shared.log_density(shared, self._wide_spread) + log_fitted,
            log_encoders,
        )
        shares = offset.new_tensor(self.counts) / sum(self.counts)
        return torch.cat(latents, dim=-1), torch.logsumexp(torch.stack(components, dim=-1) + shares.log(), dim=-1)

    def _draw_shared(
        self, keys: Int64[Tensor, " row"], start: int, stratum: Int64[Tensor, " draw"]
    ) -> Float[Tensor, "row draw shared"]:
        noise = normals(keys, 0, start, len(stratum), self._shared.mean.shape[1])
        spread = noise.new_tensor([self._spread, self._wide_spread, 1.0])[stratum].unsqueeze(-1)
        fitted = self._shared.sample(noise * spread.sqrt())
        return torch.where((stratum == _ENCODERS).unsqueeze(-1), self._encoder_shared.sample(noise), fitted)


def _for_draws(gaussian: DiagGaussian) -> DiagGaussian:
    return DiagGaussian(gaussian.mean.unsqueeze(1), gaussian.log_var.unsqueeze(1))
