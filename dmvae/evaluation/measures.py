"""The measures that an evaluation computes beside the NLL: one entry each."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np

from dmvae.data.reading.split import Split
from dmvae.evaluation.masking import Removal
from dmvae.evaluation.suite import EvaluationSuite, check_labels


@dataclass(frozen=True)
class EvaluatedSplit:
    """What a measure is computed from.

    Attributes:
        suite: the model, its training rows and the split.
        nll: the model's NLL in nats, of each row of the split or of its first rows.
        covers_all: whether that is the NLL of all modalities.
        removal: how `robustness` removes modalities; None if it is not asked for.
    """

    suite: EvaluationSuite
    nll: np.ndarray
    covers_all: bool = True
    removal: Removal | None = None


@dataclass(frozen=True)
class Measure:
    """An entry: `compute` returns metrics by name; `needs_labels` is checked before any work."""

    compute: Callable[[EvaluatedSplit], dict[str, float]]
    needs_labels: bool = False


def _baselines(evaluated: EvaluatedSplit) -> dict[str, float]:
    suite = evaluated.suite
    fault = suite.density_fault or ("" if evaluated.covers_all else "evaluation.modalities leaves some out")
    if fault:
        suite.progress(f"linear densities skipped: {fault}")
        return {}
    return suite.baselines(evaluated.nll)


def _robustness(evaluated: EvaluatedSplit) -> dict[str, float]:
    assert evaluated.removal is not None
    return evaluated.suite.robustness(evaluated.removal)


MEASURES: dict[str, Measure] = {
    "rivals": Measure(_baselines),
    "coherence": Measure(lambda evaluated: evaluated.suite.coherence(), needs_labels=True),
    "probes": Measure(lambda evaluated: evaluated.suite.probes(), needs_labels=True),
    "imputation": Measure(lambda evaluated: evaluated.suite.imputation()),
    "cells": Measure(lambda evaluated: evaluated.suite.cells()),
    "robustness": Measure(_robustness),
}
"""By name. Adding an entry makes a measure available in `evaluation.measures`."""


def check(names: Sequence[str], train: Split, split: Split) -> None:
    """Check that measures exist and that the data allow them.

    Raises:
        ValueError: naming the measure, or the split without labels.
    """
    unknown = [name for name in names if name not in MEASURES]
    if unknown:
        raise ValueError(f"Unknown measure {unknown[0]!r} in evaluation.measures. Available: {', '.join(MEASURES)}.")
    if any(MEASURES[name].needs_labels for name in names):
        check_labels(train, split)
