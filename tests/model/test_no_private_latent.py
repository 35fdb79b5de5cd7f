"""A modality without a private latent: whatever a model does with others it does with this one."""

import math
from pathlib import Path

import pytest
import torch

from dmvae import DMVAE, Batch
from dmvae.evaluation.elbo import negative_elbo
from dmvae.evaluation.latents import collect, fit_density, probe_labels
from tests.linear_gaussian import exact_log_prob, linear_model, sample_rows

SHAPES = {"a": (3,), "b": (2,), "c": (4,)}
DIMS = [{"a": 0, "b": 2, "c": 0}, {"a": 0, "b": 0, "c": 0}]


def make(dims: dict[str, int]) -> tuple[DMVAE, Batch]:
    model = linear_model(SHAPES, 2, dims)
    return model, sample_rows(model, 30, missing=0.3)


@pytest.mark.parametrize("dims", DIMS, ids=["some", "all"])
def test_latents_have_no_dimension_and_decode(dims: dict[str, int]) -> None:
    model, batch = make(dims)
    encoded = model.encode(batch, N=3)
    assert {name: z.shape for name, z in encoded.modalities_z.items()} == {n: (3, 30, dim) for n, dim in dims.items()}
    assert model.decode(encoded)["a"].shape == (3, 30, 3)
    assert model.predict(batch, "b", "a", return_mean=True)["a"].shape == (30, 3)
    assert model.generate_from_prior(4).modalities_z["a"].shape == (4, 0)


@pytest.mark.parametrize("proposal", ["encoder", "refined"])
@pytest.mark.parametrize("dims", DIMS, ids=["some", "all"])
@pytest.mark.slow
def test_the_nll_is_the_exact_evidence(dims: dict[str, int], proposal: str) -> None:
    model, batch = make(dims)
    estimate = model.joint_nll(batch, 3000, proposal=proposal)
    exact = -exact_log_prob(model, batch)
    tolerance = 5 * float(estimate.se.max()) + 1e-6
    torch.testing.assert_close(estimate.nll, exact, atol=max(tolerance, 0.05), rtol=0)
    assert bool((negative_elbo(model, batch, 200) > exact - 0.5).all())
    assert math.isfinite(float(model.compute_cond_nll(batch, "b", "a", K=300)["a"]))


@pytest.mark.parametrize("dims", DIMS, ids=["some", "all"])
def test_a_fitted_prior_and_probes_do_without_it(dims: dict[str, int], tmp_path: Path) -> None:
    model, _ = make(dims)
    batch = sample_rows(model, 200, missing=0.3)
    fitted = fit_density(model, batch, 3)
    fitted.save(tmp_path)
    again = type(fitted).load(tmp_path)
    assert model.generate_from_prior(4, density=again).modalities_z["a"].shape == (4, 0)
    assert bool(model.predict(batch, "b", "a", density=again)["a"].isfinite().all())
    labelled = Batch(batch.data, batch.masks, labels=torch.arange(200) % 3)
    latents = collect(model, labelled, True)
    assert probe_labels(latents, latents).keys() == {"shared", *(name for name, dim in dims.items() if dim)}


def test_it_is_saved_and_loaded(tmp_path: Path) -> None:
    model, batch = make(DIMS[0])
    model.save(tmp_path)
    again = DMVAE.load(tmp_path)
    torch.testing.assert_close(again(batch).metrics["kl_shared/joint"], model(batch).metrics["kl_shared/joint"])
