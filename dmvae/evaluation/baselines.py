"""Baselines that predict a modality from the others: what a person would try before a neural network.

All but the mean are linear models and scikit-learn's regressors of rows that lack any modality.
"""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol, runtime_checkable

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

from dmvae.data.batch import Batch, has, has_cells
from dmvae.evaluation.factor_analysis import FactorAnalysis
from dmvae.evaluation.masking import mask_modalities

Imputer = Callable[[Batch, str], Tensor]
"""Rows without a modality, and its name, to predictions `(rows, *shape)`."""
Array = np.ndarray[Any, np.dtype[Any]]

_STRENGTHS = (0.1, 1.0, 10.0, 100.0, 1000.0, 10000.0)
_NEIGHBOURS = (3, 10, 30)
_CHOICE_ROWS = 2048  # rows that the number of neighbours is chosen on
_MIN_ROWS = 10  # that a regression is fitted to
BOOSTING_WORK = 5_000_000
"""Rows times inputs times outputs up to which gradient boosting is fitted; it takes a fit for each output."""


@runtime_checkable
class Regressor(Protocol):
    """A regressor of scikit-learn that predicts several outputs."""

    def fit(self, inputs: Array, outputs: Array, /) -> "Regressor":
        """Fit to `(rows, inputs)` and `(rows, outputs)`."""

    def predict(self, inputs: Array, /) -> Array:
        """Predict `(rows, outputs)`, or `(rows,)` of a single one."""


@dataclass
class Ridge:
    """Ridge regression of one modality on the others that a row has: a fit for every set of these, made when asked.

    A fit takes the training rows that have that set and the target; its strength is chosen by leaving one out. Without
    any other modality, or with fewer than ten such rows, the prediction is the training mean.
    """

    train: Batch
    strengths: Sequence[float] = _STRENGTHS[:-1]
    _fits: dict[tuple[str, tuple[str, ...]], Callable[[Array], Array]] = field(default_factory=dict)

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

    def _fit(self, modality: str, known: tuple[str, ...]) -> Callable[[Array], Array]:
        if (modality, known) not in self._fits:
            here = torch.stack([has(self.train, name) for name in (modality, *known)]).all(0)
            self._fits[modality, known] = self._regress(modality, known, self.train[here])
        return self._fits[modality, known]

    def _regress(self, modality: str, known: tuple[str, ...], rows: Batch) -> Callable[[Array], Array]:
        from sklearn.linear_model import RidgeCV

        mean = _flat(self.train[has(self.train, modality)], (modality,)).mean(0)
        if not known or len(rows) < _MIN_ROWS:
            return lambda values: np.broadcast_to(mean, (len(values), len(mean)))
        targets = _flat(rows, (modality,))
        fit = RidgeCV(alphas=np.asarray(self.strengths)).fit(_flat(rows, known), targets)
        return lambda values: np.asarray(fit.predict(values)).reshape(len(values), -1)


@dataclass
class CompletedRegression:
    """A regression of one modality on all others, completed by factor analysis: a fit for each target, when asked.

    Inputs that a row lacks are their conditional means given its others, in training without the target. So all
    training rows that have the target count, whatever else they lack.

    Attributes:
        train: the rows of the fits.
        factors: what completes them.
        build: makes a regressor for inputs and outputs; inputs have mean 0 and variance 1, or nearly.
    """

    train: Batch
    factors: FactorAnalysis
    build: Callable[[Array, Array], Regressor]
    _fits: dict[str, Regressor] = field(default_factory=dict)

    def __call__(self, rows: Batch, modality: str) -> Float[Tensor, "row value"]:
        """Predict `modality` of rows from what else they have."""
        if modality not in self._fits:
            self._fits[modality] = self._fit(modality)
        predicted = np.asarray(self._fits[modality].predict(self._inputs(rows, modality)))
        return torch.from_numpy(predicted.reshape(len(rows), -1))

    def _fit(self, modality: str) -> Regressor:
        rows = self.train[has(self.train, modality)]
        inputs, outputs = self._inputs(rows, modality), _flat(rows, (modality,))
        return self.build(inputs, outputs).fit(inputs, outputs)

    def _inputs(self, rows: Batch, modality: str) -> Array:
        layout = self.factors.layout
        known = [name for name in layout.shapes if name != modality]
        completed = self.factors.complete(mask_modalities(rows, *(rows.data.keys() - set(known))))
        scaled = (completed - self.factors.mean) / self.factors.unit
        return scaled[:, layout.index(known)].numpy()


def fit_baselines(
    train: Batch, latent_dim: int, factors: FactorAnalysis | None
) -> tuple[Mapping[str, Imputer], Mapping[str, str]]:
    """Return the baselines by name, and why the others are left out.

    `mean`; `ridge`, on the training rows that have what a row has; `pca`, with `latent_dim` dimensions;
    `factor_analysis`; and on rows completed by it `ridge_completed`, `nearest_neighbours` and `gradient_boosting`.

    Args:
        train: the rows of the fits.
        latent_dim: of the model.
        factors: fitted to the floating-point modalities of `train`; None if there is no such fit.
    """
    if train.cells:
        reason = "it needs rows that have all cells of a modality or none; the measure cells has others"
        return {"mean": training_mean(train)}, dict.fromkeys(("ridge", "pca", "factor_analysis", *_COMPLETED), reason)
    found: dict[str, Imputer] = {"mean": training_mean(train), "ridge": Ridge(train)}
    left_out: dict[str, str] = {}
    sizes = {name: math.prod(values.shape[1:]) for name, values in train.data.items()}
    if not all(values.is_floating_point() for values in train.data.values()):
        left_out["pca"] = "it needs floating-point modalities"
    elif latent_dim >= sum(sizes.values()):
        left_out["pca"] = f"it needs fewer dimensions than the data, but the model has {latent_dim}"
    else:
        pca = FactorAnalysis.fit(train, latent_dim, noise="one", shrinkage=0.0, tolerance=1e-4)
        found["pca"] = pca.predict
    if factors is None or len(factors.layout.shapes) < 2:
        reason = "it needs two floating-point modalities"
        return found, left_out | dict.fromkeys(("factor_analysis", *_COMPLETED), reason)
    known = factors.layout.shapes.keys()
    found["factor_analysis"] = lambda rows, name: factors.predict(
        mask_modalities(rows, *(rows.data.keys() - known)), name
    )
    work = max(len(train) * size * (sum(sizes.values()) - size) for size in sizes.values())
    for name, build in _COMPLETED.items():
        if name == "gradient_boosting" and work > BOOSTING_WORK:
            left_out[name] = f"rows x inputs x outputs must be at most {BOOSTING_WORK:,}, but are {work:,}"
        else:
            found[name] = CompletedRegression(train, factors, build)
    return found, left_out


def training_mean(train: Batch) -> Imputer:
    """Return the baseline that predicts each value's mean over the training rows that have it."""
    means = {}
    for name, values in train.data.items():
        if name in (train.cells or {}):
            known = has_cells(train, name)
            means[name] = values.double().where(known, 0.0).sum(0) / known.sum(0).clamp(min=1)
        else:
            means[name] = values[has(train, name)].double().mean(0)
    return lambda rows, modality: means[modality].expand(len(rows), *means[modality].shape)


def _ridge(inputs: Array, outputs: Array) -> Regressor:
    from sklearn.linear_model import RidgeCV

    fit: Regressor = RidgeCV(alphas=np.asarray(_STRENGTHS))
    return fit


def _nearest_neighbours(inputs: Array, outputs: Array) -> Regressor:
    from sklearn.model_selection import GridSearchCV
    from sklearn.neighbors import KNeighborsRegressor

    inputs, outputs = inputs[:_CHOICE_ROWS], outputs[:_CHOICE_ROWS]
    candidates = [number for number in _NEIGHBOURS if number <= len(inputs) // 2] or [1]
    search = GridSearchCV(KNeighborsRegressor(), {"n_neighbors": candidates}, cv=3, scoring="neg_mean_squared_error")
    fit: Regressor = KNeighborsRegressor(**search.fit(inputs, outputs).best_params_)
    return fit


def _gradient_boosting(inputs: Array, outputs: Array) -> Regressor:
    from sklearn.ensemble import HistGradientBoostingRegressor
    from sklearn.multioutput import MultiOutputRegressor

    fit: Regressor = MultiOutputRegressor(HistGradientBoostingRegressor(early_stopping=True, random_state=0))
    return fit


_COMPLETED: Mapping[str, Callable[[Array, Array], Regressor]] = {
    "ridge_completed": _ridge,
    "nearest_neighbours": _nearest_neighbours,
    "gradient_boosting": _gradient_boosting,
}


def _flat(rows: Batch, names: Sequence[str]) -> Array:
    parts = [rows.data[name].flatten(1).cpu().double().numpy() for name in names]
    return np.concatenate([np.zeros((len(rows), 0)), *parts], axis=1)
