"""The training loop in plain torch: one worker or many, on any device.

Every random number is a function of (seed, epoch, step, position in the global batch), so a run has the same result
for any number of workers and from any checkpoint.
"""

import math
import time
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Protocol, runtime_checkable

import torch

from dmvae.config.training import TrainConfig
from dmvae.data.batch import Batch
from dmvae.model.encoding import ACTIVE_VARIANCE
from dmvae.model.loss import TermSums
from dmvae.training.checkpoint_schedule import CheckpointClock, StopWatch
from dmvae.training.state import Position, TrainState, is_finished, zero_terms
from dmvae.training.step import Collectives, StepReport, WorkerBatch, train_epoch
from dmvae.training.validation import validate


@runtime_checkable
class TrainingData(Protocol):
    """The rows that one worker reads."""

    steps_per_epoch: int

    def batches(self, epoch: int, first_step: int) -> Iterator[WorkerBatch]:
        """Yield this worker's part of every global batch of an epoch, from a step on."""
        ...

    def validation_blocks(self) -> Iterator[Batch]:
        """Yield this worker's rows of the validation split."""
        ...


@dataclass(frozen=True)
class MetricsLogged:
    """Training metrics over all workers since the last such event.

    Attributes:
        global_step: steps since the run began.
        epoch: index of the epoch, from 0.
        metrics: by name; terms in nats per row.
    """

    global_step: int
    epoch: int
    metrics: dict[str, float]


@dataclass(frozen=True)
class EpochEnded(MetricsLogged):
    """Validation metrics of an epoch; `improved` tells whether the monitored one is the best so far."""

    improved: bool


@dataclass(frozen=True)
class StepSkipped:
    """A step was skipped on every worker; `fault` says why, as far as this worker knows."""

    global_step: int
    fault: str


@dataclass(frozen=True)
class CheckpointDue:
    """A checkpoint of the state is due."""

    global_step: int
    epoch: int


def train(
    state: TrainState, data: TrainingData, config: TrainConfig, collectives: Collectives
) -> Iterator[MetricsLogged | EpochEnded | StepSkipped | CheckpointDue]:
    """Train from the state's position until the run is finished; all workers yield the same events.

    If the collectives say that training should stop, the last event is a checkpoint.

    Raises:
        NonFiniteLossError: on every worker.
    """
    steps = data.steps_per_epoch
    done = state.position.epoch * steps + state.position.step
    clock = CheckpointClock(config.training, collectives.clock, done)
    watch = StopWatch(collectives.stop_requested, collectives.clock)
    while not is_finished(state, config):
        epoch, start, rows = state.position.epoch, time.perf_counter(), 0
        pending = zero_terms(state.model)  # this worker's terms that are not yet reduced
        batches, stop_now = data.batches(epoch, state.position.step), False
        for report in train_epoch(state, batches, config, collectives, steps):
            pending, rows = pending + report.terms, rows + report.rows
            done = epoch * steps + state.position.step
            at_end = state.position.step == steps
            log_now = at_end or done % config.training.log_steps == 0
            stop_now = watch.is_time()
            checkpoint_now = (clock.is_due(done) or stop_now) and not at_end
            if report.fault:
                yield StepSkipped(done, report.fault)
            if log_now or checkpoint_now:
                state.window, pending = state.window + _all_reduce(pending, collectives), zero_terms(state.model)
            if log_now:
                yield MetricsLogged(done, epoch, _training_metrics(state, report))
                state.window = zero_terms(state.model)
            if checkpoint_now:
                yield CheckpointDue(done, epoch)
            if stop_now and not at_end:
                return
        rows_per_second = rows / (time.perf_counter() - start)
        done, state.position = (epoch + 1) * steps, Position(epoch + 1, 0)
        yield _end_epoch(state, data, config, collectives, {"train/rows_per_second": rows_per_second})
        yield CheckpointDue(done, epoch)
        if stop_now:
            return


def _training_metrics(state: TrainState, report: StepReport) -> dict[str, float]:
    every, means = state.window.means(), state.window.observed_means()
    counts = dict(zip(state.window.names, state.window.count.tolist(), strict=True))
    modalities = state.model.config.modalities
    means["loss"] = sum(float(every[source]) for source in state.model.config.source_names)
    means |= {f"observed/{name}": counts[f"kl_private/{name}"] / max(counts["joint"], 1) for name in modalities}
    means |= {"gradient_norm": report.gradient_norm, "learning_rate": report.learning_rate}
    means["skipped_steps"] = state.skipped
    return {f"train/{name}": value for name, value in means.items()}


def _end_epoch(
    state: TrainState, data: TrainingData, config: TrainConfig, collectives: Collectives, metrics: dict[str, float]
) -> EpochEnded:
    means, variances = validate(state.model, data.validation_blocks(), config, collectives.all_reduce)
    improved = state.record_validation(means.get(config.training.monitor, math.nan), config.optim)
    metrics |= {f"val/{name}": value for name, value in means.items()}
    metrics |= {f"val/active_units/{block}": int((v > ACTIVE_VARIANCE).sum()) for block, v in variances.items()}
    epoch = state.position.epoch
    return EpochEnded(epoch * data.steps_per_epoch, epoch - 1, metrics, improved)


def _all_reduce(terms: TermSums, collectives: Collectives) -> TermSums:
    total, count = collectives.all_reduce(torch.stack((terms.total, terms.count)))
    return TermSums(terms.names, total, count)
