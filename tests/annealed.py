"""Annealed importance sampling: a reference for log p(x_A) that shares nothing with the estimators under test.

Chains go from the prior to a row's posterior through p(u) p(x_A | u)^b, b from 0 to 1, by Hamiltonian Monte Carlo. It
needs no encoder, no mode and no Jacobian of a decoder; it wants some hundred thousand decoder rows a row.

    log w = sum_t (b_t - b_{t-1}) log p(x_A | u_{t-1}),      E[w] = p(x_A)

Steps, their scales and the b_t come from a shorter run of other chains and are then fixed, so that this mean is exact.

Source: Neal 2001; Wu et al. 2017 for decoder models.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from dmvae import DMVAE, Batch

LEAPFROG = 4
_LONGEST = 0.6  # of a step: four of them are half a period of a standard normal, and more lead back
_CURVE = 9.0  # how much finer the steps of b are near 0, in logs, before it is known where they should be
_ACCEPTED = 0.75


@dataclass(frozen=True)
class Reference:
    """Log-densities of rows in nats, with standard errors over chains and the share of accepted moves."""

    log_prob: Tensor
    se: Tensor
    accepted: float


@dataclass(frozen=True)
class Tuning:
    """Per temperature and row: b, size and Cholesky factor of the steps, spread of the log-likelihood over chains."""

    betas: Tensor
    size: Tensor
    factor: Tensor
    spread: Tensor

    def schedule(self, num: int) -> Tensor:
        """Return b of `num` steps `(step, row)` with equal increments of log w's spread."""
        steps = self.spread * self.betas.diff(dim=0, prepend=torch.zeros_like(self.betas[:1]))
        # a fifth as it was: the spread is an estimate
        steps = steps / steps.sum(0) + 0.25 / len(steps)
        path = torch.cat((torch.zeros_like(steps[:1]), steps.cumsum(0))) / steps.sum(0)
        known = torch.cat((torch.zeros_like(self.betas[:1]), self.betas))
        wanted = torch.linspace(0, 1, num + 1, dtype=torch.float64)[1:]
        above = torch.searchsorted(path.T.contiguous(), wanted.expand(path.shape[1], -1).contiguous()).T
        above = above.clamp(1, len(path) - 1)
        low, high = path.gather(0, above - 1), path.gather(0, above)
        share = (wanted.unsqueeze(1) - low) / (high - low)
        betas = known.gather(0, above - 1) * (1 - share) + known.gather(0, above) * share
        betas[-1] = 1.0
        return betas

    def at(self, betas: Tensor) -> tuple[Tensor, Tensor]:
        """Return each row's size and factor at its b."""
        place = (
            torch.searchsorted(self.betas.T.contiguous(), betas.unsqueeze(1)).squeeze(1).clamp(max=len(self.size) - 1)
        )
        rows = torch.arange(len(betas))
        return self.size[place, rows], self.factor[place, rows]


def annealed_log_prob(
    model: DMVAE,
    batch: Batch,
    temperatures: int,
    chains: int,
    seed: int = 0,
    say: Callable[[str], None] = lambda text: None,
) -> Reference:
    """Estimate log p(x_A) of every row; a row with nothing has 0."""
    result, errors = torch.zeros(2, len(batch), dtype=torch.float64)
    names = [name for name in model.config.modalities if name in batch.data]
    everywhere = torch.ones(len(batch), dtype=torch.bool)
    present = torch.stack([(batch.masks or {}).get(name, everywhere) for name in names], dim=1)
    accepted = []
    for pattern in present.unique(dim=0):
        rows = (present == pattern).all(1).nonzero().squeeze(1)
        here = [name for name, has in zip(names, pattern.tolist(), strict=True) if has]
        if not here:
            continue
        say(f"{len(rows)} rows with {', '.join(here)}")
        target = _Target(model, {name: batch.data[name][rows] for name in here})
        generator = torch.Generator().manual_seed(seed)
        tuning, _, _ = _anneal(target, max(temperatures // 5, 50), chains, generator, None)
        _, log_w, share = _anneal(target, temperatures, chains, generator, tuning)
        weights = torch.exp(log_w - log_w.amax(0))
        result[rows] = log_w.amax(0) + weights.mean(0).log()
        errors[rows] = weights.std(0) / math.sqrt(chains) / weights.mean(0)
        accepted.append(share)
    return Reference(result, errors, sum(accepted) / max(len(accepted), 1))


class _Target:
    """log p(x_A | u) of rows that have the same modalities, for chains `(chain, row, latent)`."""

    def __init__(self, model: DMVAE, data: dict[str, Tensor]) -> None:
        self._model, self._data = model, data
        self.rows = len(next(iter(data.values())))
        dims = model.config.private_dims
        self._sizes = [model.config.latent_dim, *(dims[name] for name in data)]
        self.dim, self.dtype = sum(self._sizes), model.dtype

    def __call__(self, u: Tensor) -> tuple[Tensor, Tensor]:
        """Return the log-likelihood `(chain, row)` and its gradient."""
        with torch.enable_grad():
            leaf = u.detach().requires_grad_()
            shared, *private = leaf.split(self._sizes, dim=-1)
            total = torch.zeros(())
            for (name, values), own in zip(self._data.items(), private, strict=True):
                z = torch.cat((shared, own), dim=-1).flatten(0, 1)
                output = self._model.decode_functions[name](z)
                output = output.reshape(*u.shape[:2], *output.shape[1:])
                total = total + self._model.likelihoods[name].log_prob(output, values)
            (gradient,) = torch.autograd.grad(total.sum(), leaf)
        return total.detach(), gradient


def first_schedule(num: int, rows: int) -> Tensor:
    """Return b of `num` steps `(step, row)`, the same for all rows, in steps that grow with b."""
    place = torch.linspace(0, 1, num + 1, dtype=torch.float64)[1:]
    return (torch.expm1(_CURVE * place) / math.expm1(_CURVE)).unsqueeze(1).repeat(1, rows)


def _anneal(
    target: _Target, temperatures: int, chains: int, generator: torch.Generator, tuning: Tuning | None
) -> tuple[Tuning, Tensor, float]:
    """Run chains from the prior to the posterior; without `tuning` they tune themselves, and say how."""
    betas = tuning.schedule(temperatures) if tuning else first_schedule(temperatures, target.rows)
    state = _Chains.begin(target, chains, generator)
    log_w, before = torch.zeros(chains, target.rows, dtype=torch.float64), torch.zeros(target.rows, dtype=torch.float64)
    size = torch.full((target.rows,), 0.3)
    covariance = torch.eye(target.dim).repeat(target.rows, 1, 1)
    sizes, factors, spreads, accepted = [], [], [], 0.0
    for beta in betas:
        log_w += (beta - before) * state.log_like.double()
        before = beta
        if tuning is not None:
            size, factor = tuning.at(beta)
        else:
            factor = torch.linalg.cholesky(covariance)
            sizes.append(size)
            factors.append(factor)
            spreads.append(state.log_like.double().std(0))
        state, chance = state.move(
            target, beta.to(target.dtype), size.to(target.dtype), factor.to(target.dtype), generator
        )
        accepted += float(chance.mean()) / temperatures
        if tuning is None:
            size = (size * torch.exp(0.3 * (chance.mean(0).float() - _ACCEPTED))).clamp(max=_LONGEST)
            covariance = 0.8 * covariance + 0.2 * _covariance(state.u.float())
    made = tuning or Tuning(betas, torch.stack(sizes), torch.stack(factors), torch.stack(spreads))
    return made, log_w, accepted


def _covariance(u: Tensor) -> Tensor:
    """Return each row's covariance over chains, off its diagonal shrunk as if as many draws were uncorrelated."""
    centred = (u - u.mean(0)).transpose(0, 1)
    full = centred.mT @ centred / (len(u) - 1)
    diagonal = torch.diag_embed(full.diagonal(dim1=-2, dim2=-1) + 1e-8)
    trust = len(u) / (len(u) + u.shape[-1])
    return trust * full + (1 - trust) * diagonal


@dataclass(frozen=True)
class _Chains:
    """Where chains `(chain, row, latent)` are, with the log-likelihood there and its gradient."""

    u: Tensor
    log_like: Tensor
    slope: Tensor

    @classmethod
    def begin(cls, target: _Target, chains: int, generator: torch.Generator) -> "_Chains":
        u = torch.randn(chains, target.rows, target.dim, generator=generator, dtype=target.dtype)
        return cls(u, *target(u))

    def move(
        self, target: _Target, beta: Tensor, size: Tensor, factor: Tensor, generator: torch.Generator
    ) -> tuple["_Chains", Tensor]:
        """Take one Hamiltonian step that leaves p(u) p(x | u)^b as it is; return the chances of acceptance too."""
        chains, rows, dim = self.u.shape
        momentum = torch.randn(chains, rows, dim, generator=generator, dtype=target.dtype)
        # trajectories of one length would come back to where they began
        step = (size * (0.5 + 0.5 * torch.rand(chains, rows, generator=generator, dtype=target.dtype))).unsqueeze(-1)

        def force(u: Tensor, slope: Tensor) -> Tensor:
            return ((beta.unsqueeze(1) * slope - u).transpose(0, 1) @ factor).transpose(0, 1)

        def energy(u: Tensor, log_like: Tensor, momentum: Tensor) -> Tensor:
            return 0.5 * u.square().sum(-1) - beta * log_like + 0.5 * momentum.square().sum(-1)

        u, log_like, slope = self.u, self.log_like, self.slope
        moving = momentum + 0.5 * step * force(u, slope)
        for leap in range(LEAPFROG):
            u = u + ((step * moving).transpose(0, 1) @ factor.mT).transpose(0, 1)
            log_like, slope = target(u)
            moving = moving + (0.5 if leap == LEAPFROG - 1 else 1.0) * step * force(u, slope)
        change = energy(self.u, self.log_like, momentum) - energy(u, log_like, moving)
        chance = change.nan_to_num(nan=-math.inf).clamp(max=0).exp()
        taken = torch.rand(chance.shape, generator=generator) < chance
        return _Chains(
            torch.where(taken.unsqueeze(-1), u, self.u),
            torch.where(taken, log_like, self.log_like),
            torch.where(taken.unsqueeze(-1), slope, self.slope),
        ), chance
