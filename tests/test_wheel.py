"""What someone has who installed the package and has no checkout."""

import os
import subprocess
import zipfile
from pathlib import Path

import pytest

from tests.wheel import ROOT, build_wheel, install_wheel, outside

pytestmark = pytest.mark.slow

CONFIGS = sorted((ROOT / "jobs" / "configs").glob("*.toml"))


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return build_wheel(tmp_path_factory.mktemp("build"))


@pytest.fixture(scope="module")
def installed(wheel: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return install_wheel(wheel, tmp_path_factory.mktemp("installed"))


def run(installed: Path, folder: Path, *argv: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [str(installed / argv[0]), *argv[1:]],
        cwd=folder,
        env=outside(folder),
        capture_output=True,
        text=True,
        check=False,
    )


def test_a_wheel_holds_the_package_and_its_configurations_and_nothing_else(wheel: Path) -> None:
    with zipfile.ZipFile(wheel) as archive:
        names = set(archive.namelist())
        for file in CONFIGS:
            assert archive.read(f"dmvae/config/examples/{file.name}") == file.read_bytes()
    modules = {str(file.relative_to(ROOT)) for file in (ROOT / "dmvae").rglob("*.py")}
    assert modules <= names
    assert {name.split("/")[0] for name in names} == {"dmvae", f"{'-'.join(wheel.name.split('-')[:2])}.dist-info"}


def test_an_installed_package_is_used_from_outside_the_checkout(installed: Path, tmp_path: Path) -> None:
    where = run(installed, tmp_path, "python", "-c", "import dmvae; print(dmvae.__file__)")
    assert where.stdout.startswith(str(installed.parent))
    fastest = float("inf")
    for _ in range(3):
        before = os.times()  # of processor time: the machine may be busy
        shown = run(installed, tmp_path, "dmvae", "--help")
        after = os.times()
        spent = after.children_user - before.children_user + after.children_system - before.children_system
        fastest = min(fastest, spent)
    assert shown.returncode == 0
    assert "dmvae VERB CONFIG.toml" in shown.stdout
    assert fastest < 1.0


def test_init_writes_the_shipped_configurations_and_keeps_what_is_there(installed: Path, tmp_path: Path) -> None:
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "train.toml").write_text("# my own\n")
    done = run(installed, tmp_path, "dmvae", "init", "mine")
    assert done.returncode == 0, done.stderr
    for file in CONFIGS:
        expected = "# my own\n" if file.name == "train.toml" else file.read_text()
        assert (tmp_path / "mine" / file.name).read_text() == expected
    assert "kept      mine/train.toml" in done.stdout
    assert done.stdout.endswith("next      dmvae prepare mine/digits.toml\n")


@pytest.mark.acceptance
@pytest.mark.timeout(1800)
def test_a_short_demo_runs_from_a_wheel(installed: Path, tmp_path: Path) -> None:
    assert run(installed, tmp_path, "dmvae", "init").returncode == 0
    prepared = run(installed, tmp_path, "dmvae", "prepare", "configs/digits.toml")
    assert prepared.returncode == 0, prepared.stderr
    short = ("--trials", "2", "--base.training.epochs", "2", "--base.evaluation.num-draws", "20")
    found = run(installed, tmp_path, "dmvae", "search", "configs/search.toml", *short)
    assert found.returncode == 0, found.stderr
    assert "test/nll " in found.stdout
    assert "best configuration" in found.stdout
    assert (tmp_path / "runs" / "digits" / "best" / "model.safetensors").is_file()
