"""Baselines predict with what each row has, and are as good as their information allows."""

import pytest
import torch

from dmvae import DMVAE, Batch
from dmvae.evaluation import baselines
from dmvae.evaluation.baselines import CompletedRegression, Ridge, fit_baselines
from dmvae.evaluation.factor_analysis import FactorAnalysis
from dmvae.evaluation.imputation import baseline_errors
from dmvae.evaluation.masking import mask_modalities
from tests.linear_gaussian import linear_model, sample_rows

NAMES = {"mean", "ridge", "pca", "factor_analysis", "ridge_completed", "nearest_neighbours", "gradient_boosting"}


@pytest.fixture(scope="module")
def model() -> DMVAE:
    return linear_model({"a": (4,), "b": (2, 2), "c": (3,)})


def test_ridge_fits_what_each_row_has_and_falls_back_on_the_mean(model: DMVAE) -> None:
    train = sample_rows(model, 300, missing=0.3)
    ridge = Ridge(train)
    assert train.masks is not None
    mean = train.data["a"][train.masks["a"]].mean(0)
    nothing = mask_modalities(sample_rows(model, 3), "b", "c")
    torch.testing.assert_close(ridge(nothing, "a"), mean.expand(3, -1))
    assert ridge(sample_rows(model, 3), "a").shape == (3, 4)


def test_baselines_beat_the_mean_and_linear_ones_are_best_on_linear_data(model: DMVAE) -> None:
    train, test = sample_rows(model, 800, seed=1, missing=0.3), sample_rows(model, 300, seed=2)
    found, left_out = fit_baselines(train, 5, FactorAnalysis.fit(train, 3))
    assert found.keys() == NAMES
    assert not left_out
    errors = {name: baseline_errors(imputer, test, "a").rmse for name, imputer in found.items()}
    assert max(errors, key=lambda name: errors[name]) == "mean"
    linear = max(errors[name] for name in ("ridge", "factor_analysis", "ridge_completed"))
    assert linear < min(errors["nearest_neighbours"], errors["gradient_boosting"])


@pytest.mark.slow
def test_ridge_on_completed_rows_learns_where_no_two_rows_have_the_same_modalities_with_the_target() -> None:
    model = linear_model(dict.fromkeys("abcdef", (3,)), latent_dim=3)
    train, test = sample_rows(model, 400, seed=1, missing=0.75), sample_rows(model, 300, seed=2)
    found, _ = fit_baselines(train, 5, FactorAnalysis.fit(train, 4))
    errors = {name: baseline_errors(found[name], test, "a").rmse for name in ("mean", "ridge", "ridge_completed")}
    assert errors["ridge"] == pytest.approx(errors["mean"])  # hardly any row has all
    assert errors["ridge_completed"] < 0.9 * errors["mean"]


def test_predictions_never_read_the_target(model: DMVAE) -> None:
    train, test = sample_rows(model, 200, missing=0.3), sample_rows(model, 20, seed=2)
    found, _ = fit_baselines(train, 5, FactorAnalysis.fit(train, 3))
    garbage = Batch({**test.data, "a": torch.full_like(test.data["a"], 1e6)})
    for name in sorted(NAMES):
        torch.testing.assert_close(found[name](test, "a"), found[name](garbage, "a"), msg=name)
        torch.testing.assert_close(found[name](mask_modalities(test, "a"), "a"), found[name](test, "a"), msg=name)


def test_a_nearly_constant_input_does_not_spoil_completed_regressions() -> None:
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(300, 4, generator=generator, dtype=torch.float64)
    spike = torch.zeros(300, 1, dtype=torch.float64)
    spike[0] = 1e-9
    train = Batch({"a": x[:, :2] + x[:, 2:], "b": torch.cat((x[:, 2:], spike), dim=1)})
    test = Batch({"a": train.data["a"], "b": torch.cat((x[:, 2:], 0 * spike + 0.5), dim=1)})
    fit = CompletedRegression(train, FactorAnalysis.fit(train, 2), baselines._ridge)
    assert baseline_errors(fit, test, "a").rmse < 1.5


def test_gradient_boosting_that_would_take_too_long_is_left_out_with_a_reason(
    model: DMVAE, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(baselines, "BOOSTING_WORK", 1000)
    train = sample_rows(model, 100)
    found, left_out = fit_baselines(train, 5, FactorAnalysis.fit(train, 3))
    assert found.keys() == NAMES - {"gradient_boosting"}
    assert "must be at most 1,000, but are 2,800" in left_out["gradient_boosting"]


def test_integer_modalities_are_no_inputs_of_linear_models(model: DMVAE) -> None:
    train = sample_rows(model, 100)
    factors = FactorAnalysis.fit(train, 3)
    mixed = Batch({**train.data, "words": torch.ones(100, 2, dtype=torch.int64)})
    found, left_out = fit_baselines(mixed, 5, factors)
    assert left_out.keys() == {"pca"}
    torch.testing.assert_close(found["factor_analysis"](mixed, "a"), factors.predict(train, "a"))
    assert found["ridge_completed"](mixed, "a").shape == (100, 4)


def test_without_factor_analysis_the_baselines_on_completed_rows_are_left_out(model: DMVAE) -> None:
    found, left_out = fit_baselines(sample_rows(model, 100), 50, None)
    assert found.keys() == {"mean", "ridge"}
    assert left_out.keys() == NAMES - {"mean", "ridge"}
