"""What one Ray Train worker does, from its first line to its last report."""

import math
import os
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from shutil import which
from socket import gethostname
from typing import Any

import ray.train
import ray.train.torch
import torch
import torch.distributed as dist
from ray.train import CheckpointUploadMode
from ray.util.queue import Queue
from torch import Tensor
from torch.nn.parallel import DistributedDataParallel

from dmvae.config.training import TrainConfig
from dmvae.data.batch import Batch
from dmvae.data.progress import Progress
from dmvae.data.reading.dataset import open_dataset
from dmvae.data.reading.loader import read_epoch, read_rows
from dmvae.data.reading.sampler import EpochSampler
from dmvae.data.reading.split import Split
from dmvae.model.dmvae import DMVAE
from dmvae.platform.tracking.outbox import Outbox
from dmvae.platform.tracking.tracked_run import TrackedRun
from dmvae.platform.train.run_store import SCORE, RunStore
from dmvae.training import checkpoint
from dmvae.training.loop import CheckpointDue, EpochEnded, MetricsLogged, StepSkipped, train
from dmvae.training.state import TrainState, build_optimizer, is_finished
from dmvae.training.step import Collectives, NonFiniteLossError, WorkerBatch

_DTYPES = {"float32": torch.float32, "float64": torch.float64, "bfloat16": torch.float32}
_BLOCK_ROWS = 256


@dataclass(frozen=True)
class WorkerTask:
    """What the driver hands to every worker.

    Attributes:
        config: resolved, `input_dims` included.
        run: what `run.json` says of this run.
        store: keeps its checkpoints.
        tracked: where rank 0 records.
        queue: takes lines for the person who waits.
        judge: what rank 0 reports to Ray beyond that, at the end of an epoch.
    """

    config: TrainConfig
    run: dict[str, Any]
    store: RunStore
    tracked: TrackedRun
    queue: Queue
    judge: Callable[[DMVAE, EpochEnded], dict[str, float]] | None = None


def work(payload: dict[str, Any]) -> dict[str, Any]:
    """Train as one of several workers; return how it ended, the same on every worker.

    A fault of the data or the settings ends the run with `{"failure": message}`: starting again would not help.
    """
    task: WorkerTask = payload["task"]
    context = ray.train.get_context()
    rank, num = context.get_world_rank(), context.get_world_size()
    device = ray.train.torch.get_device()
    torch.set_num_threads(max(1, int(task.config.workers.cpus)))
    state, data, outbox, fault = None, None, None, ""
    with ExitStack() as stack:
        try:
            state = build_state(task.config, device)
            data = WorkerData(task.config, rank, num, state.model.dtype, device)
            _resume(state, task.queue)
            outbox = stack.enter_context(Outbox(task.tracked)) if rank == 0 else None
        except (ValueError, OSError) as error:
            fault = str(error)
        fault = _agree(fault, num)
        if fault or state is None or data is None:
            return {"failure": fault}
        if rank == 0 and is_finished(state, task.config) and state.position.epoch < task.config.training.epochs:
            task.queue.put(
                f"no better figure for {state.epochs_since_best} epochs stopped this run after {state.position.epoch}; "
                "raise training.patience to train it further"
            )
        workers = Collectives(state.model) if num == 1 else _distribute(state.model, num, device)
        try:
            _train(state, data, task, workers, outbox)
        except NonFiniteLossError as error:
            return {"failure": _agree(str(error), num)}
        except DiskError as error:
            return {"failure": str(error)}
    return {"epochs": state.position.epoch, "best": state.best}


def _train(
    state: TrainState, data: "WorkerData", task: WorkerTask, workers: Collectives, outbox: Outbox | None
) -> None:
    steps = data.steps_per_epoch
    done = state.position.epoch * steps + state.position.step
    recorder = None if outbox is None else Recorder(task, outbox, task.config.training.epochs * steps, done)
    score, is_best, judged = None, False, dict[str, float]()
    for event in train(state, data, task.config, workers):
        if isinstance(event, CheckpointDue):
            report = {"step": event.global_step, SCORE: score, **judged}
            _report(state, task, report, is_best, workers.world_size, recorder)
            score, is_best, judged = None, False, {}
        elif isinstance(event, StepSkipped):
            fault = _agree(event.fault, workers.world_size)
            if recorder is not None:
                recorder.say(f"warning: a step is left out ({state.skipped} so far): {fault}")
        else:
            if isinstance(event, EpochEnded):
                score, is_best = event.metrics[f"val/{task.config.training.monitor}"], event.improved
                if task.judge is not None and recorder is not None:
                    judged = task.judge(state.model, event)
            if recorder is not None:
                recorder.record(event)


class WorkerData:
    """The rows of one worker: its share of every global batch, and its blocks of the validation split."""

    def __init__(
        self, config: TrainConfig, rank: int, num: int, dtype: torch.dtype, device: torch.device | None = None
    ) -> None:
        dataset = open_dataset(config.data.dataset)
        self._train: Split = dataset.split(config.data.train_split)
        self._validation: Split = dataset.split(config.data.val_split)
        self._rank, self._num, self._dtype = rank, num, dtype
        self._device = None if device is None or device.type == "cpu" else device
        self._order = EpochSampler(
            self._train.record_batch_rows,
            seed=config.seed,
            batch_size=config.training.batch_size,
            streams=config.data.streams,
            window_rows=config.data.window_rows,
            shards=self._train.record_batch_shards if config.data.unit == "shard" else None,
        )
        self.steps_per_epoch = self._order.num_batches

    def batches(self, epoch: int, first_step: int) -> Iterator[WorkerBatch]:
        """Return this worker's share of every global batch of an epoch, from a step on."""
        pin = self._device is not None and self._device.type == "cuda"
        for step, first, batch in read_epoch(
            self._train, self._order, epoch, first_step, self._rank, self._num, self._dtype, pin
        ):
            there = batch if self._device is None else batch.to(self._device, non_blocking=True)
            yield WorkerBatch(there, step, first, self._order.batch_size_of(step))

    def validation_blocks(self) -> Iterator[Batch]:
        """Return every so-manieth block of the validation split."""
        blocks = read_rows(self._validation, _BLOCK_ROWS, self._rank, self._num, dtype=self._dtype)
        return (batch for _, batch in blocks)


def build_state(config: TrainConfig, device: torch.device) -> TrainState:
    """Build a run's model and optimiser as they are before the first step."""
    torch.manual_seed(config.seed)  # every worker starts from the same weights
    model = DMVAE(config.model).to(device, _DTYPES[config.training.precision])
    if config.init_from is not None:
        model.load_state_dict(DMVAE.load(config.init_from).state_dict())
    if config.training.compile:
        _compile(model, device)
    return TrainState(model, build_optimizer(model, config.optim))


def _compile(model: DMVAE, device: torch.device) -> None:
    """Have torch compile the networks; what is around them depends on which rows have what.

    Raises:
        ValueError: if there is no compiler for this device.
    """
    variable, usual = ("CC", "gcc") if device.type == "cuda" else ("CXX", "g++")
    compiler = os.environ.get(variable) or usual
    if which(compiler) is None:
        raise ValueError(
            f"training.compile needs a compiler on every node; {gethostname()} has no {compiler!r}. "
            f"Install it (the image for GPUs has gcc), set {variable}, or leave training.compile out."
        )
    for network in (*model.encoders.values(), *model.decoders.values()):
        network.compile(dynamic=True)


def _resume(state: TrainState, queue: Queue) -> None:
    """Go back to the newest checkpoint that is whole; a broken one is named, and the one before it is used."""
    if ray.train.get_checkpoint() is None:
        return
    is_first = ray.train.get_context().get_world_rank() == 0
    reported = ray.train.get_all_reported_checkpoints()
    newest_first = sorted(reported, key=lambda entry: entry.metrics["step"], reverse=True)
    for entry in newest_first:
        try:
            with entry.checkpoint.as_directory() as folder:
                checkpoint.load(state, Path(folder))
        except checkpoint.CheckpointError as error:
            if is_first:
                queue.put(f"warning: a checkpoint is not used, the one before it is: {error}")
            continue
        if is_first:
            queue.put(f"resuming after {state.position.epoch} epochs and {state.position.step} steps")
        return
    raise checkpoint.CheckpointError(f"no checkpoint of this run is whole; tried {len(newest_first)}.")


def _distribute(model: DMVAE, num: int, device: torch.device) -> Collectives:
    # unused parameters are ordinary: a worker's rows may all lack a modality. They also keep DDP from laying its
    # buckets out anew after the first step, which would change the order of sums and, after a resume, the last bits
    wrapped = DistributedDataParallel(
        model,
        device_ids=[device] if device.type == "cuda" else None,
        find_unused_parameters=True,
        gradient_as_bucket_view=True,
    )
    return Collectives(wrapped, num, _sum_over_workers, _first_workers_clock, wrapped.no_sync)


class DiskError(Exception):
    """The first worker cannot write; raised on every worker alike."""


def _report(
    state: TrainState,
    task: WorkerTask,
    report: dict[str, Any],
    is_best: bool,
    num: int,
    recorder: "Recorder | None",
) -> None:
    """Write a checkpoint (rank 0) and tell Ray, once all workers know that it is there.

    Raises:
        DiskError: if it, or a figure since the last one, could not be written.
    """
    written, fault = None, ""
    if recorder is not None:
        try:
            recorder.raise_fault()
            saved = task.store.save(state, task.run, report, is_best)
            written = ray.train.Checkpoint(saved.path, saved.filesystem)
        except OSError as error:
            fault = str(error)
    fault = _agree(fault, num)
    if fault:
        raise DiskError(
            f"a run needs a disk that takes its checkpoints and figures; got {fault}. Make room; the same command goes "
            "on from the last checkpoint, which is whole."
        )
    ray.train.report(report, checkpoint=written, checkpoint_upload_mode=CheckpointUploadMode.NO_UPLOAD)


class Recorder:
    """What rank 0 does with the figures: MLflow's through the outbox, a person's on the screen.

    An outbox that cannot be written does not stop one worker among several; `raise_fault` says so when all can stop.
    """

    def __init__(self, task: WorkerTask, outbox: Outbox, total_steps: int, done: int) -> None:
        self._training, self._queue, self._outbox = task.config.training, task.queue, outbox
        self._progress = Progress(self.say, "step", total_steps, "steps", already_done=done)
        self._loss = math.nan
        self._fault: OSError | None = None

    def record(self, event: MetricsLogged) -> None:
        """Take down an event's figures; print a line every epoch, and every ten seconds of a long one."""
        try:
            self._outbox.log_metrics(event.metrics, event.global_step)
        except OSError as error:
            self._fault = error
        self._loss = event.metrics.get("train/loss", self._loss)
        is_due = self._progress.is_due()
        if isinstance(event, EpochEnded) or is_due:
            self.say(self._line(event))

    def say(self, line: str) -> None:
        """Show a line to the person who waits."""
        self._queue.put(line)

    def raise_fault(self) -> None:
        """Raise what kept a figure from being written, if anything did."""
        if self._fault is not None:
            raise self._fault

    def _line(self, event: MetricsLogged) -> str:
        line = f"epoch {event.epoch + 1}/{self._training.epochs}  step {event.global_step}  loss {self._loss:.3f}"
        if isinstance(event, EpochEnded):
            figure = event.metrics[f"val/{self._training.monitor}"]
            line += f"  val/{self._training.monitor} {figure:.3f}{'*' if event.improved else ' '}"
            line += f" {event.metrics['train/rows_per_second']:,.0f} rows/s"
        return f"{line}  {self._progress.time_left(event.global_step)}"


def _sum_over_workers(tensor: Tensor) -> Tensor:
    total = tensor.clone()
    dist.all_reduce(total)
    return total


def _first_workers_clock() -> float:
    # NCCL knows no tensors in the host's memory
    reading = torch.tensor([time.monotonic()], dtype=torch.float64, device=ray.train.torch.get_device())
    dist.broadcast(reading, 0)
    return float(reading)


def _agree(message: str, num: int) -> str:
    """Return the same message on every worker: one that names a fault in the worker's own rows, if there is any."""
    messages: list[Any] = [message]
    if num > 1:
        messages = [None] * num
        dist.all_gather_object(messages, message)
    return str(min(messages, key=lambda text: (not text, "another worker" in text)))
