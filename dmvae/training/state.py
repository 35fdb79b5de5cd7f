"""The state of a training run: weights, optimiser, position, and what early stopping and schedules remember."""

import math
from dataclasses import dataclass, field
from typing import Any

import torch

from dmvae.config.training import OptimConfig, TrainConfig
from dmvae.model.dmvae import DMVAE
from dmvae.model.loss import TermSums, term_names


@dataclass(frozen=True)
class Position:
    """The progress of training: `step` steps of epoch `epoch` (from 0) are done."""

    epoch: int = 0
    step: int = 0


@dataclass
class TrainState:
    """Everything that a run needs to continue as if it had never stopped.

    Attributes:
        model: holds the weights.
        optimizer: holds the moments.
        position: the steps done so far.
        best: the smallest monitored validation metric so far; None before the first validation.
        epochs_since_best: validations since then.
        halvings: how often the plateau schedule has halved the learning rate.
        skipped: steps skipped so far because their loss or gradient was not finite.
        window: the training terms of all workers since metrics were last logged.
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
        self.window = zero_terms(self.model)

    def record_validation(self, metric: float, optim: OptimConfig) -> bool:
        """Record the monitored metric of an epoch; return whether it is the best so far."""
        is_best = math.isfinite(metric) and (self.best is None or metric < self.best)
        if is_best:
            self.best, self.epochs_since_best = metric, 0
        else:
            self.epochs_since_best += 1
            if optim.schedule == "plateau" and self.epochs_since_best % optim.plateau_epochs == 0:
                self.halvings += 1
        return is_best


def zero_terms(model: DMVAE) -> TermSums:
    """Return the sums over no rows."""
    names = term_names(model.config)
    zeros = torch.zeros(len(names), dtype=torch.float64, device=model.device)
    return TermSums(names, zeros, zeros)


def build_optimizer(model: DMVAE, optim: OptimConfig) -> torch.optim.Optimizer:
    """Build a fused Adam or AdamW: one kernel for all parameters of a group.

    A module's `rate_factor` multiplies the learning rate of its parameters; how fast they decay does not depend on it.
    Likelihoods with a factor have no decay.
    """
    factors = {p: float(getattr(m, "rate_factor", 1.0)) for m in model.modules() for p in m.parameters(recurse=False)}
    own = {p: module.rate_factor for module in model.likelihoods.values() for p in module.parameters()}
    undecayed = {p for p, factor in own.items() if factor != 1.0}
    factors |= own
    groups: dict[tuple[float, bool], dict[str, Any]] = {}
    for parameter in model.parameters():
        factor, decays = factors[parameter], parameter not in undecayed
        decay = optim.weight_decay / factor if decays else 0.0
        group = groups.setdefault((factor, decays), {"params": [], "rate_factor": factor, "weight_decay": decay})
        group["params"].append(parameter)
    build = torch.optim.Adam if optim.algorithm == "adam" else torch.optim.AdamW
    return build(list(groups.values()), lr=optim.learning_rate, fused=True)


def learning_rate(optim: OptimConfig, done: int, total: int, halvings: int) -> float:
    """Return the learning rate of the step after `done` of `total` steps: warm-up times schedule."""
    rate = optim.learning_rate * min(1.0, (done + 1) / optim.warmup_steps if optim.warmup_steps else 1.0)
    if optim.schedule == "cosine":
        rate *= 0.5 * (1 + math.cos(math.pi * min(done / total, 1.0)))
    return rate * 0.5**halvings


def is_finished(state: TrainState, config: TrainConfig) -> bool:
    """Tell whether all epochs are done, or early stopping ended the run."""
    patience = config.training.patience
    stalled = patience is not None and state.epochs_since_best >= patience
    return state.position.epoch >= config.training.epochs or stalled
