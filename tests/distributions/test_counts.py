"""Counts: the Poisson and negative binomial likelihoods, and size factors from the batch to every estimate."""

import math
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from dmvae import DMVAE, Batch, DMVAEConfig
from dmvae.distributions.likelihoods.counts import Counts
from dmvae.distributions.likelihoods.negative_binomial import NegativeBinomial
from dmvae.distributions.likelihoods.poisson import Poisson
from dmvae.evaluation.elbo import negative_elbo

KINDS = ("poisson", "negative_binomial")


def counts_of(kind: str, size: int = 1, dispersion: float = 1.7) -> Counts:
    return Poisson((size,)) if kind == "poisson" else NegativeBinomial((size,), dispersion=dispersion)


def carried(module: Counts, counts: Tensor, size_factor: float = 1.0) -> Tensor:
    return module.observe(counts, torch.full((len(counts),), size_factor, dtype=torch.float64))


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("log_mean", [-3.0, 0.4, 3.0])
def test_probabilities_add_up_to_one_and_have_their_mean_and_variance(kind: str, log_mean: float) -> None:
    module, x = counts_of(kind), torch.arange(3000.0, dtype=torch.float64)[:, None]
    output = torch.full_like(x, log_mean - math.log(2.5))
    p = module.log_prob(output, carried(module, x, 2.5)).exp()
    mu = math.exp(log_mean)
    assert float(p.sum()) == pytest.approx(1, abs=1e-11)
    assert float(p @ x[:, 0]) == pytest.approx(mu, rel=1e-9)
    variance = mu if kind == "poisson" else mu + mu**2 / 1.7
    assert float(p @ (x[:, 0] - mu).square()) == pytest.approx(variance, rel=1e-8)
    assert float(module.mean_at(output[:1], torch.tensor([2.5], dtype=torch.float64))) == pytest.approx(mu)


def test_they_are_those_of_torch_distributions() -> None:
    x = torch.poisson(torch.rand(7, 4, dtype=torch.float64) * 20)
    output, sizes = torch.randn(7, 4, dtype=torch.float64), torch.rand(7, dtype=torch.float64) * 5
    rate = output.exp() * sizes[:, None]
    poisson, r = Poisson((4,)), torch.tensor([0.2, 1, 5, 90], dtype=torch.float64)
    expected = torch.distributions.Poisson(rate).log_prob(x).sum(1)
    torch.testing.assert_close(poisson.log_prob(output, poisson.observe(x, sizes)), expected)
    negative_binomial = NegativeBinomial((4,)).double()
    assert isinstance(negative_binomial.log_dispersion, nn.Parameter)
    negative_binomial.log_dispersion.data = r.log()
    expected = torch.distributions.NegativeBinomial(r, probs=rate / (rate + r)).log_prob(x).sum(1)
    torch.testing.assert_close(negative_binomial.log_prob(output, negative_binomial.observe(x, sizes)), expected)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_large_dispersion_is_poisson(dtype: torch.dtype) -> None:
    x, output = torch.tensor([[0.0, 3, 70]], dtype=dtype), torch.tensor([[-1.0, 1.0, -9.0]], dtype=dtype)
    expected = Poisson((3,)).log_prob(output, x)
    gaps = [float((NegativeBinomial((3,), r).log_prob(output, x) - expected).abs()) for r in (1e2, 1e4, 1e6, 1e8)]
    assert gaps[0] > 0.1
    assert gaps[1] < gaps[0] / 20
    assert gaps[2] < gaps[1] / 20
    assert gaps[3] < 1e-3


@pytest.mark.parametrize("kind", KINDS)
def test_single_precision_holds_over_many_orders_of_magnitude(kind: str) -> None:
    x = torch.tensor([[0.0, 1, 30, 4e3, 1e6]]).T
    for r in (1e-3, 1.0, 1e5):
        single, double = counts_of(kind, 1, r), counts_of(kind, 1, r)
        for log_mean in (-80.0, -20.0, 0.0, 8.0, 14.0, 60.0):
            output = torch.full((5, 1), log_mean, requires_grad=True)
            value = carried(single, x).float()
            found = single.log_prob(output, value)
            expected = double.log_prob(output.double(), carried(double, x.double()))
            # of a sum with terms as large as these no more digits are left
            terms = 1 + x[:, 0].double() * (abs(log_mean) + 14) + (math.exp(log_mean) if kind == "poisson" else r * 60)
            assert bool(((found.double() - expected).abs() <= 3e-7 * terms).all())
            (slope,) = torch.autograd.grad(found.sum(), output)
            assert torch.isfinite(slope).all()
            assert torch.isfinite(single.information(torch.ones(5, 2, 1), output.detach(), value)).all()


@pytest.mark.parametrize("kind", KINDS)
def test_score_and_information_are_the_derivative_and_its_variance(kind: str) -> None:
    module = counts_of(kind)
    x = torch.arange(4000.0, dtype=torch.float64)[:, None]
    output, value = torch.full((4000, 1), 0.3, dtype=torch.float64), carried(module, x, 4.0)
    leaf = output.clone().requires_grad_()
    (slope,) = torch.autograd.grad(module.log_prob(leaf, value).sum(), leaf)
    score = module.score(output, value)
    torch.testing.assert_close(score, slope, rtol=1e-9, atol=1e-9)
    p = module.log_prob(output, value).exp()
    assert float(p @ score[:, 0]) == pytest.approx(0, abs=1e-9)
    information = module.information(torch.ones(4000, 1, 1, dtype=torch.float64), output, value)
    assert float(p @ score[:, 0].square()) == pytest.approx(float(information[0]), rel=1e-8)


@pytest.mark.parametrize("kind", KINDS)
def test_tensors_of_any_shape_and_leading_dimensions_broadcast(kind: str) -> None:
    shape = (2, 3)
    module = Poisson(shape) if kind == "poisson" else NegativeBinomial(shape, dispersion=2.0)
    flat = counts_of(kind, 6, 2.0)
    x, output = torch.poisson(torch.full((5, *shape), 4.0)), torch.randn(4, 5, *shape)
    expected = flat.log_prob(output.flatten(2), x.flatten(1))
    torch.testing.assert_close(module.log_prob(output, x), expected)
    torch.testing.assert_close(module.log_prob(output, module.observe(x, None)), expected)
    draws = output.transpose(0, 1)
    torch.testing.assert_close(module.log_prob(draws, module.observe(x, None).unsqueeze(1)), expected.T)
    assert module.score(output[0], module.observe(x, None)).shape == (5, *shape)
    assert module.information(torch.randn(5, 7, *shape), output[0], module.observe(x, None)).shape == (5, 7, 7)


def test_a_row_s_size_factor_is_its_total_unless_given() -> None:
    module, x, output = Poisson((3,)), torch.tensor([[1.0, 4, 0], [0, 0, 0]]), torch.randn(2, 3)
    totals = torch.tensor([5.0, 1.0])  # of only zeros: 1
    torch.testing.assert_close(module.log_prob(output, x), module.log_prob(output, module.observe(x, totals)))
    nothing = torch.full((2,), math.nan)
    assert torch.equal(module.observe(x, nothing), module.observe(x, None))
    assert torch.isfinite(module.log_prob(output, x)).all()


def test_counts_are_whole_and_not_negative() -> None:
    module = Poisson((2,))
    assert module.in_support(torch.tensor([[0.0, 7.0]]))
    for wrong in (-1.0, 0.5, math.inf, math.nan):
        assert not module.in_support(torch.tensor([[0.0, wrong]]))


GENES = {"rna": (6,), "tags": (2,), "protein": (3,)}


def model_of(**changes: Any) -> DMVAE:
    torch.manual_seed(0)
    fields: dict[str, Any] = {
        "input_dims": GENES,
        "latent_dim": 2,
        "modalities_specific_dim": 1,
        "decoders_dist": {"rna": "negative_binomial", "tags": "poisson"},
    }
    return DMVAE(DMVAEConfig.model_validate(fields | changes)).double()


def rows(num: int = 40, size_factors: bool = True) -> Batch:
    """Rows of which half lack the counts, with NaN in what they lack."""
    generator = torch.Generator().manual_seed(1)
    depth = torch.rand(num, generator=generator, dtype=torch.float64) * 4 + 0.2
    data = {
        name: torch.poisson(depth[:, None] * torch.ones(num, *GENES[name], dtype=torch.float64), generator=generator)
        for name in ("rna", "tags")
    }
    data["protein"] = torch.randn(num, 3, generator=generator, dtype=torch.float64)
    masks = {"rna": torch.arange(num) % 2 == 0, "tags": torch.arange(num) % 4 < 2}
    for name, mask in masks.items():
        data[name][~mask] = math.nan
    depth[~(masks["rna"] | masks["tags"])] = math.nan
    return Batch(data, masks, size_factors=depth if size_factors else None)


@pytest.mark.parametrize("given", [True, False])
def test_missing_counts_are_never_read_and_every_parameter_has_a_gradient(given: bool) -> None:
    model, batch = model_of(), rows(size_factors=given)
    model(batch).loss.backward()
    for name, parameter in model.named_parameters():
        assert torch.isfinite(parameter.grad).all(), name
        assert (parameter.grad != 0).any(), name


def test_the_loss_of_rows_is_the_mean_of_each_by_itself() -> None:
    model, batch = model_of(), rows()
    bound = negative_elbo(model, batch)
    with_ids = [
        negative_elbo(model, Batch(one.data, one.masks, ids=torch.tensor([row]), size_factors=one.size_factors))
        for row, one in enumerate(batch)
    ]
    torch.testing.assert_close(bound, torch.cat(with_ids))
    nll = model.joint_nll(batch, 256)
    named = Batch(batch.data, batch.masks, ids=torch.arange(40), size_factors=batch.size_factors)
    torch.testing.assert_close(model.joint_nll(named[torch.arange(39, -1, -1)], 256).nll.flip(0), nll.nll)


def test_a_scale_of_size_factors_is_an_offset_of_the_log_mean() -> None:
    model, batch, factor = model_of(), rows(), 17.0
    other = model_of()
    with torch.no_grad():
        for name in ("rna", "tags"):
            other.decoders[name].body[-1].bias -= math.log(factor)
    scaled = Batch(batch.data, batch.masks, size_factors=batch.size_factors * factor)
    for left, right in (
        (negative_elbo(model, batch), negative_elbo(other, scaled)),
        (model.joint_nll(batch, 256).nll, other.joint_nll(scaled, 256).nll),
        (model(batch[:0]).loss, other(scaled[:0]).loss),
    ):
        torch.testing.assert_close(left, right)


def test_means_are_at_a_row_s_size_factor_where_it_is_known() -> None:
    model = model_of(decoder_dist_params={"rna": {"size_factor": 30.0}})
    batch, output = rows(4, size_factors=False), torch.zeros(2, 4, 6, dtype=torch.float64)
    shown = model.means(output, "rna", batch)
    totals = batch.data["rna"].sum(1)
    torch.testing.assert_close(shown[:, :, 0], torch.tensor([totals[0], 30, totals[2], 30]).expand(2, 4))
    torch.testing.assert_close(model.means(output, "rna"), torch.full_like(output, 30))
    given = Batch(batch.data, batch.masks, size_factors=torch.tensor([5.0, 7.0, math.nan, math.nan]))
    torch.testing.assert_close(model.means(output, "rna", given)[0, :, 0], torch.tensor([5, 7, totals[2], 30]))
    assert torch.equal(model.means(output[..., :3], "protein", batch), output[..., :3])


def test_a_saved_model_keeps_its_dispersions(tmp_path: Any) -> None:
    model, batch = model_of(), rows()
    with torch.no_grad():
        model.likelihoods["rna"].log_dispersion += torch.arange(6)
    model.save(tmp_path)
    loaded = DMVAE.load(tmp_path)
    assert torch.equal(negative_elbo(loaded, batch), negative_elbo(model.eval(), batch))


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("proposal", ["refined", "encoder"])
def test_the_nll_is_that_of_quadrature(kind: str, proposal: str) -> None:
    params = {"x": {"dispersion": 3.0}} if kind == "negative_binomial" else None
    config = DMVAEConfig(
        input_dims={"x": (4,)}, latent_dim=1, modalities_specific_dim=1, decoders_dist={"x": kind},
        decoder_dist_params=params,
    )  # fmt: skip
    torch.manual_seed(3)
    model = DMVAE(config).double().eval()
    with torch.no_grad():
        model.decoders["x"].body[-1].weight *= 3
    x = torch.poisson(torch.rand(6, 4, dtype=torch.float64) * 9)
    sizes = torch.rand(6, dtype=torch.float64) * 3 + 0.5
    grid = torch.linspace(-9, 9, 361, dtype=torch.float64)
    z = torch.cartesian_prod(grid, grid)
    with torch.no_grad():
        output = model.decode_functions["x"](z)
        log_mean = output + sizes.log()[:, None, None]
        theirs = {
            "poisson": torch.distributions.Poisson(log_mean.exp()),
            "negative_binomial": torch.distributions.NegativeBinomial(3.0, logits=log_mean - math.log(3.0)),
        }[kind]
        log_p = theirs.log_prob(x[:, None]).sum(-1)
    log_prior = -0.5 * z.square().sum(1) - math.log(2 * math.pi)
    exact = -(torch.logsumexp(log_p + log_prior, 1) + 2 * math.log(18 / 360))
    found = model.joint_nll(Batch({"x": x}, size_factors=sizes), 4000 if proposal == "refined" else 8000,
                            proposal=proposal)  # fmt: skip
    errors = (found.nll - exact).abs()
    assert float(errors.max()) < (0.05 if proposal == "refined" else 0.3)
    assert bool((errors < 5 * found.se + 1e-4).all())


def test_conditional_nll_and_prediction_take_size_factors_along() -> None:
    model, batch = model_of(), rows()
    generator = torch.Generator().manual_seed(0)
    found = model.compute_cond_nll(batch, ["protein"], ["rna", "tags"], K=200, generator=generator)
    generator.manual_seed(0)
    other = Batch(batch.data, batch.masks, size_factors=batch.size_factors * 3)
    changed = model.compute_cond_nll(other, ["protein"], ["rna", "tags"], K=200, generator=generator)
    for name in ("rna", "tags"):
        assert math.isfinite(float(found[name]))
        assert float(found[name]) != float(changed[name])


@pytest.mark.parametrize(
    ("params", "message"),
    [
        ({"rna": {"dispersion": 0}}, "dispersion must be a number greater than 0 .*, but got 0"),
        ({"tags": {"size_factor": "learned"}}, "size_factor must be a number greater than 0 .*, but got 'learned'"),
        ({"tags": {"dispersion": 2.0}}, r"poisson.*unknown parameter 'dispersion'\. Available: rate, size_factor"),
        ({"rna": {"dispersion": -1}}, "decoder_dist_params"),
    ],
)
def test_wrong_parameters_are_refused(params: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        model_of(decoder_dist_params=params)


def test_counts_enter_an_encoder_on_a_log_scale() -> None:
    model = model_of()
    x = torch.poisson(torch.full((3, 6), 1e4, dtype=torch.float64))
    of_floats = model_of(decoders_dist={}, decoder_dist_params=None)
    of_floats.encoders["rna"].load_state_dict(model.encoders["rna"].state_dict())
    torch.testing.assert_close(model.encoders["rna"](x).embedding, of_floats.encoders["rna"](torch.log1p(x)).embedding)


@pytest.mark.parametrize(("architecture", "shape"), [("mlp", (6,)), ("conv", (1, 28, 28))])
@pytest.mark.parametrize("rate", [None, 3.0])
def test_an_untrained_decoder_is_about_right(architecture: str, shape: tuple[int, ...], rate: float | None) -> None:
    torch.manual_seed(0)
    config = DMVAEConfig.model_validate(
        {
            "input_dims": {"x": shape},
            "decoders_dist": {"x": "poisson"},
            "decoder_dist_params": {"x": {"rate": rate} if rate else {}},
            "architectures": {"x": {"name": architecture}},
        }
    )
    model = DMVAE(config)
    output = model.decode(model.generate_from_prior(20)).x
    assert float(output.mean()) == pytest.approx(math.log(rate or 1 / math.prod(shape)), abs=0.2)
