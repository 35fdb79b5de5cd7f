"""A prior that is fitted after training: what it is in closed form, and that it goes wherever the model goes."""

import math
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from dmvae import DMVAE, Batch, DMVAEConfig
from dmvae.evaluation.imputation import held_out_errors
from dmvae.evaluation.latents import fit_density
from dmvae.model.predictor import ModalitySpec, Predictor, Request
from dmvae.model.serialization import MODEL_PRIOR, MODEL_WEIGHTS
from tests.linear_gaussian import linear_layer, linear_model

SHAPES = {"a": (5,), "b": (4,)}
SLOPE = torch.tensor([[0.8, -0.5]], dtype=torch.float64)
SPREAD = 0.3
NOISE = 0.02


def dependent_rows(model: DMVAE, num: int, seed: int) -> Batch:
    """Draw rows whose private latents are z_p = SLOPE z_s + SPREAD e, and not the model's standard normal."""
    generator = torch.Generator().manual_seed(seed)

    def normal(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, dtype=torch.float64, generator=generator)

    shared, data = normal(num, 2), {}
    for name, (size,) in SHAPES.items():
        private = shared @ SLOPE.T + SPREAD * normal(num, 1)
        decoder = linear_layer(model.decoders[name])
        data[name] = torch.cat((shared, private), dim=1) @ decoder.weight.T + decoder.bias + NOISE * normal(num, size)
    return Batch(data, ids=torch.arange(num))


@pytest.fixture(scope="module")
def model() -> DMVAE:
    """Return a model with its fitted prior; its encoders invert the decoders almost exactly."""
    model = linear_model(SHAPES, 2, 1, scales=NOISE)
    with torch.no_grad():
        for name in SHAPES:
            encoder, decoder = linear_layer(model.encoders[name]), linear_layer(model.decoders[name])
            inverse = torch.linalg.pinv(decoder.weight)
            rows = torch.tensor([0, 1, 4])  # the means of z_s and z_p; between and after them are log-variances
            encoder.weight.zero_()
            encoder.weight[rows] = inverse
            encoder.bias[rows] = -inverse @ decoder.bias
            encoder.bias[torch.tensor([2, 3, 5])] = 2 * math.log(NOISE)
    model.fitted_prior = fit_density(model, dependent_rows(model, 3000, seed=1), num_components=4)
    return model


def test_it_is_the_conditional_that_the_data_have(model: DMVAE) -> None:
    prior = model.fitted_prior
    assert prior is not None
    shared = torch.tensor([[1.0, 0.5], [-0.7, 1.2], [0.0, 0.0]], dtype=torch.float64)
    for name in SHAPES:
        torch.testing.assert_close(prior.private(name, shared, return_mean=True), shared @ SLOPE.T, atol=0.06, rtol=0)
        drawn = prior.private(name, shared.expand(8000, 3, 2), generator=torch.Generator().manual_seed(0))
        torch.testing.assert_close(drawn.std(0), torch.full((3, 1), SPREAD).double(), atol=0.03, rtol=0)


def test_predictions_reach_the_least_possible_error(model: DMVAE) -> None:
    rows = dependent_rows(model, 1000, seed=2)
    weight = linear_layer(model.decoders["b"]).weight[:, 2:].detach()
    # z_s is known from a, z_p up to SPREAD; predictions are means over 200 draws
    least = math.sqrt(float(weight.square().mean()) * SPREAD**2 * (1 + 1 / 200) + NOISE**2)
    assert held_out_errors(model, rows, "b", 200, model.fitted_prior).rmse == pytest.approx(least, rel=0.05)
    assert held_out_errors(model, rows, "b", 200).rmse > 1.5 * least


def test_it_is_used_by_default_and_none_is_the_standard_normal(model: DMVAE) -> None:
    rows = replace(dependent_rows(model, 50, seed=3), masks={"b": torch.zeros(50, dtype=torch.bool)})

    def predicted(**density: object) -> torch.Tensor:
        generator = torch.Generator().manual_seed(4)
        return model.predict(rows, gen_mod="b", generator=generator, **density)["b"]  # type: ignore[arg-type]

    assert torch.equal(predicted(), predicted(density=model.fitted_prior))
    assert not torch.equal(predicted(), predicted(density=None))
    samples = model.generate_from_prior(4000, torch.Generator().manual_seed(5))
    residual = samples.modalities_z["a"] - samples.z @ SLOPE.T
    assert float(residual.std()) == pytest.approx(SPREAD, rel=0.1)


def test_the_nll_keeps_the_standard_normal(model: DMVAE, tmp_path: Path) -> None:
    rows = dependent_rows(model, 5, seed=6)
    with_it = model.joint_nll(rows, 50).nll
    model.save(tmp_path)
    (tmp_path / MODEL_PRIOR).unlink()
    without = DMVAE.load(tmp_path)
    assert without.fitted_prior is None
    assert torch.equal(without.joint_nll(rows, 50).nll, with_it)


def test_decoders_that_predict_with_the_standard_normal_keep_it() -> None:
    config = DMVAEConfig(input_dims=SHAPES, latent_dim=2, modalities_specific_dim=1, sources="subsets", cross="prior")
    generator = torch.Generator().manual_seed(8)
    rows = Batch({name: 2 + torch.randn(300, *shape, generator=generator) for name, shape in SHAPES.items()})
    model = DMVAE(config).eval()
    prior = fit_density(model, rows, 3)
    drawn = prior.private("a", prior.shared.sample(20000, generator), generator=generator)
    assert float(drawn.mean()) == pytest.approx(0, abs=0.03)
    assert float(drawn.std()) == pytest.approx(1, abs=0.03)
    encoded = model.encode(rows, return_mean=True).z.double()
    torch.testing.assert_close(prior.shared.mean, encoded.mean(0), atol=0.2, rtol=0)


def test_a_model_folder_holds_it(model: DMVAE, tmp_path: Path) -> None:
    model.save(tmp_path)
    loaded = DMVAE.load(tmp_path)
    mine, theirs = (m.generate_from_prior(7, torch.Generator().manual_seed(1)).z for m in (model, loaded))
    assert torch.equal(mine, theirs)
    linear_model(SHAPES, 2, 1).save(tmp_path)  # of a model that has none
    assert DMVAE.load(tmp_path).fitted_prior is None


def test_a_prior_that_cannot_be_used_is_refused(model: DMVAE, tmp_path: Path) -> None:
    model.save(tmp_path)
    weights, prior = tmp_path / MODEL_WEIGHTS, tmp_path / MODEL_PRIOR
    tensors = load_file(prior)
    save_file(tensors, prior, metadata={"format": "2"})
    with pytest.raises(ValueError, match=r"expected format 1, got 2\. Upgrade dmvae"):
        DMVAE.load(tmp_path)
    prior.write_bytes(b"half a file")
    with pytest.raises(ValueError, match=r"Cannot read .*prior\.safetensors.*or remove it"):
        DMVAE.load(tmp_path)
    model.save(tmp_path)
    own = load_file(weights)
    save_file({name: tensor + 1 for name, tensor in own.items()}, weights)
    with pytest.raises(ValueError, match=r"was fitted to other weights than model\.safetensors"):
        DMVAE.load(tmp_path)


def test_a_predictor_imputes_and_samples_from_it(model: DMVAE) -> None:
    specs = {name: ModalitySpec(shape=shape, dtype="float32") for name, shape in SHAPES.items()}
    predictor = Predictor(model, specs)
    given = dependent_rows(model, 3, seed=7).data["a"]
    rows = [{"a": row.tolist()} for row in given] + [{}]
    request = Request(operation="impute", num_draws=2000)
    together = predictor.answer(rows, request)
    alone = predictor.answer(rows[:1], request)
    for key in ("mean", "sd", "best"):
        assert alone[0]["imputed"]["b"][key] == pytest.approx(together[0]["imputed"]["b"][key], abs=1e-5)
    decoder = linear_layer(model.decoders["b"])
    shared = model.encode(Batch({"a": given}), return_mean=True).z
    expected = torch.cat((shared, shared @ SLOPE.T), dim=1) @ decoder.weight.T + decoder.bias
    scale = float(decoder.weight.detach().abs().max())
    for answer, truth in zip(together, expected, strict=False):
        assert answer["imputed"]["b"]["mean"] == pytest.approx(truth.tolist(), abs=0.08 * scale)
        assert answer["imputed"]["b"]["best"] == pytest.approx(truth.tolist(), abs=0.08 * scale)
    joint = torch.cat((decoder.weight[:, :2] + decoder.weight[:, 2:] @ SLOPE, SPREAD * decoder.weight[:, 2:]), dim=1)
    nothing = together[3]["imputed"]["b"]
    assert nothing["sd"] == pytest.approx(joint.square().sum(1).sqrt().tolist(), rel=0.15)
    assert len(predictor.answer([{}, {}], Request(operation="sample"))) == 2
