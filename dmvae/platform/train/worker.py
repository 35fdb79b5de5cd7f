"""One Ray Train worker: build, resume, train, and report checkpoints."""

import os
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from shutil import which
from socket import gethostname
from typing import Any

import numpy as np
import ray.train
import ray.train.torch
import torch
from ray.train import CheckpointUploadMode
from ray.util.queue import Queue

from dmvae.config.training import TrainConfig
from dmvae.data.batch import Batch
from dmvae.data.reading.dataset import open_dataset
from dmvae.data.reading.loader import read_epoch, read_rows
from dmvae.data.reading.sampler import EpochSampler
from dmvae.data.reading.split import Split
from dmvae.model.dmvae import DMVAE
from dmvae.platform.tracking.outbox import Outbox
from dmvae.platform.tracking.tracked_run import TrackedRun
from dmvae.platform.train.collectives import agree, distribute
from dmvae.platform.train.recorder import Recorder
from dmvae.platform.train.run_store import SCORE, RunStore
from dmvae.training import checkpoint
from dmvae.training.loop import CheckpointDue, EpochEnded, StepSkipped, train
from dmvae.training.state import TrainState, build_optimizer, is_finished
from dmvae.training.step import Collectives, NonFiniteLossError, WorkerBatch

_DTYPES = {"float32": torch.float32, "float64": torch.float64, "bfloat16": torch.float32}
_BLOCK_ROWS = 256
_INITIAL_ROWS = 4096  # the first of the training split, which are shuffled; the same for any number of workers


@dataclass(frozen=True)
class WorkerTask:
    """What the driver sends to every worker.

    Attributes:
        config: resolved.
        run: the content of `run.json`.
        store: where checkpoints are saved.
        tracked: where rank 0 records metrics.
        queue: takes lines for the user.
        evaluator: returns more metrics for Ray at the end of an epoch, on rank 0.
    """

    config: TrainConfig
    run: dict[str, Any]
    store: RunStore
    tracked: TrackedRun
    queue: Queue
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
        workers = Collectives(state.model) if world_size == 1 else distribute(state.model, world_size, device)
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
                score, is_best = event.metrics[f"val/{task.config.training.monitor}"], event.improved
                if task.evaluator is not None and recorder is not None:
                    evaluated = task.evaluator(state.model, event)
            if recorder is not None:
                recorder.record(event)


class WorkerData:
    """One worker's rows: its part of every global batch, and its blocks of the validation split."""

    def __init__(
        self, config: TrainConfig, rank: int, world_size: int, dtype: torch.dtype, device: torch.device | None = None
    ) -> None:
        dataset = open_dataset(config.data.dataset)
        self._train: Split = dataset.split(config.data.train_split)
        self._validation: Split = dataset.split(config.data.val_split)
        self._rank, self._world_size, self._dtype = rank, world_size, dtype
        self._device = None if device is None or device.type == "cpu" else device
        self._sampler = EpochSampler(
            self._train.record_batch_rows,
            seed=config.seed,
            batch_size=config.training.batch_size,
            streams=config.data.streams,
            window_rows=config.data.window_rows,
            shards=self._train.record_batch_shards if config.data.unit == "shard" else None,
        )
        self.steps_per_epoch = self._sampler.num_batches

    def batches(self, epoch: int, first_step: int) -> Iterator[WorkerBatch]:
        """Yield this worker's part of every global batch of an epoch, from a step on."""
        pin = self._device is not None and self._device.type == "cuda"
        for step, first, batch in read_epoch(
            self._train, self._sampler, epoch, first_step, self._rank, self._world_size, self._dtype, pin
        ):
            moved = batch if self._device is None else batch.to(self._device, non_blocking=True)
            yield WorkerBatch(moved, step, first, self._sampler.batch_size_of(step))

    def validation_blocks(self) -> Iterator[Batch]:
        """Yield every `world_size`-th block of the validation split."""
        blocks = read_rows(self._validation, _BLOCK_ROWS, self._rank, self._world_size, dtype=self._dtype)
        return (batch for _, batch in blocks)


def build_state(config: TrainConfig, device: torch.device) -> TrainState:
    """Return the model and optimiser of a run before its first step."""
    torch.manual_seed(config.seed)  # every worker starts from the same weights
    model = DMVAE(config.model).to(device, _DTYPES[config.training.precision])
    if any(True for module in model.likelihoods.values() for _ in module.parameters()):
        split = open_dataset(config.data.dataset).split(config.data.train_split)
        model.initialize_likelihoods(split.read(np.arange(min(_INITIAL_ROWS, len(split)))))
    if config.init_from is not None:
        model.load_state_dict(DMVAE.load(config.init_from).state_dict())
    if config.training.compile:
        _compile(model, device)
    return TrainState(model, build_optimizer(model, config.optim))


def _compile(model: DMVAE, device: torch.device) -> None:
    """Compile the networks; the code around them depends on which rows have which modality.

    Raises:
        ValueError: if no compiler for this device is installed.
    """
    variable, usual = ("CC", "gcc") if device.type == "cuda" else ("CXX", "g++")
    compiler = os.environ.get(variable) or usual
    if which(compiler) is None:
        raise ValueError(
            f"training.compile needs a compiler on every node, but {compiler!r} was not found on {gethostname()}. "
            f"Install it (the image for GPUs has gcc), set {variable}, or remove training.compile."
        )
    for network in (*model.encoders.values(), *model.decoders.values()):
        network.compile(dynamic=True)


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
