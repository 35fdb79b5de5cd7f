"""Learned scales: per feature or per modality, started at the training deviation, above a floor."""

import math

import pytest
import torch

from dmvae import DMVAE, Batch, DMVAEConfig
from dmvae.config.training import OptimConfig
from dmvae.distributions.likelihoods.laplace import Laplace
from dmvae.distributions.likelihoods.normal import Normal
from dmvae.training.state import build_optimizer

SHAPE = (2, 3)
KINDS = {"normal": Normal, "laplace": Laplace}
REFERENCES = {"normal": torch.distributions.Normal, "laplace": torch.distributions.Laplace}


def values(rows: int = 400) -> torch.Tensor:
    generator = torch.Generator().manual_seed(0)
    deviations = torch.tensor([[0.1, 1.0, 10.0], [0.5, 2.0, 4.0]], dtype=torch.float64)
    return 3.0 + deviations * torch.randn(rows, *SHAPE, generator=generator, dtype=torch.float64)


@pytest.mark.parametrize("dist", KINDS)
@pytest.mark.parametrize("scale", ["learned_per_feature", "learned_per_modality"])
def test_the_density_is_that_of_torch_with_the_scale_above_its_floor(dist: str, scale: str) -> None:
    module, x = KINDS[dist](SHAPE, scale).double(), values(5)
    module.initialize(values())
    with torch.no_grad():
        module.log_scale -= 2.0
    assert module.scale.shape == (SHAPE if scale == "learned_per_feature" else ())
    expected = REFERENCES[dist](x + 1, module.scale).log_prob(x).sum((1, 2))
    torch.testing.assert_close(module.log_prob(x + 1, x), expected)
    many = torch.stack((x + 1, x - 2)), x
    torch.testing.assert_close(module.log_prob(*many)[0], expected)


@pytest.mark.parametrize("dist", KINDS)
def test_score_and_information_are_derivatives_of_the_density(dist: str) -> None:
    module, x = KINDS[dist](SHAPE, "learned_per_feature").double(), values(4)
    module.initialize(values())
    output = (x + 1).requires_grad_()
    (expected,) = torch.autograd.grad(module.log_prob(output, x).sum(), output)
    found, tangents = module.score(output.detach(), x), torch.randn(4, 2, *SHAPE, dtype=torch.float64)
    information = module.information(tangents, output.detach(), x)
    if dist == "normal":
        torch.testing.assert_close(found, expected)
        weighted = tangents.flatten(2) / module.scale.detach().flatten() ** 2
        torch.testing.assert_close(information, weighted @ tangents.flatten(2).mT)
    else:
        far = (x - output).abs() > 5 * module.scale
        torch.testing.assert_close(found[far], expected[far], rtol=0.02, atol=0)
    assert bool((torch.linalg.eigvalsh(information) > -1e-9).all())


@pytest.mark.parametrize("dist", KINDS)
def test_scales_start_at_the_deviation_of_training_rows(dist: str) -> None:
    spread = values().std(0, unbiased=False) * (1 if dist == "normal" else math.sqrt(0.5))
    each, whole = (KINDS[dist](SHAPE, f"learned_per_{of}").double() for of in ("feature", "modality"))
    each.initialize(values())
    whole.initialize(values())
    torch.testing.assert_close(each.scale.detach(), spread, rtol=0.01, atol=0)
    torch.testing.assert_close(whole.scale.detach(), spread.square().mean().sqrt(), rtol=0.01, atol=0)


@pytest.mark.parametrize("scale", ["learned_per_feature", "learned_per_modality"])
def test_no_scale_falls_below_its_share_of_the_deviation_and_it_can_leave_the_floor(scale: str) -> None:
    module = Normal(SHAPE, scale, scale_floor=0.1).double()
    module.initialize(values())
    deviation = module.log_scale.detach().exp()
    with torch.no_grad():
        module.log_scale -= 50.0
    torch.testing.assert_close(module.scale.detach(), 0.1 * deviation)
    with torch.no_grad():
        module.log_scale += 50.0 + math.log(0.1)
    module.log_prob(torch.zeros(1, *SHAPE).double(), values(1)).sum().backward()
    assert bool((module.log_scale.grad > 0).all())


def test_a_constant_feature_has_the_floor_of_the_others() -> None:
    x = values()
    x[:, 0, 0] = 7.0
    module = Normal(SHAPE, "learned_per_feature", scale_floor=0.1).double()
    module.initialize(x)
    with torch.no_grad():
        module.log_scale[0, 0] = -50.0
    overall = x.var(0, unbiased=False).mean().sqrt()
    torch.testing.assert_close(module.scale[0, 0].detach(), 0.1 * overall)
    constant = Normal((1,), "learned_per_feature").double()
    constant.initialize(torch.full((9, 1), 2.0).double())
    assert constant.scale.item() == pytest.approx(1.0, rel=0.01)


def test_the_optimum_is_the_spread_of_each_feature() -> None:
    module, x = Normal((2,), "learned_per_feature", scale_floor=0).double(), values()[:, 0, :2]
    optimiser = torch.optim.LBFGS(module.parameters(), max_iter=100, line_search_fn="strong_wolfe")

    def closure() -> torch.Tensor:
        optimiser.zero_grad()
        loss = -module.log_prob(x.mean(0), x).mean()
        loss.backward()
        return loss

    optimiser.step(closure)
    torch.testing.assert_close(module.scale.detach(), x.std(0, unbiased=False), rtol=1e-4, atol=0)


def scaled_model() -> DMVAE:
    scales = {"a": {"scale": "learned_per_feature"}, "b": {"scale": "learned"}}
    return DMVAE(DMVAEConfig(input_dims={"a": (3,), "b": (2,)}, decoder_dist_params=scales))


def test_missing_rows_do_not_count_for_where_scales_start() -> None:
    model, x = scaled_model(), values()[:, 0].float()
    mask = torch.arange(len(x)) % 2 == 0
    x[~mask] = math.nan
    model.initialize_likelihoods(Batch({"a": x, "b": torch.full((len(x), 2), 9.0)}, {"a": mask}))
    torch.testing.assert_close(model.likelihoods["a"].scale.detach(), x[mask].std(0), rtol=0.01, atol=0)
    assert model.likelihoods["b"].scale.item() == 1.0, "this one starts at 1 whatever the rows are"


def test_scales_and_floors_are_saved(tmp_path: object) -> None:
    model, batch = scaled_model(), Batch({"a": values()[:, 0].float()})
    model.initialize_likelihoods(batch)
    model.save(tmp_path)
    again = DMVAE.load(tmp_path)
    assert torch.equal(again.likelihoods["a"].scale, model.likelihoods["a"].scale)


def test_scales_above_a_floor_have_ten_times_the_rate_and_no_decay() -> None:
    model = scaled_model()
    groups = build_optimizer(model, OptimConfig(algorithm="adamw", weight_decay=0.1)).param_groups
    networks, scales = sorted(groups, key=lambda group: group["rate_factor"])
    assert scales["params"] == [model.likelihoods["a"].log_scale]
    assert (scales["rate_factor"], scales["weight_decay"]) == (10.0, 0.0)
    assert (networks["rate_factor"], networks["weight_decay"]) == (1.0, 0.1)
    assert sum(len(group["params"]) for group in (networks, scales)) == len(list(model.parameters()))


@pytest.mark.parametrize(
    ("params", "message"),
    [
        ({"scale": "learned_per_feature", "scale_floor": 1.0}, "scale_floor must be below 1"),
        ({"scale": 0.5, "scale_floor": 0.1}, "has no effect on scale=0.5"),
        ({"scale_floor": 0.1}, "has no effect on scale=1.0"),
        ({"scale": "learned", "scale_floor": 0.1}, "has no effect on scale='learned'"),
        ({"scale": "learned_per_row"}, "learned_per_row"),
    ],
)
def test_a_scale_that_cannot_hold_is_refused(params: dict[str, object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        DMVAEConfig(input_dims={"a": (3,)}, decoder_dist_params={"a": params})
