"""What one trial of a search does: train a configuration from wherever it stood, and say what it is worth."""

import json
import math
import shutil
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
from dmvae.evaluation.search_objectives import Estimate, ObjectiveEvaluator
from dmvae.model.dmvae import DMVAE
from dmvae.platform.tracking.outbox import TrackedRun
from dmvae.platform.tracking.runs import open_run
from dmvae.platform.train import local_checkpoints as shelf
from dmvae.platform.train.trainer import RunError, fit, keep_checkpoints, resolve, run_record
from dmvae.platform.train.worker import WorkerData, WorkerTask, build_state
from dmvae.platform.tune.study import PARAMS, RESULT, TrialResult, write_result
from dmvae.training import checkpoint
from dmvae.training.loop import (
    Collectives,
    EpochEnded,
    MetricsLogged,
    NonFiniteLossError,
    TrainState,
    is_finished,
    train,
)

TRIAL, EPOCH, BEST = "trial", "epoch", "best"
_SPEED = "train/rows_per_second"
_CHECKPOINT_SECONDS = 10.0  # between two checkpoints of a trial in this process; a kill costs as much


@dataclass(frozen=True)
class TrialTask:
    """What every trial of a study has in common.

    Attributes:
        config: of the search, its paths absolute.
        study_dir: the study's folder.
        parent: id of the study's MLflow run.
        queue: takes lines for the person who waits.
    """

    config: SearchConfig
    study_dir: Path
    parent: str
    queue: Queue


def value_names(config: SearchConfig) -> list[str]:
    """Return what a trial reports to be compared by, all of it minimised."""
    return [f"value_{place}" for place in range(len(config.objectives))] if config.is_multiple else ["value"]


def rungs(config: SearchConfig) -> frozenset[int]:
    """Return the epochs after which a trial may be stopped; it is judged then."""
    epochs = config.base.training.epochs
    grace = config.grace_epochs or max(1, epochs // 4)
    if config.scheduler == "none":
        return frozenset()
    if config.scheduler == "median":
        return frozenset(range(grace, epochs, max(1, grace)))
    powers = range(max(1, math.ceil(math.log(max(epochs, 2), config.reduction))) + 1)
    return frozenset(grace * config.reduction**power for power in powers if grace * config.reduction**power < epochs)


def run_trial(drawn: dict[str, Any], task: TrialTask) -> None:
    """Train and judge the trial that `drawn` names; report its figures to Tune.

    A trial whose result is there already only reports it. One that was killed goes on from its checkpoint.
    """
    config, number = task.config, int(drawn[TRIAL])
    folder = task.study_dir / "trials" / f"{number:04d}"
    params = json.loads((folder / PARAMS).read_text())
    if not (folder / RESULT).is_file():
        with open_run(
            config.base.tracking,
            f"{config.name}-{number:04d}",
            folder / "tracking",
            params,
            tags={"mlflow.parentRunId": task.parent, "trial": str(number)},
        ) as tracked:
            try:
                result = _outcome(task, folder, params, tracked)
            except SystemExit:  # how Tune ends a trial that the scheduler has stopped
                with tracked.spool() as spool:
                    spool.end("KILLED", f"stopped early by {config.scheduler}")
                raise
            with tracked.spool() as spool:
                spool.log({f"trial/{name}": value for name, value in result.figures.items()}, result.epochs)
                spool.end("FINISHED" if result.status == "complete" else "FAILED", result.reason)
        write_result(folder, result)
    done = TrialResult(**json.loads((folder / RESULT).read_text()))
    if done.status == "complete":
        _tell(config, _values(config, done.figures), config.base.training.epochs)
        return
    raise TrialEndedError(done.reason)


class TrialEndedError(Exception):
    """A trial came to nothing; its result says why."""


def _outcome(task: TrialTask, folder: Path, params: dict[str, Any], tracked: TrackedRun) -> TrialResult:
    begun = time.monotonic()
    try:
        return _train_and_judge(task, folder, params, tracked, begun)
    except (NonFiniteLossError, RunError, ValueError, OSError, MemoryError, RuntimeError) as error:
        # torch says RuntimeError when memory is out
        reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        return TrialResult("failed", 0, {}, reason[:500], tracked.run_id, time.monotonic() - begun)


def _train_and_judge(
    task: TrialTask, folder: Path, params: dict[str, Any], tracked: TrackedRun, begun: float
) -> TrialResult:
    config = task.config
    dataset = open_dataset(config.base.data.dataset)
    resolved = resolve(lay_over(config.base, params, folder.name, tuple(dataset.manifest.modalities)), dataset)
    with torch.device("meta"):
        size = sum(p.numel() for p in DMVAE(resolved.model).parameters())
    if size > config.limits.get("parameters", math.inf):
        reason = f"{size} parameters, beyond the limit of {config.limits['parameters']:g}"
        return TrialResult("infeasible", 0, {"parameters": float(size)}, reason, tracked.run_id)
    judge, record = RungJudge(config), run_record(resolved, dataset.manifest)
    train_trial = _train_here if resolved.workers.num == 1 else _train_nested
    model, seconds = train_trial(task, resolved, record, folder, tracked, judge)
    figures = {"parameters": float(size), **judge.figures(model, seconds)}
    took, epochs = time.monotonic() - begun, resolved.training.epochs
    with tracked.spool() as spool:
        spool.artifact(folder / BEST, "model")
    if not all(map(math.isfinite, config.signed(figures))):
        return TrialResult("failed", epochs, figures, "an objective is not finite", tracked.run_id, took)
    if seconds.value > config.limits.get("seconds_per_step", math.inf):
        reason = f"{seconds.value:g} seconds a step, beyond the limit of {config.limits['seconds_per_step']:g}"
        return TrialResult("infeasible", epochs, figures, reason, tracked.run_id, took)
    return TrialResult("complete", epochs, figures, "", tracked.run_id, took)


@dataclass(frozen=True)
class RungJudge:
    """Judges a model by the study's objectives; it travels to other processes, and reads rows where it arrives."""

    config: SearchConfig

    def figures(self, model: DMVAE, seconds: Estimate) -> dict[str, float]:
        """Return every objective and its standard error as `NAME_se`, the model's own mode left as it was."""
        training = model.training
        merits = self._judge.merits(model.eval(), self.config.objectives) | {"seconds_per_step": seconds}
        model.train(training)
        return {f"{n}{end}": v for n, m in merits.items() for end, v in (("", m.value), ("_se", m.se))}

    def __call__(self, model: DMVAE, event: EpochEnded) -> dict[str, float]:
        """Return what a trial reports at the end of an epoch: its figures where it may be stopped."""
        seconds = self.config.base.training.batch_size / event.metrics[_SPEED]
        told = {"seconds": seconds, EPOCH: float(event.epoch + 1)}
        if event.epoch + 1 in rungs(self.config):
            told |= _values(self.config, self.figures(model, Estimate(seconds)))
        return told

    @cached_property
    def _judge(self) -> ObjectiveEvaluator:
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
    task: TrialTask, config: TrainConfig, record: dict[str, Any], folder: Path, tracked: TrackedRun, judge: RungJudge
) -> tuple[DMVAE, Estimate]:
    """Train in this process; return the best epoch's model and the seconds that a step took."""
    torch.set_num_threads(max(1, int(config.workers.cpus)))
    use_gpu = torch.cuda.is_available() and config.workers.device != "cpu"
    device = torch.device("cuda" if use_gpu else "cpu")
    state = build_state(config, device)
    kept = _Kept(folder, record)
    times = kept.resume(state)
    data, written = WorkerData(config, 0, 1, state.model.dtype, device), time.monotonic()
    with tracked.spool() as spool:
        for event in train(state, data, config, Collectives(state.model)):
            if not isinstance(event, MetricsLogged):
                continue
            spool.log(event.metrics, event.global_step)
            if not isinstance(event, EpochEnded):
                continue
            told = judge(state.model, event)
            times.append(told["seconds"])
            if event.improved:
                kept.remember(state.model)
            if time.monotonic() - written > _CHECKPOINT_SECONDS or is_finished(state, config):
                kept.write(state, times)
                written = time.monotonic()
            if event.epoch + 1 in rungs(task.config):
                spool.log({f"rung/{name}": told[name] for name in task.config.objectives}, event.global_step)
                _tell(task.config, told, event.epoch + 1)
    return DMVAE.load(folder / BEST), _seconds(times)


class _Kept:
    """What a trial keeps on disk: its newest checkpoint, and the model of its best epoch.

    The model is written first. After a kill in between, training repeats the steps that lead to it.
    """

    def __init__(self, folder: Path, run: dict[str, Any]) -> None:
        self._folder, self._run = folder, run
        self._weights: DMVAE | None = None
        for left in folder.glob(".*.partial"):
            shutil.rmtree(left)

    def resume(self, state: TrainState) -> list[float]:
        """Go back to the newest checkpoint that is whole, if there is any; return the seconds of its epochs' steps."""
        for folder in reversed(self._checkpoints):
            try:
                checkpoint.load(state, folder)
            except checkpoint.CheckpointError:
                continue
            return list(checkpoint.read_report(folder)["seconds"])
        return []

    def remember(self, model: DMVAE) -> None:
        """Hold on to the weights as they are now."""
        if self._weights is None:
            self._weights = DMVAE(model.config).to(model.device, model.dtype)
        self._weights.load_state_dict(model.state_dict())

    def write(self, state: TrainState, seconds: list[float]) -> None:
        """Write the best model, if it is new, then the checkpoint; what it takes the place of goes afterwards."""
        if self._weights is not None:
            draft = self._folder / ".weights.partial"
            self._weights.save(draft)
            shelf.replace(draft, self._folder / BEST)
            shutil.rmtree(draft)
            self._weights = None
        done = self._checkpoints
        target = self._folder / f"checkpoint_{state.position.epoch:06d}"
        if target not in done:
            checkpoint.save(state, self._run, target, {"seconds": seconds})
        for old in done[:-1]:  # the one before stays, for the case that this one breaks
            shutil.rmtree(old)

    @property
    def _checkpoints(self) -> list[Path]:
        return sorted(self._folder.glob("checkpoint_[0-9]*"))


def _train_nested(
    task: TrialTask, config: TrainConfig, record: dict[str, Any], folder: Path, tracked: TrackedRun, judge: RungJudge
) -> tuple[DMVAE, Estimate]:
    """Train with a TorchTrainer of its own, whose first worker judges; this process only waits."""
    shelf.mend(folder / "checkpoints", task.queue.put)
    result = fit(config, str(folder), WorkerTask(config, record, tracked, task.queue, judge), [_Forward(task.config)])
    keep_checkpoints(result, folder, task.queue.put)
    lines = map(json.loads, (folder / "tracking" / "metrics.jsonl").read_text().splitlines())
    speeds = [line["metrics"][_SPEED] for line in lines if _SPEED in line.get("metrics", {})]
    return DMVAE.load(folder / BEST), _seconds([config.training.batch_size / speed for speed in speeds])


class _Forward(TuneReportCallback):
    """Hand the first worker's figures on to Tune where it has been judged; this is called in Ray Train's controller."""

    def __init__(self, config: SearchConfig) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self._config = config

    def after_report(self, run_context: Any, metrics: list[dict[str, Any]], checkpoint: Any) -> None:
        """Take one report of all workers."""
        if set(value_names(self._config)) <= metrics[0].keys():
            super().after_report(run_context, metrics, None)


def _seconds(times: list[float]) -> Estimate:
    if not times:
        return Estimate(math.nan, math.nan)
    mean = sum(times) / len(times)
    spread = math.sqrt(sum((t - mean) ** 2 for t in times) / max(len(times) - 1, 1) / len(times))
    return Estimate(mean, spread)


def _values(config: SearchConfig, figures: dict[str, float]) -> dict[str, float]:
    """Add what is compared to the figures; one that is not finite is left out, as Ray's files cannot hold it."""
    compared = dict(zip(value_names(config), config.signed(figures), strict=True))
    return {name: value for name, value in (figures | compared).items() if math.isfinite(value)}


def _tell(config: SearchConfig, figures: dict[str, float], epoch: int) -> None:
    if set(value_names(config)) <= figures.keys():
        tune.report({**figures, EPOCH: epoch})
