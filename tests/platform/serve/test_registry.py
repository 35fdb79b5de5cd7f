"""Registered models: loaded in another process, promoted only if better, rolled back."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import mlflow
import numpy as np
import pytest
import torch
from mlflow import MlflowClient

import dmvae
from dmvae.cli import run_verb
from dmvae.config.registry import PromoteConfig, RegisterConfig
from dmvae.data.reading.dataset import open_dataset
from dmvae.model.dmvae import DMVAE
from dmvae.platform.serve.promotion import promote
from dmvae.platform.serve.registry import RegistryError, register
from dmvae.platform.train.trainer import train_run
from tests.runs import finish_here, make_config, make_dataset

pytestmark = pytest.mark.usefixtures("cluster")

ROOT = Path(__file__).parents[3]


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A poor run and a better one on the same data."""
    folder = tmp_path_factory.mktemp("registry")
    dataset = make_dataset(folder, rows=600)
    finish_here(make_config(folder, dataset, "poor", training={"epochs": 1}))
    train_run(make_config(folder, dataset, "better", training={"epochs": 12, "prior_components": 2}), lambda line: None)
    return folder


def tracking(folder: Path) -> dict[str, Any]:
    return {"uri": f"sqlite:///{folder}/mlflow.db"}


def aliases(client: MlflowClient, name: str) -> dict[str, str]:
    return {alias: str(version) for alias, version in client.get_registered_model(name).aliases.items()}


def registered(folder: Path, run: str, name: str) -> str:
    config = RegisterConfig.model_validate(
        {"run": str(folder / "runs" / run), "name": name, "tracking": tracking(folder)}
    )
    return register(Path(config.run), config.name, config.tracking).version


def promotion(folder: Path, name: str, **changes: Any) -> PromoteConfig:
    tree = {"name": name, "dataset": str(folder / "data"), "tracking": tracking(folder)}
    return PromoteConfig.model_validate({**tree, "evaluation": {"num_draws": 50, "proposal": "encoder"}, **changes})


def test_a_registered_model_runs_on_the_code_that_it_contains(runs: Path, tmp_path: Path) -> None:
    version = registered(runs, "better", "answers")
    assert registered(runs, "better", "answers") == version, "the same weights are the same version"
    uri = tracking(runs)["uri"]
    client = MlflowClient(uri)
    found = client.get_model_version("answers", version)
    assert "How to use it" in found.description
    target = tmp_path / "downloaded"
    local = mlflow.artifacts.download_artifacts(artifact_uri=found.source, dst_path=str(target), tracking_uri=uri)
    packaged = {str(file.relative_to(local)) for file in Path(local).rglob("*.py")}
    assert "code/dmvae/model/predictor.py" in packaged
    others = ("platform", "report", "training", "evaluation", "data/format", "data/reading", "data/preparation")
    assert not [file for file in packaged if file.startswith(tuple(f"code/dmvae/{folder}/" for folder in others))]
    # a process that sees this folder and the installed packages, but neither this checkout nor ray
    program = (
        "import sys, json, mlflow\n"
        "sys.meta_path[:] = [f for f in sys.meta_path if 'editable' not in getattr(f, '__module__', '')]\n"
        "sys.modules['ray'] = sys.modules['pyarrow.dataset'] = None\n"
        f"model = mlflow.pyfunc.load_model({str(local)!r})\n"
        "rows = [{'left': [1, 2, 3, 4, 5]}, {'right': [0.5, 0, 1], 'left': None}]\n"
        "print(json.dumps(model.predict(rows, params={'operation': 'encode'})))\n"
        "print(json.dumps(model.predict(rows, params={'operation': 'impute'})))\n"
        "import dmvae; print(dmvae.__file__)\n"
    )
    done = subprocess.run(
        [sys.executable, "-P", "-c", program],
        capture_output=True,
        text=True,
        check=False,
        cwd=tmp_path,
        env={"PATH": ""},
    )
    assert done.returncode == 0, done.stderr[-2000:]
    answers, imputed, home = done.stdout.strip().splitlines()[-3:]
    assert home.startswith(str(local))
    model = DMVAE.load(runs / "runs" / "better" / "best")
    rows = dmvae.Batch({"left": torch.tensor([[1.0, 2, 3, 4, 5]]).to(model.dtype)})
    expected = model.encode(rows, return_mean=True).z
    np.testing.assert_allclose(json.loads(answers)[0]["shared"]["mean"], expected[0], rtol=1e-5)
    assert json.loads(answers)[1]["observed"] == ["right"]
    # with the prior that was fitted at the end of training
    assert model.fitted_prior is not None
    predicted = model.predict(rows, gen_mod="right", return_mean=True)["right"]
    np.testing.assert_allclose(json.loads(imputed)[0]["imputed"]["right"]["best"], predicted[0], rtol=1e-5)
    assert not torch.equal(model.predict(rows, gen_mod="right", return_mean=True, density=None)["right"], predicted)


@pytest.mark.parametrize("first", ["import dmvae\n", ""], ids=["imported before", "imported after"])
def test_loading_a_registered_model_leaves_the_installed_package_in_place(
    runs: Path, tmp_path: Path, first: str
) -> None:
    version = registered(runs, "better", "answers")
    uri = tracking(runs)["uri"]
    source = MlflowClient(uri).get_model_version("answers", version).source
    local = mlflow.artifacts.download_artifacts(artifact_uri=source, dst_path=str(tmp_path), tracking_uri=uri)
    program = (
        f"import mlflow\n{first}"
        f"model = mlflow.pyfunc.load_model({local!r})\n"
        "assert model.predict([{'right': [0.5, 0, 1]}], params={'operation': 'encode'})\n"
        "import dmvae\n"
        f"dmvae.load({str(runs / 'runs' / 'better' / 'best')!r})\n"
        "print(dmvae.__file__)\n"
    )
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    done = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, check=False, cwd=tmp_path, env=environment
    )
    assert done.returncode == 0, done.stderr[-2000:]
    assert done.stdout.strip().splitlines()[-1] == str(ROOT / "dmvae" / "__init__.py")


def test_a_better_version_becomes_champion_and_a_rollback_restores_the_previous(
    runs: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    poor, better = (registered(runs, run, "champions") for run in ("poor", "better"))
    lines: list[str] = []
    first = promote(promotion(runs, "champions", version=int(poor)), lines.append)
    assert (first.moved, first.champion) == (True, poor)
    second = promote(promotion(runs, "champions"), lines.append)
    assert (second.moved, second.champion) == (True, better)
    third = promote(promotion(runs, "champions", version=int(poor)), lines.append)
    assert (third.moved, third.champion) == (False, better)
    client = MlflowClient(tracking(runs)["uri"])
    assert aliases(client, "champions") == {"champion": better, "previous": poor}
    assert "nll better by" in client.get_model_version("champions", better).tags["promotion.reason"]
    assert "nll better by -" in client.get_model_version("champions", poor).tags["promotion.reason"]
    flags = ["--name", "champions", "--rollback", "--tracking.uri", tracking(runs)["uri"]]
    assert run_verb("promote", flags) == 0
    assert f"champion   models:/champions/{poor}" in capsys.readouterr().out
    assert aliases(client, "champions") == {"champion": poor, "previous": better}


def test_versions_that_cannot_be_compared_are_refused_with_the_reason(runs: Path, tmp_path: Path) -> None:
    with pytest.raises(RegistryError, match="Available: "):
        promote(promotion(runs, "nobody"), lambda line: None)
    version = registered(runs, "better", "refused")
    other = make_dataset(tmp_path, rows=300, seed=5)
    with pytest.raises(RegistryError, match=r"was trained on another dataset than .* expected fingerprint"):
        promote(promotion(runs, "refused", dataset=str(other)), lambda line: None)
    with pytest.raises(RegistryError, match="has no previous champion"):
        promote(promotion(runs, "refused", rollback=True), lambda line: None)
    with pytest.raises(RegistryError, match="is not a finished run"):
        registered(runs, "never", "refused")
    client = MlflowClient(tracking(runs)["uri"])
    shutil.rmtree(client.get_model_version("refused", version).source.removeprefix("file://"))
    with pytest.raises(RegistryError, match="Cannot load models:/refused"):
        promote(promotion(runs, "refused"), lambda line: None)
    assert aliases(client, "refused") == {}


def test_mlflow_that_cannot_be_reached_is_one_message(
    runs: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    away = ["--tracking.uri", f"sqlite:///{tmp_path}/away.db"]
    register_flags = ["--run", str(runs / "runs" / "better"), "--name", "unreached"]
    for verb, flags in (("register", register_flags), ("promote", ["--name", "unreached", "--rollback"])):
        assert run_verb(verb, [*flags, *away]) == 1
        message = capsys.readouterr().err
        assert message.startswith(f"error: Cannot {verb} 'unreached': ")
        assert "does not exist" in message
        assert len(message.splitlines()) == 1


def test_a_finished_run_registers_its_model_when_asked(runs: Path, capsys: pytest.CaptureFixture[str]) -> None:
    import tomli_w

    config = make_config(runs, runs / "data", "poor", training={"epochs": 1}, tracking={"register_as": "asked"})
    file = runs / "again.toml"
    file.write_text(tomli_w.dumps(config.model_dump(mode="json", exclude_none=True, exclude_unset=True)))
    assert run_verb("train", [str(file)]) == 0
    assert "registered               models:/asked/1" in capsys.readouterr().out


def test_dmvae_load_returns_the_registered_model(runs: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    version = registered(runs, "poor", "loaded")
    monkeypatch.setenv("MLFLOW_TRACKING_URI", tracking(runs)["uri"])
    model, kept = dmvae.load(f"models:/loaded/{version}"), dmvae.load(str(runs / "runs" / "poor" / "best"))
    assert all(torch.equal(a, b) for a, b in zip(model.state_dict().values(), kept.state_dict().values(), strict=True))
    with pytest.raises(RegistryError, match="Cannot load models:/loaded@champion"):
        dmvae.load("models:/loaded@champion")
    assert open_dataset(runs / "data").manifest.modalities.keys() == set(model.config.modalities)
