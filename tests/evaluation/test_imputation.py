"""Held-out values: errors and intervals against the closed form, and baselines that are what they say."""

import math
from dataclasses import replace

import numpy as np
import pytest
import torch

from dmvae import DMVAE, Batch
from dmvae.evaluation.elbo import negative_elbo
from dmvae.evaluation.imputation import Errors, baseline_errors, held_out_errors
from dmvae.evaluation.masking import mask_modalities, remove
from tests.linear_gaussian import exact_log_prob, linear_model, sample_rows


class Recall:
    """Gives known values of rows, which it tells by their ids."""

    def __init__(self, rows: Batch, values: torch.Tensor) -> None:
        self.values = dict(zip(rows.ids.tolist(), values, strict=True))  # type: ignore[union-attr]

    def __call__(self, part: Batch) -> torch.Tensor:
        return torch.stack([self.values[number] for number in part.ids.tolist()])  # type: ignore[union-attr]


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
    with pytest.raises(ValueError, match="Unknown modality 'x'"):
        held_out_errors(model, rows, "x")


def test_errors_of_two_predictions_are_paired_by_row(model: DMVAE) -> None:
    rows = replace(sample_rows(model, 400, missing=0.2), ids=torch.arange(400))
    truth = rows.data["a"]
    assert rows.masks is not None
    noise = torch.randn(400, 4, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    # both are wrong by the same noise, the second by a hundredth more
    errors = [
        baseline_errors(lambda part, name, s=s: Recall(rows, truth + s * noise)(part), rows, "a") for s in (1, 1.01)
    ]
    difference, se = errors[1].minus(errors[0])
    assert difference == pytest.approx(0.01 * errors[0].rmse)
    assert se < 0.1 * difference
    swapped, same = errors[0].minus(errors[1])
    assert (swapped, same) == pytest.approx((-difference, se))


def test_the_standard_error_of_a_difference_is_its_spread_over_samples_of_rows() -> None:
    rng = np.random.default_rng(0)

    def difference() -> tuple[float, float]:
        first, second = rng.gamma(2.0, size=(2, 200))
        return Errors(600, first).minus(Errors(600, 1.5 * second))

    drawn = np.array([difference() for _ in range(500)])
    assert drawn[:, 1].mean() == pytest.approx(drawn[:, 0].std(), rel=0.1)


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
    with pytest.raises(ValueError, match=r"rate must lie in .*, but got 2"):
        remove(rows, 2)
    with pytest.raises(ValueError, match="labelled rows"):
        remove(Batch(rows.data), 0.5, "label", 10)


def test_the_negative_bound_is_above_the_exact_nll_and_belongs_to_the_row(model: DMVAE) -> None:
    rows = replace(sample_rows(model, 60, missing=0.3), ids=torch.arange(60))
    bound = negative_elbo(model, rows, 500)
    assert bool((bound + exact_log_prob(model, rows) > -0.3).all())
    assert float((bound + exact_log_prob(model, rows)).mean()) > 0
    torch.testing.assert_close(negative_elbo(model, rows[7:9], 500), bound[7:9])
