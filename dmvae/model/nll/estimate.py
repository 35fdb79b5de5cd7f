"""Importance-sampled negative log-likelihood of incomplete rows, its standard error and its diagnostics.

    p(x_A) = E_q[ w ],   w = p(z_s) p(z_p) p(x_A | z_s, z_p) / q(z_s, z_p)

Weights are summed in logs as they stream, so memory does not grow with their number. A row is estimated up to three
times, each time afresh and only if the time before leaves doubt:

    1. K decoder rows    draws from a Gauss-Newton fit (`gauss_newton`)
    2. 8 K more          draws from a mixture of fits from several starts (`mixture_proposal`)
    3. at most 300 K     chains from that mixture to the posterior (`annealing`)
"""

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, fields, replace
from typing import Protocol, runtime_checkable

import torch
from jaxtyping import Bool, Float, Int64
from torch import Tensor

from dmvae.config.model import DMVAEConfig
from dmvae.data.batch import Batch
from dmvae.distributions.gaussian import DiagGaussian, product_of_experts
from dmvae.distributions.likelihoods import Likelihood
from dmvae.distributions.noise import chain, row_keys
from dmvae.model.loss import Decode, Observed
from dmvae.model.nll.annealing import PILOT_CHAINS, AnnealedSampler, annealing_cost, pilot_cost
from dmvae.model.nll.gauss_newton import (
    EncoderProposal,
    GaussNewtonProposal,
    Proposal,
    encoder_means,
    gauss_newton,
    setup_cost,
)
from dmvae.model.nll.importance import MIN_TRUSTED_DRAWS, WeightSummary, pieces
from dmvae.model.nll.log_joint import ModalityTerm, PatternRows, has_forward_mode
from dmvae.model.nll.mixture_proposal import STARTS_AT_ONCE, MixtureProposal, fit_mixture

KHAT_LIMIT = 0.7
"""Above this Pareto shape a mean of weights has no usable error (Vehtari et al. 2024)."""
SE_LIMIT = 0.5
"""Above this the delta method's standard error, in nats, is itself unreliable."""
AFRESH_KHAT = 0.3
"""Above this a row is estimated again: a fit to one mode may have missed another, which its weights hardly show."""
PROPOSALS = ("refined", "encoder")

_LONG = 10  # Gauss-Newton steps where draws are many
_STEPS = (4, 2, 1)  # and where they are fewer
_MANY_DRAWS = 1000
_ESCALATION = 8  # times K, for a row whose first estimate is doubtful
_ANNEALING = 300  # times K, at most, for one whose second estimate is not trusted
_DRAWS_PER_CHAIN = 4  # of K, where that makes more chains than the fewest that can be trusted
_FIRST, _FIT, _SECOND, _PLAN, _CHAINS = range(5)  # names of independent noise
_CHUNK_ELEMENTS = 2**22  # decoder outputs held at once
_MIN_WIDTH = 1024  # hidden layers are about as wide where the output is narrow


@runtime_checkable
class LatentModel(Protocol):
    """The part of a model that the estimators use."""

    config: DMVAEConfig

    @property
    def device(self) -> torch.device: ...  # noqa: D102

    @property
    def dtype(self) -> torch.dtype: ...  # noqa: D102

    @property
    def likelihoods(self) -> Mapping[str, Likelihood]: ...  # noqa: D102

    @property
    def decode_functions(self) -> Mapping[str, Decode]: ...  # noqa: D102

    def observe(self, inputs: Batch, modalities: Sequence[str]) -> Mapping[str, Observed]: ...  # noqa: D102


@dataclass(frozen=True, eq=False)
class NLLEstimate:
    """Estimated -log p(x_A) of every row, in nats; a row with nothing has 0.

    Attributes:
        nll: the estimate; its expectation exceeds the truth by about se^2 / 2.
        se: Monte Carlo standard error; NaN for a single draw.
        ess: effective sample size of the weights.
        khat: Pareto shape of the largest weights; NaN below 256 draws.
        trusted: whether `se` is reliable: at least 256 draws, k-hat at most 0.7 and se at most 0.5.
        decoder_rows: decoder rows spent, of the modality that took most. A derivative along one latent counts as one
            row, a gradient in all latents as one beside the row that it is of.
        proposal: where the latents were drawn from, `refined` or `encoder`.
    """

    nll: Float[Tensor, " row"]
    se: Float[Tensor, " row"]
    ess: Float[Tensor, " row"]
    khat: Float[Tensor, " row"]
    trusted: Bool[Tensor, " row"]
    decoder_rows: Int64[Tensor, " row"]
    proposal: str

    @classmethod
    def for_empty_rows(cls, num_rows: int, num_draws: int, proposal: str, device: torch.device) -> "NLLEstimate":
        """Return the exact result for rows without any modality."""
        zeros = torch.zeros(num_rows, dtype=torch.float64, device=device)
        ess, khat = torch.full_like(zeros, num_draws), torch.full_like(zeros, math.nan)
        return cls(zeros, zeros, ess, khat, zeros == 0, zeros.long(), proposal)

    def put(self, rows: Int64[Tensor, " chosen"], other: "NLLEstimate") -> "NLLEstimate":
        """Return this with the estimates of some rows taken from `other`."""
        assert self.proposal == other.proposal
        names = [field.name for field in fields(self) if field.name != "proposal"]
        return replace(self, **{name: getattr(self, name).index_copy(0, rows, getattr(other, name)) for name in names})


@dataclass(frozen=True)
class _Budget:
    """Decoder rows per modality and row, Gauss-Newton steps (whose cost is part of them) and draws decoded at once."""

    total: int
    steps: int
    chunk: int


def joint_nll(
    model: LatentModel,
    batch: Batch,
    K: int,  # noqa: N803 (the seed's name)
    batch_size_K: int,  # noqa: N803 (the seed's name)
    seed: int,
    modalities: Sequence[str],
    proposal: str = "refined",
) -> NLLEstimate:
    """Estimate -log p(x_A) of every row by importance sampling, A being what the row has of `modalities`.

    `proposal="encoder"` draws from q(z_s | x_A) prod_i q(z_i | x_i). `"refined"` fits a Gaussian to each row's
    posterior first (`dmvae.model.nll.gauss_newton`). A row whose weights then have k-hat above 0.3 or a standard error
    above 0.5 is estimated afresh with 8 K, from fits to several modes (`dmvae.model.nll.mixture_proposal`). A row that
    is still not trusted is estimated a last time by annealing (`dmvae.model.nll.annealing`). Where K is too small for a
    fit (it would take more than half) the draws are from the encoders, and the result's `proposal` says so.

    A row's estimate depends on (seed, its id) alone: not on its batch, the chunk or the process; without ids a
    row's place in the batch stands for it.

    Args:
        model: in eval mode.
        batch: rows on the model's device.
        K: decoder rows per modality and row, the cost of a fit included. A row that is estimated afresh takes 9 K in
            all, one that is annealed as much as its posterior needs, up to about 310 K.
        batch_size_K: draws decoded at once, or chains; bounds memory, and changes nothing else.
        seed: of the draws.
        modalities: which to count.
        proposal: where latents are drawn from, `refined` or `encoder`.

    Raises:
        ValueError: for K or batch_size_K below 1 or an unknown proposal.
    """
    if K < 1 or batch_size_K < 1:
        raise ValueError(f"K and batch_size_K must be at least 1, but got K={K}, batch_size_K={batch_size_K}.")
    if proposal not in PROPOSALS:
        raise ValueError(f"Unknown proposal {proposal!r}. Available: {', '.join(PROPOSALS)}.")
    probes = 1 + model.config.latent_dim + max(model.config.private_dims[name] for name in modalities)
    budget = _Budget(K, _affordable_steps(K, probes) if proposal == "refined" else 0, min(K, batch_size_K))
    estimate = NLLEstimate.for_empty_rows(len(batch), K, "refined" if budget.steps else "encoder", model.device)
    ids = torch.arange(len(batch)) if batch.ids is None else batch.ids
    keys = chain(seed, row_keys(ids)).to(model.device)
    at_once = max(budget.chunk, *((STARTS_AT_ONCE * probes, PILOT_CHAINS) if budget.steps else (1,)))
    for _, chosen, rows in rows_by_pattern(model, batch, keys, modalities, at_once, derivatives=bool(budget.steps)):
        estimate = estimate.put(chosen, _estimate(rows, budget))
    return estimate


def rows_by_pattern(
    model: LatentModel,
    batch: Batch,
    keys: Int64[Tensor, " row"],
    modalities: Sequence[str],
    decoded_per_row: int,
    derivatives: bool = True,
) -> Iterator[tuple[tuple[str, ...], Int64[Tensor, " chosen"], PatternRows]]:
    """Yield rows that have the same of `modalities`, encoded, in pieces of bounded memory; none without any.

    Args:
        model: in eval mode.
        batch: rows on the model's device.
        keys: names of the rows' noise.
        modalities: which to count.
        decoded_per_row: decoder rows per modality that one row takes at once.
        derivatives: whether decoders are linearised.

    Yields:
        The modalities, the places of the rows in the batch, and the rows.
    """
    forward_mode = _forward_mode(model, modalities) if derivatives else dict.fromkeys(modalities, False)
    at_once = _rows_at_once(model, modalities, decoded_per_row)
    for names, members in _patterns(batch, modalities):
        for start, num in pieces(len(members), at_once):
            chosen = members[start : start + num]
            yield names, chosen, _gather(model, batch, keys, names, chosen, forward_mode)


def _affordable_steps(total: int, probes: int) -> int:
    """Return the most Gauss-Newton steps that take at most half of the budget; 0 if none do."""
    wanted = (_LONG, *_STEPS) if total >= _MANY_DRAWS else _STEPS
    return next((steps for steps in wanted if 2 * setup_cost(probes, steps) <= total), 0)


def _forward_mode(model: LatentModel, modalities: Sequence[str]) -> dict[str, bool]:
    """Try each decoder's forward-mode derivative on one row."""
    dims, functions = model.config.private_dims, model.decode_functions
    return {
        name: has_forward_mode(
            functions[name],
            torch.zeros(1, model.config.latent_dim + dims[name], dtype=model.dtype, device=model.device),
        )
        for name in modalities
    }


def _rows_at_once(model: LatentModel, modalities: Sequence[str], decoded_per_row: int) -> int:
    width = max(_MIN_WIDTH, *(math.prod(model.likelihoods[name].output_shape) for name in modalities))
    return max(1, _CHUNK_ELEMENTS // (decoded_per_row * width))


def _patterns(batch: Batch, modalities: Sequence[str]) -> Iterator[tuple[tuple[str, ...], Int64[Tensor, " chosen"]]]:
    """Group the rows that have anything of `modalities` by what they have: (its names, the rows)."""
    names = [name for name in modalities if name in batch.data]
    if len(batch) == 0 or not names:
        return
    masks = batch.masks or {}
    everywhere = torch.ones(len(batch), dtype=torch.bool, device=batch.data[names[0]].device)
    present = torch.stack([masks.get(name, everywhere) for name in names], dim=1)
    for pattern in torch.unique(present, dim=0):
        here = tuple(name for name, has in zip(names, pattern.tolist(), strict=True) if has)
        if here:
            yield here, (present == pattern).all(1).nonzero().squeeze(1)


def _gather(
    model: LatentModel,
    batch: Batch,
    keys: Int64[Tensor, " row"],
    names: tuple[str, ...],
    chosen: Int64[Tensor, " chosen"],
    forward_mode: Mapping[str, bool],
) -> PatternRows:
    """Encode rows that all have the modalities `names`."""
    size_factors = None if batch.size_factors is None else batch.size_factors.index_select(0, chosen)
    data = {name: batch.data[name].index_select(0, chosen) for name in names}
    cells = {name: mask.index_select(0, chosen) for name, mask in (batch.cells or {}).items() if name in names}
    observed = model.observe(Batch(data, size_factors=size_factors, cells=cells), names)
    shared = product_of_experts(
        torch.stack([part.shared.mean for part in observed.values()]),
        torch.stack([part.shared.log_var for part in observed.values()]),
        torch.ones(len(names), len(chosen), dtype=torch.bool, device=keys.device),
    )
    functions, likelihoods, known = model.decode_functions, model.likelihoods, model.config.modalities
    terms = (
        ModalityTerm(
            place=1 + known.index(name),
            values=part.values,
            private=_double(part.private),
            decode=functions[name],
            likelihood=likelihoods[name],
            dtype=model.dtype,
            forward_mode=forward_mode[name],
            cells=part.cells,
        )
        for name, part in observed.items()
    )
    return PatternRows(keys[chosen], _double(shared), tuple(terms))


def _estimate(rows: PatternRows, budget: _Budget) -> NLLEstimate:
    if not budget.steps:
        return _average(rows, EncoderProposal(rows, budget.total), _FIRST, budget, "encoder")
    num_draws = budget.total - setup_cost(rows.probes, budget.steps)
    proposal = GaussNewtonProposal(rows, gauss_newton(rows, encoder_means(rows), budget.steps), num_draws)
    first = _average(rows, proposal, _FIRST, budget, "refined")
    doubtful = ((first.khat > AFRESH_KHAT) | (first.se > SE_LIMIT)).nonzero().squeeze(1)
    if num_draws < MIN_TRUSTED_DRAWS or len(doubtful) == 0:
        return first
    return first.put(doubtful, _escalate(rows.select(doubtful), budget))


def _escalate(rows: PatternRows, first: _Budget) -> NLLEstimate:
    """Estimate rows afresh with eight times the budget, from a proposal that looks for several modes."""
    total = _ESCALATION * first.total
    components, num_draws = fit_mixture(rows, chain(rows.keys, _FIT), total, first.chunk)
    spent = replace(first, total=total + first.total)
    second = _average(rows, MixtureProposal(rows, components, num_draws), _SECOND, spent, "refined")
    hard = (~second.trusted).nonzero().squeeze(1)
    if len(hard) == 0:
        return second
    return second.put(hard, _anneal(AnnealedSampler(rows, components).select(hard), first, spent.total))


def _anneal(sampler: AnnealedSampler, budget: _Budget, spent: int) -> NLLEstimate:
    """Estimate rows afresh by annealing; rows that need equally many moves run together."""
    keys, num_chains = sampler.rows.keys, max(MIN_TRUSTED_DRAWS, budget.total // _DRAWS_PER_CHAIN)
    plan = sampler.plan(chain(keys, _PLAN), num_chains, _ANNEALING * budget.total)
    estimate = NLLEstimate.for_empty_rows(len(keys), num_chains, "refined", keys.device)
    for num_moves in sorted(set(plan.num_moves.tolist())):
        chosen = (plan.num_moves == num_moves).nonzero().squeeze(1)
        part, its_plan = sampler.select(chosen), plan.select(chosen)
        weights = WeightSummary(len(chosen), (num_chains,), keys.device)
        for start, num in pieces(num_chains, budget.chunk):
            weights.add(part.log_weights(its_plan, num_moves, chain(part.rows.keys, _CHAINS), start, num))
        cost = spent + pilot_cost() + annealing_cost(num_chains, num_moves)
        estimate = estimate.put(chosen, _summarise(weights, cost, "refined"))
    return estimate


def _average(rows: PatternRows, proposal: Proposal, stage: int, spent: _Budget, name: str) -> NLLEstimate:
    """Draw from the proposal and average the weights."""
    keys = chain(rows.keys, stage)
    weights = WeightSummary(len(rows), proposal.counts, keys.device)
    for start, num in pieces(sum(proposal.counts), spent.chunk):
        latents, log_q = proposal.draw(keys, start, num)
        weights.add(rows.log_joint(latents) - log_q)
    return _summarise(weights, spent.total, name)


def _summarise(weights: WeightSummary, decoder_rows: int, name: str) -> NLLEstimate:
    se, khat = weights.standard_error(), weights.khat()
    return NLLEstimate(
        nll=-weights.log_mean(),
        se=se,
        ess=weights.effective_sample_size(),
        khat=khat,
        # false where k-hat is NaN
        trusted=(khat <= KHAT_LIMIT) & (se <= SE_LIMIT),
        decoder_rows=torch.full_like(se, decoder_rows, dtype=torch.int64),
        proposal=name,
    )


def _double(gaussian: DiagGaussian) -> DiagGaussian:
    return DiagGaussian(gaussian.mean.double(), gaussian.log_var.double())
