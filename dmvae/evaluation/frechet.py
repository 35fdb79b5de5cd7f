"""Fréchet distance of samples to real rows in the features of a classifier of the real rows."""

import copy
from typing import Any

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

from dmvae.distributions.gaussian_mixture import FittedPrior
from dmvae.evaluation.metrics import Classifier
from dmvae.model.dmvae import DMVAE

Array = np.ndarray[Any, np.dtype[Any]]


def frechet_distance(first: Float[Tensor, "row feature"], second: Float[Tensor, "row_2 feature"]) -> float:
    """Return the squared Fréchet distance of the Gaussians that have the mean and covariance of two sets of rows.

        |m_1 - m_2|^2 + tr(C_1 + C_2 - 2 (C_1^1/2 C_2 C_1^1/2)^1/2)

    Source: Heusel et al. 2017, in the features of an Inception network.
    """
    means, covariances = zip(*((rows.double().mean(0), rows.double().T.cov()) for rows in (first, second)), strict=True)
    one, two = (covariance.reshape(len(mean), -1) for covariance, mean in zip(covariances, means, strict=True))
    values, vectors = torch.linalg.eigh(one)
    root = vectors * values.clamp(min=0).sqrt() @ vectors.T
    cross = torch.linalg.eigvalsh(root @ two @ root).clamp(min=0).sqrt().sum()
    return float((means[0] - means[1]).square().sum() + one.trace() + two.trace() - 2 * cross)


def classifier_features(classifier: Classifier, values: Float[Tensor, "row ..."]) -> Float[Tensor, "row feature"]:
    """Return the margins between each two classes that a support vector classifier sees in values."""
    pairwise: Any = copy.copy(classifier)
    pairwise.decision_function_shape = "ovo"
    margins = pairwise.decision_function(values.detach().flatten(1).cpu().double().numpy())
    return torch.from_numpy(margins.reshape(len(values), -1))


def sample_distance(
    model: DMVAE,
    name: str,
    classifier: Classifier,
    real: Float[Tensor, "row ..."],
    num_samples: int = 2000,
    seed: int = 0,
    density: FittedPrior | None = None,
) -> float:
    """Return the Fréchet distance of the means of samples of one modality to real values.

    Args:
        model: in any mode.
        name: the modality, floating-point.
        classifier: of it, from `metrics.fit_classifier`.
        real: its values.
        num_samples: from the prior, or a density in its place.
        seed: of the samples.
        density: of the latents.
    """
    generator = torch.Generator(model.device).manual_seed(seed)
    drawn = model.decode(model.generate_from_prior(num_samples, generator, density))
    shown = model.means(drawn[name], name)
    return frechet_distance(classifier_features(classifier, shown), classifier_features(classifier, real))
