"""Watch runs from outside, and kill them."""

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
    """Return the last step that the run has logged; 0 before the first."""
    file = run_dir / "tracking" / "metrics.jsonl"
    lines = file.read_bytes().splitlines()[-3:] if file.exists() else []
    steps = [int(found[1]) for line in lines if (found := re.search(rb'"step": (\d+)', line))]
    return max(steps, default=0)


def first_worker(run_dir: Path) -> int:
    """Return the process id of rank 0, which writes checkpoints and metrics: it holds the outbox."""
    lock = run_dir / "tracking" / "spool.lock"
    wait_for(lambda: lock.read_text().endswith("\n"), 10)  # a new holder truncates it before it writes its name
    found = re.match(r"process (\d+) on", lock.read_text())
    assert found
    return int(found[1])


def is_writing(run_dir: Path) -> bool:
    """Return whether a checkpoint is half written."""
    return any((run_dir / "checkpoints").glob(".checkpoint_*.partial"))


def wait_for(condition: Callable[[], bool], seconds: float = 240) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, "the condition never became true"
        time.sleep(0.001)


class KillAt(threading.Thread):
    """Kill rank 0 with SIGKILL once the run has logged a step, or while it writes the next checkpoint.

    Attributes:
        at: the last step that was logged.
        was_writing: whether a checkpoint was left half written.
    """

    def __init__(self, run_dir: Path, step: int, while_writing: bool = False) -> None:
        super().__init__(daemon=True)
        self.run_dir, self.step, self.while_writing = run_dir, step, while_writing
        self.at, self.was_writing = 0, False
        self.start()

    def run(self) -> None:
        wait_for(lambda: logged(self.run_dir) >= self.step)
        if self.while_writing:
            wait_for(lambda: is_writing(self.run_dir))
        os.kill(first_worker(self.run_dir), signal.SIGKILL)
        self.at, self.was_writing = logged(self.run_dir), is_writing(self.run_dir)


def start_driver(
    config: TrainConfig, folder: Path, variables: dict[str, str] | None = None, address: str | None = None
) -> subprocess.Popen[str]:
    """Run `config` in a process of its own, here or at `address`; its output goes to `folder/driver.log`.

    `variables` are set there and, as `ray job submit --runtime-env-json` does, in its workers.
    """
    file = folder / "run.json"
    file.write_text(config.model_dump_json())
    program = (
        "from pathlib import Path\n"
        "from dmvae.config.training import TrainConfig\n"
        "from dmvae.platform.train.trainer import train_run\n"
        "log = lambda text: print(text, flush=True)\n"
        f"train_run(TrainConfig.model_validate_json(Path({str(file)!r}).read_text()), log)\n"
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
    """Return a metric from the outbox by step, and check that no step is there twice."""
    lines = map(json.loads, (run_dir / "tracking" / "metrics.jsonl").read_text().splitlines())
    pairs = [(line["step"], line["metrics"][name]) for line in lines if name in line.get("metrics", {})]
    assert len(dict(pairs)) == len(pairs), "a step was recorded twice"
    return dict(sorted(pairs))
