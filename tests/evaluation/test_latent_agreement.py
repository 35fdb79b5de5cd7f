"""Clusters of latents and distances of samples, against their closed forms."""

from dataclasses import replace

import pytest
import torch

from dmvae import Batch
from dmvae.evaluation.clustering import cluster_agreement
from dmvae.evaluation.frechet import classifier_features, frechet_distance
from dmvae.evaluation.latents import Latents
from dmvae.evaluation.metrics import fit_classifier


def latents(shift: float, labels: torch.Tensor) -> Latents:
    rows = len(labels)
    shared = torch.randn(rows, 3, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    shared[:, 0] += shift * labels
    return Latents(shared, {}, {"a": torch.ones(rows, dtype=torch.bool)}, labels)


def test_clusters_agree_with_labels_that_are_apart_and_not_with_labels_at_random() -> None:
    labels = torch.arange(600) % 3
    apart = cluster_agreement(latents(20.0, labels), latents(20.0, labels))
    assert apart == pytest.approx({"adjusted_rand_index": 1.0, "normalized_mutual_information": 1.0})
    mixed = cluster_agreement(latents(0.0, labels), latents(0.0, labels))
    assert all(abs(value) < 0.05 for value in mixed.values())


def test_rows_without_a_label_do_not_count_in_clusters() -> None:
    labels = torch.arange(300) % 3
    some = torch.where(torch.arange(300) < 200, labels, -1)
    test = latents(20.0, labels)
    test.shared[200:] = 0
    assert cluster_agreement(latents(20.0, labels), replace(test, labels=some))["adjusted_rand_index"] == 1
    with pytest.raises(ValueError, match="Cannot compare clusters with labels"):
        cluster_agreement(replace(test, labels=None), test)


def test_frechet_distance_is_that_of_the_gaussians() -> None:
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(2000, 4, generator=generator, dtype=torch.float64)
    x = (x - x.mean(0)) @ torch.linalg.inv(torch.linalg.cholesky(x.T.cov())).T  # covariance I
    scale, shift = torch.tensor([1.0, 2.0, 3.0, 0.5], dtype=torch.float64), torch.arange(4.0, dtype=torch.float64)
    expected = float(((scale - 1).square() + shift.square()).sum())
    assert frechet_distance(x, x * scale + shift) == pytest.approx(expected)
    assert frechet_distance(x * scale + shift, x) == pytest.approx(expected)
    assert frechet_distance(x, x) == pytest.approx(0, abs=1e-9)


def test_features_are_the_margins_between_each_two_classes() -> None:
    labels = torch.arange(120) % 4
    values = torch.randn(120, 2, 3, generator=torch.Generator().manual_seed(0)) + labels[:, None, None]
    classifier = fit_classifier(Batch({"a": values}, labels=labels), "a")
    features = classifier_features(classifier, values)
    assert features.shape == (120, 6)
    predicted = torch.from_numpy(classifier.predict(values.flatten(1).double().numpy()))
    # the margin of the first two classes decides between them
    both = predicted <= 1
    assert bool(((features[both, 0] > 0) == (predicted[both] == 0)).double().mean() > 0.95)
