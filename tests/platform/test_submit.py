"""Jobs submitted to a cluster of their own, with a token: a training run is stopped, and resumed by a second job.

Searches and failing jobs: acceptance only.
"""

import json
import os
import secrets
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import psutil
import pytest
import tomli_w
from mlflow import MlflowClient
from pydantic import BaseModel

from tests.example_runs import make_example, make_rows
from tests.kills import logged, metrics_of, wait_for
from tests.platform.tracking.test_tracking import free_port
from tests.runs import make_config, make_dataset
from tests.searches import make_search

ROOT = Path(__file__).parents[2]
EPOCHS = 60
pytestmark = [pytest.mark.ray, pytest.mark.timeout(900)]


class Cluster:
    """A cluster of one head node, and the commands that a user runs against it."""

    def __init__(self, folder: Path) -> None:
        self.folder, self.port = folder, free_port()
        self.environment = {k: v for k, v in os.environ.items() if k not in ("RAY_ADDRESS", "PYTHONPATH")}
        self.environment |= {"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN": secrets.token_hex(16)}
        self.environment["PATH"] = f"{Path(sys.executable).parent}:{os.environ['PATH']}"
        ports = {"port": free_port(), "dashboard-port": self.port, "ray-client-server-port": free_port()}
        ports |= {"dashboard-agent-listen-port": free_port(), "metrics-export-port": free_port()}
        flags = [f"--{name}={value}" for name, value in ports.items()]
        command = ["ray", "start", "--head", "--num-cpus=3", "--block", "--disable-usage-stats", *flags]
        with (folder / "head.log").open("wb") as log:
            self.head = subprocess.Popen(
                command, env=self.environment, stdout=log, stderr=log, start_new_session=True, cwd=folder
            )
        # a head answers before it can take a job
        wait_for(lambda: self.submit(f"probe-{time.time_ns()}", "python", "-c", "pass").returncode == 0, 240)

    def run(self, *arguments: str) -> subprocess.CompletedProcess[str]:
        """Run `ray ARGUMENTS` against this cluster."""
        command = ["ray", *arguments[:2], "--address", f"http://127.0.0.1:{self.port}", *arguments[2:]]
        done = subprocess.run(command, env=self.environment, capture_output=True, text=True, check=False, cwd=ROOT)
        time.sleep(0.2)
        return done

    def submit(self, name: str, *command: str, wait: bool = True) -> subprocess.CompletedProcess[str]:
        """Submit a job of this checkout."""
        flags = ["--submission-id", name, "--working-dir", ".", *([] if wait else ["--no-wait"])]
        return self.run("job", "submit", *flags, "--", *command)

    def stop(self) -> None:
        """Kill every process of this cluster."""
        parent = psutil.Process(self.head.pid)
        for one in (*parent.children(recursive=True), parent):
            one.kill()
        self.head.wait(60)


@pytest.fixture(scope="module")
def cluster(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Cluster]:
    head = Cluster(tmp_path_factory.mktemp("head"))
    yield head
    head.stop()


@pytest.fixture(scope="module")
def large(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_dataset(tmp_path_factory.mktemp("submit"), rows=1200)


def write(config: BaseModel, file: Path) -> str:
    file.write_text(tomli_w.dumps(json.loads(config.model_dump_json(exclude_none=True, exclude_unset=True))))
    return str(file)


def test_a_training_run_is_submitted_stopped_and_resumed(cluster: Cluster, large: Path, tmp_path: Path) -> None:
    config = make_config(tmp_path, large, training={"epochs": EPOCHS, "checkpoint_steps": 10}, workers={"num": 2})
    file, run_dir = write(config, tmp_path / "train.toml"), tmp_path / "runs" / "run"
    python = ("python", "-m", "jobs.train", file)
    assert cluster.submit("first", *python, wait=False).returncode == 0
    wait_for(lambda: logged(run_dir) >= 40)
    assert cluster.run("job", "stop", "first").returncode == 0
    wait_for(lambda: "STOPPED" in cluster.run("job", "status", "first").stdout.upper(), 60)
    at = logged(run_dir)
    assert at < EPOCHS * 27
    done = cluster.submit("second", *python)
    assert done.returncode == 0, done.stdout[-3000:]
    assert "resuming after" in done.stdout
    assert f"best checkpoint          {run_dir / 'best'}" in done.stdout
    assert len(metrics_of(run_dir, "train/loss")) == EPOCHS * 27
    run_id = json.loads((run_dir / "tracking" / "mlflow.json").read_text())["run_id"]
    record = MlflowClient(str(config.tracking.uri)).get_run(run_id)
    assert record.info.status == "FINISHED"
    assert "test/nll" in record.data.metrics


@pytest.mark.acceptance
def test_a_run_of_own_networks_is_submitted_with_its_folder(cluster: Cluster, tmp_path: Path) -> None:
    config = make_example(
        tmp_path, make_rows(tmp_path), training={"epochs": 2, "precision": "float32"}, workers={"num": 2}
    )
    done = cluster.submit("own", "python", "-m", "jobs.train", write(config, tmp_path / "train.toml"))
    assert done.returncode == 0, done.stdout[-3000:]
    assert f"--model {tmp_path}/runs/run/best --dataset {tmp_path}/data --trust tests" in done.stdout
    assert "active units: shared " in done.stdout


@pytest.mark.acceptance
def test_a_search_is_submitted(cluster: Cluster, large: Path, tmp_path: Path) -> None:
    config = make_search(tmp_path, large, trials=3, base={"training": {"epochs": 3}})
    done = cluster.submit("search", "python", "-m", "jobs.search", write(config, tmp_path / "search.toml"))
    assert done.returncode == 0, done.stdout[-3000:]
    assert done.stdout.count("trial ") >= 3
    assert f"best configuration       {tmp_path / 'runs' / 'study' / 'best.toml'}" in done.stdout


@pytest.mark.acceptance
def test_failure_is_an_exit_code_and_a_last_line(cluster: Cluster, tmp_path: Path) -> None:
    config = make_config(tmp_path, tmp_path / "nowhere")
    done = cluster.submit("failing", "python", "-m", "jobs.train", write(config, tmp_path / "train.toml"))
    assert done.returncode == 1
    assert "error: " in done.stdout
    assert "Traceback" not in done.stdout.partition("error: ")[2].partition("\n")[0]
