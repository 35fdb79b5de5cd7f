"""Held-out values: errors and intervals against the closed form, and rivals that are what they say."""

import math
from dataclasses import replace

import pytest
import torch

from dmvae import DMVAE, Batch
from dmvae.evaluation.baselines import ProbabilisticPCA
from dmvae.evaluation.elbo import negative_elbo
from dmvae.evaluation.imputation import Ridge, held_out_errors, rival_errors, rivals
from dmvae.evaluation.masking import mask_modalities, remove
from tests.linear_gaussian import exact_log_prob, linear_model, sample_rows

SHAPES = {"a": (4,), "b": (2, 2), "c": (3,)}


@pytest.fixture(scope="module")
def model() -> DMVAE:
    return linear_model(SHAPES)


def test_the_interval_of_the_true_model_covers_what_it_says() -> None:
    model = linear_model({"a": (4,), "b": (3,)})
    rows = sample_rows(model, 1500)
    # nothing else is left, so that draws come from the prior, which is exact
    errors = held_out_errors(model, rows, "a", num_draws=99, hide=lambda batch: mask_modalities(batch, "b"))
    assert errors.rows == 1500
    assert errors.values == 6000
    for share, inside in zip((0.5, 0.9), errors.coverage, strict=True):
        assert abs(inside - share) < 0.03
    total = float(rows.data["a"].std(0, correction=0).square().mean().sqrt())
    assert abs(errors.rmse - total) < 0.05


def test_errors_add_and_never_read_the_target(model: DMVAE) -> None:
    rows = replace(sample_rows(model, 90, missing=0.3), ids=torch.arange(90))
    parts = [rows[:40], rows[40:]]
    whole = held_out_errors(model, parts[0], "b", 10) + held_out_errors(model, parts[1], "b", 10)
    again = held_out_errors(model, parts, "b", 10)
    assert (again.rows, again.values) == (whole.rows, whole.values)
    assert math.isclose(again.squares, whole.squares)
    assert rows.masks is not None
    assert again.rows == int(rows.masks["b"].sum())
    with pytest.raises(ValueError, match="got 'x'"):
        held_out_errors(model, rows, "x")


def test_rivals_rank_as_their_information_does(model: DMVAE) -> None:
    train, test = sample_rows(model, 1500, seed=1, missing=0.3), sample_rows(model, 400, seed=2)
    errors = {name: rival_errors(rival, test, "a").rmse for name, rival in rivals(train, 5).items()}
    assert errors["pca"] < errors["mean"]
    assert errors["ridge"] < 0.95 * errors["mean"]


def test_pca_predicts_the_conditional_mean(model: DMVAE) -> None:
    rows = sample_rows(model, 500, missing=0.3)
    pca = ProbabilisticPCA.fit(rows, 4)
    covariance = pca.weight @ pca.weight.T + pca.noise_variance * torch.eye(11, dtype=torch.float64)
    own = torch.arange(4)
    rest = torch.arange(4, 11)
    test = sample_rows(model, 5, seed=3)
    x = torch.cat([test.data["b"].flatten(1), test.data["c"]], dim=1)
    gain = covariance[own][:, rest] @ torch.linalg.inv(covariance[rest][:, rest])
    torch.testing.assert_close(pca.predict(test, "a"), pca.mean[own] + (x - pca.mean[rest]) @ gain.T)
    alone = mask_modalities(test, "b", "c")
    torch.testing.assert_close(pca.predict(alone, "a"), pca.mean[own].expand(5, -1))


def test_ridge_fits_what_each_row_has_and_falls_back_on_the_mean(model: DMVAE) -> None:
    train = sample_rows(model, 300, missing=0.3)
    ridge = Ridge(train)
    assert train.masks is not None
    mean = train.data["a"][train.masks["a"]].mean(0)
    nothing = mask_modalities(sample_rows(model, 3), "b", "c")
    torch.testing.assert_close(ridge(nothing, "a"), mean.expand(3, -1))
    assert ridge(sample_rows(model, 3), "a").shape == (3, 4)


def test_removal_has_its_rate_grows_and_belongs_to_the_row(model: DMVAE) -> None:
    rows = replace(sample_rows(model, 4000), labels=torch.arange(4000) % 10, ids=torch.arange(4000))
    for how in ("random", "label"):
        before = torch.ones(4000, dtype=torch.bool)
        for rate in (0.0, 0.25, 0.5, 0.75, 1.0):
            kept = remove(rows, rate, how, 10)
            assert kept.masks is not None
            assert abs(1 - float(kept.masks["a"].double().mean()) - rate) < 0.03
            assert not bool((kept.masks["a"] & ~before).any())
            before = kept.masks["a"]
            part = remove(rows[100:110], rate, how, 10)
            assert part.masks is not None
            assert torch.equal(part.masks["a"], kept.masks["a"][100:110])
    by_label = remove(rows, 0.5, "label", 10)
    assert by_label.masks is not None
    assert rows.labels is not None
    assert bool(by_label.masks["a"][rows.labels == 0].all())
    assert not bool(by_label.masks["a"][rows.labels == 9].any())
    with pytest.raises(ValueError, match="rate=2"):
        remove(rows, 2)
    with pytest.raises(ValueError, match="labelled rows"):
        remove(Batch(rows.data), 0.5, "label", 10)


def test_the_negative_bound_is_above_the_exact_nll_and_belongs_to_the_row(model: DMVAE) -> None:
    rows = replace(sample_rows(model, 60, missing=0.3), ids=torch.arange(60))
    bound = negative_elbo(model, rows, 500)
    assert bool((bound + exact_log_prob(model, rows) > -0.3).all())
    assert float((bound + exact_log_prob(model, rows)).mean()) > 0
    torch.testing.assert_close(negative_elbo(model, rows[7:9], 500), bound[7:9])
