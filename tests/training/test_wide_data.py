"""Training holds at any number of features, with the default settings."""

import math
from collections.abc import Iterator

import pytest
import torch

from dmvae.config.training import TrainConfig
from dmvae.data.batch import Batch
from dmvae.model.dmvae import DMVAE
from dmvae.training.state import TrainState, build_optimizer
from dmvae.training.step import Collectives, WorkerBatch, train_epoch

ROWS, STEPS = 64, 8
NETWORKS = ["mlp", "skip_mlp"]


def related(num_features: int, rows: int = ROWS) -> torch.Tensor:
    """Standardised features that are all driven by one factor: every weight is pushed the same way."""
    generator = torch.Generator().manual_seed(0)
    factor, loadings = torch.randn(rows, 1, generator=generator), torch.randn(num_features, generator=generator)
    x = factor * loadings + 0.3 * torch.randn(rows, num_features, generator=generator)
    return (x - x.mean(0)) / x.std(0)


def configure(shapes: dict[str, tuple[int, ...]], network: str, **sections: object) -> TrainConfig:
    model = {"input_dims": shapes, "architectures": {name: {"name": network} for name in shapes}}
    return TrainConfig.model_validate({"name": "wide", "data": {"dataset": "none"}, "model": model, **sections})


def build(config: TrainConfig) -> TrainState:
    torch.manual_seed(0)
    model = DMVAE(config.model)
    return TrainState(model, build_optimizer(model, config.optim))


def losses(data: dict[str, torch.Tensor], network: str) -> list[float]:
    """Train a few steps and return the loss per row of each."""
    config = configure({name: (x.shape[1],) for name, x in data.items()}, network)
    state = build(config)

    def batches() -> Iterator[WorkerBatch]:
        for step in range(STEPS):
            yield WorkerBatch(Batch(data, ids=torch.arange(ROWS)), step, 0, ROWS)

    reports = train_epoch(state, batches(), config, Collectives(state.model), STEPS)
    return [sum(float(report.terms.means()[s]) for s in config.model.source_names) for report in reports]


@pytest.mark.parametrize("network", NETWORKS)
def test_ten_thousand_features_train_from_the_first_steps(network: str) -> None:
    found = losses({"wide": related(10_000), "narrow": related(10)}, network)
    assert all(map(math.isfinite, found))
    assert max(found) < 2 * found[0]
    assert found[-1] < found[0]


@pytest.mark.parametrize("network", NETWORKS)
def test_a_step_moves_the_posterior_no_further_for_more_features(network: str) -> None:
    """Without the layers' own rates, the second distance is about sixteen times the first."""

    def distance(num_features: int) -> float:
        config, x = configure({"wide": (num_features,)}, network), related(num_features)
        state = build(config)
        batch = Batch({"wide": x}, ids=torch.arange(ROWS))
        before = state.model.posteriors(batch)[0].mean.detach()
        list(train_epoch(state, [WorkerBatch(batch, 0, 0, ROWS)], config, Collectives(state.model), 100))
        return float((state.model.posteriors(batch)[0].mean.detach() - before).abs().mean())

    assert distance(16_384) < 1.5 * distance(1024)


def test_weights_decay_alike_at_any_width() -> None:
    optim = {"algorithm": "adamw", "weight_decay": 0.1}
    groups = build(configure({"a": (4096,), "b": (8,)}, "skip_mlp", optim=optim)).optimizer.param_groups
    assert sorted(group["rate_factor"] for group in groups) == [0.25, 1.0]
    assert all(group["rate_factor"] * group["weight_decay"] == pytest.approx(0.1) for group in groups)


def test_narrow_data_has_the_learning_rate_of_the_run() -> None:
    (group,) = build(configure({"a": (1024,), "b": (1, 28, 28)}, "mlp")).optimizer.param_groups
    assert group["rate_factor"] == 1.0


def test_of_the_inputs_of_a_class_only_one_counts() -> None:
    model = {"decoders_dist": {"text": "categorical"}, "decoder_dist_params": {"text": {"classes": 300}}}
    config = configure({"text": (20,)}, "mlp")
    config = TrainConfig.model_validate({**config.model_dump(), "model": {**config.model.model_dump(), **model}})
    (group,) = build(config).optimizer.param_groups
    assert group["rate_factor"] == 1.0
