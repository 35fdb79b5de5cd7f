import itertools
import math
from collections.abc import Iterator
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from dmvae import DMVAE, Batch, DMVAEConfig
from dmvae.config.likelihoods import LikelihoodSpec, Param, ValueTraits
from dmvae.config.likelihoods import suggest as suggest_for
from dmvae.data.format.manifest import ModalityInfo
from dmvae.distributions.likelihoods import Likelihood, build, log_prob_each, register, registry
from dmvae.distributions.likelihoods.bernoulli import Bernoulli
from dmvae.distributions.likelihoods.categorical import Categorical
from dmvae.distributions.likelihoods.counts import Counts
from dmvae.distributions.likelihoods.laplace import Laplace
from dmvae.distributions.likelihoods.normal import Normal
from dmvae.model.predictor import ModalitySpec, Predictor

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
    with pytest.raises(ValueError, match=r"'a' must be int64, but got torch.float32"):
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
def _own_registry(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setattr(registry, "_REGISTRY", dict(registry._REGISTRY))

    before = dict(registry.SPECS)
    yield
    registry.SPECS.clear()
    registry.SPECS.update(before)


@pytest.mark.usefixtures("_own_registry")
def test_a_registered_likelihood_is_built_with_its_parameters() -> None:
    register("cauchy", Cauchy)
    config = DMVAEConfig(
        input_dims={"a": (3,)}, decoders_dist={"a": "cauchy"}, decoder_dist_params={"a": {"width": 2.5}}
    )
    built = DMVAE(config).likelihoods["a"]
    assert isinstance(built, Cauchy)
    assert built.width == 2.5
    with pytest.raises(ValueError, match="already registered"):
        register("normal", Cauchy)


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
    found = log_prob_each(alone, output, values, [None] * len(values))
    for own, one, part, value in zip(found, alone, output, values, strict=True):
        torch.testing.assert_close(own, one.log_prob(part, value))


@pytest.mark.usefixtures("_own_registry")
def test_what_makes_no_likelihood_is_refused_when_the_model_is_built() -> None:
    register("function", lambda shape: nn.Identity())
    with pytest.raises(ValueError, match=r"'function' must return .*, but got Identity"):
        DMVAE(DMVAEConfig(input_dims={"a": (3,)}, decoders_dist={"a": "function"}))


def test_an_unknown_likelihood_is_refused_with_the_known_ones() -> None:
    with pytest.raises(ValueError, match=r"'gauss' for modality 'a'. Available: bernoulli, categorical, columns, "):
        DMVAE(DMVAEConfig(input_dims={"a": (3,)}, decoders_dist={"a": "gauss"}))


@pytest.mark.usefixtures("_own_registry")
def test_a_spec_lets_configurations_and_data_know_a_likelihood_of_ones_own() -> None:
    def suggest(traits: ValueTraits) -> str | None:
        return "very heavy tails" if traits.kurtosis > 100 else None

    register("cauchy", Cauchy, LikelihoodSpec(values="real", params={"width": Param()}, suggest=suggest))
    with pytest.raises(ValueError, match=r"width must be a number greater than 0 .*, but got 0"):
        DMVAEConfig(input_dims={"a": (3,)}, decoders_dist={"a": "cauchy"}, decoder_dist_params={"a": {"width": 0}})
    assert suggest_for(ValueTraits("real", kurtosis=200.0)) == ("cauchy", "very heavy tails")
    assert suggest_for(ValueTraits("real", kurtosis=6.0))[0] == "laplace"


class Geometric(Counts):
    """Geometric counts of mean mu: x log mu - (x + 1) log(1 + mu)."""

    def log_prob(self, output: Tensor, value: Tensor) -> Tensor:
        counts, log_mean = self._split(output, value)
        return (counts * log_mean - (counts + 1) * F.softplus(log_mean)).sum(-1)


@pytest.mark.usefixtures("_own_registry")
def test_counts_of_ones_own_need_one_class_and_one_spec() -> None:
    register("geometric", Geometric, LikelihoodSpec(values="counts"))
    info = ModalityInfo(shape=(3,), dtype="int64", likelihood="geometric")
    assert info.classes is None, "the dataset takes integers for counts, not for classes"
    torch.manual_seed(0)
    model = DMVAE(DMVAEConfig(input_dims={"a": (3,)}, decoders_dist={"a": "geometric"}))
    batch = Batch({"a": torch.tensor([[0, 4, 70], [1, 0, 2]])})
    assert bool(model(batch).loss.isfinite())
    served = Predictor(model, {"a": ModalitySpec(shape=(3,), dtype="int64", likelihood="geometric")})
    rows = served.parse([{"a": [1.5, 0, 0]}])
    with pytest.raises(ValueError, match=r"counts must be whole numbers of 0 or more, but got 1\.5"):
        served.batch(rows)
    means = model.means(model.predict(batch, return_mean=True)["a"], "a", batch)
    shares = model.means(model.predict(batch, return_mean=True)["a"], "a") / means
    torch.testing.assert_close(shares, (1 / batch.data["a"].sum(1, keepdim=True)).expand(2, 3))


@pytest.mark.usefixtures("_own_registry")
def test_parameters_that_a_likelihood_without_a_spec_does_not_take_are_refused_with_the_modality() -> None:
    register("cauchy", Cauchy)
    params = {"a": {"wdith": 2.0}}
    config = DMVAEConfig(input_dims={"a": (3,)}, decoders_dist={"a": "cauchy"}, decoder_dist_params=params)
    with pytest.raises(ValueError, match=r"'cauchy' for modality 'a': .*'wdith'\. Correct decoder_dist_params\.a"):
        DMVAE(config)


def test_every_likelihood_that_configurations_know_can_be_built() -> None:
    assert registry.SPECS.keys() <= registry._REGISTRY.keys()
    for name, spec in registry.SPECS.items():
        params = {"columns": {"kinds": ("real", "category"), "classes": (3,)}, "categorical": {"classes": 3}}
        given = {"a": params[name]} if name in params else None
        built = build(DMVAEConfig(input_dims={"a": (2,)}, decoders_dist={"a": name}, decoder_dist_params=given), "a")
        if type(built).__module__.startswith("dmvae."):  # other tests register their own
            assert built.are_counts == (spec.values == "counts")
            assert (built.classes is not None) == (spec.values == "classes")


@pytest.mark.parametrize("name", ["normal", "laplace", "bernoulli", "categorical", "poisson", "negative_binomial"])
def test_draws_are_legal_and_have_the_mean_of_the_distribution(name: str) -> None:
    params = {"categorical": {"classes": 3, "pad": 1}, "normal": {"scale": 0.5}}.get(name)
    dims, dists = {"a": (2,)}, {"a": name}
    likelihood = build(
        DMVAEConfig(input_dims=dims, decoders_dist=dists, decoder_dist_params=params and {"a": params}), "a"
    )
    output = torch.randn(likelihood.output_shape, dtype=torch.float64).expand(20_000, *likelihood.output_shape)
    drawn = likelihood.sample(output, torch.Generator().manual_seed(1))
    assert likelihood.in_support(drawn)
    values = F.one_hot(drawn, 3).double() if name == "categorical" else drawn
    mean = likelihood.mean(output)[0]
    error = values.std(0) / math.sqrt(len(values))
    assert bool(((values.mean(0) - mean).abs() <= 5 * error).all())
    assert torch.equal(drawn, likelihood.sample(output, torch.Generator().manual_seed(1)))
