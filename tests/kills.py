"""Runs that are watched from outside, and killed."""

import json
import os
import re
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path

import ray

from dmvae.config.training import TrainConfig


def logged(run_dir: Path) -> int:
    """The last step that the run has written down; 0 before the first."""
    file = run_dir / "tracking" / "metrics.jsonl"
    lines = file.read_bytes().splitlines()[-3:] if file.exists() else []
    steps = [int(found[1]) for line in lines if (found := re.search(rb'"step": (\d+)', line))]
    return max(steps, default=0)


def first_worker(run_dir: Path) -> int:
    """Process id of the worker that writes checkpoints and figures: the one that holds the outbox."""
    lock = run_dir / "tracking" / "spool.lock"
    wait_for(lambda: lock.read_text().endswith("\n"), 10)  # a new holder empties it before it writes its name
    found = re.match(r"process (\d+) on", lock.read_text())
    assert found
    return int(found[1])


def is_writing(run_dir: Path) -> bool:
    """Whether a checkpoint is half written just now."""
    return any((run_dir / "checkpoints").glob(".checkpoint_*.partial"))


def wait_for(condition: Callable[[], bool], seconds: float = 240) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, "waited in vain"
        time.sleep(0.001)


class KillAt(threading.Thread):
    """Kill the first worker with SIGKILL once the run has logged a step."""

    def __init__(self, run_dir: Path, step: int) -> None:
        super().__init__(daemon=True)
        self.run_dir, self.step, self.at = run_dir, step, 0
        self.start()

    def run(self) -> None:
        wait_for(lambda: logged(self.run_dir) >= self.step)
        os.kill(first_worker(self.run_dir), signal.SIGKILL)
        self.at = logged(self.run_dir)


def start_driver(
    config: TrainConfig, folder: Path, variables: dict[str, str] | None = None, address: str | None = None
) -> subprocess.Popen[str]:
    """Run `config` in a process of its own, here or at `address`; what it says goes to `folder/driver.log`.

    `variables` are set there and, as `ray job submit --runtime-env-json` sets them, in its workers.
    """
    file = folder / "run.json"
    file.write_text(config.model_dump_json())
    program = (
        "from pathlib import Path\n"
        "from dmvae.config.training import TrainConfig\n"
        "from dmvae.platform.train.trainer import train_run\n"
        "say = lambda text: print(text, flush=True)\n"
        f"train_run(TrainConfig.model_validate_json(Path({str(file)!r}).read_text()), say)\n"
    )
    here = address or ray.get_runtime_context().gcs_address
    environment = {**os.environ, "RAY_ADDRESS": here, **(variables or {})}
    if variables:
        environment["RAY_JOB_CONFIG_JSON_ENV_VAR"] = json.dumps({"runtime_env": {"env_vars": variables}})
    with (folder / "driver.log").open("a") as log:
        return subprocess.Popen(
            [sys.executable, "-c", program], env=environment, cwd=Path(__file__).parents[1], stdout=log, text=True
        )


def metrics_of(run_dir: Path, name: str) -> dict[int, float]:
    """A curve as the outbox has it, by step; each step once."""
    lines = map(json.loads, (run_dir / "tracking" / "metrics.jsonl").read_text().splitlines())
    pairs = [(line["step"], line["metrics"][name]) for line in lines if name in line.get("metrics", {})]
    assert len(dict(pairs)) == len(pairs), "a step was recorded twice"
    return dict(sorted(pairs))
