"""Estimates with many latents, and chains from a fit to the posterior, against closed forms."""

import math
from collections.abc import Iterator

import pytest
import torch
from torch import Tensor, nn

from dmvae import DMVAE, Batch
from dmvae.distributions.gaussian import DiagGaussian
from dmvae.distributions.likelihoods.normal import Normal
from dmvae.model.nll import estimate as nll
from dmvae.model.nll.annealing import AnnealedSampler, annealing_cost, pilot_cost
from dmvae.model.nll.full_gaussian import Components, FullGaussian
from dmvae.model.nll.gauss_newton import EncoderProposal, GaussNewtonProposal, encoder_means, gauss_newton, spreads
from dmvae.model.nll.importance import WeightSummary
from dmvae.model.nll.log_joint import ModalityTerm, PatternRows, has_forward_mode
from dmvae.model.nll.mixture_proposal import MixtureProposal, fit_mixture
from tests.linear_gaussian import exact_log_prob, linear_model, sample_rows

pytestmark = pytest.mark.slow

VIEWS = {f"view{number}": (30,) for number in range(6)}


@pytest.fixture(autouse=True)
def without_graph() -> Iterator[None]:
    with torch.no_grad():
        yield


def rows_of(model: DMVAE, batch: Batch) -> PatternRows:
    """Gather complete rows as the estimators do."""
    keys = torch.arange(len(batch))
    names = model.config.modalities
    return nll._gather(model, batch, keys, names, keys, nll._forward_mode(model, names))


def large() -> DMVAE:
    return linear_model(VIEWS, latent_dim=64, private_dims=8)


def test_many_linear_latents_need_no_second_estimate_and_are_the_closed_form() -> None:
    model = large()
    batch = sample_rows(model, 8)
    estimate = model.joint_nll(batch, K=500, batch_size_K=250)
    assert bool(estimate.trusted.all())
    assert bool((estimate.decoder_rows == 500).all())
    error = estimate.nll + exact_log_prob(model, batch)
    assert float(error.abs().max()) < 0.2
    assert bool((error.abs() <= 4 * estimate.se).all())


@pytest.mark.acceptance
def test_reported_error_with_many_linear_latents_is_the_spread_over_seeds() -> None:
    model = large()
    batch, num = sample_rows(model, 8), 60
    estimates = [model.joint_nll(batch, K=500, batch_size_K=250, seed=seed) for seed in range(num)]
    spread = torch.stack([estimate.nll for estimate in estimates]).std(0)
    error = torch.stack([estimate.se for estimate in estimates]).square().mean(0).sqrt()
    assert bool(((error / spread - 1).abs() < 0.3).all())


@pytest.mark.parametrize("dim", [1, 10, 100, 1000])
def test_what_a_wider_proposal_costs_does_not_grow_with_the_number_of_latents(dim: int) -> None:
    spread, wide = spreads(dim)
    assert 1 < spread <= 1.15
    assert spread < wide <= 2.5
    # the second moment of weights N(0, I) / N(0, spread I)
    assert dim * math.log(spread / math.sqrt(2 * spread - 1)) < 0.2


def test_pilot_draws_do_not_spoil_a_fit_with_many_latents() -> None:
    rows = rows_of(model := large(), sample_rows(model, 3))
    proposal = MixtureProposal(rows, fit_mixture(rows, rows.keys, 4000, 250)[0], 600)
    weights = WeightSummary(3, proposal.counts, rows.keys.device)
    latents, log_q = proposal.draw(rows.keys, 0, 600)
    weights.add(rows.log_joint(latents) - log_q)
    assert bool((weights.effective_sample_size() > 0.25 * 600).all())


# --- chains


def small() -> DMVAE:
    return linear_model({"a": (3,), "b": (2, 3)}, private_dims={"a": 1, "b": 2}, scales=0.4)


def spoiled(rows: PatternRows) -> Components:
    """Return a mixture that is off by a deviation, and too narrow."""
    fit = gauss_newton(rows, encoder_means(rows), 2)
    off = fit.mean + fit.covariance.diagonal(dim1=-2, dim2=-1).sqrt()
    gaussians = (FullGaussian.from_covariance(mean, 0.5 * fit.covariance) for mean in (off, fit.mean))
    return Components(torch.tensor([[0.8, 0.2]], dtype=torch.float64).repeat(len(rows), 1), tuple(gaussians))


def weights_of(sampler: AnnealedSampler, num_moves: int, num_chains: int) -> Tensor:
    plan = sampler.plan(sampler.rows.keys, num_chains, 10**9)
    return sampler.log_weights(plan, num_moves, sampler.rows.keys + 1000, 0, num_chains)


def test_weights_of_chains_average_to_the_closed_form() -> None:
    model = small()
    batch = sample_rows(model, 6)
    rows = rows_of(model, batch)
    weights = torch.exp(
        weights_of(AnnealedSampler(rows, spoiled(rows)), 16, 2000) + -exact_log_prob(model, batch)[:, None]
    )
    error = weights.std(1) / math.sqrt(2000)
    assert bool(((weights.mean(1) - 1).abs() < 4 * error).all())
    assert float(error.max()) < 0.05


def test_more_moves_leave_less_error() -> None:
    rows = rows_of(model := small(), sample_rows(model, 6))
    sampler = AnnealedSampler(rows, spoiled(rows))
    few, many = (weights_of(sampler, num, 256).var(1) for num in (4, 64))
    assert bool((many < 0.4 * few).all())


def test_moves_leave_the_posterior_as_it_is() -> None:
    model = small()
    rows = rows_of(model, sample_rows(model, 3))
    fit = gauss_newton(rows, encoder_means(rows), 2)
    exact = FullGaussian.from_covariance(fit.mean, fit.covariance)
    sampler = AnnealedSampler(rows, Components(torch.ones(3, 1, dtype=torch.float64), (exact,)))
    # of the posterior itself, which for a linear model is the fit
    sampler._spread = 1.0
    chains, beta = sampler._start(rows.keys, 0, 4000), torch.full((3,), 0.5, dtype=torch.float64)
    for number in range(1, 6):
        chains, chance = sampler._move(chains, beta, torch.full_like(beta, 0.7), rows.keys, number, 0)
    noise = (chains.u - exact.mean.unsqueeze(1)) @ exact.inverse.mT
    assert float(chance.mean()) > 0.8
    assert float(noise.mean(1).abs().max()) < 5 / math.sqrt(4000)
    torch.testing.assert_close(noise.mT @ noise / 4000, torch.eye(5).double().expand(3, -1, -1), rtol=0, atol=0.1)


def test_a_plan_gives_more_moves_to_a_worse_fit_and_keeps_to_its_budget() -> None:
    rows = rows_of(model := small(), sample_rows(model, 4))
    good = gauss_newton(rows, encoder_means(rows), 2)
    fit = Components(torch.ones(4, 1, dtype=torch.float64), (FullGaussian.from_covariance(good.mean, good.covariance),))
    easy = AnnealedSampler(rows, fit).plan(rows.keys, 256, 10**9)
    off = FullGaussian.from_covariance(good.mean + 2, 0.2 * good.covariance)
    bad = AnnealedSampler(rows, Components(fit.weights, (off,)))
    hard = bad.plan(rows.keys, 256, 10**9)
    assert bool((easy.num_moves == 8).all())
    assert bool((hard.num_moves > 8).all())
    for budget in (40_000, 100_000):
        assert annealing_cost(256, int(bad.plan(rows.keys, 256, budget).num_moves.max())) <= budget
    betas = hard.schedule(20)
    assert bool((betas.diff(dim=0) > 0).all())
    assert bool((betas[-1] == 1).all())


def test_a_row_without_finite_densities_gets_the_fewest_moves_and_leaves_the_others_alone() -> None:
    rows, _ = bent_rows(3, 4, bend=0.1, scale=0.7)
    prior = FullGaussian.from_covariance(torch.zeros(3, 4).double(), torch.eye(4).double().repeat(3, 1, 1))
    sampler = AnnealedSampler(rows, Components(torch.ones(3, 1, dtype=torch.float64), (prior,)))
    before = sampler.plan(rows.keys, 256, 10**9)
    rows.terms[0].values[1] = math.nan
    plan = sampler.plan(rows.keys, 256, 10**9)
    assert int(plan.num_moves[1]) == 8
    others = torch.tensor([0, 2])
    torch.testing.assert_close(plan.step_size[others], before.step_size[others])
    log_w = sampler.log_weights(plan, 8, rows.keys, 0, 20)
    assert bool(log_w[1].isnan().all())
    assert bool(log_w[others].isfinite().all())


class _Counted(torch.autograd.Function):
    """The identity, which has no forward-mode derivative and reports the rows that pass in either direction."""

    @staticmethod
    def forward(ctx, z, network):
        ctx.network = network
        network.rows += len(z)
        return z.clone()

    @staticmethod
    def backward(ctx, grad):
        ctx.network.rows += len(grad)
        return grad, None


class Counting(nn.Module):
    """A decoder that counts the rows that pass through it, forwards and backwards."""

    def __init__(self, decoder: nn.Module) -> None:
        super().__init__()
        self.decoder, self.rows = decoder, 0

    def forward(self, z: Tensor) -> object:
        return self.decoder(_Counted.apply(z, self))


def test_untrusted_rows_are_annealed_at_the_stated_cost_whatever_the_chunk(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(nll, "KHAT_LIMIT", -9.0)
    monkeypatch.setattr(nll, "AFRESH_KHAT", -9.0)
    plain = linear_model({"a": (3,)}, latent_dim=1)
    decoder = Counting(plain.decoders["a"])
    model = DMVAE(plain.config, decoders={"a": decoder}).double().eval()
    model.encoders["a"].load_state_dict(plain.encoders["a"].state_dict())
    batch = sample_rows(plain, 4)
    estimate = model.joint_nll(batch, K=500, batch_size_K=500)
    assert decoder.rows == int(estimate.decoder_rows.sum())
    assert bool((estimate.decoder_rows == 9 * 500 + pilot_cost() + annealing_cost(256, 8)).all())
    error = estimate.nll + exact_log_prob(plain, batch)
    assert bool((error.abs() <= 4 * estimate.se).all())
    again = model.joint_nll(batch, K=500, batch_size_K=77)
    alone = model.joint_nll(Batch({"a": batch.data["a"][2:]}, ids=torch.arange(2, 4)), K=500, batch_size_K=500)
    torch.testing.assert_close(again.nll, estimate.nll, rtol=1e-9, atol=1e-9)
    torch.testing.assert_close(alone.nll, estimate.nll[2:], rtol=1e-9, atol=1e-9)


class Bent(nn.Module):
    """x = z + c z^2 in every element, so that no posterior is normal and each integral has one dimension."""

    def __init__(self, bend: float) -> None:
        super().__init__()
        self.bend = nn.Parameter(torch.tensor(bend, dtype=torch.float64))

    def forward(self, z: Tensor) -> Tensor:
        return z + self.bend * z.square()


def bent_rows(num: int, dim: int, bend: float, scale: float) -> tuple[PatternRows, Tensor]:
    """Return rows with encoders that know nothing and no private latent, and their log p(x) by quadrature."""
    torch.manual_seed(0)
    decode, z = Bent(bend), torch.randn(num, dim, dtype=torch.float64)
    x = decode(z) + scale * torch.randn_like(z)
    nothing = DiagGaussian(torch.zeros_like(z[:, :0]), torch.zeros_like(z[:, :0]))
    term = ModalityTerm(1, x, nothing, decode, Normal((dim,), scale), torch.float64, has_forward_mode(decode, z[:1]))
    grid = torch.linspace(-9, 9, 2001, dtype=torch.float64)
    log_weight = -0.5 * grid.square() - 0.5 * math.log(2 * math.pi) + math.log(float(grid[1] - grid[0]))
    noise = (x.unsqueeze(-1) - decode(grid)) / scale
    log_like = -0.5 * noise.square() - math.log(scale * math.sqrt(2 * math.pi))
    prior = DiagGaussian(torch.zeros_like(z), torch.zeros_like(z))
    return PatternRows(torch.arange(num), prior, (term,)), torch.logsumexp(log_like + log_weight, dim=-1).sum(1)


def test_chains_reach_posteriors_of_many_latents_that_no_normal_fits() -> None:
    rows, exact = bent_rows(4, 40, bend=0.3, scale=0.7)
    fit = gauss_newton(rows, encoder_means(rows), 8)
    gaussian = FullGaussian.from_covariance(fit.mean, fit.covariance)
    sampler = AnnealedSampler(rows, Components(torch.ones(4, 1, dtype=torch.float64), (gaussian,)))
    weights = WeightSummary(4, (256,), rows.keys.device)
    weights.add(weights_of(sampler, 64, 256))
    alone = WeightSummary(4, (256,), rows.keys.device)
    latents = gaussian.sample(torch.randn(4, 256, 40, dtype=torch.float64))
    alone.add(rows.log_joint(latents) - gaussian.log_density(latents, 1.0))
    assert float(weights.effective_sample_size().min()) > 2 * float(alone.effective_sample_size().max())
    error = weights.log_mean() - exact
    assert bool((error.abs() <= 4 * weights.standard_error()).all())
    assert float(error.abs().max()) < 0.5


def test_a_modality_without_private_latents_is_estimated_like_any_other() -> None:
    rows, exact = bent_rows(6, 3, bend=0.1, scale=0.7)
    budget = nll._Budget(500, 4, 500)
    for estimate in (nll._estimate(rows, budget), nll._escalate(rows, budget)):
        assert bool(((estimate.nll + exact).abs() <= 4 * estimate.se).all())
        assert float((estimate.nll + exact).abs().max()) < 0.2
    proposal = GaussNewtonProposal(rows, gauss_newton(rows, encoder_means(rows), 2), 300)
    latents, log_q = proposal.draw(rows.keys, 0, 300)
    assert latents.shape == (6, 300, 3)
    assert bool((log_q >= EncoderProposal(rows, 300).log_density(latents) - math.log(10) - 1e-9).all())
