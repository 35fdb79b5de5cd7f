"""How training grows with workers: measured for 1, 2 and 3 here, and what that says of more on a cluster.

    python -m tests.benchmarks.scaling

A step of N workers on a global batch of B rows takes

    t(N, B) = overhead + row * B / N + reduction(N)
    reduction(N) = 2 (N - 1) / N * gradient / bandwidth + latency * 2 (N - 1)      (a ring; none for N = 1)

`overhead` and `row` are process CPU times of one worker with two batch sizes, which a busy machine hardly changes;
`bandwidth` and `latency` come from reductions of two sizes alone. Each is the least of several.
"""

import json
import os
import time
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from tempfile import TemporaryDirectory

import numpy as np
import torch
import torch.distributed as dist
import torch.multiprocessing as mp

from dmvae.config.data import PrepareConfig
from dmvae.config.training import TrainConfig
from dmvae.data.preparation.prepare import prepare
from dmvae.data.reading.dataset import open_dataset
from dmvae.data.reading.loader import read_epoch
from dmvae.data.reading.sampler import EpochSampler
from dmvae.model.dmvae import DMVAE
from dmvae.platform.train.collectives import distribute
from dmvae.training.state import Position, TrainState, build_optimizer
from dmvae.training.step import Collectives, WorkerBatch, train_epoch
from tests.benchmarks.steps import make_batch, mnist_svhn
from tests.platform.tracking.test_tracking import free_port

WORKERS, BATCHES, STEPS, ROUNDS = (1, 2, 3), (24, 96), 5, 2
ROWS = 20_000
FOLDER = Path("build/scaling")


@dataclass(frozen=True)
class Constants:
    """What was measured: seconds, bytes, bytes per second.

    Attributes:
        overhead: of a step, whatever its rows.
        row: of one row's forward and backward pass on one core.
        gradient: bytes that workers agree on in a step.
        bandwidth: of a reduction between processes here.
        latency: of one message of a ring.
        row_bytes: that reading a row moves.
        order: of laying out one epoch's order, per row of the dataset; every worker does it for all rows.
        read: of reading one row.
    """

    overhead: float
    row: float
    gradient: int
    bandwidth: float
    latency: float
    row_bytes: int
    order: float
    read: float

    def step(self, num: int, batch: int, bandwidth: float | None = None, latency: float | None = None) -> float:
        """Return the seconds of a step of `num` workers that have a core each."""
        return self.overhead + self.row * batch / num + self.reduction(num, bandwidth, latency)

    def reduction(self, num: int, bandwidth: float | None = None, latency: float | None = None) -> float:
        """Return the seconds of a gradient's way around a ring."""
        moved = 2 * (num - 1) / num * self.gradient
        return moved / (bandwidth or self.bandwidth) + 2 * (num - 1) * (latency or self.latency)


def measure_steps(rank: int, num: int, port: int, folder: str) -> None:
    """Time steps of this project's own loop, and reductions alone, as one of `num` processes."""
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    torch.set_num_threads(1)
    torch.manual_seed(0)
    dist.init_process_group("gloo", rank=rank, world_size=num)
    config = TrainConfig.model_validate({"name": "scaling", "data": {"dataset": "none"}, "model": mnist_svhn()})
    model = DMVAE(config.model)
    state = TrainState(model, build_optimizer(model, config.optim))
    workers = Collectives(model) if num == 1 else distribute(model, num, torch.device("cpu"))
    size = sum(parameter.numel() for parameter in model.parameters())
    found: dict[str, float] = {"gradient": 4 * size}
    for batch in BATCHES:
        rows = batch // num
        shares = [
            WorkerBatch(make_batch(config.model, 0.5, rows), step, rank * rows, rows * num) for step in range(STEPS)
        ]
        for number in range(3):
            state.position = Position(0, 0)
            dist.barrier()
            start, spent = time.perf_counter(), time.process_time()
            for _ in train_epoch(state, shares, config, workers, STEPS):
                pass
            spent = (time.process_time() - spent) / STEPS
            dist.barrier()
            seconds = (time.perf_counter() - start) / STEPS
            if number:  # the first is a warm-up
                found[f"step/{batch}"] = min(seconds, found.get(f"step/{batch}", seconds))
                found[f"cpu/{batch}"] = min(spent, found.get(f"cpu/{batch}", spent))
    for name, length in (("small", 1024), ("large", size)):
        values = torch.zeros(length)
        times = []
        for _ in range(30):
            dist.barrier()
            start = time.perf_counter()
            dist.all_reduce(values)
            times.append(time.perf_counter() - start)
        found[f"reduce/{name}"] = min(times)
    if rank == 0:
        Path(folder, f"{num}.json").write_text(json.dumps(found))
    dist.barrier()
    dist.destroy_process_group()


def measure_all() -> dict[int, dict[str, float]]:
    """Return the least time of every kind, by number of workers."""
    best: dict[int, dict[str, float]] = {}
    with TemporaryDirectory() as folder:
        for _ in range(ROUNDS):
            for num in WORKERS:
                mp.spawn(measure_steps, args=(num, free_port(), folder), nprocs=num)
                found = json.loads(Path(folder, f"{num}.json").read_text())
                best[num] = {key: min(value, best.get(num, found)[key]) for key, value in found.items()}
    return best


def measure_reading() -> tuple[int, float, float, dict[int, float]]:
    """Return a row's bytes, the seconds of order and reading per row, and of a worker's epoch by number of workers."""
    rng = np.random.default_rng(0)
    with TemporaryDirectory() as folder:
        source = Path(folder, "rows.npz")
        images = {"mnist": (1, 28, 28), "svhn": (3, 32, 32)}
        arrays = {name: rng.integers(0, 255, (ROWS, *shape), np.uint8) for name, shape in images.items()}
        splits = np.where(np.arange(ROWS) % 100 == 0, "val", np.where(np.arange(ROWS) % 100 == 1, "test", "train"))
        np.savez(source, id=np.arange(ROWS), split=splits, **arrays)
        config = {"dataset": f"{folder}/data", "source": {"kind": "npz", "path": str(source)}}
        prepare(PrepareConfig.model_validate(config), progress=lambda line: None)
        split = open_dataset(f"{folder}/data").split("train")
        order = EpochSampler(split.record_batch_rows, seed=0, batch_size=128, streams=None, window_rows=None)

        def epoch(num: int) -> int:
            return sum(len(batch) for _, _, batch in read_epoch(split, order, 0, 0, 0, num))

        times = {num: min(_seconds(partial(epoch, num)) for _ in range(3)) for num in WORKERS}
        row_bytes = sum(array[0].nbytes for array in arrays.values())
    one, most = WORKERS[0], WORKERS[-1]
    read = (times[one] - times[most]) / (1 / one - 1 / most) / len(split)
    return row_bytes, max(times[one] / len(split) - read, 0.0), read, times


def _seconds(call: partial[int]) -> float:
    start = time.process_time()
    call()
    return time.process_time() - start


def fit(steps: dict[int, dict[str, float]], row_bytes: int, order: float, read: float) -> Constants:
    """Work the constants out of the times."""
    small, large = (steps[1][f"cpu/{batch}"] for batch in BATCHES)
    row = (large - small) / (BATCHES[1] - BATCHES[0])
    gradient = int(steps[1]["gradient"])
    pair = steps[2]
    latency = pair["reduce/small"] / 2
    bandwidth = gradient / max(pair["reduce/large"] - pair["reduce/small"], 1e-9)
    return Constants(max(small - row * BATCHES[0], 0.0), row, gradient, bandwidth, latency, row_bytes, order, read)


def report(steps: dict[int, dict[str, float]], reading: dict[int, float], found: Constants) -> str:
    """Write what a person reads: the constants, measured beside expected, and a cluster's figures."""
    lines = [
        f"overhead {found.overhead * 1e3:.2f} ms a step, {found.row * 1e6:.0f} us a row on one core; "
        f"gradient {found.gradient / 1e6:.2f} MB; between processes here {found.bandwidth / 1e9:.2f} GB/s and "
        f"{found.latency * 1e6:.0f} us a message; {found.row_bytes:,} bytes a row, {found.read * 1e6:.2f} us to read, "
        f"{found.order * 1e6:.2f} us of order",
        "",
        "| workers | batch | CPU ms a worker's step | expected | ms a step | rows/s | a worker's epoch read, s |",
        "|---|---|---|---|---|---|---|",
    ]
    for num in WORKERS:
        for batch in BATCHES:
            seconds, spent = steps[num][f"step/{batch}"], steps[num][f"cpu/{batch}"]
            expected = found.overhead + found.row * batch / num
            lines.append(
                f"| {num} | {batch} | {spent * 1e3:.1f} | {expected * 1e3:.1f} | {seconds * 1e3:.1f} "
                f"| {batch / seconds:,.0f} | {reading[num]:.2f} |"
            )
    lines += [
        "",
        "Expected with a core a worker, one worker a machine, 10 Gbit/s (1.1 GB/s) and 50 us a message:",
        "",
        "| workers | rows/s, batch 96 | share of N times | batch 96 N: rows/s | share | sent by a worker, MB/s |",
        "|---|---|---|---|---|---|",
    ]
    alone = 96 / found.step(1, 96)
    for num in (1, 2, 4, 8, 16, 32, 64):
        fixed = 96 / found.step(num, 96, 1.1e9, 50e-6)
        seconds = found.step(num, 96 * num, 1.1e9, 50e-6)
        grown = 96 * num / seconds
        sent = 2 * (num - 1) / num * found.gradient / seconds / 1e6
        lines.append(
            f"| {num} | {fixed:,.0f} | {fixed / num / alone:.0%} | {grown:,.0f} | {grown / num / alone:.0%} "
            f"| {sent:.0f} |"
        )
    return "\n".join(lines) + "\n"


def main() -> None:
    """Measure, and write the constants and the tables."""
    row_bytes, order, read, reading = measure_reading()
    steps = measure_all()
    found = fit(steps, row_bytes, order, read)
    text = report(steps, reading, found)
    FOLDER.mkdir(parents=True, exist_ok=True)
    (FOLDER / "constants.json").write_text(json.dumps({**asdict(found), "steps": steps}, indent=2) + "\n")
    (FOLDER / "scaling.md").write_text(text)
    print(text)


if __name__ == "__main__":
    main()
