"""A run on an S3-compatible store: killed, resumed on another node, evaluated and loaded from there."""

import json
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from mlflow import MlflowClient

import dmvae
from dmvae.cli import run_verb
from dmvae.config.evaluation import EvaluateConfig
from dmvae.config.search import SearchConfig
from dmvae.config.training import TrainConfig
from dmvae.platform.evaluate.evaluate import evaluate
from dmvae.platform.remote_fs import RemoteFolder
from dmvae.platform.train.trainer import train_run
from tests.kills import logged, start_driver, wait_for
from tests.objects import object_store
from tests.platform.tracking.test_tracking import free_port, server
from tests.runs import make_config, train_here

pytestmark = pytest.mark.usefixtures("cluster")

BASE = {"name": "run", "data": {"dataset": "data"}}


@pytest.fixture(scope="module")
def store() -> Iterator[dict[str, str]]:
    with object_store() as (_, variables), pytest.MonkeyPatch.context() as patch:
        for name, value in variables.items():
            patch.setenv(name, value)
        yield variables


def test_a_run_on_s3_resumes_on_a_node_that_has_never_seen_it(
    store: dict[str, str], dataset: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    training = {"epochs": 6, "checkpoint_steps": 4}
    config = make_config(tmp_path, dataset, runs_dir="s3://bucket/runs", training=training, workers={"num": 2})
    place = RemoteFolder.at("s3://bucket/runs/run")
    one, two = ({**store, "XDG_CACHE_HOME": str(tmp_path / name)} for name in ("one", "two"))
    driver = start_driver(config, tmp_path, one)
    home = tmp_path / "one" / "dmvae" / "runs" / "s3" / "bucket" / "runs" / "run"
    wait_for(lambda: logged(home) >= 9, 480)
    driver.kill()
    driver.wait()
    (tmp_path / "one").rename(tmp_path / "gone")
    assert place.names() == ["checkpoints", "mlflow.json", "run.json"]

    assert start_driver(config, tmp_path, two).wait(480) == 0
    said = (tmp_path / "driver.log").read_text()
    assert "resuming after" in said
    assert "resuming after 0 epochs and 0 steps" not in said
    assert place.names() == ["best", "checkpoints", "last", "mlflow.json", "result.json", "run.json"]
    kept = (place / "checkpoints").names()
    assert sum(name.startswith("checkpoint_0") for name in kept) == 3
    assert sum(name.startswith("best_") for name in kept) == 1
    straight, _ = train_here(config)
    last = dmvae.load("s3://bucket/runs/run/last").state_dict()
    for name, tensor in straight.model.state_dict().items():
        torch.testing.assert_close(last[name], tensor, rtol=1e-9, atol=1e-9)

    result = json.loads((place / "result.json").read() or "")
    asked = {"model": "s3://bucket/runs/run/best", "dataset": str(dataset), "output": str(tmp_path / "judged")}
    settings = config.evaluation.model_dump(mode="json")
    metrics = evaluate(EvaluateConfig.model_validate({**asked, "evaluation": settings}), lambda line: None)
    assert metrics["test/nll"] == pytest.approx(result["metrics"]["test/nll"], rel=1e-12)

    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "three"))
    assert train_run(config, lambda line: None).was_finished
    assert MlflowClient(str(config.tracking.uri)).get_run(result["run_id"]).info.status == "FINISHED"


def test_a_store_that_is_not_there_is_one_message(
    store: dict[str, str], dataset: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    train = ["--name", "run", "--data.dataset", str(dataset), "--tracking.uri", f"sqlite:///{tmp_path}/mlflow.db"]
    assert run_verb("train", [*train, "--runs-dir", "s3://no-such-bucket/runs"]) == 1
    error = capsys.readouterr().err
    assert error.startswith("error: s3://no-such-bucket/runs/run")
    assert "AWS_ENDPOINT_URL" in error
    assert "Traceback" not in error


@pytest.mark.acceptance
def test_artifacts_go_to_a_store_through_the_tracking_server(
    store: dict[str, str], dataset: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    port = free_port()
    with server(tmp_path, port, "s3://bucket/mlflow"):
        for name in store:
            monkeypatch.delenv(name)  # a client of the server needs no keys
        config = make_config(tmp_path, dataset, tracking={"uri": f"http://127.0.0.1:{port}"})
        assert start_driver(config, tmp_path).wait(300) == 0
    for name, value in store.items():
        monkeypatch.setenv(name, value)
    recorded = json.loads((tmp_path / "runs" / "run" / "tracking" / "mlflow.json").read_text())
    experiments = RemoteFolder.at("s3://bucket/mlflow")
    (experiment,) = experiments.names()
    best = experiments / experiment / recorded["run_id"] / "artifacts" / "checkpoints" / "best"
    assert "model.safetensors" in best.names()


def test_a_study_at_a_uri_is_refused() -> None:
    with pytest.raises(ValueError, match="A search cannot use a URI"):
        SearchConfig.model_validate({"name": "s", "trials": 1, "base": BASE, "runs_dir": "s3://bucket/runs"})


def test_a_uri_with_keys_is_refused() -> None:
    with pytest.raises(ValueError, match="contains credentials"):
        TrainConfig.model_validate({**BASE, "runs_dir": "s3://key:word@bucket/runs"})


def test_an_unknown_file_system_is_refused() -> None:
    with pytest.raises(ValueError, match="Neither pyarrow nor fsspec can open"):
        RemoteFolder.at("nowhere://bucket/runs")


def test_fsspec_knows_others(tmp_path: Path) -> None:
    (tmp_path / "a").mkdir()
    (tmp_path / "a" / "checksums.json").write_text("{}")
    place = RemoteFolder.at("memory://bucket/runs")
    (place / "a").put(tmp_path / "a")
    assert (place / "a").names() == ["checksums.json"]
    with (place / "a").fetch() as copy:
        assert (copy / "checksums.json").read_text() == "{}"
    (place / "a").remove()
    assert place.names() == []
    assert (place / "a").read() is None
