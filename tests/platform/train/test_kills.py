"""Runs that are killed, whose checkpoints are damaged, or whose disk is full: how they end and resume.

Ten kills of workers and drivers in one run: acceptance only. One kill during the writing of a checkpoint is in every
test run.
"""

import os
import random
import re
import resource
import signal
import statistics
import threading
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from dmvae.config.training import TrainConfig
from dmvae.platform.errors import RunError
from dmvae.platform.train.trainer import train_run
from dmvae.training import checkpoint
from tests.kills import (
    KillAt,
    first_worker,
    is_writing,
    logged,
    metrics_of,
    start_driver,
    wait_for,
)
from tests.runs import make_config, make_dataset, train_here

pytestmark = pytest.mark.usefixtures("cluster")

# large enough that a kill can hit a checkpoint while it is written
WIDE = {"architectures": {"left": {"hidden_dims": [512, 512]}, "right": {"hidden_dims": [512, 512]}}}


@pytest.fixture(scope="module")
def large(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """27 steps an epoch."""
    return make_dataset(tmp_path_factory.mktemp("kills"), rows=1200)


def newest(run_dir: Path) -> Path:
    return max((run_dir / "checkpoints").glob("checkpoint_[0-9]*"))


def kill_while_writing(config: TrainConfig, step: int) -> None:
    """Start a run that may not retry, and kill it with SIGKILL while it writes a checkpoint after `step`."""
    killer = KillAt(Path(config.runs_dir) / config.name, step, while_writing=True)
    workers = config.workers.model_copy(update={"max_failures": 0})
    with pytest.raises(RunError, match="resume from the last checkpoint"):
        train_run(config.model_copy(update={"workers": workers}), lambda line: None)
    killer.join()
    assert killer.was_writing


def test_half_written_and_damaged_checkpoints_and_ray_s_torn_list_do_not_stop_a_run(
    large: Path, tmp_path: Path
) -> None:
    config = make_config(tmp_path, large, training={"epochs": 2, "checkpoint_steps": 5}, model=WIDE)
    run_dir = tmp_path / "runs" / "run"
    kill_while_writing(config, 32)
    broken = newest(run_dir)
    content = bytearray((broken / "model.safetensors").read_bytes())
    content[len(content) // 2] ^= 4
    (broken / "model.safetensors").write_bytes(content)
    (ray_list,) = (run_dir / "checkpoints").glob("*snapshot.json")
    ray_list.write_bytes(ray_list.read_bytes()[:100])
    before = checkpoint.read_report(max(p for p in broken.parent.glob("checkpoint_[0-9]*") if p != broken))["step"]

    screen: list[str] = []
    train_run(config, screen.append)
    (warning,) = (line for line in screen if line.startswith("warning: Checkpoint "))
    assert f"{broken} is damaged: model.safetensors" in warning
    epochs, steps = divmod(before, 27)
    assert f"resuming after {epochs} epochs and {steps} steps" in screen
    state, metrics = train_here(config)
    ended = load_file(run_dir / "last" / "model.safetensors")
    assert all(torch.equal(tensor, ended[name]) for name, tensor in state.model.state_dict().items())
    expected = {step: values["train/loss"] for step, values in metrics.items() if "train/loss" in values}
    assert metrics_of(run_dir, "train/loss") == expected
    assert not list((run_dir / "checkpoints").glob(".checkpoint_*"))


def limit_file_sizes(run_dir: Path, step: int, size: int) -> None:
    """From a step on, let rank 0 write no file beyond `size` bytes: what a full disk is to it."""
    wait_for(lambda: logged(run_dir) >= step)
    resource.prlimit(first_worker(run_dir), resource.RLIMIT_FSIZE, (size, resource.RLIM_INFINITY))


def test_a_disk_that_takes_no_more_stops_the_run_and_leaves_the_last_checkpoint_intact(
    large: Path, tmp_path: Path
) -> None:
    changes: dict[str, Any] = {"training": {"epochs": 1, "checkpoint_steps": 5}, "workers": {"num": 2}, "model": WIDE}
    config, run_dir = make_config(tmp_path, large, **changes), tmp_path / "runs" / "run"
    limiter = threading.Thread(target=limit_file_sizes, args=(run_dir, 12, 100_000), daemon=True)
    limiter.start()
    with pytest.raises(RunError, match=r"File too large.*Free some space") as stopped:
        train_run(config, lambda line: None)
    limiter.join()
    assert len(str(stopped.value).splitlines()) == 1
    kept = newest(run_dir)
    checkpoint.verify(kept)
    step = checkpoint.read_report(kept)["step"]
    screen: list[str] = []
    train_run(config, screen.append)
    assert f"resuming after {step // 27} epochs and {step % 27} steps" in screen
    found = metrics_of(run_dir, "train/loss")
    _, metrics = train_here(config)
    expected = {step: values["train/loss"] for step, values in metrics.items() if "train/loss" in values}
    assert list(found) == list(expected)
    np.testing.assert_allclose(list(found.values()), list(expected.values()), rtol=1e-9)


@pytest.mark.acceptance
def test_ten_kills_at_random_steps_change_no_bit_of_the_result(large: Path, tmp_path: Path) -> None:
    """Workers and drivers, in the middle of an epoch and of a checkpoint's writing."""
    changes: dict[str, Any] = {
        "model": WIDE,
        "workers": {"num": 2, "max_failures": 10},
        "training": {"epochs": 10, "checkpoint_steps": 5},
    }
    straight, killed = (make_config(tmp_path, large, name, **changes) for name in ("straight", "killed"))
    train_run(straight, lambda line: None)
    run_dir = tmp_path / "runs" / "killed"
    draw = random.Random(5)
    steps = sorted(draw.sample(range(10, 10 * 27 - 40, 9), 10))
    kinds = [(who, when) for who in ("worker", "driver") for when in ("step", "step", "step", "write", "write")]
    draw.shuffle(kinds)
    driver, notes = start_driver(killed, tmp_path), []
    for (who, when), step in zip(kinds, steps, strict=True):
        wait_for(lambda step=step: logged(run_dir) >= step)
        if when == "write":
            wait_for(lambda: is_writing(run_dir))
        os.kill(first_worker(run_dir) if who == "worker" else driver.pid, signal.SIGKILL)
        begun, at, torn = time.monotonic(), logged(run_dir), is_writing(run_dir)
        resumptions = (tmp_path / "driver.log").read_text().count("resuming after")
        if who == "driver":
            driver.wait()
            driver = start_driver(killed, tmp_path)
        wait_for(lambda n=resumptions: (tmp_path / "driver.log").read_text().count("resuming after") > n)
        resumed = time.monotonic() - begun
        found = re.findall(r"resuming after (\d+) epochs and (\d+) steps", (tmp_path / "driver.log").read_text())[-1]
        lost = at - (int(found[0]) * 27 + int(found[1]))
        wait_for(lambda at=at: logged(run_dir) > at)
        notes.append((who, when, at, torn, lost, resumed, time.monotonic() - begun))
        print(f"{who} at step {at} ({when}, torn {torn}): {lost} steps lost, {resumed:.1f} s to resume", flush=True)
    assert driver.wait(400) == 0
    before, after = (
        load_file(tmp_path / "runs" / name / "last" / "model.safetensors") for name in ("straight", "killed")
    )
    assert before.keys() == after.keys()
    assert all(torch.equal(before[name], after[name]) for name in before)
    for name in ("train/loss", "val/loss"):
        assert metrics_of(tmp_path / "runs" / "straight", name) == metrics_of(run_dir, name)
    assert sum(torn for _, when, _, torn, *_ in notes if when == "write") >= 2, "some were killed in the write itself"
    assert all(lost <= 10 for *_, lost, _, _ in notes), "a checkpoint is due every 5 steps; one may be half written"
    print(f"median seconds to resume: {statistics.median(note[5] for note in notes):.1f}")
