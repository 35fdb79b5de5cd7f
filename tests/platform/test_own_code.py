"""A person's own package through every job: trained, killed, searched, evaluated, embedded, registered, served."""

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import mlflow
import numpy as np
import pyarrow.parquet as pq
import pytest
import torch
from mlflow import MlflowClient
from ray import serve

import dmvae
from dmvae.cli import run_verb
from dmvae.config.registry import ServeConfig
from dmvae.config.search import SearchConfig
from dmvae.model.dmvae import DMVAE
from dmvae.platform.serve.application import start
from dmvae.platform.serve.registry import find_version, register
from dmvae.platform.train.trainer import TrainSummary
from dmvae.platform.tune.search import search
from tests.example_runs import PACKAGE, make_example, make_rows
from tests.kills import KillAt
from tests.platform.serve.test_application import ask
from tests.platform.tracking.test_tracking import free_port
from tests.platform.train.test_trainer import run, same_bits
from tests.runs import finish_here
from tests.searches import make_search

pytestmark = pytest.mark.usefixtures("cluster")

CHANGES: dict[str, Any] = {"workers": {"num": 2}, "training": {"epochs": 4, "precision": "float32", "log_steps": 1}}


@pytest.fixture(scope="module")
def rows(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_rows(tmp_path_factory.mktemp("own"))


@pytest.fixture(scope="module")
def two(tmp_path_factory: pytest.TempPathFactory, rows: Path) -> TrainSummary:
    """A run on two workers."""
    return run(make_example(tmp_path_factory.mktemp("two"), rows, **CHANGES))[0]


@pytest.fixture(scope="module")
def here(tmp_path_factory: pytest.TempPathFactory, rows: Path) -> Path:
    """The folder of a finished run that needed no Ray."""
    return finish_here(make_example(tmp_path_factory.mktemp("here"), rows))


def test_a_run_records_path_params_and_version(two: TrainSummary) -> None:
    record = json.loads((two.run_dir / "run.json").read_text())["model"]
    assert record["architectures"]["image"]["name"] == f"{PACKAGE}.nets:resnet"
    assert record["architectures"]["image"]["params"] == {"width": 4}
    version = record["packages"]["tests"]
    assert json.loads((two.run_dir / "best" / "model.json").read_text())["packages"] == {"tests": version}
    found = MlflowClient(two.tracking_uri).get_run(two.run_id).data
    assert found.params["model.architectures.text.encoder"] == f"{PACKAGE}.nets:TextEncoder"
    assert found.params["model.architectures.text.params.width"] == "4"
    assert found.tags["version.tests"] == version
    assert np.isfinite(two.metrics["test/nll"])


def test_a_killed_worker_changes_no_bit_of_own_networks(two: TrainSummary, rows: Path, tmp_path: Path) -> None:
    training = {**CHANGES["training"], "checkpoint_steps": 2}
    killer = KillAt(tmp_path / "runs" / "killed", step=6)
    killed, screen = run(make_example(tmp_path, rows, "killed", **{**CHANGES, "training": training}))
    killer.join()
    assert any(line.startswith("resuming after") for line in screen)
    assert same_bits(two, killed)


def test_evaluate_report_and_embed_need_consent(
    here: Path, rows: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    model = ["--model", str(here / "best"), "--dataset", str(rows)]
    verbs = {
        "evaluate": [*model, "--output", str(tmp_path / "e"), "--evaluation.num-draws", "20"],
        "embed": [*model, "--output", str(tmp_path / "l"), "--impute"],
    }
    for verb, flags in verbs.items():
        assert run_verb(verb, flags) == 1
        message = capsys.readouterr().err
        assert "or the flag --trust tests" in message
        assert f"architectures.image.name = '{PACKAGE}.nets:resnet'" in message
        assert run_verb(verb, [*flags, "--trust", "tests"]) == 0, capsys.readouterr().err
    assert np.isfinite(json.loads((tmp_path / "e" / "summary.json").read_text())["figures"]["test/nll"])
    tables = [pq.read_table(file) for file in (tmp_path / "l").rglob("*.parquet")]
    assert sum(table.num_rows for table in tables) == 120
    with pytest.raises(ValueError, match="code that is not part of dmvae"):
        dmvae.load(str(here / "best"))
    assert dmvae.load(str(here / "best"), trust=["tests"]).config.packages


def test_a_registered_model_carries_the_source_and_answers_where_there_is_none(
    here: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    uri = f"sqlite:///{here.parents[1]}/mlflow.db"
    flags = [str(here), "--name", "own", "--tracking.uri", uri]
    assert run_verb("register", flags) == 1
    assert "--trust tests" in capsys.readouterr().err
    assert run_verb("register", [*flags, "--trust", PACKAGE]) == 0
    assert "own code   tests: source, 4 files" in capsys.readouterr().out
    version = MlflowClient(uri).get_model_version("own", "1")
    assert "| tests | source, 4 files |" in version.description
    folder = mlflow.artifacts.download_artifacts(artifact_uri=version.source, dst_path=str(tmp_path), tracking_uri=uri)
    carried = {str(file.relative_to(Path(folder) / "code")) for file in Path(folder, "code").rglob("*.py")}
    assert {name for name in carried if not name.startswith("dmvae/")} == {
        "tests/__init__.py",
        "tests/example_package/__init__.py",
        "tests/example_package/nets.py",
        "tests/example_package/distributions.py",
    }
    program = (
        "import json, mlflow\n"
        f"model = mlflow.pyfunc.load_model({str(folder)!r})\n"
        "rows = [{'text': [0, 1, 2, 4, 4]}, {'table': [0, 1, 2, 3, 4, 5]}]\n"
        "print(json.dumps(model.predict(rows, params={'operation': 'impute', 'num_draws': 3})))\n"
    )
    # a process that sees neither this checkout nor ray
    done = subprocess.run(
        [sys.executable, "-P", "-c", program], capture_output=True, text=True, check=False, cwd=tmp_path,
        env={"PATH": ""},
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-2000:]
    first, second = json.loads(done.stdout.splitlines()[-1])
    assert set(first["imputed"]) == {"image", "table"}
    assert set(second["imputed"]) == {"image", "text"}


@pytest.mark.acceptance
def test_a_search_draws_params_of_own_networks(rows: Path, tmp_path: Path) -> None:
    base = make_example(tmp_path, rows, "base", training={"epochs": 2, "precision": "float32"})
    space = {
        "model.architectures.image.params.width": {"low": 2, "high": 8, "step": 2},
        "model.architectures.text.params.heads": {"values": [1, 2]},
    }
    changes = {"base": base.model_dump(mode="json", exclude_unset=True), "retrain": {"how": "train"}}
    plain = make_search(tmp_path, rows, trials=4, space=space, objectives=["joint_nll"]).model_dump(
        mode="json", exclude_unset=True
    )
    found = search(SearchConfig.model_validate(plain | changes), lambda line: None)
    assert {trial.result.status for trial in found.trials if trial.result} == {"complete"}
    (best,) = found.best
    assert found.config.model.architectures["image"].params == {
        "width": best.params["model.architectures.image.params.width"]
    }
    assert found.config.model.architectures["text"].params == {
        "width": 4, "heads": best.params["model.architectures.text.params.heads"]
    }  # fmt: skip
    assert found.retrained is not None
    assert np.isfinite(found.retrained.metrics["test/nll"])


@pytest.mark.acceptance
def test_own_code_is_promoted_and_served_with_consent(
    here: Path, rows: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    tracking = make_example(here.parents[1], rows).tracking
    register(here, "champions", tracking, ["tests"])
    flags = ["champions", "--dataset", str(rows), "--evaluation.num-draws", "10", "--tracking.uri", str(tracking.uri)]
    assert run_verb("promote", flags) == 1
    assert "--trust tests" in capsys.readouterr().err
    assert run_verb("promote", [*flags, "--trust", "tests"]) == 0
    port = free_port()
    start(ServeConfig(model="models:/champions@champion", port=port, tracking=tracking, trust=("tests",)))
    body = json.dumps({"rows": [{"text": [0, 1, 2, 4, 4]}], "num_draws": 3}).encode()
    try:
        status, answer = ask(f"http://127.0.0.1:{port}/", body)
    finally:
        serve.shutdown()
    assert status == 200
    assert set(answer["answers"][0]["imputed"]) == {"image", "table"}


def test_registered_source_is_used_where_the_package_is_absent(here: Path, tmp_path: Path) -> None:
    uri = f"sqlite:///{here.parents[1]}/mlflow.db"
    config = make_example(here.parents[1], here, "run").tracking
    found = register(here, "carried", config, [PACKAGE])
    folder = mlflow.artifacts.download_artifacts(
        artifact_uri=find_version(MlflowClient(uri), found.uri).source, dst_path=str(tmp_path), tracking_uri=uri
    )
    (weights,) = Path(folder).rglob("model.safetensors")
    program = (
        "import sys\n"
        f"sys.path.append({str(tmp_path / 'packages')!r})\n"
        "from dmvae import DMVAE\n"
        f"model = DMVAE.load({str(weights.parent)!r}, trust=['tests'])\n"
        "print(sys.modules['tests.example_package.nets'].__file__)\n"
    )
    (tmp_path / "packages").mkdir()
    (tmp_path / "packages" / "dmvae").symlink_to(Path(dmvae.__file__).parent)
    done = subprocess.run(
        [sys.executable, "-P", "-c", program], capture_output=True, text=True, check=False, cwd=tmp_path,
        env={"PATH": ""},
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-2000:]
    assert done.stdout.strip().startswith(folder)


def test_own_networks_give_the_same_nll_with_both_proposals(here: Path, rows: Path) -> None:
    """The transformer's decoder has no forward-mode derivatives everywhere; the refined proposal copes."""
    model = DMVAE.load(here / "best", trust=["tests"]).double()
    batch = dmvae.Batch(
        {"text": torch.tensor([[0, 1, 2, 4, 4]]), "table": torch.tensor([[1.0, 0, 2, 0, 3, 1]]).double()}
    )
    refined, plain = (model.joint_nll(batch, 20_000, proposal=proposal) for proposal in ("refined", "encoder"))
    assert abs(float(refined.nll - plain.nll)) < 5 * float(refined.se + plain.se)
