"""How well held-out values are predicted from a row's other modalities, beside rivals on the same rows."""

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

from dmvae.data.batch import Batch, has
from dmvae.distributions.gaussian_mixture import FittedPrior
from dmvae.evaluation.baselines import ProbabilisticPCA
from dmvae.evaluation.masking import mask_modalities
from dmvae.evaluation.metrics import batches, generator_of
from dmvae.model.dmvae import DMVAE

INTERVALS = (0.5, 0.9)
Imputer = Callable[[Batch, str], Tensor]
"""Rows without a modality, and its name, to predictions `(rows, *shape)`."""
Hide = Callable[[Batch], Batch]
"""What the predictions may see of the rows."""

_ROWS_AT_ONCE = 256  # that many times the draws are decoded together


@dataclass(frozen=True)
class Errors:
    """Errors of predicted values, as sums.

    Attributes:
        rows: rows whose modality was held out.
        values: values that were predicted.
        squares: sum of squared errors.
        inside: per interval of `INTERVALS`, values inside it; NaN where no interval was asked for.
    """

    rows: int = 0
    values: int = 0
    squares: float = 0.0
    inside: tuple[float, ...] = (0.0, 0.0)

    def __add__(self, other: "Errors") -> "Errors":
        inside = tuple(mine + theirs for mine, theirs in zip(self.inside, other.inside, strict=True))
        return Errors(self.rows + other.rows, self.values + other.values, self.squares + other.squares, inside)

    @property
    def rmse(self) -> float:
        """Root mean square error per value, on the scale of the values as they are read; NaN without rows."""
        return math.sqrt(self.squares / self.values) if self.values else math.nan

    @property
    def coverage(self) -> tuple[float, ...]:
        """Share of the values inside each interval; NaN without rows or intervals."""
        return tuple(count / self.values if self.values else math.nan for count in self.inside)


def held_out_errors(
    model: DMVAE,
    rows: Batch | Iterable[Batch],
    modality: str,
    num_draws: int = 100,
    density: FittedPrior | None = None,
    seed: int = 0,
    hide: Hide = lambda batch: batch,
) -> Errors:
    """Predict a modality of the rows that have it from their other modalities.

    The prediction is the mean over draws of the likelihood's mean, of counts at the row's size factor if it has one and
    else at the likelihood's; the intervals are the quantiles of draws of the values themselves, which have the
    likelihood's noise, and exist for normal and Laplace modalities.

    Args:
        model: in any mode.
        rows: with the truth.
        modality: which is held out; floating-point.
        num_draws: per row.
        density: of the latents, in place of the prior.
        seed: a batch's draws depend on it and the rows' ids alone.
        hide: takes more away from what the model may see.

    Raises:
        ValueError: for an unknown modality, or a categorical one.
    """
    _check_modality(model, modality)
    total = Errors()
    for batch in batches(rows):
        for part in _having(batch, modality):
            given = mask_modalities(hide(part), modality)
            generator = generator_of(model, part, seed)
            names = [name for name in model.config.modalities if name != modality] or [modality]
            output = model.predict(given, names, modality, num_draws, generator=generator, density=density)[modality]
            mean = model.means(output.reshape(num_draws, len(part), *output.shape[2:]), modality, given)
            truth = part.data[modality].to(mean)
            total += _errors(mean.mean(0), truth, _intervals(model, modality, mean, truth, generator))
    return total


def rival_errors(imputer: Imputer, rows: Batch | Iterable[Batch], modality: str, hide: Hide = lambda x: x) -> Errors:
    """Predict a modality of the rows that have it from their others by a rival."""
    total, nothing = Errors(), (math.nan,) * len(INTERVALS)
    for batch in batches(rows):
        for part in _having(batch, modality):
            truth = part.data[modality].double()
            predicted = imputer(mask_modalities(hide(part), modality), modality).double()
            total += _errors(predicted.reshape(truth.shape), truth, nothing)
    return total


@dataclass
class Ridge:
    """Ridge regression of one modality on the others that a row has: a fit for every set of these, made when asked.

    A fit takes the training rows that have that set and the target; its strength is chosen by leaving one out. Without
    any other modality, or with fewer than ten such rows, the prediction is the training mean.
    """

    train: Batch
    strengths: Sequence[float] = (0.1, 1.0, 10.0, 100.0, 1000.0)
    _fits: dict[tuple[str, tuple[str, ...]], Callable[[np.ndarray], np.ndarray]] = field(default_factory=dict)

    def __call__(self, rows: Batch, modality: str) -> Float[Tensor, "row value"]:
        """Predict `modality` of rows from what else they have."""
        size = math.prod(self.train.data[modality].shape[1:])
        predicted = np.zeros((len(rows), size))
        names = [name for name in sorted(rows.data) if name != modality]
        present = torch.stack([torch.ones(len(rows), dtype=torch.bool), *(has(rows, name) for name in names)], dim=1)
        for pattern in torch.unique(present, dim=0):
            chosen = (present == pattern).all(1)
            known = tuple(name for name, here in zip(names, pattern[1:].tolist(), strict=True) if here)
            predicted[chosen.numpy()] = self._fit(modality, known)(_flat(rows[chosen], known))
        return torch.from_numpy(predicted)

    def _fit(self, modality: str, known: tuple[str, ...]) -> Callable[[np.ndarray], np.ndarray]:
        if (modality, known) not in self._fits:
            here = torch.stack([has(self.train, name) for name in (modality, *known)]).all(0)
            self._fits[modality, known] = self._regress(modality, known, self.train[here])
        return self._fits[modality, known]

    def _regress(self, modality: str, known: tuple[str, ...], rows: Batch) -> Callable[[np.ndarray], np.ndarray]:
        from sklearn.linear_model import RidgeCV

        mean = _flat(self.train[has(self.train, modality)], (modality,)).mean(0)
        if not known or len(rows) < 10:
            return lambda values: np.broadcast_to(mean, (len(values), len(mean)))
        targets = _flat(rows, (modality,))
        fit = RidgeCV(alphas=np.asarray(self.strengths)).fit(_flat(rows, known), targets)
        return lambda values: np.asarray(fit.predict(values)).reshape(len(values), -1)


def training_mean(train: Batch) -> Imputer:
    """Return the rival that predicts each value's mean over the training rows that have it."""
    means = {name: values[has(train, name)].double().mean(0) for name, values in train.data.items()}
    return lambda rows, modality: means[modality].expand(len(rows), *means[modality].shape)


def rivals(train: Batch, latent_dim: int) -> Mapping[str, Imputer]:
    """Return the rivals by name: `mean`, `ridge` and, where it can be fitted, `pca` with as many latent dimensions."""
    found: dict[str, Imputer] = {"mean": training_mean(train), "ridge": Ridge(train)}
    features = sum(math.prod(values.shape[1:]) for values in train.data.values())
    if latent_dim < features and all(values.is_floating_point() for values in train.data.values()):
        found["pca"] = ProbabilisticPCA.fit(train, latent_dim, max_steps=200).predict
    return found


def join(parts: Iterable[Batch]) -> Batch:
    """Put batches of the same modalities together."""
    batches_ = list(parts)
    labels = [part.labels for part in batches_ if part.labels is not None]
    size_factors = [part.size_factors for part in batches_ if part.size_factors is not None]
    names = list(batches_[0].data)
    return Batch(
        data={name: torch.cat([part.data[name] for part in batches_]) for name in names},
        masks={name: torch.cat([has(part, name) for part in batches_]) for name in names},
        labels=torch.cat(labels) if labels else None,
        size_factors=torch.cat(size_factors) if size_factors else None,
    )


def _check_modality(model: DMVAE, modality: str) -> None:
    if modality not in model.config.modalities:
        raise ValueError(f"a modality is one of {list(model.config.modalities)}; got {modality!r}.")
    if model.likelihoods[modality].classes is not None:
        raise ValueError(f"an error is one of floating-point values; {modality!r} is categorical.")


def _having(batch: Batch, modality: str) -> Iterable[Batch]:
    """Cut the rows that have a modality into pieces."""
    rows = batch[has(batch, modality)]
    return (rows[start : start + _ROWS_AT_ONCE] for start in range(0, len(rows), _ROWS_AT_ONCE))


def _errors(predicted: Tensor, truth: Tensor, inside: tuple[float, ...]) -> Errors:
    return Errors(len(truth), truth.numel(), float((predicted - truth).double().square().sum()), inside)


def _intervals(
    model: DMVAE, modality: str, mean: Tensor, truth: Tensor, generator: torch.Generator
) -> tuple[float, ...]:
    """Count the values inside the central intervals of draws `(draw, row, *shape)` of the values."""
    likelihood = model.likelihoods[modality]
    if not likelihood.is_continuous:
        return (math.nan,) * len(INTERVALS)
    draws = likelihood.sample(mean, generator).sort(0).values
    inside = []
    for share in INTERVALS:
        # the truth is as likely in each of the gaps between n draws: that makes the count exact for any n
        low = max(0, round((1 - share) / 2 * (len(draws) + 1)) - 1)
        inside.append(float(((draws[low] <= truth) & (truth <= draws[len(draws) - 1 - low])).sum()))
    return tuple(inside)


def _flat(rows: Batch, names: Sequence[str]) -> np.ndarray:
    parts = [rows.data[name].flatten(1).cpu().double().numpy() for name in names]
    return np.concatenate([np.zeros((len(rows), 0)), *parts], axis=1)
