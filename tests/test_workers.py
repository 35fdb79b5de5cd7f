"""Two workers and their reduction of gradients, where their rows are as unequal as they can be."""

import os
import socket
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import multiprocessing

from dmvae.batch import Batch
from dmvae.config.training import TrainConfig
from dmvae.model import DMVAE, DMVAEConfig
from dmvae.platform.worker import _distribute
from dmvae.training import Share, TrainState, Workers, build_optimizer, train_epoch

CASES = ("a last batch of one row", "nothing observed by one", "nothing observed by any", "one modality nowhere")


def make_shares(case: str, rank: int, num: int) -> list[Share]:
    """Three global batches: an ordinary one, an odd one, an ordinary one."""
    generator = torch.Generator().manual_seed(0)
    shares = []
    for step in range(3):
        rows = 1 if step == 1 and case == CASES[0] else 12
        left, right = torch.ones(rows, dtype=torch.bool), torch.arange(rows) % 2 == 0
        if step == 1 and case in CASES[1:3]:
            left, right = (torch.arange(rows) < (6 if case == CASES[1] else 0),) * 2
        if step == 1 and case == CASES[3]:
            right = torch.zeros(rows, dtype=torch.bool)
        values = {"left": torch.randn(rows, 3, generator=generator), "right": torch.randn(rows, 2, generator=generator)}
        batch = Batch({name: value.double() for name, value in values.items()}, {"left": left, "right": right})
        first, last = rows * rank // num, rows * (rank + 1) // num
        shares.append(Share(batch[first:last], step, first, rows))
    return shares


def train(case: str, rank: int, num: int) -> torch.Tensor:
    """Return all weights after the three steps."""
    torch.set_num_threads(1)
    torch.manual_seed(0)
    shapes = {"left": (3,), "right": (2,)}
    model = DMVAE(DMVAEConfig(input_dims=shapes, latent_dim=2, modalities_specific_dim=1)).double()
    settings: dict[str, Any] = {"precision": "float64", "micro_batch_size": 2, "epochs": 1}
    config = TrainConfig.model_validate({"name": "x", "data": {"dataset": "d"}, "training": settings})
    state = TrainState(model, build_optimizer(model, config.optim))
    workers = Workers(model) if num == 1 else _distribute(model, num, torch.device("cpu"))
    list(train_epoch(state, make_shares(case, rank, num), config, workers, 3))
    return torch.cat([parameter.detach().flatten() for parameter in model.parameters()])


def work(rank: int, port: int, folder: str) -> None:
    os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port))
    dist.init_process_group("gloo", rank=rank, world_size=2)
    for case in CASES:
        torch.save(train(case, rank, 2), Path(folder, f"{case} {rank}.pt"))
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


@pytest.mark.parametrize("case", CASES)
def test_two_workers_end_where_one_does(case: str, trained: Path) -> None:
    alone = train(case, 0, 1)
    for rank in range(2):
        together = torch.load(trained / f"{case} {rank}.pt", weights_only=True)
        torch.testing.assert_close(together, alone, rtol=1e-9, atol=1e-12)
