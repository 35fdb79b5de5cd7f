"""The reference that the NLL's estimators are held against is itself held against the closed form."""

import pytest
import torch

from dmvae import Batch
from tests.annealed import Tuning, annealed_log_prob, first_schedule
from tests.linear_gaussian import exact_log_prob, linear_model, sample_rows

pytestmark = pytest.mark.slow


def test_annealing_is_the_closed_form_within_its_error() -> None:
    model = linear_model({"a": (3,), "b": (2, 3)}, private_dims={"a": 1, "b": 2}, scales=0.4)
    batch = sample_rows(model, 40, missing=0.3)
    reference = annealed_log_prob(model, batch, temperatures=80, chains=32)
    error = reference.log_prob - exact_log_prob(model, batch)
    assert reference.accepted > 0.6
    assert float(reference.se.max()) < 0.5
    assert float((error.abs() <= 3 * reference.se).double().mean()) >= 0.95
    # the mean of p^ / p is 1
    assert abs(float(error.exp().mean()) - 1) < 4 * float(reference.se.square().sum().sqrt()) / len(batch)


def test_more_temperatures_leave_less_error_and_nothing_observed_is_certain() -> None:
    model = linear_model({"a": (3,), "b": (4,)}, scales=0.3)
    batch = sample_rows(model, 6)
    few, many = (annealed_log_prob(model, batch, temperatures=num, chains=16).se.mean() for num in (10, 100))
    assert float(many) < 0.5 * float(few)
    nothing = Batch(batch.data, {name: torch.zeros(6, dtype=torch.bool) for name in batch.data})
    assert torch.equal(annealed_log_prob(model, nothing, 10, 4).log_prob, torch.zeros(6, dtype=torch.float64))


def test_temperatures_go_from_the_prior_to_the_posterior() -> None:
    betas = first_schedule(50, 2)
    assert betas[0, 0] > 0
    assert bool((betas[-1] == 1).all())
    assert bool((betas.diff(dim=0) > 0).all())
    spread = torch.linspace(10, 1, 50, dtype=torch.float64).unsqueeze(1).repeat(1, 2)
    tuning = Tuning(betas, torch.ones(50, 2), torch.ones(50, 2, 1, 1), spread)
    finer = tuning.schedule(200)
    assert bool((finer[-1] == 1).all())
    assert bool((finer.diff(dim=0) > 0).all())
