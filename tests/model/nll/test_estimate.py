"""The estimated NLL against closed forms and quadrature, its error, its diagnostics, and what it may depend on."""

import itertools
import math

import numpy as np
import pytest
import torch
from scipy import stats
from torch import Tensor, nn

from dmvae import DMVAE, Batch, DMVAEConfig
from dmvae.distributions import likelihoods as likelihood
from dmvae.distributions.likelihoods.bernoulli import Bernoulli
from dmvae.distributions.likelihoods.categorical import Categorical
from dmvae.distributions.likelihoods.columns import Columns
from dmvae.distributions.likelihoods.laplace import Laplace
from dmvae.distributions.likelihoods.normal import Normal
from dmvae.model.nll import estimate as nll
from dmvae.model.nll.estimate import NLLEstimate
from dmvae.model.nll.gauss_newton import EncoderProposal, GaussNewtonProposal, encoder_means, gauss_newton
from dmvae.model.nll.importance import WeightSummary, pareto_shape
from dmvae.model.nll.log_joint import ModalityTerm, PatternRows
from dmvae.model.nll.mixture_proposal import MixtureProposal, fit_mixture
from dmvae.nn.networks import DecoderOutput
from tests.linear_gaussian import exact_log_prob, linear_model, sample_rows

pytestmark = pytest.mark.slow

SHAPES = {"a": (3,), "b": (4,), "c": (2, 3)}
PRIVATE = {"a": 1, "b": 2, "c": 1}
SUBSETS = [names for size in (1, 2, 3) for names in itertools.combinations(SHAPES, size)]


def spoiled(model: DMVAE) -> DMVAE:
    """Return the model with encoders that are wrong and too sure: variances x 0.3, means off by 0.7 sd."""
    with torch.no_grad():
        for encoder in model.encoders.values():
            (layer,) = (module for module in encoder.modules() if isinstance(module, nn.Linear))
            for mean, log_var in zip(*[iter(layer.bias.split(encoder.heads.sizes))] * 2, strict=True):
                mean += 0.7 * torch.exp(0.5 * log_var)
                log_var += math.log(0.3)
    return model


def make(seed: int, encoders: str) -> DMVAE:
    model = linear_model(SHAPES, private_dims=PRIVATE, seed=seed)
    return spoiled(model) if encoders == "bad" else model


def only(batch: Batch, names: tuple[str, ...]) -> Batch:
    masks = {name: batch.masks[name] & (name in names) for name in batch.data}
    data = {
        name: torch.where(masks[name].view(-1, *[1] * (x.dim() - 1)), x, math.nan) for name, x in batch.data.items()
    }
    return Batch(data, masks, ids=batch.ids)


def copies(batch: Batch, num: int) -> Batch:
    """Return every row `num` times under different ids, so that each copy has noise of its own."""
    rows = torch.arange(len(batch)).repeat(num)
    return Batch(
        {name: values[rows] for name, values in batch.data.items()},
        {name: mask[rows] for name, mask in batch.masks.items()},
        ids=torch.arange(len(rows)),
    )


def same(one: NLLEstimate, other: NLLEstimate) -> None:
    assert one.proposal == other.proposal
    for name in ("nll", "se", "ess", "khat", "trusted", "decoder_rows"):
        torch.testing.assert_close(getattr(one, name), getattr(other, name), rtol=1e-9, atol=1e-9, equal_nan=True)


# --- the closed form


def share_within_four_se(model: DMVAE, batch: Batch, proposal: str, seed: int) -> float:
    hits = []
    for names in SUBSETS:
        rows = only(batch, names)
        estimate = model.joint_nll(rows, K=1000, batch_size_K=500, seed=seed, proposal=proposal)
        assert estimate.proposal == proposal
        hits.append((estimate.nll + exact_log_prob(model, rows)).abs() <= 4 * estimate.se)
    return float(torch.cat(hits).double().mean())


CASES = [("encoder", "good"), ("refined", "good"), ("refined", "bad")]


@pytest.mark.parametrize(("proposal", "encoders"), CASES)
def test_nll_of_every_subset_is_the_closed_form_within_its_error(proposal, encoders):
    model = make(0, encoders)
    assert share_within_four_se(model, sample_rows(model, 8), proposal, seed=1) >= 0.95


@pytest.mark.acceptance
@pytest.mark.parametrize("seed", range(5))
@pytest.mark.parametrize(("proposal", "encoders"), CASES)
def test_nll_of_every_subset_is_the_closed_form_within_its_error_in_full(proposal, encoders, seed):
    model = make(seed, encoders)
    assert share_within_four_se(model, sample_rows(model, 100, seed), proposal, seed) >= 0.95


def spread_and_error(proposal: str, encoders: str, seeds: int) -> tuple[Tensor, Tensor, Tensor]:
    """Return per row the spread of the NLL over seeds, the reported error (both rms) and the mean error."""
    model = make(0, encoders)
    batch = sample_rows(model, 4, missing=0.2)
    estimate = model.joint_nll(copies(batch, seeds), K=600, proposal=proposal)
    values = estimate.nll.view(seeds, -1)
    return (
        values.std(0),
        estimate.se.view(seeds, -1).square().mean(0).sqrt(),
        values.mean(0) + exact_log_prob(model, batch),
    )


@pytest.mark.parametrize("encoders", ["good", "bad"])
def test_reported_error_is_the_spread_over_seeds(encoders):
    spread, error, bias = spread_and_error("refined", encoders, seeds=60)
    assert torch.all((error / spread - 1).abs() < 0.3)
    assert torch.all(bias.abs() < 4 * spread / math.sqrt(60) + spread.square())


@pytest.mark.acceptance
@pytest.mark.parametrize("encoders", ["good", "bad"])
def test_reported_error_is_the_spread_over_seeds_in_full(encoders):
    spread, error, bias = spread_and_error("refined", encoders, seeds=200)
    assert torch.all((error / spread - 1).abs() < 0.3)
    assert torch.all(bias.abs() < 4 * spread / math.sqrt(200) + spread.square())


def test_refinement_repairs_bad_encoders_where_encoder_draws_fail():
    model = make(0, "bad")
    batch = sample_rows(model, 16)
    exact = exact_log_prob(model, batch)
    errors = {p: model.joint_nll(batch, K=400, proposal=p).nll + exact for p in nll.PROPOSALS}
    assert errors["refined"].square().mean() < 0.01 * errors["encoder"].square().mean()


# --- other likelihoods, by quadrature


class StudentT(likelihood.Likelihood):
    """A likelihood as a user may register it: no score, no information, and not concave in the output."""

    def log_prob(self, output: Tensor, value: Tensor) -> Tensor:
        return self._sum(torch.distributions.StudentT(4.0, output, 0.4).log_prob(value))

    def mean(self, output: Tensor) -> Tensor:
        return output


likelihood.register("student-t", StudentT)

KINDS = {
    "normal": ((3,), {"scale": 0.4}),
    "laplace": ((3,), {"scale": 0.4}),
    "bernoulli": ((6,), {}),
    "categorical": ((2, 2), {"classes": 3}),
    "student-t": ((3,), {}),
    "columns": ((5,), {"kinds": ("count", "category", "real", "binary", "category"), "classes": (3, 2)}),
}


def curved_model(kind: str, num_modalities: int = 2) -> DMVAE:
    """A model with small nonlinear decoders and encoders that know nothing, with one latent of each kind."""
    torch.manual_seed(0)
    names = [f"m{i}" for i in range(num_modalities)]
    shape, params = KINDS[kind]
    config = DMVAEConfig(
        input_dims=dict.fromkeys(names, shape),
        latent_dim=1,
        modalities_specific_dim=1,
        decoders_dist=dict.fromkeys(names, kind),
        decoder_dist_params=dict.fromkeys(names, params),
        architectures={name: {"hidden_dims": (8,)} for name in names},
    )
    model = DMVAE(config).double().eval()
    with torch.no_grad():
        for decoder in model.decoders.values():
            decoder.body[-1].weight *= 2
    return model


def rows_of(model: DMVAE, rows: int) -> Batch:
    torch.manual_seed(1)
    decoded = model.decode(model.generate_from_prior(rows))
    data = {}
    for name, module in model.likelihoods.items():
        mean = module.mean(decoded[name])
        if isinstance(module, Categorical):
            data[name] = torch.distributions.Categorical(mean).sample()
        elif isinstance(module, Bernoulli):
            data[name] = torch.bernoulli(mean)
        elif isinstance(module, Columns):
            data[name] = module.sample(decoded[name])
        else:
            data[name] = mean + 0.4 * torch.randn_like(mean)
    return Batch(data)


def log_prob_by_quadrature(model: DMVAE, batch: Batch) -> Tensor:
    """Integrate over a grid: z_s outside, each z_i inside."""
    grid = torch.linspace(-6, 6, 301, dtype=torch.float64)
    step = float(grid[1] - grid[0])
    log_weight = -0.5 * grid.square() - 0.5 * math.log(2 * math.pi) + math.log(step)
    latents = torch.cartesian_prod(grid, grid)
    total = log_weight.expand(len(batch), -1)
    for name, decode in model.decode_functions.items():
        with torch.no_grad():
            output = decode(latents)
            inner = [model.likelihoods[name].log_prob(output, value).view(301, 301) for value in batch.data[name]]
        total = total + torch.logsumexp(torch.stack(inner) + log_weight, dim=-1)
    return torch.logsumexp(total, dim=-1)


@pytest.mark.parametrize("kind", KINDS)
def test_nll_is_the_quadrature_for_every_likelihood(kind):
    model = curved_model(kind)
    batch = rows_of(model, 5)
    estimate = model.joint_nll(copies(Batch(batch.data, {}), 10), K=1000)
    error = estimate.nll + log_prob_by_quadrature(model, batch).repeat(10)
    assert estimate.proposal == "refined"
    assert (error.abs() <= 4 * estimate.se).double().mean() >= 0.95
    assert error.square().mean().sqrt() < 0.15


@pytest.mark.parametrize("kind", ["normal", "bernoulli", "categorical"])
def test_known_score_and_information_are_the_derivatives_of_the_log_density(kind):
    model, generic = curved_model(kind), likelihood.Likelihood
    module, values = model.likelihoods["m0"], rows_of(model, 4).data["m0"]
    output = torch.randn(4, *module.output_shape, dtype=torch.float64)
    tangents = torch.randn(4, 3, *module.output_shape, dtype=torch.float64)
    torch.testing.assert_close(module.score(output, values), generic.score(module, output, values))
    torch.testing.assert_close(
        module.information(tangents, output, values), generic.information(module, tangents, output, values)
    )


def test_learned_scale_enters_score_and_information():
    fixed, learned = Normal((3,), 0.5), Normal((3,), "learned")
    with torch.no_grad():
        learned.log_scale.fill_(math.log(0.5))
    x, y, tangents = torch.randn(2, 3), torch.randn(2, 3), torch.randn(2, 4, 3)
    torch.testing.assert_close(fixed.score(y, x), learned.score(y, x))
    torch.testing.assert_close(fixed.information(tangents, y, x), learned.information(tangents, y, x))


def test_smoothed_laplace_score_is_the_score_far_from_the_kink():
    module, generic = Laplace((3,), 0.1), likelihood.Likelihood
    y = torch.zeros(1, 3, dtype=torch.float64)
    torch.testing.assert_close(module.score(y, y + 5), generic.score(module, y, y + 5), rtol=1e-3, atol=0)
    assert torch.all(module.score(y, y) == 0)


# --- what an estimate may depend on


@pytest.mark.parametrize("proposal", nll.PROPOSALS)
def test_chunk_size_changes_nothing(proposal):
    model = make(0, "bad")
    batch = sample_rows(model, 6, missing=0.2)
    whole = model.joint_nll(batch, K=333, batch_size_K=1000, proposal=proposal)
    for chunk in (17, 100):
        same(whole, model.joint_nll(batch, K=333, batch_size_K=chunk, proposal=proposal))


@pytest.mark.parametrize("proposal", nll.PROPOSALS)
def test_a_row_is_independent_of_its_neighbours(proposal, monkeypatch):
    model = make(0, "bad")
    batch = sample_rows(model, 8, missing=0.3)
    batch = Batch(batch.data, batch.masks, ids=np.array([f"row {i}" for i in range(8)]))
    chosen = torch.tensor([7, 2, 4])
    whole = model.joint_nll(batch, K=300, proposal=proposal)
    some = model.joint_nll(batch[chosen], K=300, proposal=proposal)
    for name in ("nll", "se", "khat"):
        torch.testing.assert_close(
            getattr(whole, name)[chosen], getattr(some, name), rtol=1e-9, atol=1e-9, equal_nan=True
        )
    monkeypatch.setattr(nll, "_CHUNK_ELEMENTS", 1)  # one row at a time
    same(whole, model.joint_nll(batch, K=300, proposal=proposal))


def test_the_seed_and_the_ids_change_the_draws():
    model = make(0, "good")
    batch = sample_rows(model, 3)
    first = model.joint_nll(batch, K=200, seed=0).nll
    assert torch.all(first == model.joint_nll(batch, K=200, seed=0).nll)
    assert torch.all(first != model.joint_nll(batch, K=200, seed=1).nll)
    assert torch.all(first != model.joint_nll(Batch(batch.data, batch.masks, ids=torch.arange(3) + 9), K=200).nll)


@pytest.mark.parametrize("proposal", nll.PROPOSALS)
def test_what_a_missing_slot_holds_is_never_read(proposal):
    model = make(0, "good")
    batch = sample_rows(model, 8, missing=0.5)
    zeros = Batch({name: values.nan_to_num() for name, values in batch.data.items()}, batch.masks)
    same(model.joint_nll(batch, K=100, proposal=proposal), model.joint_nll(zeros, K=100, proposal=proposal))


@pytest.mark.parametrize("proposal", nll.PROPOSALS)
def test_a_row_without_any_modality_has_nll_zero(proposal):
    model = make(0, "good")
    batch = only(sample_rows(model, 3), ())
    estimate = model.joint_nll(batch, K=100, proposal=proposal)
    assert torch.all(estimate.nll == 0)
    assert torch.all(estimate.se == 0)
    assert torch.all(estimate.decoder_rows == 0)
    assert torch.all(estimate.trusted)


@pytest.mark.parametrize("proposal", nll.PROPOSALS)
def test_an_empty_batch_has_an_empty_estimate(proposal):
    model = make(0, "good")
    assert len(model.joint_nll(sample_rows(model, 3)[:0], K=100, proposal=proposal).nll) == 0


@pytest.mark.parametrize(
    ("settings", "message"),
    [({"K": 0}, "at least 1"), ({"batch_size_K": 0}, "at least 1"), ({"proposal": "x"}, "Unknown proposal")],
)
def test_impossible_settings_are_refused(settings, message):
    model = make(0, "good")
    with pytest.raises(ValueError, match=message):
        model.joint_nll(sample_rows(model, 2), **settings)


def test_a_single_draw_gives_an_estimate_without_an_error():
    model = make(0, "good")
    estimate = model.joint_nll(sample_rows(model, 3), K=1)
    assert estimate.nll.isfinite().all()
    assert estimate.se.isnan().all()
    assert not estimate.trusted.any()


def test_too_few_draws_for_a_fit_come_from_the_encoders_and_say_so():
    model = make(0, "good")
    batch = sample_rows(model, 4)
    same(model.joint_nll(batch, K=20), model.joint_nll(batch, K=20, proposal="encoder"))
    assert model.joint_nll(batch, K=20).proposal == "encoder"
    assert model.joint_nll(batch, K=2).nll.isfinite().all()
    assert model.joint_nll(batch, K=40).proposal == "refined"


# --- cost


class _NoForwardMode(torch.autograd.Function):
    @staticmethod
    def forward(ctx, z):
        return z.clone()

    @staticmethod
    def backward(ctx, grad):
        return grad


class _Plain(nn.Module):
    """A decoder that has no forward-mode derivative, and counts the rows it decodes."""

    def __init__(self, decoder: nn.Module) -> None:
        super().__init__()
        self.decoder = decoder
        self.rows = self.most = 0

    def forward(self, z: Tensor) -> DecoderOutput:
        self.rows += len(z)
        self.most = max(self.most, len(z))
        return self.decoder(_NoForwardMode.apply(z))


@pytest.mark.parametrize("proposal", nll.PROPOSALS)
def test_decoder_rows_are_what_the_decoders_are_asked_for(proposal):
    model = make(0, "good")
    counting = DMVAE(model.config, decoders={name: _Plain(decoder) for name, decoder in model.decoders.items()})
    counting = counting.double().eval()
    for name in SHAPES:
        counting.encoders[name].load_state_dict(model.encoders[name].state_dict())
    batch = sample_rows(model, 12, missing=0.3)
    estimate = counting.joint_nll(batch, K=300, proposal=proposal)
    probe = int(proposal == "refined")  # one row a decoder and call, to find out about forward mode
    for name, decoder in counting.decoders.items():
        # b has the largest private latent; the others take less where it is there too
        expected = int(estimate.decoder_rows[batch.masks[name]].sum()) + probe
        assert decoder.rows == expected if name == "b" else decoder.rows <= expected
    assert torch.all(estimate.decoder_rows <= 300)


def test_differences_stand_in_for_forward_mode_derivatives():
    model = make(0, "bad")
    plain = DMVAE(model.config, decoders={name: _Plain(decoder) for name, decoder in model.decoders.items()})
    plain = plain.double().eval()
    for name in SHAPES:
        plain.encoders[name].load_state_dict(model.encoders[name].state_dict())
    batch = sample_rows(model, 6)
    torch.testing.assert_close(
        plain.joint_nll(batch, K=200).nll, model.joint_nll(batch, K=200).nll, rtol=1e-6, atol=1e-6
    )


def test_draws_are_decoded_a_chunk_at_a_time():
    model = make(0, "good")
    counting = DMVAE(model.config, decoders={name: _Plain(decoder) for name, decoder in model.decoders.items()})
    counting.double().eval().joint_nll(sample_rows(model, 4), K=2000, batch_size_K=50)
    assert max(decoder.most for decoder in counting.decoders.values()) == 4 * 50


def test_doubtful_rows_are_estimated_afresh_at_eight_times_the_cost(monkeypatch):
    model = make(0, "bad")
    batch = sample_rows(model, 6)
    first = model.joint_nll(batch, K=500)
    assert torch.all(first.decoder_rows <= 500)
    monkeypatch.setattr(nll, "AFRESH_KHAT", -9.0)
    again = model.joint_nll(batch, K=500)
    assert torch.all(again.decoder_rows == 9 * first.decoder_rows)
    assert torch.all((again.nll + exact_log_prob(model, batch)).abs() <= 4 * again.se)
    assert again.se.square().sum() < 0.4 * first.se.square().sum()
    same(again, model.joint_nll(batch, K=500, batch_size_K=77))


class Folded(nn.Module):
    """A decoder that is even in every latent, so that each has two modes of the same weight."""

    def __init__(self, decoder: nn.Module) -> None:
        super().__init__()
        self.decoder = decoder

    def forward(self, z: Tensor) -> DecoderOutput:
        return self.decoder(z.square())


def test_every_mode_of_a_row_is_found():
    plain = linear_model({"a": (4,)}, latent_dim=1, scales=0.3)
    model = DMVAE(plain.config, decoders={"a": Folded(plain.decoders["a"])}).double().eval()
    with torch.no_grad():
        for parameter in model.encoders["a"].parameters():  # which knows nothing
            parameter.zero_()
    torch.manual_seed(0)
    decoded = model.decode(model.generate_from_prior(24))
    batch = Batch({name: values + 0.3 * torch.randn_like(values) for name, values in decoded.items()})
    estimate = model.joint_nll(batch, K=1000)
    error = estimate.nll + log_prob_by_quadrature(model, batch)
    assert (estimate.decoder_rows > 1000).double().mean() > 0.3
    assert (error.abs() <= 4 * estimate.se)[estimate.trusted].double().mean() >= 0.95
    assert estimate.trusted.double().mean() > 0.8
    assert error.square().mean().sqrt() < 0.1


def test_weights_are_at_most_ten_times_those_of_encoder_draws():
    model = make(0, "bad")
    observed = model.observe(sample_rows(model, 3))
    terms = tuple(
        ModalityTerm(
            place, part.values, part.private, model.decode_functions[name], model.likelihoods[name], model.dtype, True
        )
        for place, (name, part) in enumerate(observed.items(), start=1)
    )
    rows = PatternRows(torch.arange(3), observed["a"].shared, terms)
    with torch.no_grad():
        one = GaussNewtonProposal(rows, gauss_newton(rows, encoder_means(rows), 2), 500)
        several = MixtureProposal(rows, fit_mixture(rows, rows.keys, 2000, 100)[0], 500)
        for proposal in (one, several):
            latents, log_q = proposal.draw(rows.keys, 0, 500)
            assert torch.all(log_q >= EncoderProposal(rows, 500).log_density(latents) - math.log(10) - 1e-9)


def test_weights_of_a_mixture_average_to_the_closed_form():
    model = linear_model({"a": (3,)}, latent_dim=1)
    batch = sample_rows(model, 4)
    observed = model.observe(batch)["a"]
    term = ModalityTerm(
        1, observed.values, observed.private, model.decode_functions["a"], model.likelihoods["a"], model.dtype, True
    )
    rows = PatternRows(torch.arange(4), observed.shared, (term,))
    with torch.no_grad():
        proposal = MixtureProposal(rows, fit_mixture(rows, rows.keys, 1000, 100)[0], 4000)
        latents, log_q = proposal.draw(rows.keys, 0, 4000)
        weights = torch.exp(rows.log_joint(latents) - log_q - exact_log_prob(model, batch).unsqueeze(1))
    error = weights.std(1) / math.sqrt(4000)
    assert torch.all((weights.mean(1) - 1).abs() < 4 * error)
    assert torch.all(error < 0.02)


# --- the summary of weights


def test_summary_of_a_stream_is_that_of_the_whole():
    counts = (500, 60, 40)
    log_w = torch.randn(3, 600, dtype=torch.float64) * 2 + 700
    stream = WeightSummary(3, counts, log_w.device)
    for part in log_w.split(37, dim=1):
        stream.add(part)
    w = torch.exp(log_w - 700)
    parts = w.split(counts, dim=1)
    error = torch.stack([len(part.T) * part.var(1) for part in parts]).sum(0).sqrt() / w.sum(1)
    torch.testing.assert_close(stream.log_mean(), 700 + w.mean(1).log())
    torch.testing.assert_close(stream.standard_error(), error)
    torch.testing.assert_close(stream.effective_sample_size(), w.sum(1) ** 2 / (w**2).sum(1))
    largest = w.sort(dim=1, descending=True).values[:, : int(3 * math.sqrt(600)) + 1]
    torch.testing.assert_close(stream.khat(), pareto_shape(largest[:, :-1] - largest[:, -1:]))


def test_summary_survives_weights_of_zero_and_keeps_a_bounded_tail():
    stream = WeightSummary(1, (10**7,), torch.device("cpu"))
    stream.add(torch.full((1, 300), -math.inf))
    stream.add(torch.zeros(1, 300))
    assert stream.largest.shape == (1, 1001)
    assert float(stream.sum) == 300


@pytest.mark.parametrize("shape", [-0.3, 0.2, 0.7, 1.2])
def test_pareto_shape_is_that_of_the_distribution(shape):
    samples = stats.genpareto.rvs(shape, scale=3.0, size=(40, 1000), random_state=0)
    fitted = pareto_shape(torch.from_numpy(samples))
    assert abs(float(fitted.mean()) - shape) < 0.03
    assert torch.all((fitted - shape).abs() < 0.3)
    torch.testing.assert_close(fitted, pareto_shape(torch.from_numpy(1e-8 * samples)))  # free of scale


def test_pareto_shape_of_ties_is_finite():
    ties = torch.zeros(2, 60, dtype=torch.float64)
    ties[1, :5] = torch.arange(1, 6)
    assert pareto_shape(ties).isfinite().all()
    assert float(pareto_shape(ties)[0]) == 0


def test_few_draws_are_never_trusted():
    model = make(0, "good")
    estimate = model.joint_nll(sample_rows(model, 2), K=200)
    assert estimate.khat.isnan().all()
    assert not estimate.trusted.any()


# --- conditional NLL


def test_conditional_nll_is_the_closed_form():
    model = make(0, "good")
    batch = sample_rows(model, 12, missing=0.3)
    results = model.compute_cond_nll(batch, subset="a", pred_mods=["b", "c"], K=1000)
    for name in ("b", "c"):
        rows = batch[batch.masks[name]]
        both, given = exact_log_prob(model, only(rows, ("a", name))), exact_log_prob(model, only(rows, ("a",)))
        torch.testing.assert_close(results[name], (given - both).mean(), rtol=0, atol=0.03)
