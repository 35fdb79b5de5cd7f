"""Values that an independent implementation computed in float64 for fixed weights; conventions in the file's `meta`."""

import itertools
import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from dmvae import DMVAE, Batch, DMVAEConfig
from dmvae.model.loss import Noise
from dmvae.model.outputs import DMVAEOutput
from tests.linear_gaussian import exact_log_prob, linear_layer

GOLDEN: dict[str, Any] = json.loads((Path(__file__).parent / "golden" / "dmvae_golden.json").read_text())
SHAPES = {name: tuple(shape) for name, shape in GOLDEN["meta"]["shapes"].items()}
PRIVATE, ROWS = GOLDEN["meta"]["P"], GOLDEN["meta"]["N"]
SOURCES = ("joint", *SHAPES)
CASES = {f"{case['config']}-{case['mask']}-{case['noise']}": case for case in GOLDEN["cases"]}


def close(actual: Tensor, expected: Any) -> None:
    torch.testing.assert_close(actual.detach(), torch.tensor(expected, dtype=torch.float64), rtol=1e-9, atol=1e-9)


def golden_model(config: str) -> DMVAE:
    model = DMVAE(
        DMVAEConfig(
            n_modalities=3,
            latent_dim=GOLDEN["meta"]["L"],
            input_dims=SHAPES,
            modalities_specific_dim=PRIVATE,
            architectures={name: {"hidden_dims": ()} for name in SHAPES},
            **GOLDEN["configs"][config],
        )
    ).double()
    for key, parameter in parameters(model).items():
        kind, name, _, part = key.split(".")
        stored = GOLDEN["weights"][name][f"{kind[:3]}_{part[0]}"]
        parameter.data = torch.tensor(stored, dtype=torch.float64)
    return model


def parameters(model: DMVAE) -> dict[str, Tensor]:
    """Parameters under the golden file's names, as `encoders.a.f.weight`."""
    linear = {f"encoders.{name}": linear_layer(model.encoders[name]) for name in SHAPES}
    linear |= {f"decoders.{name}": linear_layer(model.decoders[name]) for name in SHAPES}
    return {f"{key}.f.{part}": getattr(layer, part) for key, layer in linear.items() for part in ("weight", "bias")}


def golden_noise(kind: str) -> Noise:
    dims = {"": GOLDEN["meta"]["L"], **PRIVATE}
    samples: dict[str, list[Tensor]] = {name: [] for name in dims}
    for k, (_, name) in enumerate(itertools.product(SOURCES, dims)):
        rows = torch.arange(ROWS, dtype=torch.float64)[:, None]
        columns = torch.arange(dims[name], dtype=torch.float64)
        samples[name].append(torch.sin(2.1 * k + 0.7 * rows + 1.3 * columns) * (kind == "noise"))
    stacked = {name: torch.stack(parts) for name, parts in samples.items()}
    return Noise(shared=stacked.pop(""), private=stacked)


def golden_batch(mask: str, columns: bool = False, dtype: torch.dtype = torch.bool, missing: float = math.nan) -> Batch:
    data = {name: torch.tensor(GOLDEN["x"][name], dtype=torch.float64).view(ROWS, *SHAPES[name]) for name in SHAPES}
    if GOLDEN["masks"][mask] is None:
        return Batch(data)
    masks = {name: torch.tensor(has) for name, has in GOLDEN["masks"][mask].items()}
    for name in SHAPES:
        data[name][masks[name] == 0] = missing
    return Batch(data, {m: (has[:, None] if columns else has).to(dtype) for m, has in masks.items()})


def present_rows(case: dict[str, Any]) -> Tensor:
    mask = GOLDEN["masks"][case["mask"]]
    return torch.ones(ROWS, len(SHAPES)).bool() if mask is None else torch.tensor([*mask.values()]).T.bool()


def run(case: dict[str, Any], **how: Any) -> tuple[DMVAE, DMVAEOutput]:
    model = golden_model(case["config"])
    return model, model(golden_batch(case["mask"], **how), golden_noise(case["noise"]))


@pytest.mark.parametrize("name", CASES)
def test_loss_and_metrics_are_the_reference_values(name: str) -> None:
    case = CASES[name]
    model, out = run(case)
    close(out.loss, case["loss"])
    for source in SOURCES:
        close(out.metrics[source], case["metrics"][source])
    assert model.config.reconstruction_weights == case["rescale"]


@pytest.mark.parametrize("name", CASES)
def test_the_loss_of_each_row_is_the_sum_of_the_reference_bounds_that_it_has(name: str) -> None:
    case = CASES[name]
    _, out = run(case)
    bounds = torch.tensor([case["neg_elbo_rows"][source] for source in SOURCES[1:]], dtype=torch.float64).T
    joint = torch.tensor(case["neg_elbo_rows"]["joint"], dtype=torch.float64)
    close(out.row_loss, (joint + (bounds * present_rows(case)).sum(1)).tolist())


@pytest.mark.parametrize("name", [name for name, case in CASES.items() if "grad" in case])
def test_gradients_are_the_reference_values(name: str) -> None:
    case = CASES[name]
    model, out = run(case)
    out.loss.backward()
    ours = parameters(model)
    assert ours.keys() == case["grad"].keys()
    for key, expected in case["grad"].items():
        close(ours[key].grad.flatten(), expected)


@pytest.mark.parametrize("name", [name for name, case in CASES.items() if "kl_shared_rows" in case])
def test_posteriors_and_their_divergences_are_the_reference_values(name: str) -> None:
    case = CASES[name]
    model = golden_model(case["config"])
    batch, present = golden_batch(case["mask"]), present_rows(case)
    shared, private = model.posteriors(batch)
    close(shared.mean, case["joint_mu"])
    close(shared.log_var, case["joint_logvar"])
    close(shared.kl_from_prior(), case["kl_shared_rows"]["joint"])
    observed = model.observe(batch)
    for column, m in enumerate(SHAPES):
        rows = present[:, column]
        expected_shared = torch.tensor(case["kl_shared_rows"][m], dtype=torch.float64)[rows]
        expected_private = torch.tensor(case["kl_private_rows"][m], dtype=torch.float64)[rows]
        close(observed[m].shared.kl_from_prior(), expected_shared.tolist())
        close(private[m].kl_from_prior()[rows], expected_private.tolist())


@pytest.mark.parametrize("name", [name for name, case in CASES.items() if "logp_rows_joint" in case])
def test_log_likelihoods_under_the_joint_posterior_are_the_reference_values(name: str) -> None:
    case = CASES[name]
    model = golden_model(case["config"])
    batch, present = golden_batch(case["mask"]), present_rows(case)
    outputs = model.predict(batch, return_mean=True)
    for column, m in enumerate(SHAPES):
        rows = present[:, column]
        expected = torch.tensor(case["logp_rows_joint"][m], dtype=torch.float64)[rows]
        close(model.likelihoods[m].log_prob(outputs[m][rows], batch.data[m][rows]), expected.tolist())


@pytest.mark.parametrize("name", [name for name, case in CASES.items() if "encode_mean" in case])
def test_encoded_and_predicted_means_are_the_reference_values(name: str) -> None:
    case = CASES[name]
    model, batch = golden_model(case["config"]), golden_batch(case["mask"])
    for subset, expected in case["encode_mean"].items():
        out = model.encode(batch, subset.split("+"), return_mean=True)
        close(out.z, expected["z"])
        for m in SHAPES:
            close(out.modalities_z[m], expected[f"w_{m}"])
    predicted = model.predict(batch, ["a"], return_mean=True)
    for m, means in case["predict_mean_from_a"].items():
        close(predicted[m].flatten(1), torch.tensor(means, dtype=torch.float64).flatten(1).tolist())


@pytest.mark.parametrize("name", [name for name, case in CASES.items() if "cond_nll_a_to_bc_mean" in case])
def test_the_plug_in_conditional_nll_is_the_reference_value(name: str) -> None:
    case = CASES[name]
    model, batch = golden_model(case["config"]), golden_batch(case["mask"])
    predicted = model.predict(batch, "a", ["b", "c"], return_mean=True)
    for m, expected in case["cond_nll_a_to_bc_mean"].items():
        close(-model.likelihoods[m].log_prob(predicted[m], batch.data[m]).mean(), expected)


@pytest.mark.parametrize("columns", [False, True])
@pytest.mark.parametrize("dtype", [torch.bool, torch.int64, torch.float32])
@pytest.mark.parametrize("missing", [0.0, math.nan, -math.inf])
def test_every_form_of_mask_and_missing_value_gives_the_reference_loss(
    columns: bool, dtype: torch.dtype, missing: float
) -> None:
    case = CASES["normal_scales_betas-mixed-noise"]
    _, out = run(case, columns=columns, dtype=dtype, missing=missing)
    close(out.loss, case["loss"])


@pytest.mark.parametrize("config", GOLDEN["exact_logp_rows"])
def test_the_closed_form_of_the_linear_model_is_the_reference_value(config: str) -> None:
    model = golden_model(config)
    for mask, expected in GOLDEN["exact_logp_rows"][config].items():
        close(exact_log_prob(model, golden_batch(mask)), expected)
