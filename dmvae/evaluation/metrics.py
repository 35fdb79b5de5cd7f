"""Metrics as sums over rows: coherence of predictions, and active units of the latents.

Every function takes one batch or several. Results of several workers are added, and divided once at the end.
"""

import math
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any, Protocol, runtime_checkable

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

from dmvae.data.batch import Batch, has
from dmvae.distributions.gaussian_mixture import FittedPrior
from dmvae.distributions.noise import chain, row_keys
from dmvae.evaluation.masking import mask_modalities
from dmvae.model.dmvae import DMVAE
from dmvae.model.encoding import ACTIVE_VARIANCE, Modalities

Array = np.ndarray[Any, np.dtype[Any]]


@runtime_checkable
class Classifier(Protocol):
    """A classifier: one of scikit-learn that is fitted, or any object with this method."""

    def predict(self, values: Array, /) -> Array:
        """Return the classes of `(rows, features)`."""


@dataclass(frozen=True)
class Proportion:
    """The rows that have a property, out of some rows.

    Attributes:
        hits: number of rows with the property.
        rows: number of rows.
    """

    hits: int = 0
    rows: int = 0

    def __add__(self, other: "Proportion") -> "Proportion":
        return Proportion(self.hits + other.hits, self.rows + other.rows)

    @property
    def rate(self) -> float:
        """The proportion; NaN without rows."""
        return self.hits / self.rows if self.rows else math.nan

    @property
    def se(self) -> float:
        """The binomial standard error of the proportion; NaN without rows."""
        return math.sqrt(self.rate * (1 - self.rate) / self.rows) if self.rows else math.nan


@dataclass(frozen=True, eq=False)
class MeanSums:
    """Sums over rows of the posterior means of one block of latents, in float64.

    Attributes:
        rows: number of rows.
        total: sum over rows.
        squares: sum of squares over rows.
    """

    rows: int
    total: Float[Tensor, " unit"]
    squares: Float[Tensor, " unit"]

    def __add__(self, other: "MeanSums") -> "MeanSums":
        return MeanSums(self.rows + other.rows, self.total + other.total, self.squares + other.squares)

    @property
    def variance(self) -> Float[Tensor, " unit"]:
        """The population variance over rows of the posterior mean of each unit; 0 without rows."""
        rows = max(self.rows, 1)
        return (self.squares / rows - (self.total / rows).square()).clamp(min=0)

    @property
    def num_active(self) -> int:
        """The number of active units."""
        return int((self.variance > ACTIVE_VARIANCE).sum())


def fit_classifier(rows: Batch | Iterable[Batch], modality: str) -> Classifier:
    """Fit a support vector classifier to the labelled rows that have a modality, without repeated rows.

    Raises:
        ValueError: if a batch has no labels, or fewer than two classes are left.
        ImportError: if scikit-learn is not installed.
    """
    try:
        from sklearn.svm import SVC
    except ImportError as error:
        raise ImportError(
            "scikit-learn not found: it provides the classifier. Run pip install 'dmvae[demo]'."
        ) from error
    parts = [_labelled(batch, modality) for batch in batches(rows)]
    # a row of one modality may be paired with several of another
    known = np.unique(np.concatenate([np.column_stack((_flat(b.data[modality]), _labels(b))) for b in parts]), axis=0)
    classes = np.unique(known[:, -1])
    if len(classes) < 2:
        raise ValueError(
            f"Cannot fit a classifier of {modality!r}: expected at least two classes, got labels {classes.tolist()}."
        )
    classifier: Classifier = SVC(C=10.0).fit(known[:, :-1], known[:, -1].astype(np.int64))
    return classifier


def classifier_accuracy(classifier: Classifier, rows: Batch | Iterable[Batch], modality: str) -> Proportion:
    """Count real rows whose class is recognised: the upper limit of `conditional_coherence`.

    Rows without the modality or without a label are left out.
    """
    parts = (_labelled(batch, modality) for batch in batches(rows))
    return sum((_recognised(classifier, batch.data[modality], batch) for batch in parts if len(batch)), Proportion())


def conditional_coherence(
    model: DMVAE,
    rows: Batch | Iterable[Batch],
    classifier: Classifier,
    cond_mod: Modalities,
    gen_mod: str,
    return_mean: bool = False,
    seed: int = 0,
    density: FittedPrior | None = None,
) -> Proportion:
    """Count rows for which a classifier finds the row's class in `predict(rows, cond_mod, gen_mod)`.

    The classifier gets the likelihood's mean. The model gets `cond_mod` only; rows without all of it or without a label
    are left out, rows without `gen_mod` count. The draws of a batch depend only on the seed and the rows' ids.

    Args:
        model: in any mode.
        rows: with labels.
        classifier: of `gen_mod`.
        cond_mod: one or several modalities to predict from.
        gen_mod: the modality to predict.
        return_mean: decode the posterior means in place of one draw per row.
        seed: of the draws.
        density: replaces the prior.

    Raises:
        ValueError: if a batch has no labels, or a modality is unknown.

    Source: Shi et al. 2019, cross coherence.
    """
    counted = Proportion()
    for batch in batches(rows):
        names = _as_names(model, cond_mod)
        chosen = _labelled(batch, *names)
        if len(chosen) == 0:
            continue
        given = mask_modalities(chosen, *(chosen.data.keys() - set(names)))
        counted += predicted_class_share(model, chosen, given, classifier, gen_mod, density, return_mean, seed)
    return counted


def predicted_class_share(
    model: DMVAE,
    rows: Batch,
    given: Batch,
    classifier: Classifier,
    gen_mod: str,
    density: FittedPrior | None = None,
    return_mean: bool = False,
    seed: int = 0,
) -> Proportion:
    """Count labelled rows for which the prediction of `gen_mod` from `given`, the same rows, has the row's class."""
    assert rows.labels is not None
    chosen = rows.labels.cpu() >= 0
    rows, given = rows[chosen], given[chosen]
    if len(rows) == 0:
        return Proportion()
    generator = generator_of(model, rows, seed)
    predicted = model.predict(given, "all", gen_mod, return_mean=return_mean, generator=generator, density=density)
    return _recognised(classifier, _shown(model, gen_mod, predicted[gen_mod], given, rows), rows)


def joint_coherence(
    model: DMVAE,
    classifiers: Mapping[str, Classifier],
    num_samples: int = 2000,
    seed: int = 0,
    density: FittedPrior | None = None,
) -> Proportion:
    """Count samples from the prior, or from `density`, for which the classifiers of all modalities agree.

    Source: Shi et al. 2019, joint coherence.
    """
    generator = torch.Generator(model.device).manual_seed(seed)
    drawn = model.decode(model.generate_from_prior(num_samples, generator, density))
    seen = [classifier.predict(_flat(_shown(model, name, drawn[name]))) for name, classifier in classifiers.items()]
    return Proportion(int(np.all([classes == seen[0] for classes in seen], axis=0).sum()), num_samples)


def _shown(model: DMVAE, name: str, output: Tensor, given: Batch | None = None, rows: Batch | None = None) -> Tensor:
    """Return the best guess of the values for a decoder's output: the mean, or the most probable classes.

    Counts take the size factors of `given`; classes are padded where those of `rows` are.
    """
    likelihood = model.likelihoods[name]
    if likelihood.classes is None:
        return model.means(output, name, given)
    if rows is None or name not in rows.data:
        return likelihood.likeliest(output)
    own = rows.data[name].to(output.device)
    there = has(rows, name).to(output.device).view(-1, *(1 for _ in likelihood.shape))
    return torch.where(there, likelihood.likeliest(output, own), likelihood.likeliest(output))


def posterior_mean_sums(model: DMVAE, rows: Batch | Iterable[Batch]) -> dict[str, MeanSums]:
    """Sum the posterior means of each block of latents: `shared`, and the private latent of each modality.

    The shared block counts the rows that have any modality, a private block the rows that have its own.
    """
    dims = {"shared": model.config.latent_dim, **model.config.private_dims}
    sums = {block: MeanSums(0, *torch.zeros(2, dim, dtype=torch.float64)) for block, dim in dims.items()}
    for batch in batches(rows):
        encoded = model.encode(batch, return_mean=True)
        means = {"shared": encoded.z, **encoded.modalities_z}
        present = {name: has(batch, name) for name in model.config.modalities}
        present["shared"] = torch.stack(list(present.values())).any(0)
        for block, mean in means.items():
            chosen = mean.cpu().double()[present[block]]
            sums[block] += MeanSums(len(chosen), chosen.sum(0), chosen.square().sum(0))
    return sums


def generator_of(model: DMVAE, batch: Batch, seed: int) -> torch.Generator:
    """Return a generator that depends only on the seed and the rows' ids."""
    ids = torch.arange(len(batch)) if batch.ids is None else batch.ids
    return torch.Generator(model.device).manual_seed(int(chain(seed, row_keys(ids)).sum()))


def batches(rows: Batch | Iterable[Batch]) -> Iterator[Batch]:
    """Yield the batches of an argument that is one batch or several."""
    # a batch is an iterable too: of single rows
    yield from [rows] if isinstance(rows, Batch) else rows


def _as_names(model: DMVAE, modalities: Modalities) -> tuple[str, ...]:
    if isinstance(modalities, str):
        return model.config.modalities if modalities == "all" else (modalities,)
    return tuple(modalities)


def _labelled(batch: Batch, *modalities: str) -> Batch:
    """Return the rows that have some modalities and a label."""
    if batch.labels is None:
        raise ValueError("Cannot compare classes: the batch has no labels.")
    present = [has(batch, name) for name in modalities]
    return batch[torch.stack([*present, batch.labels.cpu() >= 0]).all(0)]


def _recognised(classifier: Classifier, values: Tensor, batch: Batch) -> Proportion:
    return Proportion(int((classifier.predict(_flat(values)) == _labels(batch)).sum()), len(batch))


def _flat(values: Tensor) -> Array:
    flat: Array = values.detach().flatten(1).cpu().double().numpy()
    return flat


def _labels(batch: Batch) -> Array:
    assert batch.labels is not None
    labels: Array = batch.labels.cpu().numpy()
    return labels
