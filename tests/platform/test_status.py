"""What `jobs.status` says of runs and studies: finished, running, silent, stopped, failed and unreadable ones."""

import json
import os
import shutil
import time
from pathlib import Path

import pytest

from dmvae.cli import run_verb
from dmvae.platform.status import Status, statuses
from dmvae.platform.tracking.delivery_log import hold_lock

MADE = Path(__file__).parents[1] / "fixtures" / "old_formats" / "made.tar.xz"


@pytest.fixture
def runs(tmp_path: Path) -> Path:
    """A finished run, one that was killed half-way, and a study that was killed after two of three trials."""
    shutil.unpack_archive(MADE, tmp_path, filter="data")
    return tmp_path / "runs"


def find(runs: Path, name: str) -> Status:
    return {status.folder.name: status for status in statuses(runs)}[name]


def test_finished_and_killed_runs_and_studies(runs: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run_verb("status", [str(runs)]) == 0
    half, study, whole = capsys.readouterr().out.splitlines()
    assert half.split()[1] == "stopped"
    assert "epoch 2 of 8  best val/loss 94.77  last checkpoint" in half
    assert half.endswith("its process is gone")
    assert study.split()[1] == "stopped"
    assert "2 of 3 trials finished" in study
    assert whole.split()[1] == "finished"
    assert whole.endswith("epoch 8 of 8  best val/loss 90.25  test/nll 38.033")
    assert [status.folder.name for status in statuses(runs / "half")] == ["half"]


def test_a_run_whose_driver_lives_is_running_until_it_records_nothing_for_long(runs: Path) -> None:
    log = runs / "half" / "tracking" / "metrics.jsonl"
    with hold_lock(runs / "half" / "tracking" / "driver.lock"):
        log.touch()
        assert find(runs, "half").state == "running"
        old = time.time() - 700
        os.utime(log, (old, old))
        silent = find(runs, "half")
        assert silent.state == "silent"
        assert silent.details[-1] == "recorded nothing for 11:40"
    assert find(runs, "half").state == "stopped"


def test_a_failed_run_says_why(runs: Path) -> None:
    with (runs / "half" / "tracking" / "metrics.jsonl").open("a") as log:
        log.write(json.dumps({"status": "FAILED", "reason": "RunError: Loss became non-finite", "timestamp": 1}) + "\n")
    failed = find(runs, "half")
    assert (failed.state, failed.details[-1]) == ("failed", "RunError: Loss became non-finite")


def test_a_damaged_record_is_named_and_the_others_are_shown(runs: Path) -> None:
    (runs / "half" / "run.json").write_text("{}")
    assert find(runs, "half").state == "unreadable"
    assert find(runs, "whole").state == "finished"


def test_a_folder_without_runs(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run_verb("status", [str(tmp_path / "none")]) == 0
    assert capsys.readouterr().out == f"No runs or studies found in {tmp_path / 'none'}.\n"
