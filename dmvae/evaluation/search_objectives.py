"""Figures of merit: what models of different configurations are compared by, each with its standard error.

None depends on beta, on the reconstruction weights or on the batch size, as the loss does.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

import numpy as np
import torch

from dmvae.config.search import Objective
from dmvae.data.batch import Batch, has
from dmvae.data.reading.dataset import Dataset
from dmvae.data.reading.split import Split
from dmvae.evaluation.imputation import held_out_errors
from dmvae.evaluation.metrics import Classifier, conditional_coherence, fit_classifier
from dmvae.evaluation.suite import check_labels, first_rows
from dmvae.model.dmvae import DMVAE

_PARTS = 8  # blocks of rows that the standard error of a ratio is taken from
_IMPUTATION_DRAWS = 20


@dataclass(frozen=True)
class Estimate:
    """A figure and its standard error over rows, or over epochs for a time."""

    value: float
    se: float = 0.0


@dataclass(frozen=True, eq=False)
class ObjectiveEvaluator:
    """Judges models on the same rows with the same noise.

    Attributes:
        train: the split whose rows classifiers and variances come from.
        split: the split that is judged on.
        num_rows: of it, at most.
        num_draws: decoder rows per modality and row of an NLL.
        seed: of the draws.
    """

    train: Split
    split: Split
    num_rows: int
    num_draws: int
    seed: int = 0

    def merits(self, model: DMVAE, names: Sequence[Objective]) -> dict[str, Estimate]:
        """Return the figures asked for; `seconds_per_step` is the trainer's to measure, and is left out.

        Raises:
            ValueError: if the data cannot give one.
        """
        found: dict[str, Estimate] = {}
        if "joint_nll" in names or "conditional_nll" in names:
            found |= self._nll(model, "conditional_nll" in names)
        if "imputation" in names:
            found |= self._imputation(model)
        if "coherence" in names:
            found |= self._coherence(model)
        if "parameters" in names:
            found["parameters"] = Estimate(float(sum(p.numel() for p in model.parameters())))
        return found

    def _nll(self, model: DMVAE, each: bool) -> dict[str, Estimate]:
        """The mean of -log p(x_A), and over modalities m of that of -log p(x_m | the row's others), nats a row."""
        whole = model.joint_nll(self.rows, self.num_draws, seed=self.seed).nll
        found = {"joint_nll": _mean(whole)}
        parts = []
        for name in model.config.modalities if each else ():
            here = self._with_company(name).nonzero().squeeze(1)
            others = [other for other in model.config.modalities if other != name]
            rest = model.joint_nll(self.rows[here], self.num_draws, seed=self.seed, modalities=others).nll
            parts.append(_mean(whole[here] - rest))
            found[f"conditional_nll/{name}"] = parts[-1]
        return found | ({"conditional_nll": _average(parts)} if parts else {})

    def _imputation(self, model: DMVAE) -> dict[str, Estimate]:
        """Root mean square error of a modality predicted from the row's others; the mean over modalities.

        In units of the modality's standard deviation over the training rows.
        """
        found, parts = {}, []
        for name, deviation in self._deviations.items():
            rows = self.rows[self._with_company(name).nonzero().squeeze(1)]
            blocks = [
                held_out_errors(model, rows[part], name, _IMPUTATION_DRAWS, seed=self.seed)
                for part in torch.arange(len(rows)).tensor_split(_PARTS)
                if len(part)
            ]
            total = sum(blocks[1:], blocks[0])
            spread = np.std([block.rmse for block in blocks], ddof=1) / math.sqrt(len(blocks))
            parts.append(Estimate(total.rmse / deviation, float(spread) / deviation))
            found[f"imputation/{name}"] = parts[-1]
        return found | {"imputation": _average(parts)}

    def _coherence(self, model: DMVAE) -> dict[str, Estimate]:
        """How often a modality predicted from one other shows the row's label; the mean over pairs."""
        found, parts = {}, []
        for target, classifier in self._classifiers.items():
            for source in model.config.modalities:
                if source != target:
                    share = conditional_coherence(model, self.rows, classifier, source, target)
                    parts.append(Estimate(share.rate, share.se))
                    found[f"coherence/{source}/{target}"] = parts[-1]
        return found | {"coherence": _average(parts)}

    @cached_property
    def rows(self) -> Batch:
        """The rows that are judged on."""
        return first_rows(self.split, self.num_rows)

    @cached_property
    def _classifiers(self) -> dict[str, Classifier]:
        check_labels(self.train, self.split)
        fitted_to = first_rows(self.train)
        return {name: fit_classifier(fitted_to, name) for name in self.rows.data}

    @cached_property
    def _deviations(self) -> dict[str, float]:
        """Of each floating-point modality: the root of its mean variance over features, in observed training rows."""
        rows, found = first_rows(self.train), {}
        for name, info in self.train.manifest.modalities.items():
            if info.dtype != "int64":
                values = rows.data[name][has(rows, name)].flatten(1).double()
                found[name] = max(float(values.var(0, unbiased=False).mean().sqrt()), 1e-12)
        return found

    def _with_company(self, name: str) -> torch.Tensor:
        """Which rows have a modality, and another one."""
        present = torch.stack([has(self.rows, other) for other in self.rows.data])
        together: torch.Tensor = has(self.rows, name) & (present.sum(0) > 1)
        return together


def check(dataset: Dataset, train_split: str, split: str, names: Sequence[Objective], num_rows: int) -> None:
    """Check that the data can give the figures asked for.

    Raises:
        ValueError: naming the objective that it cannot give, and why.
    """
    judge = ObjectiveEvaluator(dataset.split(train_split), dataset.split(split), num_rows, 2)
    if "coherence" in names:
        check_labels(judge.train, judge.split)
    if "imputation" in names and not judge._deviations:
        raise ValueError(
            "the objective imputation is of floating-point modalities; the dataset has none. Use conditional_nll."
        )
    for name in dataset.manifest.modalities if {"imputation", "conditional_nll", "coherence"} & set(names) else ():
        if int(judge._with_company(name).sum()) < 2 * _PARTS:
            raise ValueError(
                f"objectives of predictions need rows that have a modality and another one; split {split!r} has fewer "
                f"than {2 * _PARTS} of {name!r} among its first {num_rows}. Use joint_nll, or raise judged_rows."
            )


def _mean(values: torch.Tensor) -> Estimate:
    return Estimate(float(values.mean()), float(values.std()) / math.sqrt(len(values)))


def _average(parts: Sequence[Estimate]) -> Estimate:
    # the parts share rows, so their errors may add up: this is the larger, safe figure
    return Estimate(float(np.mean([part.value for part in parts])), float(np.mean([part.se for part in parts])))
