"""One optimiser step on a global batch, of which every worker holds a part."""

import math
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from dmvae.config.training import TrainConfig
from dmvae.data.batch import Batch
from dmvae.distributions.noise import chain
from dmvae.model.loss import TermSums
from dmvae.training.diagnosis import largest_gradients, name_culprits
from dmvae.training.state import TrainState, learning_rate, zero_terms
from dmvae.training.validation import autocast, draw_noise

_TRAIN = 1  # second part of a noise key; validation has another


class NonFiniteLossError(RuntimeError):
    """The loss or its gradient is NaN or infinite."""


@dataclass(frozen=True, eq=False)
class WorkerBatch:
    """One worker's part of a global batch.

    Attributes:
        batch: the worker's rows, perhaps none.
        step: index of the global batch in the epoch.
        first: position of the first row in the global batch.
        global_rows: number of rows in the global batch.
    """

    batch: Batch
    step: int
    first: int
    global_rows: int


@dataclass(frozen=True, eq=False)
class Collectives:
    """Communication between workers; the defaults are those of a single worker.

    Attributes:
        forward: the model, wrapped so that backward passes average gradients over workers.
        world_size: the number of workers.
        all_reduce: sums a float64 tensor over workers and returns the same bits on each.
        clock: returns the seconds elapsed on one worker, the same reading on each; all workers must call it together.
        stop_requested: tells whether training should end before its last epoch, the same on each worker; all must call
            it together. None: it never should.
        no_sync: a context in which backward passes accumulate gradients without communication.
    """

    forward: nn.Module
    world_size: int = 1
    all_reduce: Callable[[Tensor], Tensor] = lambda tensor: tensor
    clock: Callable[[], float] = time.monotonic
    stop_requested: Callable[[], bool] | None = None
    no_sync: Callable[[], AbstractContextManager[Any]] = nullcontext


@dataclass(frozen=True)
class StepReport:
    """The outcome of one optimiser step.

    Attributes:
        step: index of the global batch in the epoch.
        terms: of this worker's rows; of no rows if the step was skipped.
        gradient_norm: norm of the global gradient before clipping.
        learning_rate: of this step.
        rows: number of rows in the global batch.
        fault: why the step was skipped and changed nothing; empty if it was not.
    """

    step: int
    terms: TermSums
    gradient_norm: float
    learning_rate: float
    rows: int
    fault: str = ""


def train_epoch(
    state: TrainState,
    batches: Iterable[WorkerBatch],
    config: TrainConfig,
    collectives: Collectives,
    steps_per_epoch: int,
) -> Iterator[StepReport]:
    """Train on the batches of one epoch from the state's position on, yielding after every step.

    The gradient is that of the mean row loss of the global batch, however its rows are spread over workers. A step
    whose gradient is not finite is skipped on every worker, at most `training.skip_nonfinite` times in a run.

    Raises:
        NonFiniteLossError: on every worker, before the weights change.
    """
    total, parameters = config.training.epochs * steps_per_epoch, state.start_training()
    last_norms: Tensor | None = None
    for part in batches:
        done = state.position.epoch * steps_per_epoch + part.step
        rate = learning_rate(config.optim, done, total, state.halvings)
        for group in state.optimizer.param_groups:
            group["lr"] = rate * group.get("rate_factor", 1.0)
        state.optimizer.zero_grad(set_to_none=True)
        _seed_dropout(state, config, part)
        terms, culprits = _accumulate(state, part, config, collectives, done)
        for parameter in parameters:
            if parameter.grad is None:
                # no row of this worker has the modality; other workers may have got zeros from the reduction, and the
                # optimiser treats None and zero differently
                parameter.grad = torch.zeros_like(parameter)
        norm, norms = _clip(parameters, config.optim.clip_norm)
        fault = "" if math.isfinite(norm) else _fault(state, part.step, culprits, rate, norms, last_norms)
        if fault:
            if state.skipped >= config.training.skip_nonfinite:
                raise NonFiniteLossError(
                    f"{fault}. Lower optim.learning_rate, check those rows, or let a few such steps be skipped with "
                    f"training.skip_nonfinite (now {config.training.skip_nonfinite})."
                )
            state.skipped, terms = state.skipped + 1, zero_terms(state.model)
        else:
            last_norms = norms
            state.optimizer.step()
        state.position = replace(state.position, step=part.step + 1)
        yield StepReport(part.step, terms, norm, rate, part.global_rows, fault)


def _clip(parameters: list[nn.Parameter], clip_norm: float | None) -> tuple[float, Tensor]:
    """Clip the gradient's norm; return the norm before clipping, and that of each parameter."""
    # as `nn.utils.get_total_norm`, which takes several times as long with small parameters
    norms = torch.stack(torch._foreach_norm([p.grad for p in parameters if p.grad is not None]))
    norm = torch.linalg.vector_norm(norms)
    if clip_norm is not None:
        nn.utils.clip_grads_with_norm_(parameters, clip_norm, norm)
    return float(norm), norms


def _fault(state: TrainState, step: int, culprits: str, rate: float, norms: Tensor, last_norms: Tensor | None) -> str:
    """Say where the loss is not finite and what is known of the cause."""
    where = f"Loss became non-finite at epoch {state.position.epoch + 1}, step {step + 1} "
    where += culprits or "(in the rows of another worker, or in the gradient only)"
    finite = torch.isfinite(norms)
    # a loss that is not finite leaves no gradient to compare; the last step's tells which part grew
    gradients = largest_gradients(state.model, torch.where(finite, norms, math.inf) if finite.any() else last_norms)
    return f"{where}. Learning rate {rate:.2g}" + (f", largest gradients: {gradients}" if gradients else "")


def _accumulate(
    state: TrainState, part: WorkerBatch, config: TrainConfig, collectives: Collectives, done: int
) -> tuple[TermSums, str]:
    """Accumulate the gradient one micro-batch at a time; return the terms and what was not finite."""
    size = config.training.micro_batch_size or max(len(part.batch), 1)
    firsts = range(0, max(len(part.batch), 1), size)
    warmup = config.training.divergence_warmup_steps
    divergence_weight = min(1.0, (done + 1) / warmup) if warmup else 1.0
    terms, culprits = None, ""
    for first in firsts:
        micro_batch = part.batch if size >= len(part.batch) else part.batch[first : first + size]
        places = torch.arange(part.first + first, part.first + first + len(micro_batch))
        keys = chain(config.seed, _TRAIN, state.position.epoch, part.step, places)
        last = first == firsts[-1]
        with nullcontext() if last else collectives.no_sync(), autocast(state.model, config):
            output = collectives.forward(micro_batch, draw_noise(state.model, keys), divergence_weight)
            loss = output.row_loss.sum() * (collectives.world_size / part.global_rows)
        if not math.isfinite(float(loss.detach())):
            culprits = culprits or name_culprits(state.model, micro_batch, output)
            loss = loss * math.nan  # every gradient shows it, on every worker
        loss.backward()
        terms = output.terms if terms is None else terms + output.terms
    assert terms is not None
    return terms, culprits


def _seed_dropout(state: TrainState, config: TrainConfig, part: WorkerBatch) -> None:
    """Seed torch's global generators, which only dropout uses: by worker, and the same for a resumed step."""
    seed = int(chain(config.seed, _TRAIN, state.position.epoch, part.step, part.first)) % 2**63
    # torch.manual_seed would cost more than a small step
    torch.default_generator.manual_seed(seed)
    if state.model.device.type == "cuda":
        torch.cuda.manual_seed(seed)
