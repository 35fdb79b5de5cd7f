import subprocess
import sys
import tomllib
from importlib import import_module
from pathlib import Path
from pkgutil import iter_modules
from typing import Any, get_args

import pytest
import tyro
from pydantic import ValidationError

from dmvae.config.data import DataConfig, PrepareConfig
from dmvae.config.section import Section
from dmvae.config.sources import DigitsSource, NpzSource, Source

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
        ({"source": {"kind": "digits", "missing": 1.5}}, "between 0 and 1, but got 1.5"),
        ({"source": {"kind": "digits", "missing": {"mnist": -0.1}}}, "between 0 and 1, but got -0.1"),
        ({"source": {"kind": "digits", "missing": {"svhn": 0.1}}}, "svhn"),
        ({"source": {"kind": "digits", "pairs_per_image": 0}}, "pairs_per_image"),
        ({"splits": {"train": 0.8}}, "must be positive and add up to 1"),
        ({"splits": {"train": 1.5, "val": -0.5}}, "must be positive and add up to 1"),
        ({"splits": {}}, "must be positive and add up to 1"),
        ({"splits": {"../train": 1.0}}, "../train"),
        ({"splits": {"a": 0.5, "b": 0.5}, "scaling": {"x": "standardise"}}, "the split 'train'"),
        ({"scaling": {"joint": "none"}}, "'joint'"),
        ({"scaling": {"x": "standardize"}}, "standardise"),
        ({"partial": "ignore"}, "refuse"),
        ({"partial": "mean"}, "partial='mean' no longer exists, since it counted invented values.*Set partial='keep'"),
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
    heavy = "{'torch', 'numpy', 'pyarrow'}"
    loaded = f"import dmvae.config.data, dmvae.config.sources, sys; print(sorted({heavy} & set(sys.modules)))"
    result = subprocess.run([sys.executable, "-c", loaded], capture_output=True, text=True, check=True)
    assert result.stdout.strip() == "[]"


def sections() -> dict[str, type[Section]]:
    """The section of every kind of source."""
    union = get_args(Source)[0]
    return {get_args(section.model_fields["kind"].annotation)[0]: section for section in get_args(union)}


def test_every_kind_of_source_has_a_reader_of_the_same_name_and_no_reader_is_forgotten() -> None:
    package = import_module("dmvae.data.preparation.sources")
    modules = {name: import_module(f"{package.__name__}.{name}") for _, name, _ in iter_modules(package.__path__)}
    assert {name for name, module in modules.items() if callable(getattr(module, "read", None))} == {
        *sections(),
        "joined",
    }


def test_every_setting_of_a_source_is_described() -> None:
    for section in sections().values():
        for name in section.model_fields.keys() - {"kind"}:
            assert f"    {name}: " in (section.__doc__ or ""), (section, name)
