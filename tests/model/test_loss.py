import itertools
import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from dmvae import DMVAE, Batch, DMVAEConfig
from dmvae.config.model import ArchitectureConfig
from dmvae.model.loss import Noise
from dmvae.model.outputs import DMVAEOutput
from dmvae.nn.networks import Dimensions, EncoderOutput
from dmvae.nn.networks.mlp import MLPDecoder, MLPEncoder
from tests.linear_gaussian import exact_log_prob, linear_layer, linear_model, sample_rows

SHAPES = {"a": (3,), "b": (4,), "c": (2, 3)}
SOURCES = ("joint", *SHAPES)


def small_model(**settings: Any) -> DMVAE:
    config = {
        "input_dims": SHAPES,
        "latent_dim": 2,
        "modalities_specific_dim": {"a": 1, "b": 2, "c": 1},
        "architectures": {name: {"hidden_dims": (5,)} for name in SHAPES},
    }
    return DMVAE(DMVAEConfig(**(config | settings))).double()


def every_pattern(missing: float = 0.0) -> Batch:
    """Return eight rows in which each set of modalities is present once, the empty one first."""
    present = torch.tensor(list(itertools.product([False, True], repeat=3)))
    masks = {name: present[:, column] for column, name in enumerate(SHAPES)}
    generator = torch.Generator().manual_seed(1)
    data = {name: torch.randn(8, *shape, generator=generator, dtype=torch.float64) for name, shape in SHAPES.items()}
    return Batch(
        {name: x.masked_fill(~masks[name].view(-1, *[1] * (x.dim() - 1)), missing) for name, x in data.items()}, masks
    )


def draw(model: DMVAE, rows: int, seed: int = 0) -> Noise:
    generator = torch.Generator().manual_seed(seed)
    normals = torch.randn(rows, Noise.width(model.config), generator=generator, dtype=torch.float64)
    return Noise.from_normals(normals, model.config)


def rows_of(noise: Noise, rows: Tensor) -> Noise:
    return Noise(noise.shared[:, rows], {name: values[:, rows] for name, values in noise.private.items()})


def run(model: DMVAE, batch: Batch, noise: Noise | None = None, **how: Any) -> tuple[DMVAEOutput, dict[str, Tensor]]:
    model.zero_grad()
    out = model(batch, draw(model, len(batch)) if noise is None else noise, **how)
    out.loss.backward()
    return out, {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


def assert_same(left: dict[str, Tensor], right: dict[str, Tensor]) -> None:
    assert left.keys() == right.keys()
    for name in left:
        assert torch.equal(left[name], right[name]), name


class NormalisedEncoder(nn.Module):
    """An encoder whose result depends on all the rows that it sees."""

    def __init__(self, name: str) -> None:
        super().__init__()
        self.norm = nn.BatchNorm1d(math.prod(SHAPES[name]))
        dims = Dimensions((math.prod(SHAPES[name]),), SHAPES[name], 2, {"a": 1, "b": 2, "c": 1}[name])
        self.net = MLPEncoder(ArchitectureConfig(hidden_dims=(5,)), dims)

    def forward(self, x: Tensor) -> EncoderOutput:
        return self.net(self.norm(x.flatten(1)))


def test_networks_work_for_exactly_the_rows_and_pairs_that_exist() -> None:
    model, seen = small_model(), {}

    def count(key: str) -> Callable[[nn.Module, tuple[Tensor, ...]], None]:
        def hook(_: nn.Module, inputs: tuple[Tensor, ...]) -> None:
            seen[key] = seen.get(key, 0) + len(inputs[0])

        return hook

    for name in SHAPES:
        model.encoders[name].register_forward_pre_hook(count(f"encoder {name}"))
        model.decoders[name].register_forward_pre_hook(count(f"decoder {name}"))
    batch = every_pattern()
    batch = batch[torch.tensor([0, 1, 1, 3, 4, 6, 7, 7, 2])]
    model(batch)
    present = torch.stack([batch.masks[name] for name in SHAPES])
    sources = torch.cat((present.any(0, keepdim=True), present))
    for name, here in zip(SHAPES, present, strict=True):
        assert seen[f"encoder {name}"] == int(here.sum())
        assert seen[f"decoder {name}"] == int((sources & here).sum())


@pytest.mark.parametrize("garbage", [math.nan, math.inf, -math.inf, 1e300])
def test_what_a_missing_slot_holds_changes_nothing(garbage: float) -> None:
    def train(fill: float) -> tuple[DMVAEOutput, dict[str, Tensor], dict[str, Tensor]]:
        torch.manual_seed(0)
        model = DMVAE(small_model().config, encoders={name: NormalisedEncoder(name) for name in SHAPES}).double()
        out, gradients = run(model, every_pattern(fill))
        return out, gradients, dict(model.state_dict())

    (clean, clean_gradients, clean_state), (dirty, dirty_gradients, dirty_state) = train(0.0), train(garbage)
    assert torch.equal(clean.row_loss, dirty.row_loss)
    assert_same(clean.metrics, dirty.metrics)
    assert_same(clean_gradients, dirty_gradients)
    assert_same(clean_state, dirty_state)
    assert bool(dirty.loss.isfinite())
    assert int(dirty_state["_encoders.modality_a.norm.num_batches_tracked"]) == 1


def test_running_statistics_are_those_of_the_present_rows_alone() -> None:
    encoders = {name: NormalisedEncoder(name) for name in SHAPES}
    batch = every_pattern(math.nan)
    DMVAE(small_model().config, encoders=encoders).double()(batch)
    for name, encoder in encoders.items():
        values = batch.data[name][batch.masks[name]].flatten(1)
        torch.testing.assert_close(encoder.norm.running_mean, 0.1 * values.mean(0))


def test_a_missing_modality_is_the_same_whether_masked_or_left_out() -> None:
    model, batch = small_model(), every_pattern()
    data, masks = dict(batch.data), dict(batch.masks)
    masked, masked_gradients = run(model, Batch(data, masks | {"b": torch.zeros(8)}))
    del data["b"], masks["b"]
    without, gradients = run(model, Batch(data, masks))
    assert torch.equal(masked.row_loss, without.row_loss)
    assert_same(masked_gradients, gradients)
    assert not any("modality_b" in name for name in gradients)


def test_a_complete_batch_costs_the_same_with_and_without_masks() -> None:
    model, data = small_model(), every_pattern().data
    bare, bare_gradients = run(model, Batch(data))
    masked, masked_gradients = run(model, Batch(data, {name: torch.ones(8, 1) for name in SHAPES}))
    assert torch.equal(bare.row_loss, masked.row_loss)
    assert_same(bare_gradients, masked_gradients)


def test_an_empty_row_costs_nothing_but_counts() -> None:
    model = small_model()
    out = model(every_pattern(math.nan))
    assert out.row_loss[0] == 0
    assert bool((out.row_loss[1:] > 0).all())
    torch.testing.assert_close(out.loss, out.row_loss.sum() / 8)


@pytest.mark.parametrize(
    "batch",
    [
        Batch(
            {name: torch.full((3, *shape), math.nan) for name, shape in SHAPES.items()},
            {m: torch.zeros(3) for m in SHAPES},
        ),
        Batch({}, ids=torch.arange(3)),
        Batch({}),
        Batch({name: torch.zeros(0, *shape) for name, shape in SHAPES.items()}),
    ],
)
def test_a_batch_in_which_nothing_is_observed_costs_nothing(batch: Batch) -> None:
    with torch.no_grad():
        out = small_model()(batch)
    assert float(out.loss) == 0
    assert out.row_loss.tolist() == [0.0] * len(batch)
    assert set(torch.stack(list(out.metrics.values())).tolist()) == {0.0}


@pytest.mark.parametrize("cut", [1, 3, 5])
def test_a_batch_is_the_row_weighted_mean_of_its_parts(cut: int) -> None:
    model, batch = small_model(), every_pattern(math.nan)
    noise = draw(model, 8)
    whole, whole_gradients = run(model, batch, noise)
    parts = [(batch[rows], rows_of(noise, rows)) for rows in (torch.arange(cut), torch.arange(cut, 8))]
    model.zero_grad()
    outputs = [model(*part) for part in parts]
    loss = sum(out.loss * len(out.row_loss) / 8 for out in outputs)
    loss.backward()
    torch.testing.assert_close(loss, whole.loss)
    for name, parameter in model.named_parameters():
        torch.testing.assert_close(parameter.grad, whole_gradients[name])
    added = outputs[0].terms + outputs[1].terms
    assert added.names == whole.terms.names
    torch.testing.assert_close(added.total, whole.terms.total)
    assert torch.equal(added.count, whole.terms.count)


def test_permuting_the_rows_permutes_their_losses() -> None:
    model, batch, order = small_model(), every_pattern(math.nan), torch.randperm(8)
    noise = draw(model, 8)
    direct, permuted = model(batch, noise), model(batch[order], rows_of(noise, order))
    torch.testing.assert_close(permuted.row_loss, direct.row_loss[order])


def test_the_order_of_modalities_in_the_batch_is_irrelevant() -> None:
    model, batch = small_model(), every_pattern(math.nan)
    backwards = Batch(dict(reversed(batch.data.items())), dict(reversed(batch.masks.items())))
    noise = draw(model, 8)
    (left, left_gradients), (right, right_gradients) = run(model, batch, noise), run(model, backwards, noise)
    assert torch.equal(left.row_loss, right.row_loss)
    assert_same(left_gradients, right_gradients)


def test_the_bounds_of_all_sources_add_up_to_the_loss() -> None:
    out = small_model(beta=0.7, uses_likelihood_rescaling=True)(every_pattern(math.nan))
    torch.testing.assert_close(sum(out.metrics[source] for source in SOURCES), out.loss.detach())


def test_the_named_terms_add_up_to_the_joint_bound() -> None:
    betas = {"a": 0.5, "b": 2.0, "c": 1.25}
    weights = {"a": 3.0, "b": 0.25, "c": 1.0}
    model = small_model(
        beta=2.5, modalities_specific_betas=betas, uses_likelihood_rescaling=True, rescale_factors=weights
    )
    out = model(every_pattern(math.nan), divergence_weight=0.3)
    total = dict(zip(out.terms.names, out.terms.total, strict=True))
    expected = 0.3 * 2.5 * total["kl_shared/joint"]
    for m in SHAPES:
        expected = (
            expected + 0.3 * betas[m] * total[f"kl_private/{m}"] - weights[m] * total[f"log_likelihood/joint/{m}"]
        )
    torch.testing.assert_close(total["joint"], expected)


def test_terms_count_the_rows_in_which_they_exist() -> None:
    out = small_model()(every_pattern(math.nan))
    count = dict(zip(out.terms.names, out.terms.count.tolist(), strict=True))
    assert {count[source] for source in SOURCES} == {8}
    assert count["kl_shared/joint"] == 7
    assert count["kl_shared/b"] == count["kl_private/b"] == 4
    assert count["log_likelihood/joint/c"] == count["log_likelihood/c/c"] == 4
    assert count["log_likelihood/a/c"] == 2
    assert len(out.terms.names) == len(set(out.terms.names)) == 4 + 4 + 3 + 12


def test_a_term_without_rows_is_zero_and_terms_carry_no_graph() -> None:
    out = small_model()(Batch({"a": torch.randn(2, 3)}))
    assert out.metrics["log_likelihood/joint/b"] == out.metrics["kl_private/c"] == out.metrics["c"] == 0
    assert not any(value.requires_grad for value in out.metrics.values())


def test_every_bound_is_below_the_exact_evidence() -> None:
    model = linear_model(SHAPES, 2, {"a": 1, "b": 2, "c": 1}, {"a": 0.7, "b": 1.0, "c": 0.5})
    complete = sample_rows(model, 8)
    patterns = Batch(complete.data, every_pattern().masks)
    for row in range(1, 8):
        evidence = float(exact_log_prob(model, patterns[row]))
        with torch.no_grad():
            metrics = model(patterns[torch.full((1000,), row)]).metrics
        for source in ("joint", *(name for name in SHAPES if patterns.masks[name][row])):
            gap = evidence + float(metrics[source])
            assert 0 < gap < 60, (row, source)


def test_the_joint_bound_is_the_evidence_where_the_experts_are_exact() -> None:
    model = linear_model(SHAPES, 1, 1, {"a": 0.7, "b": 1.0, "c": 0.5})
    with torch.no_grad():
        for name, scale in (("a", 0.7), ("b", 1.0), ("c", 0.5)):
            decoder, encoder = linear_layer(model.decoders[name]), linear_layer(model.encoders[name])
            decoder.weight[:, 1] = 0  # x depends on the shared latent alone: the private posterior is the prior
            loading = decoder.weight[:, 0]
            precision = loading @ loading / scale**2
            encoder.weight.zero_()
            encoder.bias.zero_()
            encoder.weight[0] = loading / scale**2 / precision
            encoder.bias[0] = -encoder.weight[0] @ decoder.bias
            encoder.bias[1] = -torch.log(precision)
    patterns = Batch(sample_rows(model, 8).data, every_pattern().masks)
    # log p(x | z) is quadratic in the noise, so that -1 and 1 give its expectation exactly
    noise = Noise(
        torch.tensor([-1.0, 1.0], dtype=torch.float64).expand(4, 2).unsqueeze(-1),
        {name: torch.zeros(4, 2, 1, dtype=torch.float64) for name in SHAPES},
    )
    for row in range(8):
        twice = patterns[torch.tensor([row, row])]
        torch.testing.assert_close(-model(twice, noise).metrics["joint"], exact_log_prob(model, twice)[0])


def test_the_objective_is_the_formula_written_out_row_by_row() -> None:
    betas, weights = {"a": 0.5, "b": 2.0, "c": 1.25}, {"a": 3.0, "b": 0.25, "c": 1.0}
    model = small_model(
        beta=2.5, modalities_specific_betas=betas, uses_likelihood_rescaling=True, rescale_factors=weights
    )
    batch = every_pattern(math.nan)
    noise = draw(model, 8)
    out = model(batch, noise, divergence_weight=0.6)
    for row in range(8):
        here = [name for name in SHAPES if batch.masks[name][row]]
        codes = {name: model.encoders[name](batch.data[name][row : row + 1]) for name in here}
        precision = 1 + sum(torch.exp(-code.log_covariance) for code in codes.values())
        weighted = sum(torch.exp(-code.log_covariance) * code.embedding for code in codes.values())
        posteriors = {"joint": (weighted / precision, -torch.log(torch.as_tensor(precision)))} if here else {}
        posteriors |= {name: (code.embedding, code.log_covariance) for name, code in codes.items()}
        loss = torch.zeros((), dtype=torch.float64)
        for source, (mean, log_var) in posteriors.items():
            place = SOURCES.index(source)
            z = mean + torch.exp(log_var / 2) * noise.shared[place, row]
            loss = loss + 0.6 * 2.5 * 0.5 * (torch.exp(log_var) + mean**2 - 1 - log_var).sum()
            for name, code in codes.items():
                std = torch.exp(code.style_log_covariance / 2)
                private = code.style_embedding + std * noise.private[name][place, row]
                divergence = std**2 + code.style_embedding**2 - 1 - code.style_log_covariance
                output = model.decoders[name](torch.cat((z, private), dim=1)).reconstruction[0]
                log_p = torch.distributions.Normal(output, 1.0).log_prob(batch.data[name][row]).sum()
                loss = loss + 0.6 * betas[name] * 0.5 * divergence.sum() - weights[name] * log_p
        torch.testing.assert_close(out.row_loss[row], loss)


def test_the_gradient_reaches_every_parameter() -> None:
    model = small_model(
        decoders_dist={"a": "normal", "b": "laplace", "c": "bernoulli"},
        decoder_dist_params={"a": {"scale": "learned"}, "b": {"scale": "learned"}},
    )
    batch = every_pattern(math.nan)
    batch.data["c"].round_().clamp_(0, 1)
    _, gradients = run(model, batch)
    assert gradients.keys() == dict(model.named_parameters()).keys()
    assert sum(name.endswith("log_scale") for name in gradients) == 2
    for name, gradient in gradients.items():
        assert bool(gradient.isfinite().all()), name
        assert bool((gradient != 0).any()), name


def test_a_divergence_weight_multiplies_every_beta() -> None:
    torch.manual_seed(3)
    warm = small_model()
    half = small_model(beta=0.5, modalities_specific_betas=0.5)
    half.load_state_dict(warm.state_dict())
    batch = every_pattern()
    noise = draw(warm, 8)
    torch.testing.assert_close(warm(batch, noise, divergence_weight=0.5).row_loss, half(batch, noise).row_loss)
    none = warm(batch, noise, divergence_weight=0.0)
    likelihoods = [
        -total for name, total in zip(none.terms.names, none.terms.total, strict=True) if name.startswith("log_lik")
    ]
    torch.testing.assert_close(sum(likelihoods), none.row_loss.sum().detach())


def test_noise_is_fresh_for_every_source_and_latent() -> None:
    model = small_model()
    normals = torch.arange(2.0 * Noise.width(model.config)).view(2, -1)
    noise = Noise.from_normals(normals, model.config)
    used = torch.cat([part.flatten() for part in (noise.shared, *noise.private.values())])
    assert sorted(used.tolist()) == normals.flatten().tolist()
    assert noise.shared.shape == (4, 2, 2)
    assert {name: tuple(part.shape) for name, part in noise.private.items()} == {
        "a": (4, 2, 1), "b": (4, 2, 2), "c": (4, 2, 1),
    }  # fmt: skip
    assert set(noise.shared[:, 0].flatten().tolist()) < set(normals[0].tolist())


def test_without_noise_the_global_generator_decides() -> None:
    model, batch = small_model(), every_pattern()
    torch.manual_seed(5)
    first = model(batch).loss
    second = model(batch).loss
    torch.manual_seed(5)
    assert torch.equal(model(batch).loss, first)
    assert not torch.equal(first, second)


def test_autocast_keeps_the_objective_close_to_full_precision() -> None:
    model = small_model(decoders_dist={"c": "bernoulli"}).float()
    batch = every_pattern()
    batch.data["c"].round_().clamp_(0, 1)
    normals = torch.randn(8, Noise.width(model.config))
    noise = Noise.from_normals(normals, model.config)
    full = model(batch, noise)
    with torch.autocast("cpu", torch.bfloat16):
        half = model(batch, noise)
    assert half.row_loss.dtype == torch.float32
    torch.testing.assert_close(half.row_loss, full.row_loss, rtol=0.03, atol=0.1)
    assert isinstance(model.decoders["a"], MLPDecoder)


def test_the_joint_source_alone_is_the_joint_term_of_the_others() -> None:
    model, batch = small_model(), every_pattern(math.nan)
    alone = DMVAE(model.config.model_copy(update={"sources": "joint"})).double()
    alone.load_state_dict(model.state_dict())
    draw = torch.randn(8, Noise.width(model.config), dtype=torch.float64)
    every = model.eval()(batch, Noise.from_normals(draw, model.config))
    own = draw[:, : Noise.width(alone.config)]
    joint = alone.eval()(batch, Noise.from_normals(own, alone.config))
    torch.testing.assert_close(joint.row_loss.mean(), every.metrics["joint"])
    assert joint.terms.names[0] == "joint"
    with pytest.raises(ValueError, match='cross="prior" has no effect with sources="joint"'):
        DMVAEConfig(input_dims=SHAPES, sources="joint", cross="prior")
