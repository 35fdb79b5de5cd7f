"""What the README says of the demo, made again from its own configuration files."""

from pathlib import Path

import pytest

from dmvae.cli import read_toml
from dmvae.config.data import PrepareConfig
from dmvae.config.training import TrainConfig
from dmvae.data.prepare import prepare
from dmvae.platform.trainer import train_run

CONFIGS = Path(__file__).parents[2] / "jobs" / "configs"


@pytest.mark.acceptance
def test_the_demo_beats_pca_and_predicts_the_right_digit(tmp_path: Path) -> None:
    data = read_toml(PrepareConfig, CONFIGS / "digits.toml").model_dump() | {"dataset": str(tmp_path / "digits")}
    prepare(PrepareConfig.model_validate(data), progress=print)
    run = read_toml(TrainConfig, CONFIGS / "train.toml").model_dump()
    run |= {"runs_dir": str(tmp_path / "runs"), "tracking": {"uri": f"sqlite:///{tmp_path}/mlflow.db"}}
    run["data"] |= {"dataset": str(tmp_path / "digits")}
    figures = train_run(TrainConfig.model_validate(run), print).metrics
    assert figures["test/pca/nll_minus_ours"] > 4 * figures["test/pca/nll_minus_ours_se"]
    for pair in ("mnist/optdigits", "optdigits/mnist"):
        assert figures[f"test/coherence/{pair}"] > 0.7
