"""A fitted density is the density of its points, and takes the prior's place where it is given."""

from pathlib import Path

import pytest
import torch

from dmvae import DMVAE, Batch
from dmvae.distributions.gaussian_mixture import FittedPrior, GaussianMixture
from dmvae.evaluation.latents import collect, fit_density, probe_labels
from tests.linear_gaussian import linear_model, sample_rows

SHAPES = {"a": (4,), "b": (3,)}


def mixture() -> GaussianMixture:
    means = torch.tensor([[-3.0, 0.0, 1.0], [3.0, 1.0, -1.0]], dtype=torch.float64)
    root = torch.randn(2, 3, 3, dtype=torch.float64)
    weights = torch.tensor([0.3, 0.7], dtype=torch.float64)
    return GaussianMixture(weights, means, root @ root.mT + torch.eye(3))


@pytest.fixture(scope="module")
def model() -> DMVAE:
    return linear_model(SHAPES)


@pytest.fixture(scope="module")
def density(model: DMVAE) -> FittedPrior:
    return fit_density(model, sample_rows(model, 400, missing=0.3), num_components=3)


def test_a_fit_recovers_the_mixture_that_drew_its_points() -> None:
    truth = mixture()
    points = truth.sample(4000)
    fit = GaussianMixture.fit(points, 2)
    torch.testing.assert_close(fit.weights.sort().values, truth.weights, atol=0.03, rtol=0)
    fresh = truth.sample(2000)
    assert abs(float((truth.log_density(fresh) - fit.log_density(fresh)).mean())) < 0.02


def test_the_conditional_is_the_joint_over_the_marginal() -> None:
    truth = mixture()
    given = torch.tensor([[0.5]], dtype=torch.float64)
    grid = torch.cartesian_prod(*[torch.linspace(-12, 12, 161, dtype=torch.float64)] * 2)
    log_joint = truth.log_density(torch.cat((given.expand(len(grid), 1), grid), dim=1))
    mean = log_joint.softmax(0) @ grid
    torch.testing.assert_close(truth.mean_given(given)[0], mean, atol=1e-4, rtol=0)
    drawn = truth.sample_given(given.expand(20000, 1))
    torch.testing.assert_close(drawn.mean(0), mean, atol=0.1, rtol=0)


def test_a_saved_density_is_the_same_and_holds_no_pickle(density: FittedPrior, tmp_path: Path) -> None:
    density.save(tmp_path)
    loaded = FittedPrior.load(tmp_path)
    mine, theirs = (part.sample(5, torch.Generator().manual_seed(1)) for part in (density, loaded))
    assert torch.equal(mine[0], theirs[0])
    assert all(torch.equal(mine[1][name], theirs[1][name]) for name in SHAPES)
    with pytest.raises(FileNotFoundError, match=r"has no density\.safetensors"):
        FittedPrior.load(tmp_path / "absent")


def test_prediction_takes_from_the_density_only_what_is_not_given(model: DMVAE, density: FittedPrior) -> None:
    rows = sample_rows(model, 30)
    half = Batch(rows.data, {"a": torch.arange(30) < 20, "b": torch.zeros(30, dtype=torch.bool)})
    plain = model.encode(half, generator=torch.Generator().manual_seed(2))
    fitted = model.encode(half, generator=torch.Generator().manual_seed(2), density=density)
    assert torch.equal(plain.z[:20], fitted.z[:20])
    assert torch.equal(plain.modalities_z["a"][:20], fitted.modalities_z["a"][:20])
    assert not torch.equal(plain.z[20:], fitted.z[20:])
    assert not torch.equal(plain.modalities_z["b"], fitted.modalities_z["b"])
    means = model.encode(half, return_mean=True, density=density)
    torch.testing.assert_close(means.modalities_z["b"], density.private("b", means.z, return_mean=True))
    assert model.predict(half, N=3, density=density).b.shape == (3, 30, 3)


def test_the_prior_gives_way_to_the_density(model: DMVAE) -> None:
    far = GaussianMixture(torch.ones(1).double(), torch.full((1, 2), 50.0).double(), torch.eye(2).double()[None])
    joint = GaussianMixture(torch.ones(1).double(), torch.full((1, 3), 50.0).double(), torch.eye(3).double()[None])
    drawn = model.generate_from_prior(4, density=FittedPrior(far, dict.fromkeys(SHAPES, joint)))
    assert bool((drawn.z > 30).all())
    assert all(bool((z > 30).all()) for z in drawn.modalities_z.values())


def test_a_probe_reads_labels_off_the_block_that_holds_them(model: DMVAE) -> None:
    train, test = (sample_rows(model, 300, seed=seed) for seed in (1, 2))
    parts = []
    for rows in (train, test):
        labels = (model.encode(rows, return_mean=True).z[:, 0] > 0).long()
        parts.append(collect(model, Batch(rows.data, labels=labels), return_mean=True))
    shares = probe_labels(*parts)
    assert shares["shared"].rate > 0.9
    assert max(shares["a"].rate, shares["b"].rate) < 0.8
    with pytest.raises(ValueError, match="the rows have no labels"):
        probe_labels(collect(model, train), collect(model, test))
