"""How well held-out cells are predicted from everything else that a row has, beside baselines on the same cells.

A share of the observed cells of a split is hidden, at random or more often where values are large. The model and each
baseline fill them in. Errors are in standard deviations of the training cells.
"""

import math
import warnings
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Literal

import numpy as np
import torch
from jaxtyping import Bool, Float
from torch import Tensor

from dmvae.data.batch import Batch, has_cells
from dmvae.distributions.noise import chain, row_keys, standard_normal
from dmvae.evaluation.factor_analysis import fit_factor_analysis
from dmvae.evaluation.imputation import INTERVALS, Errors, join
from dmvae.evaluation.metrics import generator_of
from dmvae.model.dmvae import DMVAE

Mechanism = Literal["random", "value"]
MECHANISMS: tuple[Mechanism, ...] = ("random", "value")
RATES = (0.1, 0.3, 0.5)
MAX_FEATURES = 512
"""Of the baselines that complete rows, which take a matrix for each pattern of cells."""
MAX_FIT_ROWS = 2048
_NEIGHBOURS = 10
_HIDE = 7  # names the noise


@dataclass(frozen=True, eq=False)
class Table:
    """The cells that may be hidden, side by side, standardised by the training cells.

    Attributes:
        columns: the places of these cells in a row of each modality.
        mean: of each over the training rows.
        std: likewise; 1 where it does not vary.
    """

    columns: Mapping[str, Tensor]
    mean: Float[Tensor, " cell"]
    std: Float[Tensor, " cell"]

    @classmethod
    def of(cls, columns: Mapping[str, Tensor], train: Batch) -> "Table":
        """Standardise the cells of training rows."""
        unit = cls(columns, torch.zeros(1), torch.ones(1))
        values, known = unit.read(train)
        num = known.sum(0).clamp(min=1)
        mean = values.where(known, 0.0).sum(0) / num
        std = ((values - mean).square().where(known, 0.0).sum(0) / num).sqrt()
        return cls(columns, mean, torch.where(std > 0, std, 1.0))

    def read(self, batch: Batch) -> tuple[Float[Tensor, "row cell"], Bool[Tensor, "row cell"]]:
        """Return the standardised values, 0 where they are missing, and which are observed."""
        parts = [(batch.data[name], has_cells(batch, name)) for name in self.columns]
        places = list(self.columns.values())
        values = [self._flat(part, place).double() for (part, _), place in zip(parts, places, strict=True)]
        cells = [self._flat(part, place) for (_, part), place in zip(parts, places, strict=True)]
        known = torch.cat(cells, dim=1)
        return ((torch.cat(values, dim=1) - self.mean) / self.std).where(known, 0.0), known

    def standardise(self, values: Mapping[str, Tensor]) -> Float[Tensor, "... cell"]:
        """Return values of each modality, `(..., *shape)`, as `read` does."""
        flat = [values[name].flatten(2).double().cpu()[..., place] for name, place in self.columns.items()]
        return (torch.cat(flat, dim=-1) - self.mean) / self.std

    def hide(self, batch: Batch, hidden: Bool[Tensor, "row cell"]) -> Batch:
        """Return a batch that lacks the hidden cells too."""
        cells = dict(batch.cells or {})
        parts = torch.split(hidden, [len(place) for place in self.columns.values()], dim=1)
        for (name, place), part in zip(self.columns.items(), parts, strict=True):
            mask = has_cells(batch, name).flatten(1).clone()
            mask[:, place] &= ~part
            cells[name] = mask.view(batch.data[name].shape)
        return Batch(batch.data, batch.masks, batch.labels, batch.ids, batch.size_factors, cells)

    @staticmethod
    def _flat(values: Tensor, place: Tensor) -> Tensor:
        return values.cpu().flatten(1)[:, place]


def choose_hidden(
    values: Float[Tensor, "row cell"],
    known: Bool[Tensor, "row cell"],
    batch: Batch,
    rate: float,
    mechanism: Mechanism,
    seed: int = 0,
) -> Bool[Tensor, "row cell"]:
    """Choose observed cells with a probability of mean `rate`; it depends on the seed and the row's id.

    With `value` the probability grows with the standardised value z, as 2 rate Phi(z).
    """
    ids = torch.arange(len(batch)) if batch.ids is None else batch.ids
    normals = standard_normal(chain(seed, _HIDE, row_keys(ids)), values.shape[1], dtype=torch.float64)
    probability = torch.full_like(values, rate)
    if mechanism == "value":
        probability = (2 * rate * torch.special.ndtr(values)).clamp(max=1)
    hidden: Tensor = known & (torch.special.ndtr(normals) < probability)
    return hidden


def held_out_cells(
    model: DMVAE,
    columns: Mapping[str, Tensor],
    train: Batch,
    blocks: Callable[[], Iterator[Batch]],
    num_draws: int = 100,
    progress: Callable[[str], None] = lambda text: None,
) -> dict[str, float]:
    """Predict hidden cells with the model and with baselines.

    Args:
        model: in eval mode.
        columns: the places of the cells that may be hidden, of each floating-point modality with missing cells.
        train: rows that the baselines are fitted to.
        blocks: yields the rows to predict.
        num_draws: per row.
        progress: called with a line for each baseline that is left out.

    Returns:
        `cells/HOW/RATE/rmse` in standard deviations, and `coverage50` and `coverage90` of the intervals; for each
        baseline `cells/HOW/RATE/NAME`, how much higher that is as `NAME_minus_ours`, and the standard error of that
        over rows, `NAME_minus_ours_se`. HOW is `random` or `value`, RATE in percent.
    """
    table = Table.of(columns, train)
    baselines = _fit_baselines(table, train, progress)
    metrics: dict[str, float] = {}
    for mechanism in MECHANISMS:
        for rate in RATES:
            ours, theirs = Errors(), dict.fromkeys(baselines, Errors())
            for batch in blocks():
                values, known = table.read(batch)
                hidden = choose_hidden(values, known, batch, rate, mechanism)
                given = table.hide(batch, hidden)
                ours += _model_errors(model, table, given, values, hidden, num_draws)
                for name, complete in baselines.items():
                    predicted = complete(values.where(known & ~hidden, math.nan))
                    theirs[name] += _errors(predicted, values, hidden)
            place = f"cells/{mechanism}/{rate:.0%}".removesuffix("%")
            metrics[f"{place}/rmse"] = ours.rmse
            for share, inside in zip(INTERVALS, ours.coverage, strict=True):
                metrics[f"{place}/coverage{share:.0%}".removesuffix("%")] = inside
            for name, errors in theirs.items():
                metrics[f"{place}/{name}"] = errors.rmse
                metrics[f"{place}/{name}_minus_ours"], metrics[f"{place}/{name}_minus_ours_se"] = errors.minus(ours)
    return metrics


def _model_errors(model: DMVAE, table: Table, given: Batch, values: Tensor, hidden: Tensor, num_draws: int) -> Errors:
    """Predict by the mean of the likelihood's mean; intervals are quantiles of draws of the values."""
    output = model.decode(model.draw_posterior(given, num_draws), list(table.columns))
    means = table.standardise({name: model.means(output[name], name, given) for name in table.columns}).mean(0)
    generator = generator_of(model, given, 0)
    drawn = {name: model.draw_values(output[name], name, given, generator) for name in table.columns}
    draws = table.standardise(drawn).sort(0).values
    inside = []
    for share in INTERVALS:
        # the truth is as likely in each of the gaps between n draws
        low = max(0, round((1 - share) / 2 * (len(draws) + 1)) - 1)
        here = (draws[low] <= values) & (values <= draws[len(draws) - 1 - low]) & hidden
        inside.append(float(here.sum()))
    return _errors(means, values, hidden, tuple(inside))


def _errors(
    predicted: Tensor, values: Tensor, hidden: Tensor, inside: tuple[float, ...] = (math.nan,) * len(INTERVALS)
) -> Errors:
    by_row = (predicted - values).square().where(hidden, 0.0).sum(1)
    return Errors(int(hidden.sum()), by_row.numpy(), inside)


def _fit_baselines(
    table: Table, train: Batch, progress: Callable[[str], None]
) -> dict[str, Callable[[Tensor], Tensor]]:
    """Return functions that complete standardised rows, NaN where a cell is missing."""
    found: dict[str, Callable[[Tensor], Tensor]] = {"mean": lambda rows: torch.zeros_like(rows)}
    values, known = table.read(join([train[:MAX_FIT_ROWS]]))
    if values.shape[1] > MAX_FEATURES:
        progress(
            f"baselines of cells skipped: they complete up to {MAX_FEATURES} features, but there are {values.shape[1]}"
        )
        return found
    rows = values.where(known, math.nan).numpy()
    rows = rows[known.any(1).numpy()]
    found |= {"nearest_neighbours": _nearest_neighbours(rows), "iterative_ridge": _iterative_ridge(rows)}
    if values.shape[1] > 1:
        factors = fit_factor_analysis(_by_cell(torch.from_numpy(rows)), _by_cell(torch.from_numpy(rows)))
        found["factor_analysis"] = lambda rows: factors.complete(_by_cell(rows))
    return found


def _nearest_neighbours(rows: np.ndarray) -> Callable[[Tensor], Tensor]:
    from sklearn.impute import KNNImputer

    fit = KNNImputer(n_neighbors=min(_NEIGHBOURS, len(rows)), keep_empty_features=True).fit(rows)
    return lambda given: torch.from_numpy(fit.transform(given.numpy()))


def _iterative_ridge(rows: np.ndarray) -> Callable[[Tensor], Tensor]:
    from sklearn.experimental import enable_iterative_imputer  # noqa: F401
    from sklearn.impute import IterativeImputer

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # that ten rounds were not enough
        fit = IterativeImputer(random_state=0, keep_empty_features=True).fit(rows)
    return lambda given: torch.from_numpy(fit.transform(given.numpy()))


def _by_cell(rows: Tensor) -> Batch:
    """Return rows as a batch with a modality for each cell, which factor analysis takes in any pattern."""
    names = [f"{place:04d}" for place in range(rows.shape[1])]
    data = {name: column.unsqueeze(1) for name, column in zip(names, rows.unbind(1), strict=True)}
    return Batch(data, {name: ~column.isnan().squeeze(1) for name, column in data.items()})
