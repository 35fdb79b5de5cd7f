"""One Ray Train worker: build, resume, train, and report checkpoints."""

import math
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import ray.train
import ray.train.torch
import torch
from ray.train import CheckpointUploadMode
from ray.util.queue import Queue

from dmvae.config.training import TrainConfig
from dmvae.model.dmvae import DMVAE
from dmvae.platform.stopping import Flag
from dmvae.platform.tracking.outbox import Outbox
from dmvae.platform.tracking.tracked_run import TrackedRun
from dmvae.platform.train.collectives import agree, distribute
from dmvae.platform.train.recorder import Recorder
from dmvae.platform.train.run_store import SCORE, RunStore
from dmvae.training import checkpoint
from dmvae.training.diagnosis import describe_latents
from dmvae.training.loop import CheckpointDue, EpochEnded, StepSkipped, train
from dmvae.training.setup import WorkerData, build_state
from dmvae.training.state import TrainState, is_finished
from dmvae.training.step import Collectives, NonFiniteLossError


@dataclass(frozen=True)
class WorkerTask:
    """What the driver sends to every worker.

    Attributes:
        config: resolved.
        run: the content of `run.json`.
        store: where checkpoints are saved.
        tracked: where rank 0 records metrics.
        queue: takes lines for the user.
        stop: raised when training should write a checkpoint and end; None: it never is.
        evaluator: returns more metrics for Ray at the end of an epoch, on rank 0.
    """

    config: TrainConfig
    run: dict[str, Any]
    store: RunStore
    tracked: TrackedRun
    queue: Queue
    stop: Flag | None = None
    evaluator: Callable[[DMVAE, EpochEnded], dict[str, float]] | None = None


def work(payload: dict[str, Any]) -> dict[str, Any]:
    """Train as one of several workers; return how training ended, the same on every worker.

    An error in the data or the settings ends the run with `{"failure": message}`, because a retry would not help.
    """
    task: WorkerTask = payload["task"]
    context = ray.train.get_context()
    rank, world_size = context.get_world_rank(), context.get_world_size()
    device = ray.train.torch.get_device()
    torch.set_num_threads(max(1, int(task.config.workers.cpus)))
    state, data, outbox, fault = None, None, None, ""
    with ExitStack() as stack:
        try:
            state = build_state(task.config, device)
            data = WorkerData(task.config, rank, world_size, state.model.dtype, device)
            _resume(state, task.queue)
            outbox = stack.enter_context(Outbox(task.tracked)) if rank == 0 else None
        except (ValueError, OSError) as error:
            fault = str(error)
        fault = agree(fault, world_size)
        if fault or state is None or data is None:
            return {"failure": fault}
        if rank == 0 and is_finished(state, task.config) and state.position.epoch < task.config.training.epochs:
            task.queue.put(
                f"early stopping after epoch {state.position.epoch}: val/{task.config.training.monitor} has not "
                f"improved for {state.epochs_since_best} epochs. Raise training.patience to train further."
            )
        stop = None if task.stop is None else task.stop.watch()
        workers = (
            Collectives(state.model, stop_requested=stop)
            if world_size == 1
            else distribute(state.model, world_size, device, stop)
        )
        try:
            _train(state, data, task, workers, outbox)
        except NonFiniteLossError as error:
            return {"failure": agree(str(error), world_size)}
        except DiskError as error:
            return {"failure": str(error)}
    return {"epochs": state.position.epoch, "best": state.best}


def _train(
    state: TrainState, data: "WorkerData", task: WorkerTask, workers: Collectives, outbox: Outbox | None
) -> None:
    steps = data.steps_per_epoch
    done = state.position.epoch * steps + state.position.step
    total, log = task.config.training.epochs * steps, task.queue.put
    recorder = None if outbox is None else Recorder(task.config.training, outbox, log, total, done)
    score, is_best, evaluated = None, False, dict[str, float]()
    last: EpochEnded | None = None
    for event in train(state, data, task.config, workers):
        if isinstance(event, CheckpointDue):
            report = {"step": event.global_step, SCORE: score, **evaluated}
            _report(state, task, report, is_best, workers.world_size, recorder)
            score, is_best, evaluated = None, False, {}
        elif isinstance(event, StepSkipped):
            fault = agree(event.fault, workers.world_size)
            if recorder is not None:
                log(f"warning: Skipped a step ({state.skipped} so far): {fault}")
        else:
            if isinstance(event, EpochEnded):
                last = event
                score, is_best = event.metrics.get(f"val/{task.config.training.monitor}", math.nan), event.improved
                if task.evaluator is not None and recorder is not None:
                    evaluated = task.evaluator(state.model, event)
            if recorder is not None:
                recorder.record(event)
    if last is not None and recorder is not None and task.evaluator is None:
        for line in describe_latents(task.config.model, last.metrics):
            log(line)


def _resume(state: TrainState, queue: Queue) -> None:
    """Load the newest checkpoint; if it is damaged, warn and load the one before it."""
    if ray.train.get_checkpoint() is None:
        return
    is_rank_0 = ray.train.get_context().get_world_rank() == 0
    reported = ray.train.get_all_reported_checkpoints()
    newest_first = sorted(reported, key=lambda entry: entry.metrics["step"], reverse=True)
    for entry in newest_first:
        try:
            with entry.checkpoint.as_directory() as folder:
                checkpoint.load(state, Path(folder))
        except checkpoint.CheckpointError as error:
            if is_rank_0:
                queue.put(f"warning: {error} Skipping it.")
            continue
        if is_rank_0:
            queue.put(f"resuming after {state.position.epoch} epochs and {state.position.step} steps")
        return
    raise checkpoint.CheckpointError(
        f"All {len(newest_first)} checkpoints of the run are damaged. Remove the run and train it again."
    )


class DiskError(Exception):
    """Rank 0 could not write a checkpoint or metrics; raised on every worker."""


def _report(
    state: TrainState,
    task: WorkerTask,
    report: dict[str, Any],
    is_best: bool,
    world_size: int,
    recorder: Recorder | None,
) -> None:
    """Write a checkpoint on rank 0, and report it to Ray on all workers.

    Raises:
        DiskError: if the checkpoint, or metrics since the last one, could not be written.
    """
    written, fault = None, ""
    if recorder is not None:
        try:
            recorder.raise_fault()
            saved = task.store.save(state, task.run, report, is_best)
            written = ray.train.Checkpoint(saved.path, saved.filesystem)
        except OSError as error:
            fault = str(error)
    fault = agree(fault, world_size)
    if fault:
        raise DiskError(
            f"Could not write a checkpoint or metrics: {fault}. Free some space, then run the same command again: it "
            "resumes from the last checkpoint, which is intact."
        )
    ray.train.report(report, checkpoint=written, checkpoint_upload_mode=CheckpointUploadMode.NO_UPLOAD)
