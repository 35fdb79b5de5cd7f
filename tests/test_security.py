"""What comes from strangers is never run: models, checkpoints, datasets and settings hold data alone."""

import ast
import json
import os
import pickle
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

from dmvae.config.data import PrepareConfig
from dmvae.data.errors import DatasetError
from dmvae.data.preparation.prepare import prepare
from dmvae.model.dmvae import DMVAE
from dmvae.training import checkpoint
from tests.training.test_checkpoint import make_state

pytestmark = pytest.mark.slow

ROOT = Path(__file__).parents[1]
SOURCES = sorted(file for folder in ("dmvae", "jobs") for file in (ROOT / folder).rglob("*.py"))
FORBIDDEN_MODULES = {"pickle", "cPickle", "dill", "cloudpickle", "joblib", "shelve", "marshal", "jsonpickle", "yaml"}
FORBIDDEN_CALLS = {"eval", "exec", "compile", "__import__"}


def faults(tree: ast.AST) -> list[str]:
    """What in a module could run what it reads."""
    found = []
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            found += [alias.name for alias in node.names if alias.name.split(".")[0] in FORBIDDEN_MODULES]
        elif isinstance(node, ast.ImportFrom) and (node.module or "").split(".")[0] in FORBIDDEN_MODULES:
            found.append(str(node.module))
        elif isinstance(node, ast.Call):
            settings = {keyword.arg: ast.unparse(keyword.value) for keyword in node.keywords}
            name = ast.unparse(node.func)
            if name in FORBIDDEN_CALLS:
                found.append(name)
            if name == "torch.load" and settings.get("weights_only") != "True":
                found.append(name)
            if name.endswith(("read_pickle", "load_pickle")) or settings.get("allow_pickle", "False") != "False":
                found.append(name)
            if name in ("np.load", "numpy.load") and settings.get("allow_pickle") != "False":
                found.append(name)
            if settings.get("shell") == "True":
                found.append(f"{name}(shell=True)")
    return found


@pytest.mark.parametrize("file", SOURCES, ids=lambda file: str(file.relative_to(ROOT)))
def test_no_module_unpickles_or_runs_what_it_reads(file: Path) -> None:
    assert faults(ast.parse(file.read_text())) == []


@pytest.mark.parametrize(
    "line",
    [
        "import pickle",
        "from joblib import load",
        "torch.load(f)",
        "np.load(f, allow_pickle=True)",
        "eval(x)",
        "np.load(f)",
    ],
)
def test_the_search_finds_what_it_looks_for(line: str) -> None:
    assert faults(ast.parse(line))


class Trap:
    """Unpickling it writes a file."""

    def __init__(self, mark: Path) -> None:
        self.mark = mark

    def __reduce__(self) -> tuple[object, tuple[str, str]]:
        return (_spring, (str(self.mark), "sprung"))


def _spring(mark: str, text: str) -> None:
    Path(mark).write_text(text)


def test_pickles_in_the_place_of_files_are_not_opened(tmp_path: Path) -> None:
    mark, folder = tmp_path / "mark", tmp_path / "c"
    trap = pickle.dumps(Trap(mark))
    checkpoint.save(make_state(), {}, folder)
    for name in ("model.safetensors", "model.json"):
        whole = (folder / name).read_bytes()
        (folder / name).write_bytes(trap)
        with pytest.raises(ValueError, match=name):
            DMVAE.load(folder)
        with pytest.raises(ValueError, match=name):
            checkpoint.load(make_state(), folder)
        (folder / name).write_bytes(whole)
    torch.save({"weights": Trap(mark)}, folder / "model.safetensors")
    with pytest.raises(ValueError, match=r"model\.safetensors"):
        DMVAE.load(folder)
    np.savez(tmp_path / "rows.npz", a=np.array([Trap(mark)], dtype=object))
    source = {"kind": "npz", "path": str(tmp_path / "rows.npz")}
    with pytest.raises(DatasetError, match="No modality among the arrays a"):
        prepare(PrepareConfig.model_validate({"dataset": str(tmp_path / "d"), "source": source}), lambda line: None)
    assert not mark.exists()


def test_secrets_of_the_environment_stay_out_of_everything_a_run_writes(tmp_path: Path) -> None:
    """A whole run's driver part, with a password in the URI and in variables that MLflow reads."""
    program = (
        "import sys\n"
        "from pathlib import Path\n"
        "from dmvae.config.tracking import TrackingConfig\n"
        "from dmvae.platform.tracking.outbox import Outbox\n"
        "from dmvae.platform.tracking.runs import DatasetRecord, open_run\n"
        f"folder = Path({str(tmp_path)!r})\n"
        "data = DatasetRecord('d', 'e' * 64, 'https://me:hunter2@store/d?token=hunter2')\n"
        "with open_run(TrackingConfig(), 'run', folder / 'tracking', {'a': 'http://u:hunter2@h/x'}, {}, data) as run:\n"
        "    with Outbox(run) as outbox:\n"
        "        outbox.log_metrics({'train/loss': 1.0}, 1)\n"
        "    print(run)\n"
    )
    environment = {
        **os.environ,
        "MLFLOW_TRACKING_URI": f"sqlite:///{tmp_path}/mlflow.db",
        "MLFLOW_TRACKING_USERNAME": "me",
        "MLFLOW_TRACKING_PASSWORD": "hunter2",
        "MLFLOW_TRACKING_TOKEN": "hunter2",
    }
    done = subprocess.run(
        [sys.executable, "-c", program], env=environment, capture_output=True, text=True, check=False, cwd=ROOT
    )
    assert done.returncode == 0, done.stderr
    assert "hunter2" not in done.stdout + done.stderr
    files = [file for file in tmp_path.rglob("*") if file.is_file()]
    assert json.loads((tmp_path / "tracking" / "mlflow.json").read_text())["run_id"]
    assert len(files) >= 4
    assert [file for file in files if b"hunter2" in file.read_bytes()] == []
