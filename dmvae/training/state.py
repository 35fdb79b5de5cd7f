"""The state of a training run: weights, optimiser, position, and what early stopping and schedules remember."""

import math
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn

from dmvae.config.training import OptimConfig, TrainConfig
from dmvae.model.dmvae import DMVAE
from dmvae.model.loss import TermSums, term_names
from dmvae.model.parts import check_prefixes, is_in, named_parameters


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

    def start_training(self) -> list[nn.Parameter]:
        """Put the model into training mode but for what is frozen, and return the parameters that learn."""
        self.model.train()
        for module in self.model.modules():
            parameters = list(module.parameters())
            if parameters and not any(parameter.requires_grad for parameter in parameters):
                module.eval()  # no dropout, and running statistics stay
        return [parameter for parameter in self.model.parameters() if parameter.requires_grad]

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
    """Build a fused Adam or AdamW of the parameters that are not frozen: one kernel for all parameters of a group.

    Raises:
        ValueError: see `parameter_groups`.
    """
    build = torch.optim.Adam if optim.algorithm == "adam" else torch.optim.AdamW
    return build(parameter_groups(model, optim), lr=optim.learning_rate, fused=True)


def parameter_groups(model: DMVAE, optim: OptimConfig) -> list[dict[str, Any]]:
    """Freeze the parts that the settings name, and group the other parameters by learning rate and decay.

    A module's `rate_factor` multiplies the learning rate of its parameters; how fast they decay does not depend on it.
    Likelihoods with a factor have no decay. Factors of the settings multiply both.

    Raises:
        ValueError: if a prefix of the settings names no weights, or nothing is left to train.
    """
    named = named_parameters(model)
    check_prefixes("optim.freeze", optim.freeze, named)
    for path, parameter in named.items():
        parameter.requires_grad_(not any(is_in(path, prefix) for prefix in optim.freeze))
    learning = {path: parameter for path, parameter in named.items() if parameter.requires_grad}
    if not learning:
        raise ValueError(f"optim.freeze = {list(optim.freeze)} leaves no weights to train. Remove a part from it.")
    check_prefixes("optim.rate_factors, beside optim.freeze", optim.rate_factors, learning)
    factors = {p: float(getattr(m, "rate_factor", 1.0)) for m in model.modules() for p in m.parameters(recurse=False)}
    own = {p: module.rate_factor for module in model.likelihoods.values() for p in module.parameters()}
    undecayed = {p for p, factor in own.items() if factor != 1.0}
    factors |= own
    groups: dict[tuple[float, float], dict[str, Any]] = {}
    for path, parameter in learning.items():
        decay = 0.0 if parameter in undecayed else optim.weight_decay / factors[parameter]
        chosen = max((prefix for prefix in optim.rate_factors if is_in(path, prefix)), key=len, default=None)
        factor = factors[parameter] * (1.0 if chosen is None else optim.rate_factors[chosen])
        group = groups.setdefault((factor, decay), {"params": [], "rate_factor": factor, "weight_decay": decay})
        group["params"].append(parameter)
    return list(groups.values())


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
