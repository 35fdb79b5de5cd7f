"""The training loop: plain torch on any device; how many workers there are is the caller's business.

Every random number is addressed by (seed, epoch, step, position in the global batch), so a run is the same run on
any number of workers and from any checkpoint.
"""

import math
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field, replace
from typing import Any, Protocol, runtime_checkable

import torch
from torch import Tensor, nn

from dmvae.config.training import OptimConfig, TrainConfig
from dmvae.data.batch import Batch
from dmvae.distributions.noise import chain
from dmvae.model.dmvae import DMVAE
from dmvae.model.encoding import ACTIVE_VARIANCE
from dmvae.model.loss import TermSums, term_names
from dmvae.model.outputs import DMVAEOutput
from dmvae.training.checkpoint_schedule import CheckpointClock
from dmvae.training.validation import autocast, draw_noise, validate

_TRAIN = 1  # second part of a noise key; validation has another


class NonFiniteLossError(RuntimeError):
    """The loss, or its gradient, is not a number or infinite."""


@dataclass(frozen=True)
class Position:
    """How far training has come: `step` steps of `epoch` are done."""

    epoch: int = 0
    step: int = 0


@dataclass
class TrainState:
    """All that a run is made of: with it, the run goes on as if it had never stopped.

    Attributes:
        model: the weights.
        optimizer: its moments.
        position: steps done.
        best: the smallest validation figure so far; None before the first.
        epochs_since_best: validations since then.
        halvings: of the learning rate, by the plateau schedule.
        skipped: steps left out so far because their loss or gradient was not finite.
        window: the training terms since they were last logged, of all workers.
    """

    model: DMVAE
    optimizer: torch.optim.Optimizer
    position: Position = field(default_factory=Position)
    best: float | None = None
    epochs_since_best: int = 0
    halvings: int = 0
    skipped: int = 0
    window: TermSums = field(init=False)

    def __post_init__(self) -> None:
        self.window = _zero_terms(self.model)

    def record_validation(self, figure: float, optim: OptimConfig) -> bool:
        """Take note of an epoch's validation figure; tell whether it is the best so far."""
        is_best = math.isfinite(figure) and (self.best is None or figure < self.best)
        if is_best:
            self.best, self.epochs_since_best = figure, 0
        else:
            self.epochs_since_best += 1
            if optim.schedule == "plateau" and self.epochs_since_best % optim.plateau_epochs == 0:
                self.halvings += 1
        return is_best


@dataclass(frozen=True, eq=False)
class WorkerBatch:
    """One worker's part of a global batch.

    Attributes:
        batch: its rows; there may be none.
        step: number of the global batch in the epoch.
        first: position of its first row in the global batch.
        global_rows: rows of the global batch.
    """

    batch: Batch
    step: int
    first: int
    global_rows: int


@dataclass(frozen=True, eq=False)
class Collectives:
    """What the loop needs of the other workers; alone, the identity.

    Attributes:
        num: how many there are; gradients are averaged over them.
        add: sums a float64 tensor over them, the same result on each.
        clock: seconds that have passed on one of them, the same reading on each; all must ask together.
        forward: the model, wrapped where gradients have to be reduced.
        without_reduction: a context in which backward passes only accumulate.
    """

    forward: nn.Module
    num: int = 1
    add: Callable[[Tensor], Tensor] = lambda tensor: tensor
    clock: Callable[[], float] = time.monotonic
    without_reduction: Callable[[], AbstractContextManager[Any]] = nullcontext


@dataclass(frozen=True)
class StepReport:
    """One optimiser step: the terms of this worker's rows, and the norm of the global gradient before clipping.

    A step whose gradient is not finite has changed nothing and says so in `fault`; it has no terms.
    """

    step: int
    terms: TermSums
    gradient_norm: float
    learning_rate: float
    rows: int
    fault: str = ""


def build_optimizer(model: nn.Module, optim: OptimConfig) -> torch.optim.Optimizer:
    """Build Adam or AdamW, fused: one kernel for all parameters."""
    if optim.algorithm == "adam":
        return torch.optim.Adam(model.parameters(), lr=optim.learning_rate, fused=True)
    return torch.optim.AdamW(model.parameters(), lr=optim.learning_rate, weight_decay=optim.weight_decay, fused=True)


def learning_rate(optim: OptimConfig, done: int, total: int, halvings: int) -> float:
    """Return the rate of the step after `done` of `total` steps: warm-up times schedule."""
    rate = optim.learning_rate * min(1.0, (done + 1) / optim.warmup_steps if optim.warmup_steps else 1.0)
    if optim.schedule == "cosine":
        rate *= 0.5 * (1 + math.cos(math.pi * min(done / total, 1.0)))
    return rate * 0.5**halvings


def train_epoch(
    state: TrainState, shares: Iterable[WorkerBatch], config: TrainConfig, workers: Collectives, steps_per_epoch: int
) -> Iterator[StepReport]:
    """Train on the shares of one epoch from the state's position on, yielding after every step.

    The gradient is that of the mean row loss of the global batch, however its rows are spread. Where it is not finite,
    the step is left out as long as `training.skip_nonfinite` allows, on every worker alike.

    Raises:
        NonFiniteLossError: on every worker alike, before the weights are touched.
    """
    state.model.train()
    total, parameters = config.training.epochs * steps_per_epoch, list(state.model.parameters())
    for share in shares:
        done = state.position.epoch * steps_per_epoch + share.step
        rate = learning_rate(config.optim, done, total, state.halvings)
        for group in state.optimizer.param_groups:
            group["lr"] = rate
        state.optimizer.zero_grad(set_to_none=True)
        _seed_dropout(state, config, share)
        terms, culprits = _accumulate(state, share, config, workers, done)
        for parameter in parameters:
            if parameter.grad is None:
                # of a modality that no row of the global batch has, as far as this worker can know; others may have got
                # zeros from the reduction, and the optimiser treats None and zero differently
                parameter.grad = torch.zeros_like(parameter)
        norm = _clip(parameters, config.optim.clip_norm)
        fault = "" if math.isfinite(norm) else _fault(state, share.step, culprits)
        if fault:
            if state.skipped >= config.training.skip_nonfinite:
                raise NonFiniteLossError(
                    f"{fault}. Lower optim.learning_rate, set optim.clip_norm, look at those rows, or allow a few such "
                    f"steps to be left out with training.skip_nonfinite (now {config.training.skip_nonfinite})."
                )
            state.skipped, terms = state.skipped + 1, _zero_terms(state.model)
        else:
            state.optimizer.step()
        state.position = replace(state.position, step=share.step + 1)
        yield StepReport(share.step, terms, norm, rate, share.global_rows, fault)


def _clip(parameters: list[nn.Parameter], clip_norm: float | None) -> float:
    """Scale the gradient down to the norm asked for, if it is longer; return its norm before."""
    # as `nn.utils.get_total_norm`, which takes several times as long with small parameters
    norms = torch._foreach_norm([p.grad for p in parameters if p.grad is not None])
    norm = torch.linalg.vector_norm(torch.stack(norms))
    if clip_norm is not None:
        nn.utils.clip_grads_with_norm_(parameters, clip_norm, norm)
    return float(norm)


def _fault(state: TrainState, step: int, culprits: str) -> str:
    where = f"a loss is finite; it is not at epoch {state.position.epoch + 1}, step {step + 1}"
    return where + (culprits or " (the rows of another worker, or the gradient alone)")


def _accumulate(
    state: TrainState, share: WorkerBatch, config: TrainConfig, workers: Collectives, done: int
) -> tuple[TermSums, str]:
    """Accumulate the gradient of a share, a micro-batch at a time; return its terms and what was not finite."""
    size = config.training.micro_batch_size or max(len(share.batch), 1)
    firsts = range(0, max(len(share.batch), 1), size)
    warmup = config.training.divergence_warmup_steps
    divergence_weight = min(1.0, (done + 1) / warmup) if warmup else 1.0
    terms, culprits = None, ""
    for first in firsts:
        part = share.batch if size >= len(share.batch) else share.batch[first : first + size]
        places = torch.arange(share.first + first, share.first + first + len(part))
        keys = chain(config.seed, _TRAIN, state.position.epoch, share.step, places)
        last = first == firsts[-1]
        with nullcontext() if last else workers.without_reduction(), autocast(state.model, config):
            output = workers.forward(part, draw_noise(state.model, keys), divergence_weight)
            loss = output.row_loss.sum() * (workers.num / share.global_rows)
        if not math.isfinite(float(loss.detach())):
            culprits = culprits or _name_culprits(part, output)
            loss = loss * math.nan  # every gradient shows it, on every worker
        loss.backward()
        terms = output.terms if terms is None else terms + output.terms
    assert terms is not None
    return terms, culprits


def _seed_dropout(state: TrainState, config: TrainConfig, share: WorkerBatch) -> None:
    """Seed torch's global generators, which dropout alone uses; workers differ, and a resumed step does not."""
    seed = int(chain(config.seed, _TRAIN, state.position.epoch, share.step, share.first)) % 2**63
    # torch.manual_seed would cost more than a small step
    torch.default_generator.manual_seed(seed)
    if state.model.device.type == "cuda":
        torch.cuda.manual_seed(seed)


def _name_culprits(batch: Batch, output: DMVAEOutput) -> str:
    rows = (~torch.isfinite(output.row_loss.detach())).nonzero().squeeze(1).cpu()
    terms = [name for name, value in zip(output.terms.names, output.terms.total.tolist(), strict=True)
             if not math.isfinite(value)]  # fmt: skip
    ids = [] if batch.ids is None else batch[rows[:5]].ids.tolist()  # type: ignore[union-attr]
    return f": terms {', '.join(terms)}; {len(rows)} rows, ids {ids}{' and more' if len(rows) > 5 else ''}"


def _zero_terms(model: DMVAE) -> TermSums:
    names = term_names(model.config)
    zeros = torch.zeros(len(names), dtype=torch.float64, device=model.device)
    return TermSums(names, zeros, zeros)


def _add_up(terms: TermSums, workers: Collectives) -> TermSums:
    total, count = workers.add(torch.stack((terms.total, terms.count)))
    return TermSums(terms.names, total, count)


@runtime_checkable
class TrainingData(Protocol):
    """The rows that one worker reads."""

    steps_per_epoch: int

    def shares(self, epoch: int, first_step: int) -> Iterator[WorkerBatch]:
        """Return this worker's share of every global batch of an epoch, from a step on."""
        ...

    def validation_blocks(self) -> Iterator[Batch]:
        """Return this worker's rows of the validation split."""
        ...


@dataclass(frozen=True)
class MetricsLogged:
    """Training figures since the last such event, over all workers.

    Attributes:
        global_step: steps done since the run began.
        epoch: number of the epoch, from 0.
        metrics: by name; terms in nats per row.
    """

    global_step: int
    epoch: int
    metrics: dict[str, float]


@dataclass(frozen=True)
class EpochEnded(MetricsLogged):
    """An epoch's validation figures; `improved` tells whether the monitored one is the best so far."""

    improved: bool


@dataclass(frozen=True)
class StepSkipped:
    """A step was left out on every worker; `fault` says why, as far as this worker knows."""

    global_step: int
    fault: str


@dataclass(frozen=True)
class CheckpointDue:
    """The state is whole and asks to be written down."""

    global_step: int
    epoch: int


def is_finished(state: TrainState, config: TrainConfig) -> bool:
    """Tell whether the run has had all its epochs, or has stopped improving."""
    patience = config.training.patience
    stalled = patience is not None and state.epochs_since_best >= patience
    return state.position.epoch >= config.training.epochs or stalled


def train(
    state: TrainState, data: TrainingData, config: TrainConfig, workers: Collectives
) -> Iterator[MetricsLogged | EpochEnded | StepSkipped | CheckpointDue]:
    """Train until the run is finished, from wherever the state stands; all workers yield the same events.

    Raises:
        NonFiniteLossError: on every worker alike.
    """
    steps = data.steps_per_epoch
    done = state.position.epoch * steps + state.position.step
    clock = CheckpointClock(config.training, workers.clock, done)
    while not is_finished(state, config):
        epoch, start, rows = state.position.epoch, time.perf_counter(), 0
        pending = _zero_terms(state.model)  # this worker's terms that are not yet added up
        shares = data.shares(epoch, state.position.step)
        for report in train_epoch(state, shares, config, workers, steps):
            pending, rows = pending + report.terms, rows + report.rows
            done = epoch * steps + state.position.step
            at_end = state.position.step == steps
            log_now = at_end or done % config.training.log_steps == 0
            checkpoint_now = clock.is_due(done) and not at_end
            if report.fault:
                yield StepSkipped(done, report.fault)
            if log_now or checkpoint_now:
                state.window, pending = state.window + _add_up(pending, workers), _zero_terms(state.model)
            if log_now:
                yield MetricsLogged(done, epoch, _training_metrics(state, report))
                state.window = _zero_terms(state.model)
            if checkpoint_now:
                yield CheckpointDue(done, epoch)
        rows_per_second = rows / (time.perf_counter() - start)
        done, state.position = (epoch + 1) * steps, Position(epoch + 1, 0)
        yield _end_epoch(state, data, config, workers, {"train/rows_per_second": rows_per_second})
        yield CheckpointDue(done, epoch)


def _training_metrics(state: TrainState, report: StepReport) -> dict[str, float]:
    means = {name: float(value) for name, value in state.window.means().items()}
    counts = dict(zip(state.window.names, state.window.count.tolist(), strict=True))
    modalities = state.model.config.modalities
    means["loss"] = sum(means[source] for source in state.model.config.source_names)
    means |= {f"observed/{name}": counts[f"kl_private/{name}"] / max(counts["joint"], 1) for name in modalities}
    means |= {"gradient_norm": report.gradient_norm, "learning_rate": report.learning_rate}
    means["skipped_steps"] = state.skipped
    return {f"train/{name}": value for name, value in means.items()}


def _end_epoch(
    state: TrainState, data: TrainingData, config: TrainConfig, workers: Collectives, metrics: dict[str, float]
) -> EpochEnded:
    figures, variances = validate(state.model, data.validation_blocks(), config, workers.add)
    improved = state.record_validation(figures[config.training.monitor], config.optim)
    metrics |= {f"val/{name}": value for name, value in figures.items()}
    metrics |= {f"val/active_units/{block}": int((v > ACTIVE_VARIANCE).sum()) for block, v in variances.items()}
    epoch = state.position.epoch
    return EpochEnded(epoch * data.steps_per_epoch, epoch - 1, metrics, improved)
