import itertools
import math
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from dmvae import DMVAE, Batch, DMVAEConfig
from dmvae.distributions import likelihoods as likelihood
from dmvae.distributions.likelihoods import Bernoulli, Categorical, Laplace, Likelihood, Normal

SHAPE = (2, 3)


def outputs(*leading: int, extra: tuple[int, ...] = ()) -> Tensor:
    return 2 * torch.randn(*leading, *SHAPE, *extra, dtype=torch.float64)


@pytest.mark.parametrize("scale", [1.0, 0.75, 3])
def test_normal_and_laplace_are_those_of_torch_distributions(scale: float) -> None:
    value, output = outputs(5), outputs(5)
    for ours, theirs in ((Normal, torch.distributions.Normal), (Laplace, torch.distributions.Laplace)):
        expected = theirs(output, scale).log_prob(value).sum((1, 2))
        torch.testing.assert_close(ours(SHAPE, scale=scale).log_prob(output, value), expected)


def test_bernoulli_is_that_of_torch_distributions_also_far_out() -> None:
    output = outputs(5) * torch.tensor([1.0, 10, 100, 1000, 1e5], dtype=torch.float64).view(5, 1, 1)
    value = torch.randint(0, 2, (5, *SHAPE)).double()
    expected = torch.distributions.Bernoulli(logits=output).log_prob(value).sum((1, 2))
    torch.testing.assert_close(Bernoulli(SHAPE).log_prob(output, value), expected)


def test_categorical_is_that_of_torch_distributions() -> None:
    output, value = outputs(5, extra=(4,)), torch.randint(0, 4, (5, *SHAPE))
    expected = torch.distributions.Categorical(logits=output).log_prob(value).sum((1, 2))
    torch.testing.assert_close(Categorical(SHAPE, classes=4).log_prob(output, value), expected)


@pytest.mark.parametrize("kind", [Normal, Laplace])
def test_densities_integrate_to_one(kind: type[Normal] | type[Laplace]) -> None:
    # the middles of cells: exact for a kink at 0.1 to the square of the cell's width
    x, width = torch.linspace(-30, 30, 60_001, dtype=torch.float64)[:, None], 0.001
    density = torch.exp(kind((1,), scale=0.7).log_prob(torch.tensor([0.1], dtype=torch.float64), x))
    assert float(density.sum() * width) == pytest.approx(1, abs=1e-5)
    assert density.shape == (60_001,)


def test_discrete_probabilities_add_up_to_one() -> None:
    every_bit = torch.tensor(list(itertools.product([0.0, 1.0], repeat=6)), dtype=torch.float64).view(-1, *SHAPE)
    total = torch.exp(Bernoulli(SHAPE).log_prob(outputs(1), every_bit)).sum()
    assert float(total) == pytest.approx(1, abs=1e-12)
    every_code = torch.tensor(list(itertools.product(range(3), repeat=6))).view(-1, *SHAPE)
    total = torch.exp(Categorical(SHAPE, classes=3).log_prob(outputs(1, extra=(3,)), every_code)).sum()
    assert float(total) == pytest.approx(1, abs=1e-12)


@pytest.mark.parametrize("name", ["normal", "laplace", "bernoulli", "categorical"])
@pytest.mark.parametrize(
    ("output_rows", "value_rows"), [((4, 5), (5,)), ((5, 7), (5, 1)), ((1,), (6,)), ((), (3,)), ((2, 5), (2, 5))]
)
def test_leading_dimensions_broadcast(name: str, output_rows: tuple[int, ...], value_rows: tuple[int, ...]) -> None:
    categorical = name == "categorical"
    module = (
        Categorical(SHAPE, classes=4)
        if categorical
        else {"normal": Normal, "laplace": Laplace}.get(name, Bernoulli)(SHAPE)
    )
    output = outputs(*output_rows, extra=(4,) if categorical else ())
    value = torch.randint(0, 2, (*value_rows, *SHAPE))
    value = value if categorical else value.double()
    rows = torch.broadcast_shapes(output_rows, value_rows)
    expected = module.log_prob(output.expand(*rows, *module.output_shape), value.expand(*rows, *SHAPE))
    actual = module.log_prob(output, value)
    assert actual.shape == rows
    torch.testing.assert_close(actual, expected)


def test_means_are_on_the_scale_of_the_data() -> None:
    output = outputs(3)
    assert torch.equal(Normal(SHAPE).mean(output), output)
    assert torch.equal(Laplace(SHAPE).mean(output), output)
    torch.testing.assert_close(Bernoulli(SHAPE).mean(output), torch.sigmoid(output))
    probabilities = Categorical(SHAPE, classes=4).mean(outputs(3, extra=(4,)))
    torch.testing.assert_close(probabilities.sum(-1), torch.ones(3, *SHAPE, dtype=torch.float64))


def test_grey_values_are_binary_cross_entropy_and_no_density() -> None:
    grey, output = torch.rand(4, *SHAPE, dtype=torch.float64), outputs(4)
    module = Bernoulli(SHAPE)
    expected = nn.functional.binary_cross_entropy_with_logits(output, grey, reduction="none").sum((1, 2))
    torch.testing.assert_close(-module.log_prob(output, grey), expected)
    assert not module.is_density(grey)
    assert module.is_density(grey.round())
    assert Normal(SHAPE).is_density(grey)


@pytest.mark.parametrize("dist", ["normal", "laplace"])
def test_a_learned_scale_is_trained_to_the_spread_of_the_data(dist: str) -> None:
    module = {"normal": Normal, "laplace": Laplace}[dist]((2,), scale="learned").double()
    value = 0.3 * torch.randn(2000, 2, dtype=torch.float64)
    optimiser = torch.optim.LBFGS(module.parameters(), max_iter=50, line_search_fn="strong_wolfe")

    def closure() -> Tensor:
        optimiser.zero_grad()
        loss = -module.log_prob(torch.zeros(2, dtype=torch.float64), value).mean()
        loss.backward()
        return loss

    optimiser.step(closure)
    spread = value.square().mean().sqrt() if dist == "normal" else value.abs().mean()
    assert module.log_scale.exp().item() == pytest.approx(float(spread), rel=1e-4)


@pytest.mark.parametrize("dist", ["normal", "laplace"])
def test_a_learned_scale_gives_the_density_of_the_same_fixed_scale(dist: str) -> None:
    kind = {"normal": Normal, "laplace": Laplace}[dist]
    learned, fixed = kind(SHAPE, scale="learned").double(), kind(SHAPE, scale=0.6)
    learned.log_scale.data.fill_(math.log(0.6))
    output, value = outputs(3), outputs(3)
    torch.testing.assert_close(learned.log_prob(output, value).detach(), fixed.log_prob(output, value))
    assert not list(fixed.parameters())


def test_only_integers_are_categories() -> None:
    config = DMVAEConfig(
        input_dims={"a": (3,)}, decoders_dist={"a": "categorical"}, decoder_dist_params={"a": {"classes": 4}}
    )
    model = DMVAE(config)
    assert model.observe(Batch({"a": torch.zeros(2, 3, dtype=torch.uint8)}))["a"].values.dtype == torch.int64
    with pytest.raises(ValueError, match=r"int64; got torch.float32 for 'a'"):
        model(Batch({"a": torch.zeros(2, 3)}))


class Cauchy(Likelihood):
    """A likelihood of one's own."""

    def __init__(self, shape: tuple[int, ...], width: float = 1.0) -> None:
        super().__init__(shape)
        self.width = width

    def log_prob(self, output: Tensor, value: Tensor) -> Tensor:
        return self._sum(torch.distributions.Cauchy(output, self.width).log_prob(value))

    def mean(self, output: Tensor) -> Tensor:
        return output


@pytest.fixture
def _empty_registry(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(likelihood, "_REGISTRY", dict(likelihood._REGISTRY))


@pytest.mark.usefixtures("_empty_registry")
def test_a_registered_likelihood_is_built_with_its_parameters() -> None:
    likelihood.register("cauchy", Cauchy)
    config = DMVAEConfig(
        input_dims={"a": (3,)}, decoders_dist={"a": "cauchy"}, decoder_dist_params={"a": {"width": 2.5}}
    )
    built = DMVAE(config).likelihoods["a"]
    assert isinstance(built, Cauchy)
    assert built.width == 2.5
    with pytest.raises(ValueError, match="once"):
        likelihood.register("normal", Cauchy)


class Scaled(Cauchy):
    """A likelihood with something of its own that is not public."""

    def __init__(self, shape: tuple[int, ...], width: float | nn.Module) -> None:
        super().__init__(shape)
        self._width = width

    def log_prob(self, output: Tensor, value: Tensor) -> Tensor:
        output = self._width(output) if isinstance(self._width, nn.Module) else self._width * output
        return super().log_prob(output, value)


@pytest.mark.parametrize("widths", [(1.0, 9.0), (nn.Linear(3, 3), nn.Linear(3, 3))])
def test_likelihoods_that_differ_in_what_is_private_to_them_are_not_taken_for_one(widths: tuple[Any, Any]) -> None:
    alone = [Scaled((3,), width) for width in widths]
    output, values = torch.randn(2, 4, 3), [torch.randn(4, 3), torch.randn(4, 3)]
    found = likelihood.log_prob_each(alone, output, values)
    for own, one, part, value in zip(found, alone, output, values, strict=True):
        torch.testing.assert_close(own, one.log_prob(part, value))


@pytest.mark.usefixtures("_empty_registry")
def test_what_makes_no_likelihood_is_refused_when_the_model_is_built() -> None:
    likelihood.register("function", lambda shape: nn.Identity())
    with pytest.raises(ValueError, match="Identity for 'function'"):
        DMVAE(DMVAEConfig(input_dims={"a": (3,)}, decoders_dist={"a": "function"}))


def test_an_unknown_likelihood_is_refused_with_the_known_ones() -> None:
    with pytest.raises(ValueError, match=r"'gauss' for 'a'.*normal, laplace, bernoulli, categorical"):
        DMVAE(DMVAEConfig(input_dims={"a": (3,)}, decoders_dist={"a": "gauss"}))
