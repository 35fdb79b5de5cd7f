"""Suggest settings of a first run on a dataset: likelihoods with their reasons, networks, sizes and epochs."""

import math
import re
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import numpy as np

from dmvae.config.likelihoods import SPECS, LikelihoodSpec, ValueTraits, suggest
from dmvae.config.training import TrainConfig
from dmvae.data.format.manifest import Manifest, ModalityInfo
from dmvae.data.inspection.profile import DatasetProfile
from dmvae.data.inspection.value_stats import ValueStats

Array = np.ndarray[Any, np.dtype[Any]]

_ROW_VISITS = 200_000  # epochs times training rows of a first run
_ROWS_PER_FEATURE = 10  # with fewer, networks of this size overfit
_DROPOUT = 0.2
_NEARLY_ALL = 0.98  # share of the rows that have a modality, from which on it counts as never missing
_LEAST_SIDE, _LEAST_TIME, _LEAST_LENGTH = 8, 32, 16  # from which on an order of the values is worth its networks


@dataclass(frozen=True)
class LikelihoodSuggestion:
    """A likelihood for one modality, its parameters, and the reason in the data."""

    likelihood: str
    reason: str
    params: dict[str, Any]


def suggest_likelihoods(profile: DatasetProfile) -> dict[str, LikelihoodSuggestion]:
    """Return a likelihood for each modality; one that was set when the dataset was prepared takes precedence."""
    modalities = profile.dataset.manifest.modalities
    return {name: _fit(info, profile.values(name)) for name, info in modalities.items()}


def _fit(info: ModalityInfo, values: ValueStats | None) -> LikelihoodSuggestion:
    if info.columns is not None:
        kinds = Counter(column.kind for column in info.columns)
        return _suggestion(info, info.likelihood, ", ".join(f"{n} {kind}" for kind, n in kinds.items()))
    if info.likelihood not in ("normal", "categorical"):  # the defaults of a manifest
        return _suggestion(info, info.likelihood, "set in the dataset")
    return _suggestion(info, *suggest(traits_of(values, info.scaling, info.classes)))


def _suggestion(info: ModalityInfo, likelihood: str, reason: str) -> LikelihoodSuggestion:
    spec = SPECS.get(likelihood, LikelihoodSpec())
    params = spec.suggested_params_of_images if _is_image(info) else None
    padding = {} if info.pad is None else {"pad": info.pad}
    return LikelihoodSuggestion(likelihood, reason, dict(spec.suggested_params if params is None else params) | padding)


def traits_of(values: ValueStats | None, scaling: str = "none", classes: int | None = None) -> ValueTraits:
    """Return what values suggest; `scaling` says how they are read, and `classes` are those of integers."""
    if classes is not None:
        return ValueTraits("classes", classes=classes)
    if values is None or not values.rows:
        return ValueTraits("unknown")
    if values.are_binary and scaling in ("none", "unit"):
        return ValueTraits("binary")
    if scaling == "unit" or (scaling == "none" and values.low.min() >= 0 and values.high.max() <= 1):
        return ValueTraits("unit")
    if values.are_counts and scaling == "none":
        with np.errstate(all="ignore"):
            return ValueTraits("counts", dispersion=_typical(values.std**2 / values.mean))
    return ValueTraits("log" if scaling == "log1p" else "real", kurtosis=_typical(values.kurtosis))


def _typical(numbers: Array) -> float:
    """Return the median of the finite numbers; NaN if there are none."""
    finite = numbers[np.isfinite(numbers)]
    return float(np.median(finite)) if len(finite) else math.nan


def suggest_run(profile: DatasetProfile, dataset: str, likelihoods: dict[str, LikelihoodSuggestion]) -> TrainConfig:
    """Return the settings of a first run on the dataset at `dataset`.

    Raises:
        ValidationError: (a ValueError) if the dataset cannot be trained on.
    """
    manifest, train = profile.dataset.manifest, profile.splits[profile.train]
    others = [name for name in ("val", *profile.splits) if name in profile.splits and name != profile.train]
    val = others[0] if others else profile.train
    sizes = {name: info.column.size for name, info in manifest.modalities.items()}
    epochs = _between(5, round(_ROW_VISITS / train.rows), 200)
    batch_size = _between(8, 2 ** round(math.log2(train.rows / 10)), 256)
    steps = epochs * math.ceil(train.rows / batch_size)
    dropout = _DROPOUT if train.rows < _ROWS_PER_FEATURE * _num_features(manifest.modalities.values()) else 0.0
    name = re.sub(r"[^A-Za-z0-9._-]", "-", dataset.rstrip("/").rpartition("/")[2]).lstrip("._-")
    tree: dict[str, Any] = {
        "name": f"{name or 'data'}-first",
        "data": {"dataset": dataset, "train_split": profile.train, "val_split": val},
        "model": {
            "latent_dim": _latent_dim(manifest.modalities.values(), train.rows),
            "modalities_specific_dim": {
                name: _between(0, int(math.log2(size) / 2), 10) for name, size in sizes.items()
            },
            **_sources(manifest, profile.train),
            "decoders_dist": {name: fit.likelihood for name, fit in likelihoods.items()},
            **_unless_empty("decoder_dist_params", {name: fit.params for name, fit in likelihoods.items()}),
            "architectures": {name: _architecture(m, dropout) for name, m in manifest.modalities.items()},
        },
        "optim": {"learning_rate": 3e-3, "warmup_steps": min(100, steps // 10)},
        "training": {
            "epochs": epochs,
            "batch_size": batch_size,
            "patience": max(5, epochs // 4),
            "prior_components": 20,
        },
        "evaluation": {"split": "test" if "test" in others else val},
    }
    return TrainConfig.model_validate(tree)


def _sources(manifest: Manifest, train: str) -> dict[str, Any]:
    """Return the sources that train what is asked for: modalities from others, or cells from the rest of their row."""
    split = manifest.splits[train]
    if len(manifest.modalities) == 1:
        return {}
    if manifest.missing_cells and min(split.observed.values()) >= _NEARLY_ALL * split.rows:
        return {"sources": "joint"}
    return {"sources": "subsets", "cross": "prior"}


def _latent_dim(modalities: Iterable[ModalityInfo], num_rows: int) -> int:
    """Return twice the root of the number of features, at most one for every ten rows."""
    return _between(2, min(round(2 * math.sqrt(_num_features(modalities))), num_rows // 10), 64)


def _num_features(modalities: Iterable[ModalityInfo]) -> float:
    """Return the number of features; sixteen pixels count as one, since neighbours have nearly the same values."""
    return sum(info.column.size / (16 if _is_image(info) else 1) for info in modalities)


def _is_image(info: ModalityInfo) -> bool:
    return len(info.shape) == 3


def _architecture(info: ModalityInfo, dropout: float) -> dict[str, Any]:
    """Return the networks of a modality: convolutions for images, series and sequences, otherwise perceptrons."""
    sides = info.shape[1:]
    if info.classes is None and _is_image(info) and min(sides) >= _LEAST_SIDE:
        return {"name": "residual"}
    if info.classes is None and len(info.shape) == 2 and sides[0] >= _LEAST_TIME:
        return {"name": "series"}
    is_long = info.classes is not None and len(info.shape) == 1 and info.column.size >= _LEAST_LENGTH
    if is_long or info.pad is not None:
        return {"name": "sequence"}
    inputs = info.column.size * (info.classes or 1)
    hidden_dims = [512, 256] if inputs >= 2048 else [256, 256] if inputs > 16 else [64, 64]
    settings = {"name": "skip_mlp", "hidden_dims": hidden_dims}
    return settings | ({"dropout": dropout} if dropout else {})


def _unless_empty(key: str, settings: dict[str, dict[str, Any]]) -> dict[str, Any]:
    filled = {name: setting for name, setting in settings.items() if setting}
    return {key: filled} if filled else {}


def _between(low: int, number: int, high: int) -> int:
    return max(low, min(number, high))
