"""Tables: the likelihood of a row is the product of those of its columns."""

import math

import pytest
import torch
from torch import Tensor

from dmvae import DMVAE, Batch, DMVAEConfig
from dmvae.distributions.likelihoods import Likelihood, build
from dmvae.distributions.likelihoods.columns import UNSEEN_PROBABILITY, Columns
from dmvae.nn.networks.table import TableFeatures

KINDS = ("category", "real", "count", "binary", "category", "positive", "category")
CLASSES = (3, 4, 3)
PARAMS = {"kinds": KINDS, "classes": CLASSES, "rates": (2.5,)}


def table() -> Columns:
    torch.manual_seed(0)
    likelihood = Columns((7,), KINDS, CLASSES, (2.5,)).double()
    with torch.no_grad():
        for parameter in likelihood.parameters():
            parameter.copy_(0.3 * torch.randn_like(parameter))
    return likelihood


def rows(num: int = 6) -> Tensor:
    torch.manual_seed(1)
    parts = [
        torch.randint(0, 3, (num,)), torch.randn(num), torch.poisson(torch.full((num,), 2.5)),
        torch.randint(0, 2, (num,)), torch.randint(0, 4, (num,)), torch.randn(num), torch.randint(0, 3, (num,)),
    ]  # fmt: skip
    return torch.stack([part.double() for part in parts], dim=1)


def outputs(*leading: int) -> Tensor:
    torch.manual_seed(2)
    return torch.randn(*leading, 14, dtype=torch.float64)


def single(likelihood: Columns, output: Tensor, value: Tensor) -> Tensor:
    """The log-density of one row by the distributions of torch, column by column."""
    scale = next(part.likelihood.scale for part in likelihood.parts if hasattr(part.likelihood, "scale"))
    r = likelihood.parts[1].likelihood.log_dispersion.exp()
    known = math.log1p(-UNSEEN_PROBABILITY)
    logits = {0: output[4:7], 6: output[7:10], 4: output[10:14]}
    total = sum(torch.distributions.Categorical(logits=logits[c]).log_prob(value[c]) + known for c in logits)
    total = total + torch.distributions.Normal(output[0], scale[0]).log_prob(value[1])
    total = total + torch.distributions.Normal(output[1], scale[1]).log_prob(value[5])
    count = torch.distributions.NegativeBinomial(r, logits=output[2] - r.log())
    total = total + count.log_prob(value[2]).squeeze()
    return total + torch.distributions.Bernoulli(logits=output[3]).log_prob(value[3])


def test_the_density_of_a_row_is_the_product_over_its_columns() -> None:
    likelihood, value, output = table(), rows(), outputs(6)
    expected = torch.stack([single(likelihood, *pair) for pair in zip(output, value, strict=True)])
    torch.testing.assert_close(likelihood.log_prob(output, value), expected)


@pytest.mark.parametrize(
    ("output_rows", "value_rows"), [((4, 6), (6,)), ((6, 5), (6, 1)), ((1,), (6,)), ((4, 6), (1, 6))]
)
def test_leading_dimensions_broadcast(output_rows: tuple[int, ...], value_rows: tuple[int, ...]) -> None:
    likelihood, output, value = table(), outputs(*output_rows), rows().view(*value_rows, 7)
    found = likelihood.log_prob(output, value)
    shape = torch.broadcast_shapes(output_rows, value_rows)
    expected = likelihood.log_prob(
        output.expand(*shape, 14).reshape(-1, 14), value.expand(*shape, 7).reshape(-1, 7)
    ).view(shape)
    torch.testing.assert_close(found, expected)


def test_probabilities_of_a_discrete_row_add_up_to_one() -> None:
    likelihood = Columns((2,), ("category", "binary"), (3,))
    every = torch.cartesian_prod(torch.arange(4.0), torch.arange(2.0))
    total = likelihood.log_prob(torch.randn(1, 4), every).exp().sum()
    assert float(total) == pytest.approx(1, abs=1e-6)


def test_a_class_that_no_training_row_has_is_legal_and_costs_the_same_under_every_decoder() -> None:
    likelihood = Columns((1,), ("category",), (2,))
    value = torch.tensor([[2.0], [2.0]])
    output = torch.tensor([[5.0, -5.0], [0.0, 0.0]])
    assert likelihood.in_support(value)
    torch.testing.assert_close(likelihood.log_prob(output, value), torch.full((2,), math.log(UNSEEN_PROBABILITY)))
    assert likelihood.score(output, value).tolist() == [[0, 0], [0, 0]]
    assert likelihood.information(torch.randn(2, 3, 2), output, value).abs().max() == 0
    assert not likelihood.in_support(torch.tensor([[3.0]]))


def test_score_and_information_are_derivatives_of_the_log_density() -> None:
    likelihood, value, output = table(), rows(), outputs(6)
    torch.testing.assert_close(likelihood.score(output, value), Likelihood.score(likelihood, output, value))
    # the negative binomial's is the expected information and not the curvature
    tangents = torch.randn(6, 3, 14, dtype=torch.float64)
    tangents[..., 2] = 0
    torch.testing.assert_close(
        likelihood.information(tangents, output, value), Likelihood.information(likelihood, tangents, output, value)
    )


def test_draws_have_the_means_and_the_probabilities() -> None:
    likelihood, output = table(), outputs(1)
    drawn = likelihood.sample(output.expand(20_000, 14), torch.Generator().manual_seed(0))
    assert likelihood.in_support(drawn)
    numbers = [1, 2, 3, 5]
    error = drawn.std(0)[numbers] / 20_000**0.5
    assert ((drawn.mean(0) - likelihood.mean(output)[0])[numbers].abs() < 5 * error).all()
    for column, p in likelihood.probabilities(output).items():
        share = torch.stack([(drawn[:, column] == number).double().mean() for number in range(p.shape[-1])])
        torch.testing.assert_close(share, p[0], atol=0.02, rtol=0)
        assert float(likelihood.mean(output)[0, 0]) == float(output[0, 4:7].argmax())


def test_each_number_has_its_own_scale_and_each_count_its_own_start() -> None:
    likelihood = Columns((3,), ("real", "count", "real"), rates=(20.0,))
    likelihood.initialize(torch.tensor([[0.0, 1, 0], [2, 1, 20], [0, 3, 0], [2, 3, 20]]))
    assert likelihood.parts[0].likelihood.scale.tolist() == pytest.approx([1.0, 10.0], rel=2e-3)
    assert likelihood.start == pytest.approx((0, 0, math.log(20)))


def test_encoders_see_categories_one_hot_counts_in_logs_and_nothing_for_unseen_classes() -> None:
    x = torch.tensor([[2.0, -0.5, 3, 1, 0, 0.7, 3]])
    found = TableFeatures(KINDS, CLASSES).features(x)
    expected = [-0.5, 1, 0.7, math.log(4), 0, 0, 1, 1, 0, 0, 0, 0, 0, 0]
    torch.testing.assert_close(found, torch.tensor([expected]))


def test_a_model_of_a_table_learns_and_every_parameter_gets_a_gradient() -> None:
    config = DMVAEConfig(
        input_dims={"clinic": (7,), "blood": (2,)},
        decoders_dist={"clinic": "columns"},
        decoder_dist_params={"clinic": PARAMS},
        architectures={name: {"name": "skip_mlp", "hidden_dims": (8,)} for name in ("clinic", "blood")},
    )
    assert DMVAEConfig.model_validate_json(config.model_dump_json()) == config
    torch.manual_seed(0)
    model = DMVAE(config)
    out = model(Batch({"clinic": rows().float(), "blood": torch.randn(6, 2)}))
    out.loss.backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in model.parameters())
    decoded = model.decode(model.generate_from_prior(3))["clinic"]
    assert model.likelihoods["clinic"].mean(decoded).shape == (3, 7)


@pytest.mark.parametrize(
    ("params", "message"),
    [
        ({}, "kinds must be a list"),
        ({"kinds": ("real", "colour")}, 'kinds must be a list, each entry "real" or .*"category", but got'),
        ({"kinds": ("real", "category")}, "classes must have one entry for each column of kind category, 1, but got 0"),
        ({"kinds": ("count", "real"), "rates": (1.0, 2.0)}, "rates must have one entry .* count, 1, but got 2"),
        ({"kinds": ("real", 3)}, r"kinds must be a list, .* but got \('real', 3\)"),
    ],
)
def test_kinds_that_do_not_fit_are_refused(params: dict[str, object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        DMVAEConfig(input_dims={"a": (2,)}, decoders_dist={"a": "columns"}, decoder_dist_params={"a": params})


def test_a_kind_for_each_column_is_asked_for() -> None:
    config = DMVAEConfig(
        input_dims={"a": (3,)}, decoders_dist={"a": "columns"}, decoder_dist_params={"a": {"kinds": ("real",)}}
    )
    with pytest.raises(ValueError, match=r"one kind for each column, but got 1 for shape \(3,\)"):
        build(config, "a")
