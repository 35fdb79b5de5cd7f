"""Networks that run together give what each gives alone."""

import copy

import pytest
import torch
from torch import Tensor, nn

from dmvae import DMVAE, Batch, DMVAEConfig
from dmvae.nn.batched import bound_log_var, group_by_layout, layout

NAMES = ("a", "b", "c")


def make_model(**changes: object) -> DMVAE:
    torch.manual_seed(0)
    given = {
        "input_dims": dict.fromkeys(NAMES, (2, 3)),
        "latent_dim": 2,
        "modalities_specific_dim": 1,
        "architectures": {key: {"hidden_dims": (5, 4)} for key in NAMES},
    }
    return DMVAE(DMVAEConfig.model_validate({**given, **changes})).double()


def make_alone(model: DMVAE) -> DMVAE:
    """Return a copy whose networks are watched, so that each runs by itself."""
    alone = copy.deepcopy(model)
    for network in (*alone.encoders.values(), *alone.decoders.values()):
        network.register_forward_hook(lambda *_: None)
    return alone


def make_batch(rows: int = 7) -> Batch:
    generator = torch.Generator().manual_seed(1)
    draw = {name: torch.randn(rows, 2, 3, generator=generator, dtype=torch.float64) for name in NAMES}
    return Batch(draw, ids=torch.arange(rows))


def assert_alike(model: DMVAE, batch: Batch) -> None:
    alone, found = make_alone(model), []
    for side in (model, alone):
        torch.manual_seed(2)
        out = side(batch)
        out.loss.backward()
        gradients = {name: parameter.grad for name, parameter in side.named_parameters()}
        found.append({"row_loss": out.row_loss, **out.metrics, **gradients})
    together, apart = found
    assert together.keys() == apart.keys()
    for name, value in together.items():
        torch.testing.assert_close(value, apart[name], rtol=1e-12, atol=1e-12)


def laplace(number: int) -> dict[str, object]:
    return {"decoders_dist": dict.fromkeys(NAMES[:number], "laplace")}


@pytest.mark.parametrize(
    "changes",
    [
        {},
        laplace(1),
        {"decoder_dist_params": {"a": {"scale": 0.5}, "b": {"scale": "learned"}}},
        {"architectures": {name: {"hidden_dims": (5,) if name == "b" else (4,)} for name in NAMES}},
        {"modalities_specific_betas": {"a": 1.0, "b": 2.0, "c": 3.0}},
        {"sources": "subsets", "num_subsets": 2},
        {"sources": "subsets", "cross": "prior"},
        {"architectures": {name: {"name": "skip_mlp", "hidden_dims": (5, 4)} for name in NAMES}},
        {"architectures": {name: {"name": "skip_mlp", "hidden_dims": ()} for name in NAMES}},
        {"modalities_specific_dim": 0},
    ],
)
def test_the_objective_and_its_gradient_are_those_of_networks_run_alone(changes: dict[str, object]) -> None:
    assert_alike(make_model(**changes), make_batch())


@pytest.mark.parametrize("missing", [("b",), ("a", "b"), ("a", "b", "c")])
def test_missing_rows_change_nothing_of_that(missing: tuple[str, ...]) -> None:
    batch = make_batch()
    masks = {name: torch.arange(7) % (2 + place) != 0 for place, name in enumerate(missing)}
    assert_alike(make_model(), Batch(batch.data, masks))
    assert_alike(make_model(), Batch({name: batch.data[name] for name in NAMES if name not in missing[:2]}))


def test_the_nll_is_that_of_networks_run_alone() -> None:
    model = make_model(decoder_dist_params={"c": {"scale": 0.5}}).eval()
    for proposal in ("encoder", "refined"):
        ours, alone = (side.joint_nll(make_batch(), 300, proposal=proposal).nll for side in (model, make_alone(model)))
        torch.testing.assert_close(ours, alone, rtol=1e-10, atol=1e-10)


def test_only_plain_perceptrons_of_one_layout_run_together() -> None:
    model = make_model()
    assert layout(model.encoders["a"]) == layout(model.encoders["b"]) is not None
    assert layout(model.encoders["a"]) != layout(model.decoders["a"])

    class Doubled(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return 2 * x

    altered = copy.deepcopy(model.decoders["a"])
    altered.body[1] = Doubled()
    watched = copy.deepcopy(model.decoders["a"])
    watched.body[0].register_forward_hook(lambda *_: None)
    reparametrised = copy.deepcopy(model.decoders["a"])
    nn.utils.parametrizations.weight_norm(reparametrised.body[0])
    dropped = make_model(architectures={key: {"hidden_dims": (5,), "dropout": 0.1} for key in NAMES}).decoders["a"]
    listened = copy.deepcopy(model.decoders["a"])
    listened.body.register_forward_hook(lambda *_: None)
    retraced = copy.deepcopy(model.decoders["a"])
    retraced.register_full_backward_pre_hook(lambda *_: None)
    for network in (altered, watched, reparametrised, dropped, listened, retraced):
        assert layout(network) is None


def test_perceptrons_with_skip_connections_run_together_and_apart_from_those_without() -> None:
    plain = make_model()
    skipping = make_model(architectures={key: {"name": "skip_mlp", "hidden_dims": (5, 4)} for key in NAMES})
    for kind in ("encoders", "decoders"):
        ours, others = getattr(skipping, kind), getattr(plain, kind)
        assert layout(ours["a"]) == layout(ours["b"]) is not None
        assert layout(ours["a"]) != layout(others["a"])
        watched = copy.deepcopy(ours["a"])
        watched.skip.register_forward_hook(lambda *_: None)
        assert layout(watched) is None


def test_a_model_whose_first_layer_is_reparametrised_still_runs() -> None:
    model = make_model()
    nn.utils.parametrizations.spectral_norm(model.encoders["a"].body[0])
    assert model.dtype == torch.float64
    model(make_batch()).loss.backward()


def test_names_of_one_kind_are_together_in_their_order() -> None:
    assert group_by_layout({"a": 1, "b": None, "c": 1, "d": 2, "e": None}) == [("a", "c"), ("b",), ("d",), ("e",)]


def test_log_variances_are_bounded_softly_and_as_they_are_in_the_usual_range() -> None:
    usual = torch.linspace(-20, 10, 301, requires_grad=True)
    wide = torch.cat([usual, torch.tensor([-1e20, -40.0, 20.0, 1e20])])  # outside, so that the bound is computed
    bounded = bound_log_var(wide)
    assert torch.equal(bounded[:301], usual)
    (gradient,) = torch.autograd.grad(bounded.sum(), usual)
    assert torch.equal(gradient[1:-1], torch.ones(299))
    assert torch.isfinite(torch.exp(-bounded)).all()
    assert torch.isfinite(torch.exp(bounded)).all()
    grid = torch.linspace(-100, 100, 4001, dtype=torch.float64)
    steps = bound_log_var(grid).diff() / grid.diff()
    assert steps.min() > 0.01, "the gradient does not vanish"
    assert steps.max() < 1 + 1e-9


def test_log_variances_of_every_encoder_are_bounded() -> None:
    model = make_model()
    with torch.no_grad():
        for encoder in model.encoders.values():
            encoder.heads.bias.fill_(1e6)
    for part in model.observe(make_batch()).values():
        assert part.shared.log_var.max() < 30
        assert part.private.log_var.max() < 30
