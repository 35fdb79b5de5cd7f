"""What is refused before any worker starts, each with one message."""

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tomli_w
from pydantic import ValidationError

from dmvae.cli import run_verb
from dmvae.config.data import PrepareConfig
from dmvae.config.training import TrainConfig
from dmvae.data.preparation.prepare import prepare
from dmvae.data.reading.dataset import open_dataset
from dmvae.platform.errors import RunError
from dmvae.platform.train.run_store import RunStore
from dmvae.platform.train.trainer import _check_same_run, train_run
from dmvae.training.settings import resolve, run_record
from tests.runs import make_config, make_dataset

NETS, WRONG = "tests.example_package.nets", "tests.example_package.wrong"


@pytest.fixture(scope="module")
def dataset(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_dataset(tmp_path_factory.mktemp("trainer"))


def test_the_dataset_fills_in_shapes_and_likelihoods(dataset: Path, tmp_path: Path) -> None:
    model = resolve(make_config(tmp_path, dataset), open_dataset(dataset)).model
    assert model.shapes == {"left": (5,), "right": (3,)}
    assert model.distributions == {"left": "normal", "right": "normal"}


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"model": {"decoders_dist": {"middle": "normal"}}}, ["middle", "left"]),
        ({"model": {"input_dims": {"left": [4], "right": [3]}}}, ["(5,)", "Remove model.input_dims"]),
        ({"model": {"decoders_dist": {"left": "cauchy"}}}, ["Unknown likelihood 'cauchy'", "Available: "]),
        ({"model": {"architectures": {"left": {"name": "conv"}}}}, ["conv", "(5,)"]),
        ({"training": {"monitor": "accuracy"}}, ["accuracy", "Available: loss, joint"]),
        ({"evaluation": {"split": "holdout"}}, ["holdout", "test"]),
        ({"data": {"dataset": "/nowhere"}}, ["/nowhere"]),
        ({"init_from": "/nowhere"}, ["/nowhere", "model.json"]),
        ({"evaluation": {"measures": ["coherence"]}}, ["no labels", "Remove these measures"]),
        ({"evaluation": {"modalities": ["middle"]}}, ["evaluation.modalities", "middle"]),
        ({"training": {"monitor": "log_likelihood/joint/left"}}, ["log_likelihood/joint/left"]),
        ({"model": {"decoders_dist": {"left": "categorical"}}}, ["'left' is float32", "integers"]),
        ({"tracking": {"uri": "http://127.0.0.1:9"}}, ["127.0.0.1:9"]),
        ({"model": {"architectures": {"left": {"name": "nowhere.nets:Net"}}}}, ["architectures.left.name", "nowhere"]),
        ({"model": {"architectures": {"left": {"name": f"{NETS}:table", "params": {"widht": 3}}}}}, ["'widht'"]),
        ({"model": {"architectures": {"left": {"decoder": f"{WRONG}:OneColumn"}}}}, ["'left'", "(2, 5)", "(2, 1)"]),
        ({"model": {"architectures": {"left": {"encoder": f"{WRONG}:Normalised"}}}}, ["'left' has batch norm"]),
        ({"model": {"decoders_dist": {"left": f"{WRONG}:NotSummed"}}}, ["'left' must return one number", "(2, 5)"]),
        ({"model": {"decoders_dist": {"left": "nowhere:Cauchy"}}}, ["decoders_dist.left", "'nowhere' not found"]),
    ],
)
def test_what_cannot_work_is_refused_before_anything_is_written(
    changes: dict[str, Any], words: list[str], dataset: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    tree = make_config(tmp_path, dataset).model_dump(mode="json", exclude_defaults=True)
    for section, change in changes.items():
        tree[section] = {**tree.get(section, {}), **change} if isinstance(change, dict) else change
    file = tmp_path / "run.toml"
    file.write_text(tomli_w.dumps(tree))
    assert run_verb("train", [str(file)]) == 1
    message = capsys.readouterr().err
    assert message.startswith("error: ")
    assert "Traceback" not in message
    assert "pydantic" not in message
    assert "input_value" not in message
    for word in words:
        assert word in message
    assert not (tmp_path / "runs" / "run" / "run.json").exists()


def test_a_modality_that_no_training_row_has_is_refused(tmp_path: Path) -> None:
    dataset = make_dataset(tmp_path, left_in_train=False)
    with pytest.raises(ValueError, match=r"No row of split 'train' of .* has modality 'left'"):
        resolve(make_config(tmp_path, dataset), open_dataset(dataset))


@pytest.mark.parametrize("fault", ["cut", "flipped", "absent"])
def test_a_broken_shard_stops_a_run_before_it_starts(fault: str, dataset: Path, tmp_path: Path) -> None:
    copy = tmp_path / "copy"
    shutil.copytree(dataset, copy)
    shard = next((copy / "train").glob("*.arrow"))
    content = bytearray(shard.read_bytes())
    content[len(content) // 2] ^= 255
    if fault == "absent":
        shard.unlink()
    else:
        shard.write_bytes(content if fault == "flipped" else content[: len(content) // 2])
    with pytest.raises(ValueError, match=shard.name):
        train_run(make_config(tmp_path, copy), print)
    assert not (tmp_path / "runs").exists()


def test_a_run_does_not_resume_with_another_dataset_or_model(dataset: Path, tmp_path: Path) -> None:
    run_dir = tmp_path / "runs" / "run"
    run_dir.mkdir(parents=True)
    opened = open_dataset(dataset)
    record = resolve(make_config(tmp_path, dataset), opened).model_dump(mode="json")
    record["dataset"] = {"fingerprint": opened.manifest.fingerprint}
    (run_dir / "run.json").write_text(json.dumps(record))
    other = make_dataset(tmp_path / "other", seed=1)
    now = open_dataset(other).manifest.fingerprint
    with pytest.raises(RunError) as refusal:
        train_run(make_config(tmp_path, other, model={"latent_dim": 16}), print)
    assert f"dataset.fingerprint: '{opened.manifest.fingerprint}' in the run, '{now}' requested" in str(refusal.value)
    assert "model.latent_dim: 2 in the run, 16 requested" in str(refusal.value)


def test_a_setting_that_is_newer_than_a_run_had_its_default_there(dataset: Path, tmp_path: Path) -> None:
    opened = open_dataset(dataset)
    record = run_record(resolve(make_config(tmp_path, dataset), opened), opened.manifest)
    before = json.loads(json.dumps(record))
    del before["data"]["unit"], before["training"]["compile"], before["optim"]["clip_norm"]
    store = RunStore.open(str(tmp_path), "run")
    store.run_dir.mkdir()
    (store.run_dir / "run.json").write_text(json.dumps(before))
    _check_same_run(store, record)
    record["data"]["unit"] = "shard"
    with pytest.raises(RunError, match=r"data\.unit: 'batch' in the run, 'shard' requested"):
        _check_same_run(store, record)


@pytest.mark.parametrize(
    ("workers", "words"),
    [
        ({"num": 2, "min_num": 3}, "min_num=3 must not exceed num=2"),
        ({"num": 2, "resize_seconds": 5.0}, "has no effect without min_num"),
        ({"num": True}, "expected a number, got true"),
        ({"cpus": 1e300}, "less than or equal to 4096"),
    ],
)
def test_numbers_of_workers_that_cannot_be_are_refused(
    workers: dict[str, Any], words: str, dataset: Path, tmp_path: Path
) -> None:
    with pytest.raises(ValidationError, match=words):
        make_config(tmp_path, dataset, workers=workers)


def test_a_modality_with_the_name_of_a_metric_is_refused(tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    source = tmp_path / "rows.npz"
    np.savez(source, loss=rng.normal(size=(60, 2)), other=rng.normal(size=(60, 2)))
    folder = prepare(
        PrepareConfig.model_validate(
            {"dataset": str(tmp_path / "data"), "source": {"path": str(source), "kind": "npz"}}
        ),
        progress=lambda text: None,
    )
    config = TrainConfig.model_validate({"name": "x", "data": {"dataset": str(folder)}})
    with pytest.raises(ValueError, match="'loss' has the name of a metric"):
        resolve(config, open_dataset(folder))


def test_own_code_is_recorded_with_its_version(dataset: Path, tmp_path: Path) -> None:
    opened = open_dataset(dataset)
    config = make_config(tmp_path, dataset, model={"architectures": {"left": {"name": f"{NETS}:table"}}})
    model = run_record(resolve(config, opened), opened.manifest)["model"]
    assert model["architectures"]["left"]["name"] == f"{NETS}:table"
    assert model["packages"]["tests"].startswith("sha256:")


def test_own_code_that_only_the_dataset_names_is_not_imported(dataset: Path, tmp_path: Path) -> None:
    source = {"kind": "npz", "path": str(dataset.parent / "rows.npz")}
    tree = {"dataset": str(tmp_path / "data"), "source": source, "likelihood": {"left": "nowhere:Cauchy"}}
    copy = prepare(PrepareConfig.model_validate(tree), lambda line: None)
    with pytest.raises(ValueError, match=r"The dataset proposes .*'nowhere:Cauchy'.* set model\.decoders_dist\.left"):
        resolve(make_config(tmp_path, copy), open_dataset(copy))
