"""Imputation: the values that rows lack, with predictive standard deviations and quantiles."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from dmvae.data.preparation.object_rows import ObjectRows
from dmvae.fitting.units import Units
from dmvae.model.dmvae import DMVAE


@dataclass(frozen=True, eq=False)
class Imputed:
    """The values of one modality in every row: observed ones as they are, missing ones from the model.

    Attributes:
        values: a data frame, or an array `(rows, *shape)` if a row is no vector; missing values are predictive means.
        sd: predictive standard deviations; 0 where a value is observed.
        quantiles: predictive quantiles by probability; the value itself where it is observed.
        missing: which values are missing, `(rows, *shape)`.
    """

    values: Any
    sd: Any
    quantiles: dict[float, Any]
    missing: np.ndarray

    def __repr__(self) -> str:
        return f"Imputed({int(self.missing.sum())} of {self.missing.size} values, sd, quantiles {list(self.quantiles)})"


def impute(
    model: DMVAE, units: Units, rows: ObjectRows, num_draws: int, quantiles: Sequence[float], seed: int
) -> dict[str, Imputed]:
    """Fill in what rows lack; see `Fitted.impute`."""
    generator = torch.Generator(model.device).manual_seed(seed)
    means: dict[str, list[Tensor]] = {name: [] for name in units.scales}
    draws: dict[str, list[Tensor]] = {name: [] for name in units.scales}
    for batch in units.batches(rows, model):
        outputs = model.predict(batch, N=num_draws, generator=generator)
        for name, scale in units.scales.items():
            likelihood = model.likelihoods[name]
            output = outputs[name].reshape(num_draws, len(batch), *likelihood.output_shape)
            drawn = likelihood.sample(output, generator)
            draws[name].append(scale.show(drawn.double()).cpu())
            means[name].append(_best_guess(model, units, name, output, drawn).cpu())
    return {
        name: _join(units, rows, name, torch.cat(means[name]), torch.cat(draws[name], 1), quantiles)
        for name in units.scales
    }


def _best_guess(model: DMVAE, units: Units, name: str, output: Tensor, drawn: Tensor) -> Tensor:
    """Return the mean of each value over draws, in the units of the data; of classes, the most frequent one."""
    info = units.modalities[name]
    if info.classes is not None:
        return drawn.mode(0).values.double()
    best = units.scales[name].show(model.means(output, name).double()).mean(0)
    for place, column in enumerate(info.columns or ()):
        if column.classes:
            best[:, place] = drawn[..., place].mode(0).values.double()
    return best


def _join(
    units: Units, rows: ObjectRows, name: str, mean: Tensor, draws: Tensor, quantiles: Sequence[float]
) -> Imputed:
    """Put observed values in the place of imputed ones."""
    parts: dict[Any, Tensor] = {"mean": mean, "sd": draws.std(0)} | {q: draws.quantile(q, 0) for q in quantiles}
    missing = np.ones(tuple(mean.shape), dtype=bool)
    if name in rows.rows.data:
        values, shape = rows.rows.data[name], (-1, *(1,) * (mean.dim() - 1))
        missing = ~rows.rows.present[name].reshape(shape) | (np.isnan(values) if values.dtype.kind == "f" else False)
        here, observed = torch.from_numpy(~missing), torch.from_numpy(values).double()
        parts = {
            key: torch.where(here, torch.zeros_like(observed) if key == "sd" else observed, part)
            for key, part in parts.items()
        }
    guess, spread = units.table(rows, name, parts["mean"]), units.table(rows, name, parts["sd"], as_classes=False)
    return Imputed(guess, spread, {q: units.table(rows, name, parts[q]) for q in quantiles}, missing)
