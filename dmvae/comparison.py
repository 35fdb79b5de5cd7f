"""What a model's figures are worth: rivals judged on the same rows, and what predictions keep of the labels."""

import math
from collections.abc import Iterator

import numpy as np
import torch

from dmvae.baselines import ProbabilisticPCA
from dmvae.batch import Batch
from dmvae.data.loader import read_rows
from dmvae.data.split import Split
from dmvae.metrics import classifier_accuracy, conditional_coherence, fit_classifier
from dmvae.model import DMVAE

_BLOCK_ROWS = 1024


def compare_with_pca(model: DMVAE, train: Split, split: Split, nll: np.ndarray) -> dict[str, float]:
    """Fit probabilistic PCA with as many latent dimensions to the same training rows and pair it with `nll` by row.

    Args:
        model: whose latent dimensions, shared and private, PCA has.
        train: the rows that the model was trained on.
        split: the rows that `nll` is of, in their order.
        nll: per row, in nats.

    Returns:
        PCA's mean exact NLL in nats per row, how much higher it is than the model's, and that difference's standard
        error over rows; nothing where a modality is no float with a density under PCA.
    """
    if any(info.dtype == "int64" for info in train.manifest.modalities.values()):
        return {}
    latent_dim = model.config.latent_dim + sum(model.config.private_dims.values())
    pca = ProbabilisticPCA.fit(_blocks(train), latent_dim)
    theirs = -torch.cat([pca.log_prob(batch) for batch in _blocks(split)]).numpy()
    difference = theirs - nll
    return {
        "pca/nll": float(theirs.mean()),
        "pca/nll_minus_ours": float(difference.mean()),
        "pca/nll_minus_ours_se": float(difference.std(ddof=1) / math.sqrt(len(difference))),
    }


def coherence(model: DMVAE, train: Split, split: Split) -> dict[str, float]:
    """Count how often the prediction of one modality from another shows the row's label.

    A classifier per modality is fitted to the labelled training rows.

    Returns:
        `coherence/FROM/TO` for a draw, `coherence_mean/FROM/TO` for the posteriors' means, and each classifier's
        accuracy on real rows, the ceiling, as `classifier/M`; nothing for data without labels.
    """
    if train.labels() is None:
        return {}
    figures = {}
    classifiers = {name: fit_classifier(_blocks(train), name) for name in model.config.modalities}
    for target, classifier in classifiers.items():
        figures[f"classifier/{target}"] = classifier_accuracy(classifier, _blocks(split), target).rate
        for source in model.config.modalities:
            if source == target:
                continue
            for name, means in (("coherence", False), ("coherence_mean", True)):
                share = conditional_coherence(model, _blocks(split), classifier, source, target, return_mean=means)
                figures[f"{name}/{source}/{target}"] = share.rate
    return figures


def _blocks(split: Split) -> Iterator[Batch]:
    return (batch for _, batch in read_rows(split, _BLOCK_ROWS))
