"""The loss curve does not depend on the number of workers, even if it changes within an epoch."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from dmvae.config.training import TrainConfig
from dmvae.platform.errors import RunError
from dmvae.platform.train.trainer import train_run
from tests.kills import KillAt, metrics_of
from tests.runs import make_config, make_dataset, train_here

pytestmark = pytest.mark.usefixtures("cluster")

STEPS = 100
TOLERANCE = {"float64": 1e-9, "float32": 1e-3}


@pytest.fixture(scope="module")
def dataset(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """27 steps an epoch."""
    return make_dataset(tmp_path_factory.mktemp("elastic"), rows=1200)


def configure(folder: Path, dataset: Path, precision: str = "float64", **workers: Any) -> TrainConfig:
    training = {"epochs": 4, "checkpoint_steps": 5, "precision": precision}
    return make_config(folder, dataset, training=training, workers=workers)


def assert_same_curves(run_dir: Path, straight: dict[int, dict[str, float]], tolerance: float) -> None:
    for name in ("train/loss", "train/kl_shared/joint", "val/loss"):
        expected = {step: metrics[name] for step, metrics in straight.items() if name in metrics}
        found = metrics_of(run_dir, name)
        assert list(found) == list(expected)
        assert len(found) >= STEPS or name == "val/loss"
        np.testing.assert_allclose(list(found.values()), list(expected.values()), rtol=tolerance)


def run_from_two_to_one_to_three(folder: Path, dataset: Path, precision: str) -> list[str]:
    """Stop a run on 2 workers within an epoch, resume it with 1, stop it again, and finish it with 3."""
    screen: list[str] = []
    for num, step in ((2, 12), (1, 40)):
        killer = KillAt(folder / "runs" / "run", step)
        with pytest.raises(RunError, match="resume from the last checkpoint"):
            train_run(configure(folder, dataset, precision, num=num, max_failures=0), screen.append)
        killer.join()
        assert killer.at < STEPS
    train_run(configure(folder, dataset, precision, num=3), screen.append)
    return screen


def test_a_run_on_two_then_one_then_three_workers_has_the_loss_curve_of_one(dataset: Path, tmp_path: Path) -> None:
    _, straight = train_here(configure(tmp_path, dataset))
    screen = run_from_two_to_one_to_three(tmp_path, dataset, "float64")
    resumed = [line for line in screen if line.startswith("resuming after")]
    assert len(resumed) == 2
    assert not any(line.endswith("and 0 steps") for line in resumed), "both changes were within an epoch"
    assert_same_curves(tmp_path / "runs" / "run", straight, TOLERANCE["float64"])


@pytest.mark.acceptance
def test_one_two_three_and_changing_workers_agree_in_float32_too(dataset: Path, tmp_path: Path) -> None:
    _, straight = train_here(configure(tmp_path, dataset, "float32"))
    run_from_two_to_one_to_three(tmp_path, dataset, "float32")
    assert_same_curves(tmp_path / "runs" / "run", straight, TOLERANCE["float32"])


@pytest.mark.acceptance
@pytest.mark.parametrize("precision", ["float64", "float32"])
@pytest.mark.parametrize("num", [1, 2, 3])
def test_the_loss_curve_does_not_depend_on_the_number_of_workers(
    num: int, precision: str, dataset: Path, tmp_path: Path
) -> None:
    _, straight = train_here(configure(tmp_path, dataset, precision))
    config = configure(tmp_path, dataset, precision, num=num)
    at_epochs = config.training.model_copy(update={"checkpoint_steps": None})
    train_run(config.model_copy(update={"training": at_epochs}), lambda line: None)
    assert_same_curves(tmp_path / "runs" / "run", straight, TOLERANCE[precision])
