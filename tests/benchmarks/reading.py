"""Reading a million rows of six float views from shards, against tensors in memory; training beyond a memory limit.

    python -m tests.benchmarks.reading [FOLDER]

writes the dataset (1.1 GB, by a seeded script) and ten times the limit of it under FOLDER (default build/reading;
9 GB in all, made once), and `reading.json` and `reading.md`. Both sides of a ratio alternate in one run, on one thread
of torch.
"""

import argparse
import json
import re
import resource
import shutil
import statistics
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import asdict
from itertools import islice
from pathlib import Path

import numpy as np
import torch

from dmvae.config.model import DMVAEConfig
from dmvae.config.training import TrainConfig
from dmvae.data.batch import Batch
from dmvae.data.format.manifest import load_manifest, save_manifest
from dmvae.data.preparation.rows import Rows
from dmvae.data.preparation.writer import write_dataset
from dmvae.data.reading.dataset import open_dataset
from dmvae.data.reading.loader import read_epoch
from dmvae.data.reading.sampler import EpochSampler
from dmvae.data.reading.split import Split
from dmvae.model.dmvae import DMVAE
from dmvae.training.state import Position, TrainState, build_optimizer
from dmvae.training.step import Collectives, WorkerBatch, train_epoch
from tests.benchmarks.ratio import Result, compare, machine, markdown

ROWS, BATCH = 1_000_000, 256
VIEWS = {"a": 64, "b": 64, "c": 48, "d": 32, "e": 32, "f": 32}
LIMIT, COPIES = 640 << 20, 7
"""The process that trains may have so many bytes of memory of its own, and trains on so many copies of the dataset."""


def write_views(folder: Path) -> None:
    """Write the dataset: views of a common cause, each missing in a fifth of the rows."""
    rng = np.random.default_rng(0)
    cause = rng.standard_normal((ROWS, 8), dtype=np.float32)
    data, present = {}, {}
    for name, dim in VIEWS.items():
        data[name] = rng.standard_normal((ROWS, dim), dtype=np.float32)
        data[name] += cause @ rng.standard_normal((8, dim), dtype=np.float32)
        present[name] = rng.random(ROWS) < 0.8
    present["a"] |= ~np.logical_or.reduce(list(present.values()))
    write_dataset(folder, {"train": Rows(np.arange(ROWS), data, present, rng.integers(0, 100, ROWS))}, replace=True)


def multiply(source: Path, target: Path, times: int, link: bool) -> None:
    """Write a dataset of `times` copies of another's shards: real files, or names of the same ones."""
    manifest = load_manifest(source)
    infos = manifest.splits["train"].shards
    (target / "train").mkdir(parents=True, exist_ok=True)
    shards = []
    for number in range(times * len(infos)):
        info = infos[number % len(infos)]
        shards.append(info.model_copy(update={"path": f"train/part-{number:05d}.arrow"}))
        file = target / shards[-1].path
        if link:
            file.unlink(missing_ok=True)
            file.hardlink_to(source / info.path)
        elif not file.is_file() or file.stat().st_size != info.bytes:
            shutil.copyfile(source / info.path, file)
    split = manifest.splits["train"].model_copy(update={"shards": tuple(shards)})
    save_manifest(manifest.model_copy(update={"splits": {"train": split}}), target)


def batches_of(split: Split, epoch: int, size: int = BATCH) -> Iterator[Batch]:
    """Return the shuffled batches of an epoch, from shards."""
    order = EpochSampler(split.record_batch_rows, seed=0, batch_size=size)
    return (batch for _, _, batch in read_epoch(split, order, epoch))


def batches_in_memory(whole: Batch, epoch: int) -> Iterator[Batch]:
    """Return the same of tensors in memory, in an order of all rows."""
    order = torch.randperm(len(whole), generator=torch.Generator().manual_seed(epoch))
    assert whole.masks is not None
    assert whole.labels is not None
    assert isinstance(whole.ids, torch.Tensor)
    for rows in order.split(BATCH):
        yield Batch(
            {name: values.index_select(0, rows) for name, values in whole.data.items()},
            {name: mask.index_select(0, rows) for name, mask in whole.masks.items()},
            whole.labels.index_select(0, rows),
            whole.ids.index_select(0, rows),
        )


def make_state(hidden: int) -> tuple[TrainState, TrainConfig]:
    """Return a model of the six views with one hidden layer a network, and how it is trained."""
    model = DMVAEConfig.model_validate(
        {
            "input_dims": {name: (dim,) for name, dim in VIEWS.items()},
            "latent_dim": 16,
            "modalities_specific_dim": 8,
            "architectures": {name: {"hidden_dims": [hidden]} for name in VIEWS},
        }
    )
    config = TrainConfig.model_validate({"name": "reading", "data": {"dataset": "none"}, "model": model})
    built = DMVAE(model)
    return TrainState(built, build_optimizer(built, config.optim)), config


def train_on(batches: Iterator[Batch], state: TrainState, config: TrainConfig, steps: int) -> None:
    """Take so many training steps."""
    state.position = Position(0, 0)
    shares = (WorkerBatch(batch, step, 0, len(batch)) for step, batch in enumerate(islice(batches, steps)))
    for _ in train_epoch(state, shares, config, Collectives(state.model), steps):
        pass


def memory() -> dict[str, int]:
    """Return this process's memory in bytes: anonymous pages it holds, and what RLIMIT_DATA counts."""
    found = re.findall(r"(RssAnon|VmData):\s+(\d+)", Path("/proc/self/status").read_text())
    return {name: int(value) << 10 for name, value in found}


def opening(folder: Path, work: str) -> Result:
    """Time the opening of a dataset, twenty times."""
    seconds = []
    for _ in range(20):
        begun = time.perf_counter()
        split = open_dataset(folder).split("train")
        seconds.append(time.perf_counter() - begun)
    size = (folder / "dataset.json").stat().st_size
    note = f"{len(split):,} rows, {split.manifest.bytes / 1e9:.1f} GB, a manifest of {size / 1e3:.0f} KB"
    middle, promised = statistics.median(seconds), 1.0 if len(split) <= 10**7 else None
    return Result(work, "-", None, middle, min(seconds), max(seconds), promised, unit="s", note=note)


def reading(split: Split) -> Iterator[Result]:
    """Compare shuffled reading, and training steps, with tensors in memory."""
    whole = split.read(np.arange(len(split)))
    epochs = iter(range(10**6))

    def consume(batches: Iterator[Batch]) -> None:
        for _ in islice(batches, 400):
            pass

    yield compare(
        f"shuffled reading, batches of {BATCH}",
        "index_select of tensors in memory",
        lambda: consume(batches_of(split, next(epochs))),
        lambda: consume(batches_in_memory(whole, next(epochs))),
        at_least=0.5,
    )
    for hidden in (64, 256):
        state, config = make_state(hidden)
        yield compare(
            f"training step, six perceptrons of {hidden}, batches of {BATCH}",
            "the same on tensors in memory",
            lambda state=state, config=config: train_on(batches_of(split, next(epochs)), state, config, 60),
            lambda state=state, config=config: train_on(batches_in_memory(whole, next(epochs)), state, config, 60),
            at_least=0.97,
            note="reading, in its thread, included in processor time",
        )


def measure_memory(folder: Path, side: str) -> None:
    """Print how much anonymous memory a pass over the rows adds at most; in a process of its own."""
    split = open_dataset(folder, verify_on_use=False).split("train")
    before = most = memory()["RssAnon"]
    batches = batches_of(split, 0) if side == "shards" else batches_in_memory(split.read(np.arange(ROWS)), 0)
    for number, _ in enumerate(batches):
        if number % 50 == 0:
            most = max(most, memory()["RssAnon"])
    print(json.dumps({"added": most - before}))


def train_within_limit(folder: Path) -> None:
    """Train an epoch of a small model under RLIMIT_DATA and print the memory on the way; see that the limit is one."""
    resource.setrlimit(resource.RLIMIT_DATA, (LIMIT, LIMIT))
    split = open_dataset(folder, verify_on_use=False).split("train")
    state, config = make_state(16)
    seen: list[dict[str, int]] = []

    def watched() -> Iterator[Batch]:
        for number, batch in enumerate(batches_of(split, 0, 1024)):
            if number % 100 == 0:
                seen.append(memory())
            yield batch

    train_on(watched(), state, config, 10**9)
    try:
        split.read(np.arange(ROWS))
        in_memory = "a seventh of it can be read into memory"
    except (MemoryError, RuntimeError):
        in_memory = "reading a seventh of it into memory fails"
    anonymous = [reading["RssAnon"] for reading in seen]
    print(
        json.dumps(
            {
                "bytes": split.manifest.bytes,
                "rows": len(split),
                "at_a_tenth": anonymous[len(anonymous) // 10],
                "largest_after": max(anonymous[len(anonymous) // 10 :]),
                "at_the_end": anonymous[-1],
                "data": max(reading["VmData"] for reading in seen),
                "otherwise": in_memory,
            }
        )
    )


def apart(*words: str) -> dict[str, int]:
    """Run a part of this in a process of its own and return what it printed."""
    found = subprocess.run(
        [sys.executable, "-m", "tests.benchmarks.reading", *words], check=True, capture_output=True, text=True
    )
    return json.loads(found.stdout.splitlines()[-1])


def memories(folder: Path, copies: Path) -> Iterator[Result]:
    """Compare memory, and train beyond a limit of it."""
    ours, theirs = (apart(str(folder), "--part", side)["added"] for side in ("shards", "tensors"))
    yield _times(
        "memory of reading, less by",
        "tensors in memory",
        theirs / ours,
        f"anonymous memory that an epoch adds: {ours / 1e6:.0f} MB and {theirs / 1e6:.0f} MB",
    )
    found = apart(str(copies), "--part", "limit")
    yield _times(
        f"an epoch of {found['rows']:,} rows, {found['bytes'] / 1e9:.1f} GB, with RLIMIT_DATA {LIMIT / 1e6:.0f} MB",
        "the limit",
        found["bytes"] / LIMIT,
        f"anonymous memory {found['at_a_tenth'] / 1e6:.0f} MB after a tenth of the epoch, "
        f"{found['largest_after'] / 1e6:.0f} MB at most afterwards, {found['at_the_end'] / 1e6:.0f} MB at the end; "
        f"RLIMIT_DATA counted {found['data'] / 1e6:.0f} MB; {found['otherwise']}",
    )


def _times(work: str, against: str, figure: float, note: str) -> Result:
    return Result(work, against, None, figure, figure, figure, 10.0, note=note)


def results(folder: Path) -> Iterator[Result]:
    """Make the data unless it is there, and run everything."""
    views, copies = folder / "views", folder / "copies"
    if not (views / "dataset.json").is_file():
        apart(str(views), "--part", "write")
    if not (copies / "dataset.json").is_file():
        multiply(views, copies, COPIES, link=False)
    yield opening(views, "opening, a million rows")
    for times in (10, 100):
        many = folder / f"times{times}"
        multiply(views, many, times, link=True)
        yield opening(many, f"opening, {times} million rows (hard links)")
        shutil.rmtree(many)
    yield from reading(open_dataset(views).split("train"))
    yield from memories(views, copies)


def main() -> None:
    """Run everything, or one part in this process, and write the table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("folder", nargs="?", default="build/reading", type=Path)
    parser.add_argument("--part", choices=("write", "shards", "tensors", "limit"))
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    if arguments.part == "write":
        write_views(arguments.folder)
        print(json.dumps({}))
    elif arguments.part == "limit":
        train_within_limit(arguments.folder)
    elif arguments.part is not None:
        measure_memory(arguments.folder, arguments.part)
    else:
        arguments.folder.mkdir(parents=True, exist_ok=True)
        found, facts = [], machine()
        for result in results(arguments.folder):
            print(f"{result.work:<56} {result.figure:6.3f}{result.unit}  {result.note}", flush=True)
            found.append(result)
        text = markdown(found, facts)
        (arguments.folder / "reading.json").write_text(
            json.dumps({"machine": facts, "results": list(map(asdict, found))}, indent=2)
        )
        (arguments.folder / "reading.md").write_text(text)
        print(text)


if __name__ == "__main__":
    main()
