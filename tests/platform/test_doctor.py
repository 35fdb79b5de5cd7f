"""What `jobs.doctor` finds, on this machine and on one that is set up wrongly."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from dmvae.cli import run_verb


@pytest.mark.usefixtures("cluster")
def test_a_machine_that_is_set_up_passes(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    arguments = ["--runs-dir", str(tmp_path / "runs"), "--tracking.uri", f"sqlite:///{tmp_path}/mlflow.db"]
    assert run_verb("doctor", arguments) == 0
    lines = capsys.readouterr().out.splitlines()
    names = ["versions", "CPUs", "memory", "GPUs", "TMPDIR", "disk", "runs", "MLflow", "Ray"]
    assert [line.split()[1] for line in lines] == names
    assert not any(line.startswith("error") for line in lines)
    assert list((tmp_path / "runs").iterdir()) == []


@pytest.mark.usefixtures("cluster")
def test_each_fault_has_its_remedy(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("RAY_TMPDIR", "/tmp/" + "deep/" * 20)
    arguments = ["--runs-dir", str(tmp_path / "file" / "runs"), "--tracking.uri", "http://127.0.0.1:9"]
    assert run_verb("doctor", arguments) == 1
    shown = capsys.readouterr()
    errors = [line for line in shown.out.splitlines() if line.startswith("error")]
    assert [line.split()[1] for line in errors] == ["TMPDIR", "runs", "MLflow"]
    assert "Set RAY_TMPDIR=/tmp" in errors[0]
    assert "Start the server, or correct MLFLOW_TRACKING_URI" in errors[2]
    assert shown.err == "error: 3 check(s) failed; each line above has the remedy.\n"


def test_only_cpus_of_the_affinity_are_used() -> None:
    program = "import os; os.sched_setaffinity(0, {min(os.sched_getaffinity(0))})\n"
    program += "from dmvae.platform.cluster import usable_cpus; print(usable_cpus())"
    shown = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True, env=os.environ)
    assert shown.stdout == "1\n"
