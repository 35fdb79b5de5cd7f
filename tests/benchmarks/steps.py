"""A training step, ours against the reference implementation's: forward, backward, Adam; one thread."""

from collections.abc import Callable

import torch

from dmvae.config.model import DMVAEConfig
from dmvae.config.training import TrainConfig
from dmvae.data.batch import Batch
from dmvae.model.dmvae import DMVAE
from dmvae.training.state import Position, TrainState, build_optimizer
from dmvae.training.step import Collectives, WorkerBatch, train_epoch
from tests.benchmarks.multivae import inputs, reference
from tests.benchmarks.ratio import Result, compare

ROWS, STEPS = 128, 8

CONV = {"name": "conv"}
SMALL = {"hidden_dims": [64]}


def mnist_svhn() -> DMVAEConfig:
    """MNIST with a perceptron of 256, SVHN with convolutions."""
    return DMVAEConfig.model_validate(
        {
            "input_dims": {"mnist": (1, 28, 28), "svhn": (3, 32, 32)},
            "latent_dim": 20,
            "modalities_specific_dim": {"mnist": 10, "svhn": 10},
            "architectures": {"svhn": CONV},
        }
    )


def conv_modalities(num: int) -> DMVAEConfig:
    """Images of 28x28 in three colours, as PolyMNIST has them."""
    names = [f"m{number}" for number in range(num)]
    return DMVAEConfig.model_validate(
        {
            "input_dims": dict.fromkeys(names, (3, 28, 28)),
            "latent_dim": 20,
            "modalities_specific_dim": 10,
            "architectures": dict.fromkeys(names, CONV),
        }
    )


def small_mlps(num: int) -> DMVAEConfig:
    """Vectors of 32 with perceptrons of 64."""
    names = [f"m{number}" for number in range(num)]
    return DMVAEConfig.model_validate(
        {
            "input_dims": dict.fromkeys(names, (32,)),
            "latent_dim": 10,
            "modalities_specific_dim": 4,
            "architectures": dict.fromkeys(names, SMALL),
        }
    )


def make_batch(config: DMVAEConfig, missing: float, rows: int = ROWS) -> Batch:
    """Draw rows; a row that would lose everything keeps its first modality."""
    data = {name: torch.rand(rows, *shape) for name, shape in config.shapes.items()}
    if not missing:
        return Batch(data, ids=torch.arange(rows))
    present = torch.rand(len(data), rows) >= missing
    present[0] |= ~present.any(0)
    return Batch(data, dict(zip(data, present, strict=True)), ids=torch.arange(rows))


def our_steps(model: DMVAE, batches: list[Batch]) -> Callable[[], None]:
    """Return our training loop over the batches, noise, clipping check and reports included."""
    config = TrainConfig.model_validate({"name": "steps", "data": {"dataset": "none"}, "model": model.config})
    state = TrainState(model, build_optimizer(model, config.optim))
    shares = [WorkerBatch(batch, step, 0, len(batch)) for step, batch in enumerate(batches)]
    workers = Collectives(model)

    def run() -> None:
        state.position = Position(0, 0)
        for _ in train_epoch(state, shares, config, workers, len(shares)):
            pass

    return run


def their_steps(model: torch.nn.Module, batches: list[Batch]) -> Callable[[], None]:
    """Return the loop of the reference implementation's trainer, its bare part."""
    given = [inputs(batch) for batch in batches]
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-3)
    model.train()

    def run() -> None:
        for batch in given:
            optimizer.zero_grad()
            model(batch).loss.backward()
            optimizer.step()

    return run


def check_same_objective(config: DMVAEConfig) -> None:
    """Refuse to time two sides that do not compute the same loss, with posteriors so narrow that noise is nothing."""
    model = DMVAE(config)
    for encoder in model.encoders.values():
        heads = encoder.heads
        _, shared, _, private = heads.bias.split(heads.sizes)
        with torch.no_grad():
            shared.fill_(-18), private.fill_(-18)
    for missing in (0.0, 0.5):
        batch = make_batch(config, missing)
        with torch.no_grad():
            ours, theirs = float(model(batch).loss), float(reference(model)(inputs(batch)).loss)
        assert abs(ours - theirs) <= 1e-4 * abs(theirs), f"objectives differ: {ours} and {theirs}"


def results(wanted: Callable[[str], bool]) -> list[Result]:
    """Run the comparisons asked for."""
    table = [
        ("MNIST-SVHN nets, complete", mnist_svhn(), 0.0, 1.05, 1.15),
        ("MNIST-SVHN nets, half missing", mnist_svhn(), 0.5, 2.2, 2.5),
        ("5 conv modalities, half missing", conv_modalities(5), 0.5, 2.8, 3.2),
        ("3 small MLPs, complete", small_mlps(3), 0.0, 2.5, 3.0),
        ("5 small MLPs, complete", small_mlps(5), 0.0, 3.5, 4.0),
        ("8 small MLPs, complete", small_mlps(8), 0.0, 4.0, 5.0),
        ("8 small MLPs, half missing", small_mlps(8), 0.5, None, None),
    ]
    found = []
    for work, config, missing, at_least, aim in table:
        if not wanted(f"train step, {work}"):
            continue
        torch.manual_seed(0)
        check_same_objective(config)
        model = DMVAE(config)
        batches = [make_batch(config, missing) for _ in range(STEPS)]
        theirs = their_steps(reference(model), batches)
        found.append(
            compare(f"train step, {work}", "MultiVae", our_steps(model, batches), theirs, at_least=at_least, aim=aim)
        )
    return found
