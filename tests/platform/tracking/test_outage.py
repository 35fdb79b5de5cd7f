"""Real runs during an outage of MLflow: no metric is lost or doubled, no step is slower, no dead run stays RUNNING.

Acceptance only: outages of minutes. Short ones are in `test_tracking.py`.
"""

import itertools
import json
import os
import signal
import statistics
import subprocess
import sys
import threading
import time
from pathlib import Path
from typing import Any

import pytest
from mlflow import MlflowClient

from dmvae.config.training import TrainConfig
from dmvae.platform.tracking.runs import sync
from dmvae.platform.train.trainer import train_run
from tests.kills import first_worker, logged, metrics_of, start_driver, wait_for
from tests.platform.tracking.test_tracking import free_port, server
from tests.runs import make_config, make_dataset

pytestmark = pytest.mark.usefixtures("cluster")


@pytest.fixture(scope="module")
def large(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """27 steps an epoch."""
    return make_dataset(tmp_path_factory.mktemp("outage"), rows=1200)


def stored(run_dir: Path, uri: str, name: str) -> dict[int, float]:
    run_id = json.loads((run_dir / "tracking" / "mlflow.json").read_text())["run_id"]
    history = MlflowClient(uri).get_metric_history(run_id, name)
    assert len({metric.step for metric in history}) == len(history), "a step was recorded twice"
    return {metric.step: metric.value for metric in sorted(history, key=lambda metric: metric.step)}


def status(run_dir: Path, uri: str) -> str:
    run_id = json.loads((run_dir / "tracking" / "mlflow.json").read_text())["run_id"]
    return str(MlflowClient(uri).get_run(run_id).info.status)


def seconds_per_step(run_dir: Path, first: float, last: float) -> float:
    """The median time between two steps that were logged between two points in time."""
    lines = map(json.loads, (run_dir / "tracking" / "metrics.jsonl").read_text().splitlines())
    times = [line["timestamp"] / 1000 for line in lines if "train/loss" in line.get("metrics", {})]
    return statistics.median(b - a for a, b in itertools.pairwise(times) if first < a and b < last)


@pytest.mark.acceptance
def test_a_run_finishes_without_its_database_and_sync_delivers_it(large: Path, tmp_path: Path) -> None:
    config = make_config(tmp_path, large, training={"epochs": 3})
    database, away, run_dir = tmp_path / "mlflow.db", tmp_path / "away.db", tmp_path / "runs" / "run"

    def take_away() -> None:
        wait_for(lambda: logged(run_dir) >= 3)
        database.rename(away)

    thread = threading.Thread(target=take_away, daemon=True)
    thread.start()
    summary = train_run(config, lambda line: None)
    thread.join()
    assert "test/nll" in summary.metrics
    assert not database.exists()
    assert [result.state for result in sync(tmp_path / "runs", config.tracking.uri)] == ["undelivered"]
    away.rename(database)
    (result,) = sync(tmp_path / "runs", config.tracking.uri)
    assert (result.state, result.killed) == ("delivered", False)
    uri = str(config.tracking.uri)
    assert stored(run_dir, uri, "train/loss") == metrics_of(run_dir, "train/loss")
    assert len(stored(run_dir, uri, "train/loss")) == 3 * 27
    assert status(run_dir, uri) == "FINISHED"


def remote(folder: Path, dataset: Path, port: int, epochs: int) -> TrainConfig:
    wide = {"architectures": {"left": {"hidden_dims": [256, 256]}, "right": {"hidden_dims": [256, 256]}}}
    changes: dict[str, Any] = {"model": wide, "training": {"epochs": epochs, "checkpoint_seconds": 30.0}}
    return make_config(folder, dataset, **changes, tracking={"uri": f"http://127.0.0.1:{port}"})


@pytest.mark.acceptance
def test_an_outage_of_a_minute_costs_no_metric_and_no_time(large: Path, tmp_path: Path) -> None:
    port, run_dir = free_port(), tmp_path / "runs" / "run"
    config = remote(tmp_path, large, port, epochs=400)
    with server(tmp_path, port):
        driver = start_driver(config, tmp_path)
        wait_for(lambda: logged(run_dir) >= 100)
        begun = time.time()
        time.sleep(30)
    gone = time.time()
    time.sleep(60)
    back = time.time()
    at = logged(run_dir)
    with server(tmp_path, port):
        wait_for(lambda: driver.poll() is not None, 500)
        assert driver.returncode == 0
        sync(tmp_path / "runs", config.tracking.uri)
        assert stored(run_dir, f"http://127.0.0.1:{port}", "train/loss") == metrics_of(run_dir, "train/loss")
        assert status(run_dir, f"http://127.0.0.1:{port}") == "FINISHED"
    assert 0 < at < 400 * 27, "the outage ended before the run did"
    before, during = seconds_per_step(run_dir, begun, gone), seconds_per_step(run_dir, gone, back)
    print(f"seconds per step: {before:.5f} before, {during:.5f} during, {during / before:.3f} times")
    assert during <= 1.05 * before


@pytest.mark.acceptance
def test_a_trainer_killed_during_an_outage_loses_nothing_and_does_not_stay_running(large: Path, tmp_path: Path) -> None:
    port, run_dir = free_port(), tmp_path / "runs" / "run"
    config = remote(tmp_path, large, port, epochs=400)
    with server(tmp_path, port):
        driver = start_driver(config, tmp_path)
        wait_for(lambda: logged(run_dir) >= 60)
    at = logged(run_dir)
    wait_for(lambda: logged(run_dir) >= at + 60)
    writer = first_worker(run_dir)
    os.kill(driver.pid, signal.SIGKILL)
    driver.wait()
    wait_for(lambda: not Path(f"/proc/{writer}").exists(), 60)
    command = [sys.executable, "-m", "jobs.sync", str(tmp_path / "runs"), "--tracking.uri", str(config.tracking.uri)]
    with server(tmp_path, port):
        done = subprocess.run(command, cwd=Path(__file__).parents[3], capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stderr
        assert stored(run_dir, f"http://127.0.0.1:{port}", "train/loss") == metrics_of(run_dir, "train/loss")
        assert status(run_dir, f"http://127.0.0.1:{port}") == "KILLED"
