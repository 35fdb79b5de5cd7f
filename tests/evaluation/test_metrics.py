import math
import sys
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch

from dmvae import DMVAE, Batch
from dmvae.evaluation.metrics import (
    Proportion,
    classifier_accuracy,
    conditional_coherence,
    fit_classifier,
    posterior_mean_sums,
)
from dmvae.model.encoding import ACTIVE_VARIANCE
from tests.linear_gaussian import linear_model, sample_rows

SHAPES = {"a": (2, 2), "b": (3,)}


class Sign:
    """Tells rows whose first value is positive."""

    def predict(self, values: Any, /) -> Any:
        return (values[:, 0] > 0).astype(np.int64)


@pytest.fixture
def model() -> DMVAE:
    return linear_model(SHAPES)


def labelled(model: DMVAE, rows: int = 120, missing: float = 0.3) -> Batch:
    batch = sample_rows(model, rows, missing=missing)
    return replace(batch, labels=torch.arange(rows) % 3 - 1, ids=torch.arange(rows) + 7)


def test_coherence_of_means_is_the_share_of_predictions_with_the_row_s_class(model: DMVAE) -> None:
    batch = labelled(model)
    assert batch.masks is not None
    assert batch.labels is not None
    predicted = model.predict(batch, "b", "a", return_mean=True).a
    hits = (predicted[:, 0, 0] > 0).long() == batch.labels
    counted = batch.masks["b"] & (batch.labels >= 0)
    share = conditional_coherence(model, batch, Sign(), "b", "a", return_mean=True)
    assert share == Proportion(int((hits & counted).sum()), int(counted.sum()))
    assert 0 < share.hits < share.rows


def test_coherence_of_draws_has_the_rate_of_predict(model: DMVAE) -> None:
    batch = labelled(model, missing=0.0)
    assert batch.labels is not None
    counted = batch.labels >= 0
    draws = model.predict(batch, "b", "a", N=2000).a
    rate = ((draws[:, :, 0, 0] > 0).long() == batch.labels)[:, counted].double().mean()
    shares = sum((conditional_coherence(model, batch, Sign(), "b", "a", seed=seed) for seed in range(50)), Proportion())
    assert abs(shares.rate - float(rate)) < 4 * shares.se


def test_coherence_adds_over_batches_and_depends_on_seed_and_ids_alone(model: DMVAE) -> None:
    batch = labelled(model)
    parts = [batch[:50], batch[50:51], batch[51:]]
    for return_mean in (False, True):
        one_by_one = (conditional_coherence(model, part, Sign(), "b", "a", return_mean) for part in parts)
        assert conditional_coherence(model, parts, Sign(), "b", "a", return_mean) == sum(one_by_one, Proportion())
    torch.manual_seed(5)
    again = conditional_coherence(model, batch, Sign(), "b", "a", seed=1)
    assert conditional_coherence(model, batch, Sign(), "b", "a", seed=1) == again
    assert len({conditional_coherence(model, batch, Sign(), "b", "a", seed=seed).hits for seed in range(8)}) > 1


def test_coherence_reads_the_given_modality_only(model: DMVAE) -> None:
    batch = labelled(model)
    without = replace(batch, data={"b": batch.data["b"]}, masks={"b": batch.masks["b"]})  # type: ignore[index]
    assert conditional_coherence(model, without, Sign(), "b", "a") == conditional_coherence(
        model, batch, Sign(), "b", "a"
    )
    assert conditional_coherence(model, without, Sign(), "a", "b") == Proportion(0, 0)


def test_coherence_refuses_rows_without_labels_and_unknown_modalities(model: DMVAE) -> None:
    batch = labelled(model)
    with pytest.raises(ValueError, match="the batch has no labels"):
        conditional_coherence(model, replace(batch, labels=None), Sign(), "b", "a")
    with pytest.raises(ValueError, match="Available: "):
        conditional_coherence(model, batch, Sign(), "b", "x")


def test_a_share_without_rows_is_nan_and_adds_nothing() -> None:
    assert math.isnan(Proportion().rate)
    assert math.isnan(Proportion().se)
    share = Proportion(1, 4) + Proportion()
    assert (share.rate, share.se) == (0.25, math.sqrt(0.25 * 0.75 / 4))


def test_a_classifier_learns_the_observed_labelled_rows() -> None:
    x = torch.randn(600, 1, 2, 2)
    labels = (x[:, 0, 0, 0] > 0).long()
    mask = torch.rand(600) < 0.7
    values = torch.where(mask[:, None, None, None], x, math.nan)
    labels[::10] = -1
    batch = Batch({"a": values}, {"a": mask}, labels)
    parts = [batch[:300], batch[300:]]
    classifier = fit_classifier(parts, "a")
    accuracy = classifier_accuracy(classifier, parts, "a")
    assert accuracy.rows == int((mask & (labels >= 0)).sum())
    assert accuracy.rate > 0.95
    assert accuracy == classifier_accuracy(classifier, batch, "a")
    assert classifier_accuracy(classifier, batch, "b") == Proportion(0, 0)


def test_repeated_rows_change_no_classifier() -> None:
    x, labels = torch.randn(60, 3), torch.arange(60) % 2
    once, twice = Batch({"a": x}, labels=labels), Batch({"a": x.repeat(2, 1)}, labels=labels.repeat(2))
    probe = np.random.default_rng(0).normal(size=(200, 3))
    assert (fit_classifier(once, "a").predict(probe) == fit_classifier(twice, "a").predict(probe)).all()


def test_a_classifier_needs_two_classes() -> None:
    batch = Batch({"a": torch.randn(5, 2)}, labels=torch.full((5,), 3))
    with pytest.raises(ValueError, match=r"of 'a': expected at least two classes, got labels \[3.0\]"):
        fit_classifier(batch, "a")


def test_without_scikit_learn_the_message_names_the_extra(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "sklearn.svm", None)
    with pytest.raises(ImportError, match=r"pip install 'dmvae\[demo\]'"):
        fit_classifier(Batch({"a": torch.randn(4, 2)}, labels=torch.arange(4)), "a")


def test_variance_of_posterior_means_is_the_direct_one_and_adds_over_batches(model: DMVAE) -> None:
    batch = sample_rows(model, 90, missing=0.4)
    assert batch.masks is not None
    sums = posterior_mean_sums(model, [batch[:40], batch[40:]])
    encoded = model.encode(batch, return_mean=True)
    means = {"shared": encoded.z, **encoded.modalities_z}
    present = {**batch.masks, "shared": batch.masks["a"] | batch.masks["b"]}
    assert set(sums) == {"shared", "a", "b"}
    for block, mean in means.items():
        chosen = mean[present[block]]
        assert sums[block].rows == len(chosen)
        torch.testing.assert_close(sums[block].variance, chosen.var(0, correction=0))
        assert sums[block].num_active == int((chosen.var(0, correction=0) > ACTIVE_VARIANCE).sum())


def test_a_unit_that_the_encoders_leave_at_the_prior_is_not_active(model: DMVAE) -> None:
    batch = sample_rows(model, 200)
    before = posterior_mean_sums(model, batch)
    with torch.no_grad():
        for encoder in model.encoders.values():
            weight, bias = dict(encoder.named_parameters()).values()
            weight[0], bias[0] = 0.0, 0.0  # of the shared mean's first unit
    after = posterior_mean_sums(model, batch)
    assert before["shared"].num_active == 2
    assert after["shared"].num_active == 1
    assert float(after["shared"].variance[0]) == 0.0


def test_no_rows_have_no_active_units(model: DMVAE) -> None:
    assert {block: sums.num_active for block, sums in posterior_mean_sums(model, []).items()} == {
        "shared": 0, "a": 0, "b": 0,
    }  # fmt: skip
