"""Default settings at any number of features: is training finite, and how far below predicting the mean is it?

    python -m tests.benchmarks.width [--features 20 200 2000 20000 50000] [--seeds 3] [--networks mlp skip_mlp]

Two epochs of 32 steps each, on data of three factors: standardised features, counts, and standardised features beside a
modality of ten. A cell is the largest over the seeds of the validation loss relative to that of a model whose posterior
is the prior and which predicts every feature's mean in training (below 1 is better). `before` is training without the
learning rates of wide layers and without bounds on log-variances.
"""

import argparse
import math
from collections.abc import Iterator
from contextlib import AbstractContextManager, nullcontext
from typing import Any
from unittest.mock import patch

import torch

from dmvae.config.training import TrainConfig
from dmvae.data.batch import Batch
from dmvae.model.dmvae import DMVAE
from dmvae.nn import batched
from dmvae.training.loop import EpochEnded, train
from dmvae.training.state import TrainState, build_optimizer
from dmvae.training.step import Collectives, NonFiniteLossError, WorkerBatch

STEPS, BATCH, VALIDATION, EPOCHS, FACTORS = 32, 64, 256, 2, 3
KINDS = ("normal", "counts", "mixed")


def draw(kind: str, num_features: int, seed: int) -> dict[str, torch.Tensor]:
    """Draw rows, the training rows first."""
    generator = torch.Generator().manual_seed(seed)

    def normal(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=generator)

    rows = STEPS * BATCH + VALIDATION
    factors = normal(rows, FACTORS)
    signal = factors @ normal(FACTORS, num_features) / math.sqrt(FACTORS)
    if kind == "counts":
        depths, abundance = 0.3 * normal(rows, 1), 1.5 * normal(num_features) - 0.5
        return {"wide": torch.poisson(torch.exp(depths + abundance + 0.7 * signal), generator=generator)}
    data = {"wide": signal.add_(normal(rows, num_features), alpha=0.5)}
    if kind == "mixed":
        data["narrow"] = factors @ normal(FACTORS, 10) / math.sqrt(FACTORS) + 0.5 * normal(rows, 10)
    return {name: (x - x[:-VALIDATION].mean(0)) / x[:-VALIDATION].std(0) for name, x in data.items()}


class Rows:
    """Rows in memory, as one worker reads them."""

    steps_per_epoch = STEPS

    def __init__(self, data: dict[str, torch.Tensor]) -> None:
        self._data = data

    def batches(self, epoch: int, first_step: int) -> Iterator[WorkerBatch]:
        """Yield the batches of an epoch."""
        order = torch.randperm(STEPS * BATCH, generator=torch.Generator().manual_seed(epoch))
        for step, rows in enumerate(order.split(BATCH)):
            if step >= first_step:
                yield WorkerBatch(Batch({name: x[rows] for name, x in self._data.items()}, ids=rows), step, 0, BATCH)

    def validation_blocks(self) -> Iterator[Batch]:
        """Yield the rows after the training rows."""
        yield Batch({name: x[-VALIDATION:] for name, x in self._data.items()}, ids=torch.arange(VALIDATION))


def configure(network: str, data: dict[str, torch.Tensor], kind: str, seed: int) -> TrainConfig:
    """Return default settings but for the name of the network."""
    model: dict[str, Any] = {
        "input_dims": {name: (x.shape[1],) for name, x in data.items()},
        "architectures": {name: {"name": network} for name in data},
    }
    if kind == "counts":
        x = data["wide"]
        params = {"size_factor": float(x.sum(1).median()), "rate": float((x / x.sum(1, keepdim=True)).mean())}
        params["rate"] *= params["size_factor"]
        model |= {"decoders_dist": {"wide": "negative_binomial"}, "decoder_dist_params": {"wide": params}}
    training = {"epochs": EPOCHS, "batch_size": BATCH}
    tree = {"name": "width", "seed": seed, "data": {"dataset": "none"}, "model": model, "training": training}
    return TrainConfig.model_validate(tree)


def loss_of_means(model: DMVAE, data: dict[str, torch.Tensor]) -> float:
    """Return the loss of the best constant prediction, with the likelihoods as they are now."""
    total = 0.0
    for name, x in data.items():
        likelihood, train_rows, rows = model.likelihoods[name], x[:-VALIDATION], x[-VALIDATION:]
        output = train_rows.mean(0)
        if likelihood.are_counts:
            share = (train_rows.sum(0) + 0.5) / train_rows.sum()
            output = torch.log(share * likelihood.size_factor)
        values = likelihood.observe(rows, None)
        with torch.no_grad():
            total -= float(likelihood.log_prob(output.expand(VALIDATION, -1).contiguous(), values).mean())
    return total * len(model.config.source_names)


def ratio(network: str, kind: str, num_features: int, seed: int, before: bool) -> float:
    """Train and return the loss relative to that of the means; infinity if it stopped being finite."""
    data = draw(kind, num_features, seed)
    config = configure(network, data, kind, seed)
    torch.manual_seed(seed)
    model = DMVAE(config.model)
    if before:
        for module in (*model._encoders.modules(), *model._decoders.modules()):
            if hasattr(module, "rate_factor"):
                module.rate_factor = 1.0  # type: ignore[assignment]  # a plain number
    state = TrainState(model, build_optimizer(model, config.optim))
    bounds: AbstractContextManager[Any] = (
        patch.object(batched, "bound_log_var", lambda log_var: log_var) if before else nullcontext()
    )
    try:
        with bounds:
            events = list(train(state, Rows(data), config, Collectives(model)))
    except NonFiniteLossError:
        return math.inf
    (*_, last) = (event for event in events if isinstance(event, EpochEnded))
    return last.metrics["val/loss"] / loss_of_means(model, data)


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--features", nargs="+", type=int, default=[20, 200, 2000, 20_000, 50_000])
    parser.add_argument("--networks", nargs="+", default=["mlp", "skip_mlp"])
    parser.add_argument("--kinds", nargs="+", default=list(KINDS))
    parser.add_argument("--seeds", type=int, default=3)
    arguments = parser.parse_args()
    print("| network | values | features | before | now |\n|---|---|---|---|---|", flush=True)
    for network in arguments.networks:
        for kind in arguments.kinds:
            for num in arguments.features:
                cells = []
                for before in (True, False):
                    worst = max(ratio(network, kind, num, seed, before) for seed in range(arguments.seeds))
                    cells.append(f"{worst:,.2f}" if math.isfinite(worst) else "not finite")
                print(f"| {network} | {kind} | {num:,} | {' | '.join(cells)} |", flush=True)


if __name__ == "__main__":
    main()
