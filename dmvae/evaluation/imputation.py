"""How well held-out values are predicted from a row's other modalities, beside baselines on the same rows."""

import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from torch import Tensor

from dmvae.data.batch import Batch, has, has_cells
from dmvae.distributions.gaussian_mixture import FittedPrior
from dmvae.evaluation.baselines import Imputer
from dmvae.evaluation.masking import mask_modalities
from dmvae.evaluation.metrics import batches, generator_of
from dmvae.model.dmvae import DMVAE

INTERVALS = (0.5, 0.9)
Hide = Callable[[Batch], Batch]
"""What the predictions may see of the rows."""

_ROWS_AT_ONCE = 256  # that many times the draws are decoded together


@dataclass(frozen=True, eq=False)
class Errors:
    """Errors of predicted values.

    Attributes:
        values: values that were predicted.
        by_row: each row's sum of squared errors, in the order of the rows whose modality was held out.
        inside: per interval of `INTERVALS`, values inside it; NaN where no interval was asked for.
    """

    values: int = 0
    by_row: np.ndarray[Any, np.dtype[np.float64]] = field(default_factory=lambda: np.zeros(0))
    inside: tuple[float, ...] = (0.0, 0.0)

    def __add__(self, other: "Errors") -> "Errors":
        inside = tuple(mine + theirs for mine, theirs in zip(self.inside, other.inside, strict=True))
        return Errors(self.values + other.values, np.concatenate((self.by_row, other.by_row)), inside)

    @property
    def rows(self) -> int:
        """Rows whose modality was held out."""
        return len(self.by_row)

    @property
    def squares(self) -> float:
        """Sum of squared errors."""
        return float(self.by_row.sum())

    @property
    def rmse(self) -> float:
        """Root mean square error per value, on the scale of the values as they are read; NaN without rows."""
        return math.sqrt(self.squares / self.values) if self.values else math.nan

    def minus(self, other: "Errors") -> tuple[float, float]:
        """Return this root mean square error less that of other predictions of the same rows, and its standard error.

        The standard error is over rows, by the delta method; NaN with fewer than two rows.
        """
        if self.rows < 2:
            return self.rmse - other.rmse, math.nan
        slopes = [errors.by_row / max(2 * errors.rmse, 1e-300) for errors in (self, other)]
        spread = float((slopes[0] - slopes[1]).std(ddof=1)) * math.sqrt(self.rows) / self.values
        return self.rmse - other.rmse, spread

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
            cells = has_cells(part, modality).to(mean.device)
            total += _errors(mean.mean(0), truth, cells, _intervals(model, modality, mean, truth, cells, generator))
    return total


def baseline_errors(
    imputer: Imputer, rows: Batch | Iterable[Batch], modality: str, hide: Hide = lambda batch: batch
) -> Errors:
    """Predict a modality of the rows that have it from their other modalities by a baseline."""
    total, nothing = Errors(), (math.nan,) * len(INTERVALS)
    for batch in batches(rows):
        for part in _having(batch, modality):
            truth = part.data[modality].double()
            predicted = imputer(mask_modalities(hide(part), modality), modality).double()
            total += _errors(predicted.reshape(truth.shape), truth, has_cells(part, modality), nothing)
    return total


def join(parts: Iterable[Batch]) -> Batch:
    """Put batches of the same modalities together."""
    batches_ = list(parts)
    labels = [part.labels for part in batches_ if part.labels is not None]
    size_factors = [part.size_factors for part in batches_ if part.size_factors is not None]
    names, with_cells = list(batches_[0].data), set().union(*(part.cells or {} for part in batches_))
    return Batch(
        data={name: torch.cat([part.data[name] for part in batches_]) for name in names},
        masks={name: torch.cat([has(part, name) for part in batches_]) for name in names},
        labels=torch.cat(labels) if labels else None,
        size_factors=torch.cat(size_factors) if size_factors else None,
        cells={name: torch.cat([has_cells(part, name) for part in batches_]) for name in names if name in with_cells},
    )


def _check_modality(model: DMVAE, modality: str) -> None:
    if modality not in model.config.modalities:
        raise ValueError(f"Unknown modality {modality!r}. The model has {list(model.config.modalities)}.")
    if model.likelihoods[modality].classes is not None:
        raise ValueError(f"Cannot measure errors of {modality!r}: it is categorical, not floating-point.")


def _having(batch: Batch, modality: str) -> Iterable[Batch]:
    """Cut the rows that have a modality into pieces."""
    rows = batch[has(batch, modality)]
    return (rows[start : start + _ROWS_AT_ONCE] for start in range(0, len(rows), _ROWS_AT_ONCE))


def _errors(predicted: Tensor, truth: Tensor, cells: Tensor, inside: tuple[float, ...]) -> Errors:
    by_row = (predicted - truth).double().square().where(cells, 0.0).flatten(1).sum(1)
    return Errors(int(cells.sum()), by_row.detach().cpu().numpy(), inside)


def _intervals(
    model: DMVAE, modality: str, mean: Tensor, truth: Tensor, cells: Tensor, generator: torch.Generator
) -> tuple[float, ...]:
    """Count the observed values inside the central intervals of draws `(draw, row, *shape)` of the values."""
    likelihood = model.likelihoods[modality]
    if not likelihood.is_continuous:
        return (math.nan,) * len(INTERVALS)
    draws = likelihood.sample(mean, generator).sort(0).values
    inside = []
    for share in INTERVALS:
        # the truth is as likely in each of the gaps between n draws: that makes the count exact for any n
        low = max(0, round((1 - share) / 2 * (len(draws) + 1)) - 1)
        inside.append(float(((draws[low] <= truth) & (truth <= draws[len(draws) - 1 - low]) & cells).sum()))
    return tuple(inside)
