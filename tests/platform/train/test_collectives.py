"""Two workers and their reduction of gradients, where their rows are as unequal as they can be."""

import itertools
import os
import socket
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import multiprocessing

from dmvae.config.training import TrainConfig
from dmvae.data.batch import Batch
from dmvae.model.dmvae import DMVAE, DMVAEConfig
from dmvae.platform.train.collectives import distribute
from dmvae.training.setup import WorkerData, build_state
from dmvae.training.state import TrainState, build_optimizer
from dmvae.training.step import Collectives, WorkerBatch, train_epoch
from tests.runs import make_config, make_dataset

pytestmark = pytest.mark.slow

DTYPES = {"float64": torch.float64, "float32": torch.float32}
TOLERANCE = {"float64": 1e-9, "float32": 1e-4}
CASES = (
    "a last batch of one row",
    "nothing observed by one",
    "nothing observed by any",
    "one modality nowhere",
    "the other modality frozen",
)


def make_shares(case: str, rank: int, num: int, precision: str = "float64") -> list[WorkerBatch]:
    """Three global batches: an ordinary one, an odd one, an ordinary one."""
    generator = torch.Generator().manual_seed(0)
    shares = []
    for step in range(3):
        rows = 1 if step == 1 and case == CASES[0] else 12
        left, right = torch.ones(rows, dtype=torch.bool), torch.arange(rows) % 2 == 0
        if step == 1 and case in CASES[1:3]:
            left, right = (torch.arange(rows) < (6 if case == CASES[1] else 0),) * 2
        if step == 1 and case in CASES[3:]:
            right = torch.zeros(rows, dtype=torch.bool)
        values = {"left": torch.randn(rows, 3, generator=generator), "right": torch.randn(rows, 2, generator=generator)}
        batch = Batch(
            {name: value.to(DTYPES[precision]) for name, value in values.items()}, {"left": left, "right": right}
        )
        first, last = rows * rank // num, rows * (rank + 1) // num
        shares.append(WorkerBatch(batch[first:last], step, first, rows))
    return shares


def train(case: str, rank: int, num: int, precision: str) -> torch.Tensor:
    """Return all weights after the three steps."""
    torch.set_num_threads(1)
    torch.manual_seed(0)
    shapes = {"left": (3,), "right": (2,)}
    model = DMVAE(DMVAEConfig(input_dims=shapes, latent_dim=2, modalities_specific_dim=1)).to(DTYPES[precision])
    settings: dict[str, Any] = {"precision": precision, "micro_batch_size": 2, "epochs": 1}
    # the odd batch of the last case has no weight to train
    optim = {"freeze": ["encoders.left", "decoders.left"]} if case == CASES[4] else {}
    tree = {"name": "x", "data": {"dataset": "d"}, "training": settings, "optim": optim}
    config = TrainConfig.model_validate(tree)
    state = TrainState(model, build_optimizer(model, config.optim))
    workers = Collectives(model) if num == 1 else distribute(model, num, torch.device("cpu"), None)
    list(train_epoch(state, make_shares(case, rank, num, precision), config, workers, 3))
    return torch.cat([parameter.detach().flatten() for parameter in model.parameters()])


def work(rank: int, port: int, folder: str) -> None:
    os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port))
    dist.init_process_group("gloo", rank=rank, world_size=2)
    for case, precision in itertools.product(CASES, DTYPES):
        torch.save(train(case, rank, 2, precision), Path(folder, f"{case} {precision} {rank}.pt"))
    dist.destroy_process_group()


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What two workers end with, by case and rank; to start them takes longer than all they do."""
    folder = tmp_path_factory.mktemp("workers")
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    multiprocessing.spawn(work, (port, str(folder)), nprocs=2)
    return folder


@pytest.mark.parametrize("precision", DTYPES)
@pytest.mark.parametrize("case", CASES)
def test_two_workers_end_where_one_does(case: str, precision: str, trained: Path) -> None:
    alone, tolerance = train(case, 0, 1, precision), TOLERANCE[precision]
    for rank in range(2):
        together = torch.load(trained / f"{case} {precision} {rank}.pt", weights_only=True)
        torch.testing.assert_close(together, alone, rtol=tolerance, atol=tolerance / 1000)


def train_compiled(rank: int, folder: str) -> None:
    """Write down what three steps lead to, not compiled and compiled: the tests' type checks do not compile."""
    shapes = {"left": (3,), "right": (2,)}
    model = DMVAEConfig(input_dims=shapes, latent_dim=2, modalities_specific_dim=1)
    for name in ("eager", "compiled"):
        settings = {"epochs": 1, "compile": name == "compiled", "precision": "float64"}
        tree = {"name": "x", "data": {"dataset": "d"}, "model": model, "training": settings}
        config = TrainConfig.model_validate(tree)
        state = build_state(config, torch.device("cpu"))
        list(train_epoch(state, make_shares(CASES[3], 0, 1), config, Collectives(state.model), 3))
        nll = state.model.eval().joint_nll(make_shares(CASES[0], 0, 1)[0].batch, 20).nll
        torch.save({**state.model.state_dict(), "nll": nll}, Path(folder, f"{name}.pt"))


@pytest.mark.acceptance
def test_compiled_networks_train_to_the_same_weights_under_the_same_names(tmp_path: Path) -> None:
    multiprocessing.spawn(train_compiled, (str(tmp_path),), nprocs=1)
    eager, compiled = (torch.load(tmp_path / f"{name}.pt", weights_only=True) for name in ("eager", "compiled"))
    assert list(eager) == list(compiled)
    for name, value in eager.items():
        torch.testing.assert_close(compiled[name], value, rtol=1e-9, atol=1e-9)


def test_compiling_without_a_compiler_is_one_error(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CXX", "no-such-compiler")
    model = DMVAEConfig(input_dims={"left": (3,), "right": (2,)}, latent_dim=2, modalities_specific_dim=1)
    tree = {"name": "x", "data": {"dataset": "d"}, "model": model, "training": {"compile": True}}
    with pytest.raises(ValueError, match=r"needs a compiler on every node, but 'no-such-compiler' was not found"):
        build_state(TrainConfig.model_validate(tree), torch.device("cpu"))


def test_rows_are_handed_over_on_the_workers_device(tmp_path: Path) -> None:
    config = make_config(tmp_path, make_dataset(tmp_path))
    data = WorkerData(config, 0, 1, torch.float64, torch.device("meta"))
    assert {values.device.type for share in data.batches(0, 0) for values in share.batch.data.values()} == {"meta"}
