"""Run one trial of a search: train a configuration from its last checkpoint, evaluate it, and report to Tune."""

import json
import math
import time
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from ray import tune
from ray.tune.integration.ray_train import TuneReportCallback
from ray.util.queue import Queue

from dmvae.config.search import SearchConfig, lay_over
from dmvae.config.training import TrainConfig
from dmvae.data.reading.dataset import open_dataset
from dmvae.evaluation.search_objectives import Estimate, ObjectiveEvaluator, compared_values
from dmvae.model.dmvae import DMVAE
from dmvae.platform.errors import RunError
from dmvae.platform.tracking.outbox import Outbox
from dmvae.platform.tracking.runs import Waiting, open_run
from dmvae.platform.tracking.tracked_run import TrackedRun
from dmvae.platform.train.run_store import RunStore
from dmvae.platform.train.trainer import fit
from dmvae.platform.train.worker import WorkerTask
from dmvae.platform.tune.study import RESULT, TrialResult, read_params, read_result, write_result
from dmvae.platform.tune.trial_checkpoints import BEST, TrialCheckpoints
from dmvae.training.loop import EpochEnded, MetricsLogged, train
from dmvae.training.settings import blank_model, resolve, run_record, trusted
from dmvae.training.setup import WorkerData, build_state
from dmvae.training.state import is_finished
from dmvae.training.step import Collectives, NonFiniteLossError

TRIAL, EPOCH = "trial", "epoch"
_SPEED = "train/rows_per_second"
_MLFLOW_SECONDS = 3600.0  # a trial waits this long for a server that is away: that is no fault of the trial
_CHECKPOINT_SECONDS = 10.0  # between checkpoints of a trial in this process: the most that a kill costs


@dataclass(frozen=True)
class TrialTask:
    """What all trials of a study share.

    Attributes:
        config: the search configuration, with absolute paths.
        study_dir: the study's folder.
        parent: id of the study's MLflow run.
        queue: receives console lines for the driver.
    """

    config: SearchConfig
    study_dir: Path
    parent: str
    queue: Queue


def value_names(config: SearchConfig) -> list[str]:
    """Return the names under which a trial reports the values that are minimised."""
    return [f"value_{place}" for place in range(len(config.objectives))] if config.is_multiple else ["value"]


def rungs(config: SearchConfig) -> frozenset[int]:
    """Return the epochs after which a trial is evaluated and may be stopped."""
    epochs = config.base.training.epochs
    grace = config.grace_epochs or max(1, epochs // 4)
    if config.scheduler == "none":
        return frozenset()
    if config.scheduler == "median":
        return frozenset(range(grace, epochs, max(1, grace)))
    powers = range(max(1, math.ceil(math.log(max(epochs, 2), config.reduction))) + 1)
    return frozenset(grace * config.reduction**power for power in powers if grace * config.reduction**power < epochs)


def run_trial(drawn: dict[str, Any], task: TrialTask) -> None:
    """Train and evaluate the trial that `drawn` names; report its objectives to Tune.

    A trial that already has a result only reports it. A killed trial resumes from its last checkpoint.
    """
    config, number = task.config, int(drawn[TRIAL])
    folder = task.study_dir / "trials" / f"{number:04d}"
    params = read_params(folder)
    if not (folder / RESULT).is_file():
        with open_run(
            config.base.tracking,
            f"{config.name}-{number:04d}",
            folder / "tracking",
            params,
            tags={"mlflow.parentRunId": task.parent, "trial": str(number)},
            waiting=Waiting(_MLFLOW_SECONDS, task.queue.put),
        ) as tracked:
            try:
                result = _outcome(task, folder, params, tracked)
            except SystemExit:  # Tune ends a trial this way when the scheduler stops it
                with Outbox(tracked) as outbox:
                    outbox.end("KILLED", f"stopped early by {config.scheduler}")
                raise
            with Outbox(tracked) as outbox:
                outbox.log_metrics({f"trial/{name}": value for name, value in result.figures.items()}, result.epochs)
                outbox.end("FINISHED" if result.status == "complete" else "FAILED", result.reason)
        write_result(folder, result)
    done = read_result(folder)
    assert done is not None
    if done.status == "complete":
        _report(config, _values(config, done.figures), config.base.training.epochs)
        return
    raise TrialEndedError(done.reason)


class TrialEndedError(Exception):
    """A trial failed or exceeded a limit; its result says why."""


def _outcome(task: TrialTask, folder: Path, params: dict[str, Any], tracked: TrackedRun) -> TrialResult:
    start = time.monotonic()
    try:
        return _train_and_evaluate(task, folder, params, tracked, start)
    except (NonFiniteLossError, RunError, ValueError, OSError, MemoryError, RuntimeError) as error:
        # torch raises RuntimeError when memory runs out
        reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        return TrialResult("failed", 0, {}, reason[:500], tracked.run_id, time.monotonic() - start)


def _train_and_evaluate(
    task: TrialTask, folder: Path, params: dict[str, Any], tracked: TrackedRun, start: float
) -> TrialResult:
    config = task.config
    dataset = open_dataset(config.base.data.dataset)
    resolved = resolve(lay_over(config.base, params, folder.name, tuple(dataset.manifest.modalities)), dataset)
    size = sum(p.numel() for p in blank_model(resolved.model).parameters())
    if size > config.limits.get("parameters", math.inf):
        reason = f"{size} parameters exceed limits.parameters = {config.limits['parameters']:g}"
        return TrialResult("infeasible", 0, {"parameters": float(size)}, reason, tracked.run_id)
    evaluator, record = RungEvaluator(config), run_record(resolved, dataset.manifest)
    train_trial = _train_here if resolved.workers.num == 1 else _train_nested
    model, seconds = train_trial(task, resolved, record, folder, tracked, evaluator)
    figures = {"parameters": float(size), **evaluator.figures(model, seconds)}
    took, epochs = time.monotonic() - start, resolved.training.epochs
    with Outbox(tracked) as outbox:
        outbox.log_artifact(folder / BEST, "model")
    if not all(map(math.isfinite, compared_values(config, figures))):
        return TrialResult("failed", epochs, figures, "an objective is not finite", tracked.run_id, took)
    if seconds.value > config.limits.get("seconds_per_step", math.inf):
        reason = (
            f"{seconds.value:g} seconds per step exceed limits.seconds_per_step = {config.limits['seconds_per_step']:g}"
        )
        return TrialResult("infeasible", epochs, figures, reason, tracked.run_id, took)
    return TrialResult("complete", epochs, figures, "", tracked.run_id, took)


@dataclass(frozen=True)
class RungEvaluator:
    """Evaluates a model on the study's objectives; it is sent to other processes, and reads the rows there."""

    config: SearchConfig

    def figures(self, model: DMVAE, seconds: Estimate) -> dict[str, float]:
        """Return every objective and its standard error as `NAME_se`; the model's mode is restored."""
        training = model.training
        estimates = self._evaluator.evaluate(model.eval(), self.config.objectives) | {"seconds_per_step": seconds}
        model.train(training)
        return {f"{n}{end}": v for n, m in estimates.items() for end, v in (("", m.value), ("_se", m.se))}

    def __call__(self, model: DMVAE, event: EpochEnded) -> dict[str, float]:
        """Return what a trial reports at the end of an epoch: its objectives at the rungs, else its speed alone."""
        seconds = self.config.base.training.batch_size / event.metrics[_SPEED]
        reported = {"seconds": seconds, EPOCH: float(event.epoch + 1)}
        if event.epoch + 1 in rungs(self.config):
            reported |= _values(self.config, self.figures(model, Estimate(seconds)))
        return reported

    @cached_property
    def _evaluator(self) -> ObjectiveEvaluator:
        config, data = self.config, self.config.base.data
        dataset = open_dataset(data.dataset)
        return ObjectiveEvaluator(
            dataset.split(data.train_split),
            dataset.split(data.val_split),
            config.judged_rows,
            config.num_draws,
            config.seed,
        )


def _train_here(
    task: TrialTask,
    config: TrainConfig,
    record: dict[str, Any],
    folder: Path,
    tracked: TrackedRun,
    evaluator: RungEvaluator,
) -> tuple[DMVAE, Estimate]:
    """Train in this process; return the best epoch's model and the seconds per step."""
    torch.set_num_threads(max(1, int(config.workers.cpus)))
    use_gpu = torch.cuda.is_available() and config.workers.device != "cpu"
    device = torch.device("cuda" if use_gpu else "cpu")
    state = build_state(config, device)
    checkpoints = TrialCheckpoints(folder, record)
    times = checkpoints.resume(state, task.queue.put)
    data, written = WorkerData(config, 0, 1, state.model.dtype, device), time.monotonic()
    with Outbox(tracked) as outbox:
        for event in train(state, data, config, Collectives(state.model)):
            if not isinstance(event, MetricsLogged):
                continue
            outbox.log_metrics(event.metrics, event.global_step)
            if not isinstance(event, EpochEnded):
                continue
            reported = evaluator(state.model, event)
            times.append(reported["seconds"])
            if event.improved:
                checkpoints.remember(state.model)
            if time.monotonic() - written > _CHECKPOINT_SECONDS or is_finished(state, config):
                checkpoints.write(state, times)
                written = time.monotonic()
            if event.epoch + 1 in rungs(task.config):
                outbox.log_metrics(
                    {f"rung/{name}": reported[name] for name in task.config.objectives}, event.global_step
                )
                _report(task.config, reported, event.epoch + 1)
    return DMVAE.load(folder / BEST, trust=trusted(config.model)), _seconds(times)


def _train_nested(
    task: TrialTask,
    config: TrainConfig,
    record: dict[str, Any],
    folder: Path,
    tracked: TrackedRun,
    evaluator: RungEvaluator,
) -> tuple[DMVAE, Estimate]:
    """Train with a TorchTrainer of its own, whose rank 0 evaluates; this process only waits."""
    store = RunStore.open(str(folder.parent), folder.name)
    store.repair(task.queue.put)
    fit(config, WorkerTask(config, record, store, tracked, task.queue, evaluator=evaluator), [_Forward(task.config)])
    store.publish(task.queue.put)
    lines = map(json.loads, (folder / "tracking" / "metrics.jsonl").read_text().splitlines())
    speeds = [line["metrics"][_SPEED] for line in lines if _SPEED in line.get("metrics", {})]
    seconds = _seconds([config.training.batch_size / speed for speed in speeds])
    return DMVAE.load(folder / BEST, trust=trusted(config.model)), seconds


class _Forward(TuneReportCallback):
    """Forward rank 0's metrics to Tune at the rungs; called in Ray Train's controller."""

    def __init__(self, config: SearchConfig) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self._config = config

    def after_report(self, run_context: Any, metrics: list[dict[str, Any]], checkpoint: Any) -> None:
        """Forward one report of all workers."""
        if set(value_names(self._config)) <= metrics[0].keys():
            super().after_report(run_context, metrics, None)


def _seconds(times: list[float]) -> Estimate:
    if not times:
        return Estimate(math.nan, math.nan)
    mean = sum(times) / len(times)
    spread = math.sqrt(sum((t - mean) ** 2 for t in times) / max(len(times) - 1, 1) / len(times))
    return Estimate(mean, spread)


def _values(config: SearchConfig, figures: dict[str, float]) -> dict[str, float]:
    """Add the values that are minimised to the metrics; leave out non-finite ones, which Ray's files cannot hold."""
    compared = dict(zip(value_names(config), compared_values(config, figures), strict=True))
    return {name: value for name, value in (figures | compared).items() if math.isfinite(value)}


def _report(config: SearchConfig, figures: dict[str, float], epoch: int) -> None:
    if set(value_names(config)) <= figures.keys():
        tune.report({**figures, EPOCH: epoch})
