import subprocess
import sys
import tomllib
from pathlib import Path
from typing import Any

import pytest
import tyro
from pydantic import ValidationError

from dmvae.config.data import DataConfig, DigitsSource, NpzSource, PrepareConfig

CONFIGS = Path(__file__).parents[2] / "jobs/configs"


def test_the_demo_is_described_by_its_file() -> None:
    config = PrepareConfig.model_validate(tomllib.loads((CONFIGS / "digits.toml").read_text()))
    assert config == PrepareConfig(dataset="data/digits", source=DigitsSource())


def test_a_description_survives_json() -> None:
    config = PrepareConfig(
        dataset="data/x",
        source=NpzSource(path="x.npz"),
        scaling={"a": "standardise"},
        splits={"train": 0.7, "val": 0.3},
    )
    assert PrepareConfig.model_validate_json(config.model_dump_json()) == config


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"sead": 1}, "sead"),
        ({"source": {"kind": "parquet"}}, "parquet"),
        ({"source": {"kind": "npz"}}, "path"),
        ({"source": {"kind": "digits", "path": "x"}}, "path"),
        ({"source": {"kind": "digits", "missing": 1.5}}, r"a share lies in \[0, 1\]; got 1.5"),
        ({"source": {"kind": "digits", "missing": {"mnist": -0.1}}}, r"a share lies in \[0, 1\]; got -0.1"),
        ({"source": {"kind": "digits", "missing": {"svhn": 0.1}}}, "svhn"),
        ({"source": {"kind": "digits", "pairs_per_image": 0}}, "pairs_per_image"),
        ({"splits": {"train": 0.8}}, "add up to 1"),
        ({"splits": {"train": 1.5, "val": -0.5}}, "add up to 1"),
        ({"splits": {}}, "add up to 1"),
        ({"splits": {"../train": 1.0}}, "Invalid name"),
        ({"splits": {"a": 0.5, "b": 0.5}, "scaling": {"x": "standardise"}}, "the split 'train'"),
        ({"scaling": {"joint": "none"}}, "Invalid modality name"),
        ({"scaling": {"x": "standardize"}}, "standardise"),
        ({"partial": "ignore"}, "refuse"),
        ({"shard_megabytes": 0}, "shard_megabytes"),
        ({"dataset": ""}, "dataset"),
    ],
)
def test_a_description_that_cannot_be_carried_out_is_refused(change: dict[str, Any], message: str) -> None:
    with pytest.raises(ValidationError, match=message):
        PrepareConfig.model_validate({"dataset": "data/x", "source": {"kind": "digits"}} | change)


def test_reading_settings_out_of_range_are_refused() -> None:
    assert DataConfig(dataset="data/x").streams is None
    for change in ({"streams": 0}, {"window_rows": 0}, {"train_split": "a/b"}, {"dataset": ""}, {"batch": 1}):
        with pytest.raises(ValidationError):
            DataConfig.model_validate({"dataset": "data/x"} | change)


def test_flags_are_laid_over_a_description() -> None:
    config = PrepareConfig(dataset="data/x", source=DigitsSource())
    flags = ["--seed", "3", "--source.missing", "mnist", "0.25", "--splits", "train", "0.5", "val", "0.5", "--replace"]
    changed = tyro.cli(tyro.conf.AvoidSubcommands[PrepareConfig], default=config, args=flags)
    assert changed == PrepareConfig(
        dataset="data/x",
        source=DigitsSource(missing={"mnist": 0.25}),
        seed=3,
        splits={"train": 0.5, "val": 0.5},
        replace=True,
    )
    flags = ["--dataset", "d", "source:npz-source", "--source.path", "x.npz"]
    assert tyro.cli(PrepareConfig, args=flags) == PrepareConfig(dataset="d", source=NpzSource(path="x.npz"))


def test_help_says_what_every_setting_means(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit, match="0"):
        tyro.cli(DataConfig, args=["--help"])
    assert "DMVAE_CACHE" in capsys.readouterr().out
    with pytest.raises(SystemExit, match="0"):
        tyro.cli(PrepareConfig, args=["--help"])
    assert "the folder to write" in capsys.readouterr().out


def test_settings_load_without_torch_numpy_or_pyarrow() -> None:
    loaded = "import dmvae.config.data, sys; print(sorted({'torch', 'numpy', 'pyarrow'} & set(sys.modules)))"
    result = subprocess.run([sys.executable, "-c", loaded], capture_output=True, text=True, check=True)
    assert result.stdout.strip() == "[]"
