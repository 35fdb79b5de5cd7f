"""Real runs on a real Ray cluster, recorded in a real MLflow database."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from mlflow import MlflowClient
from safetensors.torch import load_file

from dmvae.config.training import TrainConfig
from dmvae.model.dmvae import DMVAE
from dmvae.platform.errors import RunError
from dmvae.platform.evaluate.nll_table import Task, evaluate_nll
from dmvae.platform.train.trainer import TrainSummary, train_run
from tests.kills import KillAt, logged, start_driver, wait_for
from tests.runs import make_config, train_here

pytestmark = pytest.mark.usefixtures("cluster")


class Screen(list[str]):
    """The lines that a user sees."""

    def __call__(self, text: str) -> None:
        self.append(text)


def run(config: TrainConfig) -> tuple[TrainSummary, Screen]:
    screen = Screen()
    return train_run(config, screen), screen


def curve(summary: TrainSummary, name: str) -> list[float]:
    history = MlflowClient(summary.tracking_uri).get_metric_history(summary.run_id, name)
    assert len({metric.step for metric in history}) == len(history), "a step was recorded twice"
    return [metric.value for metric in sorted(history, key=lambda metric: metric.step)]


def last_weights(summary: TrainSummary) -> dict[str, torch.Tensor]:
    return load_file(summary.run_dir / "last" / "model.safetensors")


def same_bits(one: TrainSummary, other: TrainSummary) -> bool:
    mine, theirs = last_weights(one), last_weights(other)
    return mine.keys() == theirs.keys() and all(torch.equal(mine[name], theirs[name]) for name in mine)


@pytest.fixture(scope="module")
def two(tmp_path_factory: pytest.TempPathFactory, dataset: Path) -> tuple[TrainSummary, Screen]:
    folder = tmp_path_factory.mktemp("two")
    return run(make_config(folder, dataset, workers={"num": 2}, training={"epochs": 6}))


def test_two_workers_have_the_loss_curve_of_one(
    two: tuple[TrainSummary, Screen], dataset: Path, tmp_path: Path
) -> None:
    """Of one that knows no Ray; one of Ray's has the bits of that, see the run whose driver is killed."""
    _, alone = train_here(make_config(tmp_path, dataset, training={"epochs": 6}))
    for name in ("train/loss", "val/loss", "train/gradient_norm"):
        expected = [alone[step][name] for step in sorted(alone) if name in alone[step]]
        assert len(expected) >= 3
        np.testing.assert_allclose(curve(two[0], name), expected, rtol=1e-9)


def test_a_record_has_settings_dataset_metrics_and_checkpoints(two: tuple[TrainSummary, Screen], dataset: Path) -> None:
    summary, screen = two
    client = MlflowClient(summary.tracking_uri)
    recorded = client.get_run(summary.run_id)
    assert recorded.info.status == "FINISHED"
    assert recorded.info.run_name == "run"
    assert recorded.data.params["optim.learning_rate"] == "0.01"
    assert recorded.data.params["model.input_dims.left"] == "[5]"
    manifest = json.loads((dataset / "dataset.json").read_text())
    assert manifest
    (data,) = recorded.inputs.dataset_inputs
    assert data.dataset.digest
    names = set(recorded.data.metrics)
    for name in (
        "train/joint", "train/left", "train/kl_shared/joint", "train/kl_private/left", "train/observed/left",
        "train/log_likelihood/joint/right", "train/rows_per_second", "train/gradient_norm", "train/learning_rate",
        "val/loss", "val/active_units/shared", "test/nll", "test/nll_se", "test/nll_mc_se", "test/nll_ess",
        "test/nll_untrusted",
    ):  # fmt: skip
        assert name in names
    for kept in ("best", "last"):
        files = {Path(file.path).name for file in client.list_artifacts(summary.run_id, f"checkpoints/{kept}")}
        assert {"model.json", "model.safetensors", "checksums.json", "run.json"} <= files
    assert any("epoch 6/6" in line and "rows/s" in line and "left" in line for line in screen)


def test_the_test_metric_is_that_of_the_best_checkpoint_on_any_number_of_workers(
    two: tuple[TrainSummary, Screen], dataset: Path, tmp_path: Path
) -> None:
    summary, _ = two
    config = make_config(tmp_path, dataset).evaluation
    task = Task(str(summary.run_dir / "best"), str(dataset), config)
    alone = evaluate_nll(task)
    assert alone.summary()["nll"] == summary.metrics["test/nll"]
    together = evaluate_nll(task, workers=2)
    for name, column in alone.columns.items():
        np.testing.assert_array_equal(column, together.columns[name])


def test_a_finished_run_says_so_and_resumes_only_with_more_epochs(
    two: tuple[TrainSummary, Screen], dataset: Path
) -> None:
    summary, _ = two
    folder = summary.run_dir.parents[1]
    again, screen = run(make_config(folder, dataset, workers={"num": 2}, training={"epochs": 6}))
    assert again.was_finished
    assert not screen
    changed = {"training": {"epochs": 2, "batch_size": 16}, "model": {"latent_dim": 3}}
    with pytest.raises(RunError) as refusal:
        train_run(make_config(folder, dataset, **changed), Screen())
    for words in ("latent_dim: 2 in the run, 3 requested", "batch_size: 32 in the run, 16", "epochs: 6 in the run, 2"):
        assert words in str(refusal.value)


def test_a_killed_worker_changes_no_bit_of_the_result(
    two: tuple[TrainSummary, Screen], dataset: Path, tmp_path: Path
) -> None:
    straight, _ = two
    killer = KillAt(tmp_path / "runs" / "killed", step=10)
    changes: dict[str, Any] = {"workers": {"num": 2}, "training": {"epochs": 6, "checkpoint_steps": 4}}
    killed, screen = run(make_config(tmp_path, dataset, "killed", **changes))
    killer.join()
    assert 10 <= killer.at < 36
    assert any(line.startswith("resuming after") for line in screen)
    assert same_bits(straight, killed)
    for name in ("train/loss", "val/loss"):
        assert curve(straight, name) == curve(killed, name)


def test_the_run_of_a_killed_driver_is_resumed_by_the_same_command(dataset: Path, tmp_path: Path) -> None:
    config = make_config(tmp_path, dataset, training={"epochs": 40, "checkpoint_steps": 2})
    run_dir = tmp_path / "runs" / "run"
    driver = start_driver(config, tmp_path)
    wait_for(lambda: logged(run_dir) >= 20)
    assert driver.poll() is None, "the run ended before it could be killed"
    driver.kill()
    driver.wait()
    resumed, screen = run(config)
    assert any(line.startswith("resuming after") for line in screen)
    state, metrics = train_here(config)
    assert all(torch.equal(tensor, last_weights(resumed)[name]) for name, tensor in state.model.state_dict().items())
    assert curve(resumed, "train/loss") == [
        values["train/loss"] for values in metrics.values() if "train/loss" in values
    ]


def test_a_loss_that_is_not_finite_ends_the_run_and_names_the_step(dataset: Path, tmp_path: Path) -> None:
    config = make_config(tmp_path, dataset, workers={"num": 2}, optim={"learning_rate": 1e200, "schedule": "constant"})
    with pytest.raises(RunError, match=r"epoch 1, step \d \(terms: .*rows, ids \["):
        train_run(config, Screen())
    client = MlflowClient(config.tracking.uri)
    (recorded,) = client.search_runs([client.get_experiment_by_name("dmvae").experiment_id])
    assert recorded.info.status == "FAILED"


@pytest.mark.acceptance
def test_a_new_run_may_start_from_weights(two: tuple[TrainSummary, Screen], dataset: Path, tmp_path: Path) -> None:
    best = two[0].run_dir / "best"
    config = make_config(tmp_path, dataset, init_from=str(best), optim={"learning_rate": 1e-30})
    summary, _ = run(config)
    start = DMVAE.load(best).state_dict()
    assert all(torch.equal(tensor, start[name]) for name, tensor in last_weights(summary).items())
