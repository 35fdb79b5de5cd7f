"""What one trial of a search does: train a configuration from wherever it stood, and say what it is worth."""

import json
import math
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import ray.train
import torch
from ray import tune
from ray.util.queue import Queue

from dmvae import checkpoint
from dmvae.config.search import SearchConfig, lay_over
from dmvae.config.training import TrainConfig
from dmvae.data.dataset import open_dataset
from dmvae.merit import Judge, Merit
from dmvae.model import DMVAE
from dmvae.platform import shelf
from dmvae.platform.spool import MetricSpool, TrackedRun
from dmvae.platform.study import PARAMS, RESULT, TrialResult, write_result
from dmvae.platform.tracking import open_run
from dmvae.platform.trainer import RunError, build_record, fit, keep_checkpoints, resolve
from dmvae.platform.worker import SCORE, WorkerData, WorkerTask, build_state
from dmvae.training import (
    EpochEnded,
    Logged,
    NonFiniteLossError,
    TrainState,
    Workers,
    is_finished,
    train,
)

TRIAL, EPOCH = "trial", "epoch"
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
            result = _outcome(task, folder, params, tracked)
            with tracked.spool() as spool:
                spool.log({f"trial/{name}": value for name, value in result.figures.items()}, result.epochs)
                spool.end("FINISHED" if result.status == "complete" else "FAILED", result.reason)
        write_result(folder, result)
    done = TrialResult(**json.loads((folder / RESULT).read_text()))
    if done.status == "complete":
        _tell(config, done.figures, config.base.training.epochs)
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
    laid = lay_over(config.base, params, folder.name, tuple(dataset.manifest.modalities))
    resolved = resolve(laid, dataset)
    judge = Judge(
        dataset.split(resolved.data.train_split),
        dataset.split(resolved.data.val_split),
        config.judged_rows,
        config.num_draws,
        config.seed,
    )
    with torch.device("meta"):
        size = sum(p.numel() for p in DMVAE(resolved.model).parameters())
    if size > config.limits.get("parameters", math.inf):
        reason = f"{size} parameters, beyond the limit of {config.limits['parameters']:g}"
        return TrialResult("infeasible", 0, {"parameters": float(size)}, reason, tracked.run_id)

    def judged(model: DMVAE, seconds: Merit | None = None) -> dict[str, float]:
        names = [name for name in config.objectives if name != "seconds_per_step"]
        merits = judge.merits(model.eval(), names) | ({} if seconds is None else {"seconds_per_step": seconds})
        model.train()
        return {f"{n}{end}": v for n, m in merits.items() for end, v in (("", m.value), ("_se", m.se))}

    if resolved.workers.num > 1:
        model, seconds = _train_nested(task, resolved, dataset.manifest.fingerprint, folder, tracked, judged)
    else:
        model, seconds = _train_here(task, resolved, dataset.manifest.fingerprint, folder, tracked, judged)
    figures = judged(model, seconds) | {"parameters": float(size)}
    took = time.monotonic() - begun
    if seconds.value > config.limits.get("seconds_per_step", math.inf):
        reason = f"{seconds.value:g} seconds a step, beyond the limit of {config.limits['seconds_per_step']:g}"
        return TrialResult("infeasible", resolved.training.epochs, figures, reason, tracked.run_id, took)
    return TrialResult("complete", resolved.training.epochs, figures, "", tracked.run_id, took)


Judged = Callable[..., dict[str, float]]


def _train_here(
    task: TrialTask, config: TrainConfig, fingerprint: str, folder: Path, tracked: TrackedRun, judged: Judged
) -> tuple[DMVAE, Merit]:
    """Train in this process; return the best epoch's model and the seconds that a step took."""
    torch.set_num_threads(max(1, int(config.workers.cpus)))
    use_gpu = torch.cuda.is_available() and config.workers.device != "cpu"
    state = build_state(config, torch.device("cuda" if use_gpu else "cpu"))
    kept = _Kept(folder, build_record(config, fingerprint))
    kept.resume(state)
    data, written, times = WorkerData(config, 0, 1, state.model.dtype), time.monotonic(), list[float]()
    with tracked.spool() as spool:
        for event in train(state, data, config, Workers(state.model)):
            if not isinstance(event, Logged):
                continue
            spool.log(event.metrics, event.global_step)
            if not isinstance(event, EpochEnded):
                continue
            times.append(config.training.batch_size / event.metrics["train/rows_per_second"])
            if event.improved:
                kept.remember(state.model)
            # the epoch's end is counted here, though the loop says so one event later
            if time.monotonic() - written > _CHECKPOINT_SECONDS or is_finished(state, config):
                kept.write(state)
                written = time.monotonic()
            _report_rung(task.config, event.epoch + 1, state.model, judged, spool, event.global_step, times)
    return kept.best(), _seconds(times)


class _Kept:
    """What a trial keeps on disk: its newest checkpoint, and the model of its best epoch.

    The model is written first. After a kill in between, training repeats the steps that lead to it.
    """

    def __init__(self, folder: Path, run: dict[str, Any]) -> None:
        self._folder, self._run = folder, run
        self._weights: DMVAE | None = None
        for left in folder.glob(".*.partial"):
            shelf.remove(left)

    def resume(self, state: TrainState) -> None:
        """Go back to the checkpoint, if there is a whole one."""
        try:
            checkpoint.load(state, self._folder / "checkpoint")
        except checkpoint.CheckpointError:
            return  # none yet, or one that a kill left broken: from the beginning

    def remember(self, model: DMVAE) -> None:
        """Hold on to the weights as they are now."""
        if self._weights is None:
            self._weights = DMVAE(model.config).to(model.device, model.dtype)
        self._weights.load_state_dict(model.state_dict())

    def write(self, state: TrainState) -> None:
        """Write the best model, if it is new, and the checkpoint, each in one move."""
        if self._weights is not None:
            draft = self._folder / ".best.partial"
            shelf.remove(draft)
            self._weights.save(draft)
            shelf.exchange(draft, self._folder / "best")
            self._weights = None
        fresh = self._folder / ".fresh.partial"
        shelf.remove(fresh)
        checkpoint.save(state, self._run, fresh)
        shelf.exchange(fresh, self._folder / "checkpoint")

    def best(self) -> DMVAE:
        """Return the model of the best epoch."""
        return DMVAE.load(self._folder / "best")


def _train_nested(
    task: TrialTask, config: TrainConfig, fingerprint: str, folder: Path, tracked: TrackedRun, judged: Judged
) -> tuple[DMVAE, Merit]:
    """Train with a TorchTrainer of its own; its first worker judges at the rungs."""
    record = build_record(config, fingerprint)
    shelf.mend(folder / "checkpoints", task.queue.put)
    at = rungs(task.config)
    times: list[float] = []

    def judge_epoch(model: DMVAE, epoch: int, rows_per_second: float) -> dict[str, float]:
        seconds = config.training.batch_size / rows_per_second
        figures = _values(task.config, judged(model, Merit(seconds))) if epoch in at else {}
        return {EPOCH: epoch, "seconds": seconds, **figures}

    worker_task = WorkerTask(config, record, tracked, task.queue, judge_epoch)
    result = fit(config, folder, worker_task, [_Forward(task.config, times)])
    keep_checkpoints(result, folder, task.queue.put)
    return DMVAE.load(folder / "best"), _seconds(times)


class _Forward(ray.train.UserCallback):
    """Hand the first worker's figures on to Tune, where it has any."""

    def __init__(self, config: SearchConfig, times: list[float]) -> None:
        self._config, self._times = config, times

    def after_report(self, run_context: Any, metrics: list[dict[str, Any]], checkpoint: Any) -> None:  # noqa: ARG002
        first = metrics[0]
        if "seconds" in first:
            self._times.append(first["seconds"])
        if set(value_names(self._config)) <= first.keys():
            tune.report({name: first[name] for name in (*value_names(self._config), EPOCH)})


def _seconds(times: list[float]) -> Merit:
    if not times:
        return Merit(math.nan, math.nan)
    mean = sum(times) / len(times)
    spread = math.sqrt(sum((t - mean) ** 2 for t in times) / max(len(times) - 1, 1) / len(times))
    return Merit(mean, spread)


def _report_rung(
    config: SearchConfig, epoch: int, model: DMVAE, judged: Judged, spool: MetricSpool, step: int, times: list[float]
) -> None:
    if epoch in rungs(config):
        figures = judged(model, _seconds(times))
        spool.log({f"rung/{name}": value for name, value in figures.items()}, step)
        _tell(config, figures, epoch)


def _values(config: SearchConfig, figures: dict[str, float]) -> dict[str, float]:
    return dict(zip(value_names(config), config.signed(figures), strict=True)) | {
        name: value for name, value in figures.items() if math.isfinite(value)
    }


def _tell(config: SearchConfig, figures: dict[str, float], epoch: int) -> None:
    tune.report({**_values(config, figures), EPOCH: epoch})
