"""A proposal for posteriors with several modes: fits from many starts, mixed, and refitted to pilot draws.

One Gaussian at one mode misses what lies in the others, and its weights cannot tell. Here u = (z_s, z_i for i in A) and

    g(u; t) = sum_c a_c N(u; m_c, t C_c)
    q(u)    = .6 g(u; s) + .3 g(u; w) + .1 q(z_s | x_A) prod_i q(z_i | x_i)

with s and w as in `gauss_newton.spreads`, m_c and C_c from Gauss-Newton steps that begin at the encoders' means and at
draws around them, and a_c by Laplace's approximation. Then, a few times, pilot draws from q re-estimate a, m and C by a
step of weighted EM, m and C as far as the draws differ from the fit by more than their own noise. The pilots' weights
are not used: the proposal is fixed before the draws that count, which keeps the estimate of p(x_A) unbiased.

Source: Cappe et al. 2008 for the refit; Hesterberg 1995 for the defensive component; James and Stein 1961 and Ledoit
and Wolf 2004 for the shrinkage.
"""

import math

import torch
from jaxtyping import Float, Int64
from torch import Tensor

from dmvae.distributions.noise import chain
from dmvae.model.nll.full_gaussian import Components, FullGaussian
from dmvae.model.nll.gauss_newton import (
    EncoderProposal,
    encoder_means,
    gauss_newton,
    normals,
    setup_cost,
    spreads,
)
from dmvae.model.nll.importance import pieces, strata
from dmvae.model.nll.log_joint import PatternRows

STARTS_AT_ONCE = 4
"""Starts of every row that are linearised together."""
_STARTS = 16
_STEPS = 6
_ROUNDS = 3
_PILOT_SHARE = 0.15  # of the draws, each round
_MAX_PILOT = 2048  # kept in memory, hence bounded
_FLOOR = 0.1  # of the components' weights, shared equally: a mode that looks poor may not be
_WIDENED = (2.0, 4.0, 8.0)  # times the encoders' standard deviation, where starts lie
_FAR = 3.0  # and no further from their mean than the prior reaches
_SAME_MODE = 0.1  # squared distance in units of a component's variance, per dimension
_START, _PILOT = range(2)  # names of independent noise
_MIXED = -1  # and of the components' beside the encoders', which the modalities' places name


class MixtureProposal:
    """`Components`, the same wider, and the encoders' posteriors: three strata of fixed sizes."""

    def __init__(self, rows: PatternRows, components: Components, num_draws: int) -> None:
        # two draws have a variance; the density uses the counts as they are, so any counts are unbiased
        wide, few = (max(2, round(share * num_draws)) for share in (0.3, 0.1))
        self.counts: tuple[int, ...] = (num_draws - wide - few, wide, few)
        self._components, self._encoders = components, EncoderProposal(rows, num_draws)
        self._spreads = spreads(rows.blocks[-1].stop)

    def draw(
        self, keys: Int64[Tensor, " row"], start: int, num: int
    ) -> tuple[Float[Tensor, "row draw latent"], Float[Tensor, "row draw"]]:
        """Return draws `start` to `start + num` and their log-density in nats."""
        latents, log_q, _ = self.draw_with_shares(keys, start, num)
        return latents, log_q

    def draw_with_shares(
        self, keys: Int64[Tensor, " row"], start: int, num: int
    ) -> tuple[Float[Tensor, "row draw latent"], Float[Tensor, "row draw"], Float[Tensor, "row draw component"]]:
        """Return draws and their log-density like `draw`, and the probability that each is of each component."""
        latents = self._draw(keys, start, num)
        components, encoders = self._log_components(latents), self._log_encoders(latents)
        log_q = torch.logsumexp(torch.cat((components, encoders), dim=-1), dim=-1)
        return latents, log_q, torch.softmax(components, dim=-1)

    def _draw(self, keys: Int64[Tensor, " row"], start: int, num: int) -> Float[Tensor, "row draw latent"]:
        stratum = strata(self.counts, start, num, keys.device)
        encoded, _ = self._encoders.draw(keys, start, num)
        noise = normals(keys, _MIXED, start, num, encoded.shape[-1] + 1)
        noise, choice = noise[..., :-1], noise[..., -1:]
        noise = noise * noise.new_tensor([*self._spreads, 1.0])[stratum].sqrt().unsqueeze(-1)
        fitted = self._components.sample(noise, choice)
        return torch.where((stratum < len(self._spreads)).unsqueeze(-1), fitted, encoded)

    def _log_components(self, latents: Float[Tensor, "row draw latent"]) -> Float[Tensor, "row draw component"]:
        total, dim, parts = sum(self.counts), latents.shape[-1], []
        offsets = [
            math.log(count / total) - 0.5 * dim * math.log(2 * math.pi * spread)
            for count, spread in zip(self.counts, self._spreads, strict=False)
        ]
        for gaussian in self._components.gaussians:
            distance = gaussian.distance(latents)
            pair = (offset - 0.5 * distance / spread for offset, spread in zip(offsets, self._spreads, strict=True))
            parts.append(torch.logaddexp(*pair) - gaussian.log_scale.unsqueeze(1))
        return torch.stack(parts, dim=-1) + self._components.weights.log().unsqueeze(1)

    def _log_encoders(self, latents: Float[Tensor, "row draw latent"]) -> Float[Tensor, "row draw 1"]:
        share = math.log(self.counts[-1] / sum(self.counts))
        return (self._encoders.log_density(latents) + share).unsqueeze(-1)


def fit_mixture(rows: PatternRows, keys: Int64[Tensor, " row"], total: int, chunk: int) -> tuple[Components, int]:
    """Fit components to each row's posterior, with at most half of `total` decoder rows, and refit them to pilot draws.

    Returns:
        The components, and the decoder rows per modality and data row that are left.
    """
    cost = setup_cost(rows.probes, _STEPS) + 1
    num_starts = max(1, min(_STARTS, total // 2 // cost))
    left = total - num_starts * cost
    components = _from_starts(rows, chain(keys, _START), num_starts)
    num_pilot = min(_MAX_PILOT, int(_PILOT_SHARE * left))
    for number in range(_ROUNDS):
        components = _refit(rows, components, chain(keys, _PILOT, number), num_pilot, chunk)
    return components, left - _ROUNDS * num_pilot


def _from_starts(rows: PatternRows, keys: Int64[Tensor, " row"], num: int) -> Components:
    """Fit a Gaussian from each start; a component's weight is its Laplace evidence, one mode's fits sharing theirs."""
    middle = encoder_means(rows)
    draws, _ = EncoderProposal(rows, num).draw(keys, 0, num)
    spread = draws.new_tensor([0.0, *(_WIDENED[place % len(_WIDENED)] for place in range(1, num))])
    away = spread.unsqueeze(-1) * (draws - middle.unsqueeze(1))
    starts = middle.unsqueeze(1) + away.clamp(-_FAR, _FAR)
    gaussians, evidence = [], []
    for first, some in pieces(num, STARTS_AT_ONCE):
        many = rows.select(torch.arange(len(rows), device=keys.device).repeat_interleave(some))
        fit = gauss_newton(many, starts[:, first : first + some].flatten(0, 1), _STEPS)
        log_p = many.log_joint(fit.mean.unsqueeze(1)).view(len(rows), some)
        for place in range(some):
            gaussians.append(FullGaussian.from_covariance(fit.mean[place::some], fit.covariance[place::some]))
            evidence.append(log_p[:, place] + gaussians[-1].log_scale)
    limit = _SAME_MODE * middle.shape[1]
    means = torch.stack([gaussian.mean for gaussian in gaussians], dim=1)
    alike = torch.stack([(gaussian.distance(means) < limit).sum(1) for gaussian in gaussians], dim=1)
    return Components(_floored(torch.softmax(torch.stack(evidence, dim=1) - alike.log(), dim=1)), tuple(gaussians))


def _refit(
    rows: PatternRows, components: Components, keys: Int64[Tensor, " row"], num_draws: int, chunk: int
) -> Components:
    """Take a step of EM on importance-weighted draws.

    Weights are tempered until their effective number is enough for the shared latent; a component that few draws
    belong to stays as it is.
    """
    proposal = MixtureProposal(rows, components, num_draws)
    parts = []
    for start, num in pieces(num_draws, chunk):
        latents, log_q, shares = proposal.draw_with_shares(keys, start, num)
        parts.append((latents, rows.log_joint(latents) - log_q, shares))
    latents, log_w, shares = (torch.cat(part, dim=1) for part in zip(*parts, strict=True))
    shares = shares * temper(log_w, 4.0 * rows.shared.mean.shape[1]).unsqueeze(-1)
    totals = shares.sum(1)
    gaussians = []
    for number, gaussian in enumerate(components.gaussians):
        # a component that is no draw's has weights of 0, not NaN
        mine = shares[..., number] / totals[:, number, None].clamp(min=torch.finfo(torch.float64).tiny)
        gaussians.append(_moved(gaussian, latents, mine))
    return Components(_floored(totals / totals.sum(1, keepdim=True)), tuple(gaussians))


def _moved(
    gaussian: FullGaussian, latents: Float[Tensor, "row draw latent"], weights: Float[Tensor, "row draw"]
) -> FullGaussian:
    """Match the moments of weighted draws, as far as they differ from the Gaussian by more than their noise.

    In the Gaussian's own units the mean of n effective draws has a squared distance of d / n from its expectation, and
    their covariance S one of (tr(S)^2 + |S|^2) / n. Matched as they are, few draws of many latents spoil a fit.
    """
    num_effective = 1 / weights.square().sum(1).clamp(min=torch.finfo(torch.float64).tiny)
    whitened = (latents - gaussian.mean.unsqueeze(1)) @ gaussian.inverse.mT
    mean = (weights.unsqueeze(1) @ whitened).squeeze(1)
    centred = whitened - mean.unsqueeze(1)
    sample = (centred * weights.unsqueeze(-1)).mT @ centred
    # weights that are all 0, of a component that no draw belongs to, have no excess
    identity = torch.eye(sample.shape[-1], dtype=sample.dtype, device=sample.device)
    excess = sample - weights.sum(1)[:, None, None] * identity
    noise = (sample.diagonal(dim1=-2, dim2=-1).sum(-1).square() + sample.square().sum((1, 2))) / num_effective
    mean = mean * _beyond_noise(mean.square().sum(1), mean.shape[1] / num_effective).unsqueeze(-1)
    excess = excess * _beyond_noise(excess.square().sum((1, 2)), noise)[:, None, None]
    return FullGaussian.from_covariance(
        gaussian.mean + (gaussian.factor @ mean.unsqueeze(-1)).squeeze(-1),
        gaussian.covariance + gaussian.factor @ excess @ gaussian.factor.mT,
    )


def _beyond_noise(distance: Float[Tensor, " row"], noise: Float[Tensor, " row"]) -> Float[Tensor, " row"]:
    """Return the share of a squared distance that noise does not explain."""
    return (1 - noise / distance.clamp(min=torch.finfo(torch.float64).tiny)).clamp(min=0)


def temper(log_w: Float[Tensor, "row draw"], enough: float) -> Float[Tensor, "row draw"]:
    """Return normalised weights w^a with the largest a of 1, 1/sqrt(2), 1/2, ... whose effective number is enough."""
    power = torch.ones_like(log_w[:, :1])
    for _ in range(24):
        weights = torch.softmax(power * log_w, dim=1)
        effective = 1 / weights.square().sum(1)
        power = torch.where(effective.unsqueeze(1) < enough, power * math.sqrt(0.5), power)
    return weights


def _floored(weights: Float[Tensor, "row component"]) -> Float[Tensor, "row component"]:
    return (1 - _FLOOR) * weights + _FLOOR / weights.shape[1]
