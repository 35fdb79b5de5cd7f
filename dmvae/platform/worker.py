"""What one Ray Train worker does, from its first line to its last report."""

import math
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import ray.train
import ray.train.torch
import torch
import torch.distributed as dist
from ray.util.queue import Queue
from torch import Tensor
from torch.nn.parallel import DistributedDataParallel

from dmvae import checkpoint
from dmvae.batch import Batch
from dmvae.config.training import TrainConfig
from dmvae.data.dataset import open_dataset
from dmvae.data.loader import read_epoch, read_rows
from dmvae.data.order import EpochOrder
from dmvae.data.split import Split
from dmvae.model import DMVAE
from dmvae.platform.spool import MetricSpool, TrackedRun
from dmvae.training import (
    CheckpointDue,
    EpochEnded,
    Logged,
    NonFiniteLossError,
    Share,
    TrainState,
    Workers,
    build_optimizer,
    train,
)

SCORE = "score"
"""The reported figure by which Ray keeps checkpoints: smaller is better."""
_NEVER_BEST = sys.float_info.max
"""The score of a checkpoint within an epoch, kept as the newest only; Ray's snapshot turns an infinity into null."""
_DTYPES = {"float32": torch.float32, "float64": torch.float64, "bfloat16": torch.float32}
_BLOCK_ROWS = 256


@dataclass(frozen=True)
class WorkerTask:
    """What the driver hands to every worker.

    Attributes:
        config: resolved, `input_dims` included.
        run: what `run.json` says of this run.
        tracked: where rank 0 records.
        queue: takes lines for the person who waits.
    """

    config: TrainConfig
    run: dict[str, Any]
    tracked: TrackedRun
    queue: Queue


def work(payload: dict[str, Any]) -> dict[str, Any]:
    """Train as one of several workers; return how it ended, the same on every worker.

    A fault of the data or the settings ends the run with `{"failure": message}`: starting again would not help.
    """
    task: WorkerTask = payload["task"]
    context = ray.train.get_context()
    rank, num = context.get_world_rank(), context.get_world_size()
    device = ray.train.torch.get_device()
    torch.set_num_threads(max(1, int(task.config.workers.cpus)))
    state, data, fault = None, None, ""
    try:
        state = _build_state(task.config, device)
        data = WorkerData(task.config, rank, num, state.model.dtype)
        _resume(state, task.queue)
    except (ValueError, OSError) as error:
        fault = str(error)
    fault = _agree(fault, num)
    if fault or state is None or data is None:
        return {"failure": fault}
    workers = Workers(state.model) if num == 1 else _distribute(state.model, num, device)
    with task.tracked.spool() if rank == 0 else nullcontext() as spool:
        try:
            _train(state, data, task, workers, spool)
        except NonFiniteLossError as error:
            return {"failure": _agree(str(error), num)}
    return {"epochs": state.position.epoch, "best": state.best}


def _train(
    state: TrainState, data: "WorkerData", task: WorkerTask, workers: Workers, spool: MetricSpool | None
) -> None:
    steps = data.steps_per_epoch
    done = state.position.epoch * steps + state.position.step
    recorder = None if spool is None else Recorder(task, spool, task.config.training.epochs * steps, done)
    score = _NEVER_BEST
    for event in train(state, data, task.config, workers):
        if isinstance(event, CheckpointDue):
            _report(state, task, event.global_step, score)
            score = _NEVER_BEST
            continue
        if isinstance(event, EpochEnded):
            score = event.metrics[f"val/{task.config.training.monitor}"]
        if recorder is not None:
            recorder.record(event)


class WorkerData:
    """The rows of one worker: its share of every global batch, and its blocks of the validation split."""

    def __init__(self, config: TrainConfig, rank: int, num: int, dtype: torch.dtype) -> None:
        dataset = open_dataset(config.data.dataset)
        self._train: Split = dataset.split(config.data.train_split)
        self._validation: Split = dataset.split(config.data.val_split)
        self._rank, self._num, self._dtype = rank, num, dtype
        self._order = EpochOrder(
            self._train.record_batch_rows,
            seed=config.seed,
            batch_size=config.training.batch_size,
            streams=config.data.streams,
            window_rows=config.data.window_rows,
        )
        self.steps_per_epoch = self._order.num_batches

    def shares(self, epoch: int, first_step: int) -> Iterator[Share]:
        """Return this worker's share of every global batch of an epoch, from a step on."""
        for step, first, batch in read_epoch(
            self._train, self._order, epoch, first_step, self._rank, self._num, dtype=self._dtype
        ):
            yield Share(batch, step, first, self._order.batch_size_of(step))

    def validation_blocks(self) -> Iterator[Batch]:
        """Return every so-manieth block of the validation split."""
        blocks = read_rows(self._validation, _BLOCK_ROWS, self._rank, self._num, dtype=self._dtype)
        return (batch for _, batch in blocks)


def _build_state(config: TrainConfig, device: torch.device) -> TrainState:
    torch.manual_seed(config.seed)  # every worker starts from the same weights
    model = DMVAE(config.model).to(device, _DTYPES[config.training.precision])
    if config.init_from is not None:
        model.load_state_dict(DMVAE.load(config.init_from).state_dict())
    return TrainState(model, build_optimizer(model, config.optim))


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


def _distribute(model: DMVAE, num: int, device: torch.device) -> Workers:
    # unused parameters are ordinary: a worker's rows may all lack a modality. They also keep DDP from laying its
    # buckets out anew after the first step, which would change the order of sums and, after a resume, the last bits
    wrapped = DistributedDataParallel(
        model,
        device_ids=[device] if device.type == "cuda" else None,
        find_unused_parameters=True,
        gradient_as_bucket_view=True,
    )
    return Workers(wrapped, num, _sum_over_workers, wrapped.no_sync)


def _report(state: TrainState, task: WorkerTask, step: int, score: float) -> None:
    """Write a checkpoint (rank 0) and hand it to Ray, which keeps the newest and the best."""
    metrics = {"step": step, SCORE: score}
    if ray.train.get_context().get_world_rank() != 0:
        ray.train.report(metrics)
        return
    with tempfile.TemporaryDirectory() as folder:
        checkpoint.save(state, task.run, Path(folder))
        ray.train.report(metrics, checkpoint=ray.train.Checkpoint.from_directory(folder))


class Recorder:
    """What rank 0 does with the figures: MLflow's through the spool, a person's on the screen."""

    def __init__(self, task: WorkerTask, spool: MetricSpool, total_steps: int, done: int) -> None:
        self._training, self._queue, self._spool = task.config.training, task.queue, spool
        self._total_steps, self._first = total_steps, done
        self._start = self._printed = time.monotonic()
        self._loss = math.nan

    def record(self, event: Logged) -> None:
        """Take down an event's figures; print a line every epoch, and every ten seconds of a long one."""
        self._spool.log(event.metrics, event.global_step)
        self._loss = event.metrics.get("train/loss", self._loss)
        due = time.monotonic() - self._printed > 10
        if isinstance(event, EpochEnded) or due:
            self._queue.put(self._line(event))
            self._printed = time.monotonic()

    def _line(self, event: Logged) -> str:
        line = f"epoch {event.epoch + 1}/{self._training.epochs}  step {event.global_step}  loss {self._loss:.3f}"
        if isinstance(event, EpochEnded):
            figure = event.metrics[f"val/{self._training.monitor}"]
            line += f"  val/{self._training.monitor} {figure:.3f}{'*' if event.improved else ' '}"
            line += f" {event.metrics['train/rows_per_second']:,.0f} rows/s"
        done = event.global_step - self._first
        left = (time.monotonic() - self._start) / max(done, 1) * (self._total_steps - event.global_step)
        return f"{line}  {int(left) // 60}:{int(left) % 60:02d} left"


def _sum_over_workers(tensor: Tensor) -> Tensor:
    total = tensor.clone()
    dist.all_reduce(total)
    return total


def _agree(message: str, num: int) -> str:
    """Return the same message on every worker: one that names a fault in the worker's own rows, if there is any."""
    messages: list[Any] = [message]
    if num > 1:
        messages = [None] * num
        dist.all_gather_object(messages, message)
    return str(min(messages, key=lambda text: (not text, "another worker" in text)))
