"""Annealed importance sampling from a fit to each row's posterior, for rows that the fit itself is too far from.

Chains go from g, the mixture `Components` slightly widened, to the posterior through

    f_b(u) = g(u)^(1 - b) p(x_A, u)^b,   0 = b_0 < b_1 < ... < b_T = 1

by one Hamiltonian move for each b_t, which leaves f_(b_t) as it is and is preconditioned by the covariance of the
heaviest component. With D(u) = log p(x_A, u) - log g(u)

    log w = sum_t (b_t - b_(t-1)) D(u_(t-1)),   E[w] = p(x_A)

Pilot chains choose each row's step size, its b_t and its T, all of which are fixed before the chains that count begin:
that keeps the estimate of p(x_A) unbiased. The variance of log w is of the order of L^2 / T,
L being the integral of the standard deviation of D over b (thermodynamic length).

Source: Neal 2001 for the weights; Neal 2011 for the moves.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from jaxtyping import Bool, Float, Int64
from torch import Tensor

from dmvae.model.nll.full_gaussian import Components
from dmvae.model.nll.gauss_newton import normals, spreads
from dmvae.model.nll.log_joint import PatternRows

PILOT_CHAINS = 32
"""Pilot chains of a row, which run together."""
GRADIENT_COST = 2
"""Decoder rows that a log-density with its gradient counts as: once through the decoder and once back."""
_PILOT_MOVES = 16
_LEAPFROG_STEPS = 2
_FEWEST_MOVES = 8
_MOVES_PER_SQUARED_LENGTH = 4.0
_FIRST_STEP_SIZE, _LARGEST_STEP_SIZE = 0.5, 1.2  # in standard deviations of the preconditioner
_ACCEPTANCE = 0.8
_ADAPTATION_RATE = 0.5
_AS_IT_WAS = 0.2  # share of the pilot's own steps in a schedule: the spread that it found is an estimate


@dataclass(frozen=True, eq=False)
class AnnealingPlan:
    """How the chains of every row move.

    Attributes:
        step_size: of the leapfrog integrator, in standard deviations of the preconditioner.
        betas: b of every pilot move.
        lengths: L from 0 to each of these.
        num_moves: T, a power of two.
    """

    step_size: Float[Tensor, " row"]
    betas: Float[Tensor, "move row"]
    lengths: Float[Tensor, "move row"]
    num_moves: Int64[Tensor, " row"]

    def select(self, rows: Int64[Tensor, " chosen"]) -> "AnnealingPlan":
        """Return the plans of some rows."""
        return AnnealingPlan(self.step_size[rows], self.betas[:, rows], self.lengths[:, rows], self.num_moves[rows])

    def schedule(self, num_moves: int) -> Float[Tensor, "{num_moves} row"]:
        """Return b of every move, at equal distances in length."""
        path = self.lengths / self.lengths[-1]
        path = (1 - _AS_IT_WAS) * path + _AS_IT_WAS * torch.linspace(0, 1, len(path) + 1).to(path)[1:, None]
        path, known = (torch.cat((torch.zeros_like(part[:1]), part)).T.contiguous() for part in (path, self.betas))
        wanted = torch.linspace(0, 1, num_moves + 1).to(path)[1:].expand(len(path), -1).contiguous()
        above = torch.searchsorted(path, wanted).clamp(1, path.shape[1] - 1)
        low, high = path.gather(1, above - 1), path.gather(1, above)
        share = (wanted - low) / (high - low)
        betas = torch.lerp(known.gather(1, above - 1), known.gather(1, above), share)
        betas[:, -1] = 1.0
        return betas.T


class AnnealedSampler:
    """Chains from a mixture to the posterior of every row; see the top of this module."""

    def __init__(self, rows: PatternRows, components: Components) -> None:
        self.rows, self._components = rows, components
        self._spread, _ = spreads(rows.blocks[-1].stop)
        self._factor = components.heaviest_factor

    def select(self, rows: Int64[Tensor, " chosen"]) -> "AnnealedSampler":
        """Return the sampler of some rows."""
        return AnnealedSampler(self.rows.select(rows), self._components.select(rows))

    def plan(self, keys: Int64[Tensor, " row"], num_chains: int, budget: int) -> AnnealingPlan:
        """Run pilot chains and return how the chains that count move: as often as the row needs and the budget allows.

        Args:
            keys: names of the noise.
            num_chains: chains that count.
            budget: decoder rows per modality and data row that they may take; the fewest moves are always allowed.
        """
        chains = self._start(keys, 0, PILOT_CHAINS)
        # D is spread most where b is small
        betas = (torch.arange(1, _PILOT_MOVES + 1) / _PILOT_MOVES).square().to(chains.log_p)
        step_size = torch.full_like(chains.log_p[:, 0], _FIRST_STEP_SIZE)
        sizes, spread = [], []
        for number, beta in enumerate(betas):
            spread.append(_spread(chains.log_ratio))
            chains, chance = self._move(chains, beta.expand_as(step_size), step_size, keys, 1 + number, 0)
            sizes.append(step_size)
            step_size = step_size * torch.exp(_ADAPTATION_RATE * (chance.mean(1) - _ACCEPTANCE))
            step_size = step_size.clamp(max=_LARGEST_STEP_SIZE)
        steps = betas.diff(prepend=torch.zeros_like(betas[:1])).unsqueeze(1)
        lengths = (torch.stack(spread) * steps).cumsum(0).clamp(min=torch.finfo(torch.float64).tiny)
        most = max(_FEWEST_MOVES, _power_of_two_below(_affordable_moves(num_chains, budget)))
        wanted = (_MOVES_PER_SQUARED_LENGTH * lengths[-1].square()).clamp(_FEWEST_MOVES, most)
        return AnnealingPlan(
            step_size=torch.stack(sizes[_PILOT_MOVES // 2 :]).mean(0),
            betas=betas.unsqueeze(1).expand(-1, len(step_size)),
            lengths=lengths,
            num_moves=(2 ** wanted.log2().ceil()).long(),
        )

    def log_weights(
        self, plan: AnnealingPlan, num_moves: int, keys: Int64[Tensor, " row"], start: int, num: int
    ) -> Float[Tensor, "row {num}"]:
        """Return log w of chains `start` to `start + num`."""
        chains = self._start(keys, start, num)
        log_w, before = torch.zeros_like(chains.log_p), torch.zeros_like(plan.step_size)
        for number, beta in enumerate(plan.schedule(num_moves)):
            log_w = log_w + (beta - before).unsqueeze(1) * chains.log_ratio
            before = beta
            # where a chain ends does not matter
            if number + 1 < num_moves:
                chains, _ = self._move(chains, beta, plan.step_size, keys, 1 + number, start)
        return log_w

    def _start(self, keys: Int64[Tensor, " row"], start: int, num: int) -> "_Chains":
        noise = normals(keys, 0, start, num, self._factor.shape[1] + 1)
        return self._at(self._components.sample(math.sqrt(self._spread) * noise[..., :-1], noise[..., -1:]))

    def _at(self, u: Float[Tensor, "row chain latent"]) -> "_Chains":
        log_p, slope_p = _with_gradient(self.rows.log_joint, u)
        log_g, slope_g = _with_gradient(lambda z: self._components.log_density(z, self._spread), u)
        return _Chains(u, log_p, log_g, slope_p, slope_g)

    def _move(
        self,
        chains: "_Chains",
        beta: Float[Tensor, " row"],
        step_size: Float[Tensor, " row"],
        keys: Int64[Tensor, " row"],
        number: int,
        start: int,
    ) -> tuple["_Chains", Float[Tensor, "row chain"]]:
        """Take a Hamiltonian move that leaves f_b as it is; return the chances of acceptance too."""
        num, dim = chains.u.shape[1:]
        noise = normals(keys, number, start, num, dim + 2)
        momentum, jitter, luck = noise[..., :dim], torch.special.ndtr(noise[..., dim]), noise[..., dim + 1]
        # trajectories of one length could come back to where they began
        step = (step_size.unsqueeze(1) * (0.8 + 0.4 * jitter)).unsqueeze(-1)
        new, moving = chains, momentum + 0.5 * step * (chains.force(beta) @ self._factor)
        for leap in range(_LEAPFROG_STEPS):
            new = self._at(new.u + (step * moving) @ self._factor.mT)
            half = 0.5 if leap == _LEAPFROG_STEPS - 1 else 1.0
            moving = moving + half * step * (new.force(beta) @ self._factor)
        gain = new.log_density(beta) - chains.log_density(beta)
        gain = gain - 0.5 * (moving.square().sum(-1) - momentum.square().sum(-1))
        # a trajectory that left the finite numbers is not taken
        gain = gain.nan_to_num(nan=-math.inf).clamp(max=0)
        return chains.replaced(torch.special.log_ndtr(luck) < gain, new), gain.exp()


def pilot_cost() -> int:
    """Return the decoder rows per modality and data row that a plan takes."""
    return PILOT_CHAINS * _chain_cost(_PILOT_MOVES)


def annealing_cost(num_chains: int, num_moves: int) -> int:
    """Return the decoder rows per modality and data row that chains take: T - 1 moves of two steps, and the start."""
    return num_chains * _chain_cost(num_moves - 1)


def _chain_cost(num_moves: int) -> int:
    return GRADIENT_COST * (1 + _LEAPFROG_STEPS * num_moves)


def _affordable_moves(num_chains: int, budget: int) -> int:
    return 1 + (budget // (GRADIENT_COST * num_chains) - 1) // _LEAPFROG_STEPS


def _power_of_two_below(number: int) -> int:
    return 1 << (max(number, 1).bit_length() - 1)


def _spread(log_ratio: Float[Tensor, "row chain"]) -> Float[Tensor, " row"]:
    """Return the standard deviation, of the middle two thirds: a chain lost in a poor component says little."""
    low, high = log_ratio.quantile(log_ratio.new_tensor([0.16, 0.84]), dim=1).unbind()
    # more moves would not help a row without finite densities
    return (0.5 * (high - low)).nan_to_num(nan=0.0)


def _with_gradient(
    log_density: Callable[[Tensor], Tensor], u: Float[Tensor, "row chain latent"]
) -> tuple[Float[Tensor, "row chain"], Float[Tensor, "row chain latent"]]:
    with torch.enable_grad():
        leaf = u.detach().requires_grad_()
        value = log_density(leaf)
        gradient: Tensor = torch.autograd.grad(value.sum(), leaf)[0]
    return value.detach(), gradient


@dataclass(frozen=True, eq=False)
class _Chains:
    """Where chains are, with log p(x_A, u) and log g(u) there and their gradients."""

    u: Float[Tensor, "row chain latent"]
    log_p: Float[Tensor, "row chain"]
    log_g: Float[Tensor, "row chain"]
    slope_p: Float[Tensor, "row chain latent"]
    slope_g: Float[Tensor, "row chain latent"]

    @property
    def log_ratio(self) -> Float[Tensor, "row chain"]:
        """D(u)."""
        return self.log_p - self.log_g

    def log_density(self, beta: Float[Tensor, " row"]) -> Float[Tensor, "row chain"]:
        """Return log f_b."""
        return torch.lerp(self.log_g, self.log_p, beta.unsqueeze(1))

    def force(self, beta: Float[Tensor, " row"]) -> Float[Tensor, "row chain latent"]:
        """Return the gradient of log f_b."""
        return torch.lerp(self.slope_g, self.slope_p, beta[:, None, None])

    def replaced(self, taken: Bool[Tensor, "row chain"], new: "_Chains") -> "_Chains":
        """Return the chains with those of `new` where a move is taken."""
        each = taken.unsqueeze(-1)
        return _Chains(
            torch.where(each, new.u, self.u),
            torch.where(taken, new.log_p, self.log_p),
            torch.where(taken, new.log_g, self.log_g),
            torch.where(each, new.slope_p, self.slope_p),
            torch.where(each, new.slope_g, self.slope_g),
        )
