"""SIGTERM and time budgets end a command in order, and the same command resumes."""

import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import ray
from mlflow import MlflowClient
from safetensors.torch import load_file

from dmvae.config.section import seconds_of
from dmvae.config.training import TrainConfig
from dmvae.platform.train.trainer import train_run
from tests.kills import logged, wait_for
from tests.runs import make_config, make_dataset

ROOT = Path(__file__).parents[2]


def start(verb: str, config: Path, folder: Path) -> subprocess.Popen[str]:
    environment = {**os.environ, "RAY_ADDRESS": ray.get_runtime_context().gcs_address}
    with (folder / "screen").open("a") as screen:
        return subprocess.Popen(
            [sys.executable, "-m", f"jobs.{verb}", str(config)], cwd=ROOT, env=environment, text=True,
            stdout=screen, stderr=subprocess.STDOUT,
        )  # fmt: skip


def write(config: TrainConfig, folder: Path) -> Path:
    import tomli_w

    file = folder / "train.toml"
    file.write_text(tomli_w.dumps(json.loads(config.model_dump_json(exclude_unset=True, exclude_none=True))))
    return file


@pytest.mark.usefixtures("cluster")
def test_sigterm_and_a_time_budget_leave_a_checkpoint_and_resume_to_the_same_bits(tmp_path: Path) -> None:
    dataset = make_dataset(tmp_path, rows=1200)
    whole = make_config(tmp_path, dataset, name="whole", training={"epochs": 12}, workers={"num": 2})
    config = whole.model_copy(update={"name": "stopped"})
    run_dir, file = tmp_path / "runs" / "stopped", write(config, tmp_path)

    driver = start("train", file, tmp_path)
    wait_for(lambda: logged(run_dir) > 30)
    driver.send_signal(signal.SIGTERM)
    assert driver.wait(60) == 143
    *_, last = (tmp_path / "screen").read_text().splitlines()
    assert last == "SIGTERM ended this run. Run the same command again to resume from its last checkpoint."
    assert "Traceback" not in (tmp_path / "screen").read_text()
    run = json.loads((run_dir / "tracking" / "mlflow.json").read_text())
    assert MlflowClient(run["uri"]).get_run(run["run_id"]).info.status == "KILLED"

    file.write_text(f'time_budget = "6s"\n{file.read_text()}')
    assert start("train", file, tmp_path).wait(120) in (75, 0)  # 0: a fast machine had finished
    train_run(config, lambda line: None)
    train_run(whole, lambda line: None)
    one, other = (load_file(tmp_path / "runs" / name / "last" / "model.safetensors") for name in ("stopped", "whole"))
    assert all(one[name].equal(other[name]) for name in other)


@pytest.mark.parametrize("verb", ["prepare", "evaluate"])
def test_sigterm_ends_a_verb_without_workers_with_one_line(verb: str, tmp_path: Path) -> None:
    program = (
        "import os, signal, sys, threading, time\n"
        "import dmvae.cli as cli\n"
        "from dataclasses import replace\n"
        f"verb = cli.VERBS[{verb!r}]\n"
        "def run(config):\n"
        "    threading.Timer(0.5, lambda: os.kill(os.getpid(), signal.SIGTERM)).start()\n"
        "    time.sleep(30)\n"
        f"cli.VERBS[{verb!r}] = replace(verb, run=run)\n"
        f"sys.exit(cli.run_verb({verb!r}, [{str(ROOT / 'jobs' / 'configs' / f'{_CONFIGS[verb]}.toml')!r}]))\n"
    )
    ended = subprocess.run([sys.executable, "-c", program], cwd=tmp_path, capture_output=True, text=True, timeout=60)
    assert ended.returncode == 143
    assert ended.stderr == "Stopped by SIGTERM. Run the same command again to resume from what is finished.\n"


_CONFIGS = {"prepare": "digits", "evaluate": "evaluate"}


@pytest.mark.parametrize(("text", "seconds"), [("3h30m", 12600), ("90s", 90), ("2m5s", 125), ("1h", 3600)])
def test_durations_are_hours_minutes_and_seconds(text: str, seconds: float) -> None:
    assert seconds_of(text) == seconds


@pytest.mark.parametrize("text", ["", "3", "0s", "5 m", "30m3h", "-5s", "1.5h"])
def test_other_durations_are_refused(text: str) -> None:
    with pytest.raises(ValueError, match="must be hours, minutes and seconds"):
        seconds_of(text)
