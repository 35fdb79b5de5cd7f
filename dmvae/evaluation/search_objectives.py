"""The objectives of a search: metrics by which models of different configurations are compared, with standard errors.

None depends on beta, on the reconstruction weights or on the batch size, as the loss does.
"""

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Literal

import numpy as np
import torch
from jaxtyping import Bool, Float
from torch import Tensor

from dmvae.config.search import SearchConfig
from dmvae.data.batch import Batch, has, has_cells
from dmvae.data.reading.dataset import Dataset
from dmvae.data.reading.split import Split
from dmvae.evaluation.imputation import held_out_errors
from dmvae.evaluation.metrics import Classifier, conditional_coherence, fit_classifier
from dmvae.evaluation.suite import check_labels, first_rows
from dmvae.model.dmvae import DMVAE

_PARTS = 8  # blocks of rows that the standard error of a ratio is taken from
_IMPUTATION_DRAWS = 20
_NLL_SHARE = 0.25  # of the NLL per value beside the logarithm of the imputation error; see docs/results.md


@dataclass(frozen=True)
class Estimate:
    """A metric and its standard error over rows, or over epochs for a time."""

    value: float
    se: float = 0.0


@dataclass(frozen=True, eq=False)
class ObjectiveEvaluator:
    """Evaluates models on the same rows with the same noise.

    Attributes:
        train: the split to which classifiers are fitted and from which variances are taken.
        split: the split to evaluate on.
        num_rows: how many of its rows are used at most.
        num_draws: decoder rows per modality and row of an NLL.
        seed: of the draws.
    """

    train: Split
    split: Split
    num_rows: int
    num_draws: int
    seed: int = 0

    def evaluate(self, model: DMVAE, names: Sequence[str]) -> dict[str, Estimate]:
        """Return the objectives, and their parts per modality.

        Raises:
            ValueError: if the data do not allow one of them.
        """
        evaluation, found = ModelEvaluation(self, model), dict[str, Estimate]()
        for name in names:
            found |= OBJECTIVES[name].compute(evaluation)
        return found

    @cached_property
    def rows(self) -> Batch:
        """The rows to evaluate on."""
        return first_rows(self.split, self.num_rows)

    @cached_property
    def classifiers(self) -> dict[str, Classifier]:
        """A classifier of the label per modality."""
        check_labels(self.train, self.split)
        fitted_to = first_rows(self.train)
        return {name: fit_classifier(fitted_to, name) for name in self.rows.data}

    @cached_property
    def deviations(self) -> dict[str, float]:
        """Per floating-point modality, the root of its mean variance over features, in observed training rows."""
        rows, found = first_rows(self.train), {}
        for name, info in self.train.manifest.modalities.items():
            if info.dtype != "int64":
                values = rows.data[name][has(rows, name)].flatten(1).double()
                found[name] = max(float(values.var(0, unbiased=False).mean().sqrt()), 1e-12)
        return found

    def is_predictable(self, name: str) -> Bool[Tensor, " row"]:
        """Tell which rows have a modality and another one to predict it from."""
        present = torch.stack([has(self.rows, other) for other in self.rows.data])
        together: Tensor = has(self.rows, name) & (present.sum(0) > 1)
        return together


@dataclass(frozen=True, eq=False)
class ModelEvaluation:
    """One model under evaluation, with what several objectives need of it."""

    evaluator: ObjectiveEvaluator
    model: DMVAE

    @cached_property
    def joint_nll(self) -> Float[Tensor, " row"]:
        """-log p(x_A) of each row, in nats."""
        return self.nll(self.evaluator.rows)

    def nll(self, rows: Batch, modalities: Iterable[str] = ()) -> Float[Tensor, " row"]:
        """Estimate -log p(x_A) of each row in nats, for some modalities or all."""
        chosen = list(modalities) or "all"
        evaluator = self.evaluator
        return self.model.joint_nll(rows, evaluator.num_draws, seed=evaluator.seed, modalities=chosen).nll


@dataclass(frozen=True)
class SearchObjective:
    """One objective.

    Attributes:
        compute: returns it by its name, and its parts by names below that.
        check: raises ValueError if the data do not allow it.
        direction: whether less or more is better.
        predicts: whether it needs rows that have a modality and another one to predict it from.
    """

    compute: Callable[[ModelEvaluation], dict[str, Estimate]]
    check: Callable[[ObjectiveEvaluator], None] = lambda evaluator: None
    direction: Literal["minimize", "maximize"] = "minimize"
    predicts: bool = False


def _joint_nll(evaluation: ModelEvaluation) -> dict[str, Estimate]:
    """The mean of -log p(x_A), in nats per row."""
    return {"joint_nll": _mean(evaluation.joint_nll)}


def _conditional_nll(evaluation: ModelEvaluation) -> dict[str, Estimate]:
    """The mean of -log p(x_m | the row's other modalities) in nats per row, averaged over modalities m."""
    found, parts = _joint_nll(evaluation), []
    names, rows = evaluation.model.config.modalities, evaluation.evaluator.rows
    for name in names:
        here = evaluation.evaluator.is_predictable(name).nonzero().squeeze(1)
        rest = evaluation.nll(rows[here], [other for other in names if other != name])
        parts.append(_mean(evaluation.joint_nll[here] - rest))
        found[f"conditional_nll/{name}"] = parts[-1]
    return found | {"conditional_nll": _average(parts)}


def _imputation(evaluation: ModelEvaluation) -> dict[str, Estimate]:
    """The root mean square error of a modality predicted from the row's others, averaged over modalities.

    In units of the modality's standard deviation over the training rows.
    """
    found, parts, evaluator = {}, [], evaluation.evaluator
    for name, deviation in evaluator.deviations.items():
        rows = evaluator.rows[evaluator.is_predictable(name).nonzero().squeeze(1)]
        blocks = [
            held_out_errors(evaluation.model, rows[part], name, _IMPUTATION_DRAWS, seed=evaluator.seed)
            for part in torch.arange(len(rows)).tensor_split(_PARTS)
            if len(part)
        ]
        total = sum(blocks[1:], blocks[0])
        spread = np.std([block.rmse for block in blocks], ddof=1) / math.sqrt(len(blocks))
        parts.append(Estimate(total.rmse / deviation, float(spread) / deviation))
        found[f"imputation/{name}"] = parts[-1]
    return found | {"imputation": _average(parts)}


def _imputation_and_nll(evaluation: ModelEvaluation) -> dict[str, Estimate]:
    """The logarithm of the imputation error, plus a quarter of the joint NLL in nats per observed value.

    The logarithm of an error is, up to a constant, the NLL per value of a normal distribution with that deviation. So
    both are nats per value, and neither depends on the units of a modality but for a constant.
    """
    errors = _imputation(evaluation)
    logs = [
        Estimate(math.log(part.value), part.se / part.value) for name, part in errors.items() if name != "imputation"
    ]
    error, rows = _average(logs), evaluation.evaluator.rows
    values = torch.stack([has_cells(rows, name).flatten(1).sum(1).double() for name in rows.data]).sum(0)
    nll = evaluation.joint_nll.cpu().double()
    per_value = float(nll.sum() / values.sum())
    # of a ratio of sums, by the delta method
    spread = float((nll - per_value * values).std()) * math.sqrt(len(values)) / float(values.sum())
    both = Estimate(error.value + _NLL_SHARE * per_value, error.se + _NLL_SHARE * spread)
    return errors | _joint_nll(evaluation) | {"imputation_and_nll": both}


def _check_imputation(evaluator: ObjectiveEvaluator) -> None:
    if not evaluator.deviations:
        raise ValueError(
            "Cannot compute an error of imputation: the dataset has no floating-point modality. Use conditional_nll."
        )


def _coherence(evaluation: ModelEvaluation) -> dict[str, Estimate]:
    """How often a modality predicted from another one shows the row's label, averaged over pairs."""
    found, parts, evaluator = {}, [], evaluation.evaluator
    for target, classifier in evaluator.classifiers.items():
        for source in evaluation.model.config.modalities:
            if source != target:
                share = conditional_coherence(evaluation.model, evaluator.rows, classifier, source, target)
                parts.append(Estimate(share.rate, share.se))
                found[f"coherence/{source}/{target}"] = parts[-1]
    return found | {"coherence": _average(parts)}


def _parameters(evaluation: ModelEvaluation) -> dict[str, Estimate]:
    """The number of parameters."""
    return {"parameters": Estimate(float(sum(p.numel() for p in evaluation.model.parameters())))}


OBJECTIVES: dict[str, SearchObjective] = {
    "imputation": SearchObjective(_imputation, _check_imputation, predicts=True),
    "imputation_and_nll": SearchObjective(_imputation_and_nll, _check_imputation, predicts=True),
    "conditional_nll": SearchObjective(_conditional_nll, predicts=True),
    "joint_nll": SearchObjective(_joint_nll),
    "coherence": SearchObjective(
        _coherence,
        lambda evaluator: check_labels(evaluator.train, evaluator.split),
        direction="maximize",
        predicts=True,
    ),
    "parameters": SearchObjective(_parameters),
    "seconds_per_step": SearchObjective(lambda evaluation: {}),  # training measures it
}
"""By name. Adding an entry makes an objective available in `objectives`."""


def check(dataset: Dataset, train_split: str, split: str, names: Sequence[str], num_rows: int) -> None:
    """Check that objectives exist and that the data allow them.

    Raises:
        ValueError: naming the objective and the reason.
    """
    unknown = [name for name in names if name not in OBJECTIVES]
    if unknown:
        raise ValueError(f"Unknown objective {unknown[0]!r}. Available: {', '.join(OBJECTIVES)}.")
    evaluator = ObjectiveEvaluator(dataset.split(train_split), dataset.split(split), num_rows, 2)
    for name in names:
        OBJECTIVES[name].check(evaluator)
        for modality in dataset.manifest.modalities if OBJECTIVES[name].predicts else ():
            if int(evaluator.is_predictable(modality).sum()) < 2 * _PARTS:
                raise ValueError(
                    f"Cannot compute the objective {name!r}: of the first {num_rows} rows of split {split!r}, fewer "
                    f"than {2 * _PARTS} have {modality!r} and another modality. Use joint_nll, or raise judged_rows."
                )


def compared_error(config: SearchConfig, metrics: Mapping[str, float]) -> float:
    """Return the standard error of the one value that a search minimises; errors of weighted objectives add up."""
    errors = [metrics.get(f"{name}_se", 0.0) for name in config.objectives]
    return math.fsum(w * e for w, e in zip(config.weights or (1.0,), errors, strict=True))


def compared_values(config: SearchConfig, metrics: Mapping[str, float]) -> tuple[float, ...]:
    """Return the values that a search minimises: its objectives or their weighted sum, maximised ones negated."""
    signs = [-1.0 if OBJECTIVES[name].direction == "maximize" else 1.0 for name in config.objectives]
    values = [sign * metrics[name] for sign, name in zip(signs, config.objectives, strict=True)]
    if config.is_multiple:
        return tuple(values)
    return (math.fsum(w * v for w, v in zip(config.weights or (1.0,), values, strict=True)),)


def _mean(values: Tensor) -> Estimate:
    return Estimate(float(values.mean()), float(values.std()) / math.sqrt(len(values)))


def _average(parts: Sequence[Estimate]) -> Estimate:
    # the parts share rows, so their errors may add up: this is the larger, safe figure
    return Estimate(float(np.mean([part.value for part in parts])), float(np.mean([part.se for part in parts])))
