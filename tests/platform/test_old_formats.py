"""What people have on disk from before loads in this tree; fixtures/old_formats/README.md says how it was made."""

import json
import os
import re
import shutil
import sqlite3
import subprocess
import sys
import tomllib
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from mlflow import MlflowClient
from safetensors.torch import load_file

import dmvae
from dmvae import DMVAE, Batch
from dmvae.cli import run_verb
from dmvae.config.tracking import TrackingConfig
from dmvae.config.training import TrainConfig
from dmvae.data.reading.dataset import open_dataset
from dmvae.model.predictor import Predictor, Request
from dmvae.platform.serve.registry import download
from dmvae.platform.train.trainer import train_run
from dmvae.platform.tune.study import Trial, trials_of
from dmvae.training import checkpoint
from dmvae.training.settings import resolve
from dmvae.training.setup import build_state

pytestmark = pytest.mark.slow

ROOT = Path(__file__).parents[2]
MADE = ROOT / "tests" / "fixtures" / "old_formats" / "made.tar.xz"
MADE_IN = "/tmp/old_formats"
FINGERPRINT = "7eaea6f6605e1d1e0bdef20dd4ad989705c3852c0ad2ab2aad50d9428b41d840"
CHAMPION = "models:/cells@champion"


@pytest.fixture
def old(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The old folder, moved to where the test works."""
    shutil.unpack_archive(MADE, tmp_path, filter="data")
    for file in (tmp_path / "mlflow.sql", *tmp_path.rglob("mlflow.json")):
        file.write_text(file.read_text().replace(MADE_IN, str(tmp_path)))
    database = sqlite3.connect(tmp_path / "mlflow.db")
    database.executescript((tmp_path / "mlflow.sql").read_text())
    database.close()
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("MLFLOW_TRACKING_URI", f"sqlite:///{tmp_path}/mlflow.db")
    return tmp_path


def same(one: dict[str, torch.Tensor], other: dict[str, torch.Tensor]) -> bool:
    return one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)


def assert_close(found: Any, expected: Any, tolerance: float) -> None:
    """Compare JSON values, numbers to a relative and absolute tolerance."""
    if isinstance(expected, dict):
        assert found.keys() == expected.keys()
        for key, value in expected.items():
            assert_close(found[key], value, tolerance)
    elif isinstance(expected, list):
        assert len(found) == len(expected)
        for one, other in zip(found, expected, strict=True):
            assert_close(one, other, tolerance)
    elif isinstance(expected, float):
        assert found == pytest.approx(expected, rel=tolerance, abs=tolerance)
    else:
        assert found == expected


def test_a_dataset_opens_with_its_fingerprint_and_rows(old: Path) -> None:
    dataset, source = open_dataset("data/cells"), np.load("rows.npz")
    assert dataset.manifest.fingerprint == FINGERPRINT
    assert dataset.verify() == ()
    place = {name: row for row, name in enumerate(source["id"])}
    trained = (source["split"] == "train") & source["mask.protein"]
    mean, std = (getattr(source["protein"][trained].astype("f8"), name)(0) for name in ("mean", "std"))
    read_as = {"rna": source["rna"], "protein": (source["protein"] - mean) / std, "image": source["image"] / 255}
    for split, num in (("train", 72), ("val", 32), ("test", 16)):
        batch = dataset.split(split).read(np.arange(num), torch.float64)
        rows = np.array([place[name] for name in batch.ids])
        assert set(source["id"][rows]) == set(source["id"][source["split"] == split])
        assert batch.labels.tolist() == source["label"][rows].tolist()
        assert batch.size_factors.tolist() == source["size_factor"][rows].tolist()
        for name, values in read_as.items():
            mask = source[f"mask.{name}"][rows]
            assert batch.masks[name].tolist() == mask.tolist()
            np.testing.assert_allclose(batch.data[name][mask], values[rows][mask], rtol=1e-6, atol=1e-6)


def test_a_saved_model_loads_and_gives_the_same_numbers(old: Path) -> None:
    model, expected = DMVAE.load("model"), json.loads(Path("expected.json").read_text())
    assert model.dtype == torch.float32
    assert same(model.state_dict(), load_file("model/model.safetensors"))
    values = {name: torch.tensor(x, dtype=torch.float64) for name, x in expected["values"].items()}
    values["word"] = values["word"].long()
    masks = {name: torch.tensor(mask) for name, mask in expected["masks"].items()}
    batch = Batch(values, masks, ids=torch.arange(5), size_factors=torch.tensor(expected["size_factors"]).double())
    model = model.double()
    encoded = model.encode(batch, return_mean=True)
    assert_close(encoded.z.tolist(), expected["shared"], 1e-9)
    assert_close({name: z.tolist() for name, z in encoded.modalities_z.items()}, expected["private"], 1e-9)
    predicted = model.predict(batch, return_mean=True)
    assert_close({name: x.tolist() for name, x in predicted.items()}, expected["predicted"], 1e-9)
    found = model.joint_nll(batch, 300, proposal="encoder", seed=7)
    assert_close(found.nll.tolist(), expected["nll"], 1e-9)


def test_the_checkpoints_of_a_finished_run_load_and_it_is_known_to_be_finished(old: Path) -> None:
    config = TrainConfig.model_validate(tomllib.loads(Path("train.toml").read_text()))
    resolved = resolve(config, open_dataset(config.data.dataset))
    for kept in ("best", "last"):
        folder = Path("runs/whole", kept)
        stored = load_file(folder / "model.safetensors")
        assert same(DMVAE.load(folder).state_dict(), stored)
        state = build_state(resolved, torch.device("cpu"))
        checkpoint.load(state, folder)
        assert same(state.model.state_dict(), stored)
        assert (state.position.epoch, state.position.step) == (8, 0)
        moments = load_file(folder / "optimizer.safetensors")
        assert sum(len(kept) for kept in state.optimizer.state.values()) == len(moments) > 0
    summary = train_run(config, print)
    assert summary.was_finished
    assert summary.metrics == json.loads(Path("runs/whole/result.json").read_text())["metrics"]


def test_a_run_that_was_killed_half_way_ends_as_the_one_that_was_not(
    old: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert not Path("runs/half/last").exists()
    assert run_verb("train", ["train.toml", "--name", "half"]) == 0
    epochs = set(re.findall(r"epoch (\d)/8", capsys.readouterr().out))
    assert epochs == set("345678"), "its last checkpoint is within the third"
    for kept in ("best", "last"):
        resumed, straight = (load_file(Path("runs", run, kept, "model.safetensors")) for run in ("half", "whole"))
        assert resumed.keys() == straight.keys()
        for name, tensor in straight.items():
            torch.testing.assert_close(resumed[name], tensor, rtol=1e-9, atol=1e-12)
    half, whole = (json.loads(Path("runs", run, "result.json").read_text()) for run in ("half", "whole"))
    assert half["epochs"] == whole["epochs"] == 8
    assert_close(half["metrics"], whole["metrics"], 1e-9)
    client = MlflowClient()
    resumed_curve, straight_curve = (client.get_metric_history(run["run_id"], "val/loss") for run in (half, whole))
    assert [point.step for point in resumed_curve] == list(range(5, 41, 5)), "every epoch once"
    assert_close([point.value for point in resumed_curve], [point.value for point in straight_curve], 1e-9)
    assert client.get_run(half["run_id"]).info.status == "FINISHED"


def test_a_study_that_was_killed_goes_on_with_its_trials_and_draws_none_again(old: Path) -> None:
    study = Path("runs/study")
    before = trials_of(study)
    assert [trial.result is None for trial in before] == [False, False, True]
    trained = load_file(study / "trials/0002/best/model.safetensors")
    assert run_verb("search", ["search.toml"]) == 0
    after = trials_of(study)
    assert after[:2] == before[:2]
    assert len(after) == 3
    assert after[2].params == before[2].params
    assert after[2].result is not None
    assert after[2].result.status == "complete"
    assert same(load_file(study / "trials/0002/best/model.safetensors"), trained), "it was trained, and only judged now"
    table = json.loads((study / "trials.json").read_text())
    assert [row["trial"] for row in table] == [0, 1, 2]
    found = tomllib.loads((study / "best.toml").read_text())
    assert found["model"]["latent_dim"] == min(after, key=imputation).params["model.latent_dim"]


def imputation(trial: Trial) -> float:
    assert trial.result is not None
    return trial.result.figures["imputation"]


def test_a_registered_model_loads_by_its_alias_and_answers_as_it_did(
    old: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert same(dmvae.load(CHAMPION).state_dict(), load_file("runs/whole/best/model.safetensors"))
    predictor, asked = Predictor.load(download(CHAMPION, old / "downloaded", TrackingConfig())), answers()
    for request in asked["asked"]:
        found = predictor.answer(asked["rows"], Request.model_validate(request["params"]))
        assert_close(as_before(found), request["answers"], 1e-6)
    assert run_verb("register", ["--run", "runs/whole", "--name", "cells"]) == 0
    assert "models:/cells/1" in capsys.readouterr().out, "the same weights are the same version"


@pytest.mark.parametrize("first", ["", "from dmvae import DMVAE"], ids=["alone", "beside this package"])
def test_a_registered_model_s_own_code_runs(first: str, old: Path) -> None:
    """In a process that has this package: its own copy answers, unless this package was imported before."""
    program = f"""
import json, warnings
{first}
warnings.simplefilter("ignore")
import mlflow
asked = json.load(open("answers.json"))
model = mlflow.pyfunc.load_model({CHAMPION!r})
answers = [model.predict(asked["rows"], params=request["params"]) for request in asked["asked"]]
import dmvae
print(json.dumps([dmvae.__file__, answers]))
"""
    done = subprocess.run(
        [sys.executable, "-P", "-c", program],
        capture_output=True,
        text=True,
        check=False,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
    )
    assert done.returncode == 0, done.stderr[-2000:]
    home, found = json.loads(done.stdout.splitlines()[-1])
    assert Path(home).is_relative_to(ROOT) == bool(first)
    assert_close([as_before(each) for each in found], [request["answers"] for request in answers()["asked"]], 1e-6)


def as_before(found: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Return answers without the quantiles that imputed values have had since."""
    for answer in found:
        for imputed in answer.get("imputed", {}).values():
            imputed.pop("quantiles", None)
    return found


def answers() -> dict[str, Any]:
    asked: dict[str, Any] = json.loads(Path("answers.json").read_text())
    return asked
