"""Whole runs of Ray's workers on convolutional nets, one torch thread each: two against one, and against bare loops.

The bare loops hold their rows in memory, draw torch's own noise and do nothing but steps; two of them are two processes
with gloo and torch's DDP as it comes. Ray's start is in no figure: rates are of the epochs after the first.
"""

import itertools
import json
import socket
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist
from torch import multiprocessing
from torch.nn.parallel import DistributedDataParallel

from dmvae.config.data import PrepareConfig
from dmvae.config.training import TrainConfig
from dmvae.data.batch import Batch
from dmvae.data.preparation.prepare import prepare
from dmvae.data.reading.dataset import open_dataset
from dmvae.model.dmvae import DMVAE, DMVAEConfig
from dmvae.platform.cluster import local_cluster, messages
from dmvae.platform.tracking.runs import open_run
from dmvae.platform.train.run_store import RunStore
from dmvae.platform.train.trainer import fit
from dmvae.platform.train.worker import WorkerTask
from dmvae.training.loop import CheckpointDue, EpochEnded, MetricsLogged, train
from dmvae.training.settings import absolute, resolve, run_record
from dmvae.training.setup import WorkerData, build_state
from dmvae.training.state import build_optimizer
from dmvae.training.step import Collectives, WorkerBatch
from tests.benchmarks.ratio import Result
from tests.benchmarks.steps import mnist_svhn

ROWS, VALIDATION_ROWS, BATCH, EPOCHS = 12_800, 640, 128, 4


WORKS = ("DDP, 2 workers against 1, MNIST-SVHN nets", "2 workers, steps", "epoch with checkpoint, validation, tracking")


def results(wanted: Callable[[str], bool]) -> list[Result]:
    """Train with one and two workers and with one and two bare processes, one after the other."""
    if not any(map(wanted, WORKS)):
        return []
    with tempfile.TemporaryDirectory() as folder:
        dataset, rates = _make_dataset(Path(folder)), dict[str, list[float]]()
        whole = dict[int, list[float]]()
        for num in (1, 2):
            rates[f"bare {num}"] = _bare_rates(num)
            rates[f"ours {num}"], whole[num] = _our_rates(_config(Path(folder), dataset, num))
        shares = _shares(_config(Path(folder), dataset, 1, epochs=2))
    median = {side: statistics.median(values) for side, values in rates.items()}
    seen = ", ".join(f"{side} {value:,.0f}" for side, value in median.items())
    limit = median["bare 2"] / median["bare 1"]
    return [
        _ratio(WORKS[0], "ourselves", rates["ours 2"], rates["ours 1"], 1.6, 1.8,
               f"rows/s of steps: {seen}; two bare gloo processes are {limit:.2f} times one"),
        _ratio(WORKS[1], "two bare gloo processes", rates["ours 2"], rates["bare 2"]),
        _ratio(WORKS[2], "bare steps", whole[1], rates["bare 1"], 0.9, 0.97,
               f"{ROWS:,} rows an epoch, {VALIDATION_ROWS} validated; {shares}"),
    ]  # fmt: skip


def _ratio(
    work: str,
    against: str,
    ours: list[float],
    theirs: list[float],
    at_least: float | None = None,
    aim: float | None = None,
    note: str = "",
) -> Result:
    ratio = statistics.median(ours) / statistics.median(theirs)
    low, high = min(ours) / max(theirs), max(ours) / min(theirs)
    return Result(work, against, None, ratio, low, high, at_least, aim, note=note)


def _make_dataset(folder: Path) -> Path:
    """Write complete rows of the two image modalities."""
    rng, num = np.random.default_rng(0), ROWS + VALIDATION_ROWS
    images = {name: rng.random((num, *shape), dtype=np.float32) for name, shape in mnist_svhn().shapes.items()}
    splits = np.where(np.arange(num) < ROWS, "train", "val")
    np.savez(folder / "rows.npz", id=np.arange(num), split=splits, **images)
    given = {"dataset": str(folder / "data"), "source": {"kind": "npz", "path": str(folder / "rows.npz")}}
    prepare(PrepareConfig.model_validate(given), progress=lambda line: None)
    return folder / "data"


def _config(folder: Path, dataset: Path, num: int, epochs: int = EPOCHS) -> TrainConfig:
    model = mnist_svhn().model_dump(exclude_unset=True, exclude={"input_dims"})
    return TrainConfig.model_validate(
        {
            "name": f"workers-{num}",
            "runs_dir": str(folder / "runs"),
            "data": {"dataset": str(dataset)},
            "model": model,
            "training": {"epochs": epochs, "batch_size": BATCH},
            "workers": {"num": num},
            "tracking": {"uri": f"sqlite:///{folder}/mlflow.db"},
        }
    )


def _our_rates(config: TrainConfig) -> tuple[list[float], list[float]]:
    """Return rows per second of the steps of every epoch but the first, and of those epochs as a whole."""
    dataset, run_dir = open_dataset(config.data.dataset), Path(config.runs_dir, config.name)
    config, run_dir = resolve(config, dataset), run_dir.absolute()
    record = run_record(config, dataset.manifest)
    run_dir.mkdir(parents=True)
    with (
        open_run(config.tracking, config.name, run_dir / "tracking", record) as tracked,
        local_cluster(2),
        messages(lambda line: None) as queue,
    ):
        fit(config, WorkerTask(absolute(config), record, RunStore.open(config.runs_dir, config.name), tracked, queue))
    lines = [json.loads(line) for line in (run_dir / "tracking" / "metrics.jsonl").read_text().splitlines()]
    ends = [line for line in lines if "train/rows_per_second" in line.get("metrics", {})]
    steps = [line["metrics"]["train/rows_per_second"] for line in ends[1:]]
    moments = [line["timestamp"] / 1000 for line in ends]
    return steps, [ROWS / (after - before) for before, after in itertools.pairwise(moments)]


def _bare_rates(num: int) -> list[float]:
    with tempfile.TemporaryDirectory() as folder, socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
        free.close()
        multiprocessing.spawn(_bare, (num, port, folder, mnist_svhn(), ROWS, EPOCHS), nprocs=num)
        rates: list[float] = json.loads(Path(folder, "rates").read_text())
    return rates


def _bare(rank: int, num: int, port: int, folder: str, config: DMVAEConfig, num_rows: int, epochs: int) -> None:
    """Train on this process's rows of every batch, held in memory; no report, no check, no reading."""
    torch.set_num_threads(1)
    torch.manual_seed(0)
    model = DMVAE(config)
    optimizer = build_optimizer(model, TrainConfig(name="x", data={"dataset": "d"}).optim)
    forward: torch.nn.Module = model
    if num > 1:
        dist.init_process_group("gloo", init_method=f"tcp://127.0.0.1:{port}", rank=rank, world_size=num)
        forward = DistributedDataParallel(model, gradient_as_bucket_view=True)
    rows = {name: torch.rand(num_rows // num, *shape) for name, shape in config.shapes.items()}
    rates = []
    for _ in range(epochs - 1):
        order, begun = torch.randperm(num_rows // num), time.perf_counter()
        for chosen in order.split(BATCH // num):
            optimizer.zero_grad()
            forward(Batch({name: values.index_select(0, chosen) for name, values in rows.items()})).loss.backward()
            optimizer.step()
        rates.append(num_rows / (time.perf_counter() - begun))
    if rank == 0:
        Path(folder, "rates").write_text(json.dumps(rates[1:]))  # the first one warms up
    if num > 1:
        dist.destroy_process_group()


def _shares(config: TrainConfig) -> str:
    """Run the same loop in this process and say which part of an epoch goes where."""
    config = resolve(config, open_dataset(config.data.dataset))
    state, spent = build_state(config, torch.device("cpu")), dict.fromkeys(("reading", "validation", "checkpoint"), 0.0)

    @contextmanager
    def timed(part: str) -> Iterator[None]:
        begun = time.perf_counter()
        yield
        spent[part] += time.perf_counter() - begun

    class Timed(WorkerData):
        def batches(self, epoch: int, first_step: int) -> Iterator[WorkerBatch]:
            rows = super().batches(epoch, first_step)
            while True:
                with timed("reading"):
                    share = next(rows, None)
                if share is None:
                    return
                yield share

    data, store = Timed(config, 0, 1, torch.float32), RunStore.open(config.runs_dir, "shares")
    begun = last = time.perf_counter()
    for event in train(state, data, config, Collectives(state.model)):
        now = time.perf_counter()
        if isinstance(event, EpochEnded):
            spent["validation"] += now - last
        elif isinstance(event, CheckpointDue):
            with timed("checkpoint"):
                store.save(state, {}, {"step": event.global_step}, is_best=True)
        if isinstance(event, MetricsLogged):
            last = time.perf_counter()
    total = time.perf_counter() - begun
    return ", ".join(f"{part} {seconds / total:.1%}" for part, seconds in spent.items())
