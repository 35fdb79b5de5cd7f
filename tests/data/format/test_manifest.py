import json
from pathlib import Path
from typing import Any

import pytest

from dmvae.data.errors import DatasetError
from dmvae.data.format.manifest import Manifest, load_manifest, save_manifest


def content(**changes: Any) -> dict[str, Any]:
    shard = {
        "path": "train/part-00000.arrow",
        "rows": 3,
        "record_batch_rows": 2,
        "bytes": 100,
        "sha256": "0" * 64,
        "observed": {"a": 3, "b": 1, "c": 0},
    }
    return {
        "id_type": "int64",
        "has_label": False,
        "modalities": {
            "a": {"shape": [2], "dtype": "float32", "likelihood": "normal", "scaling": "standardise"}
            | {"mean": [0.1, 1 / 3], "std": [1.0, 2.5]},
            "b": {"shape": [1], "dtype": "int64", "likelihood": "categorical", "classes": 4},
            "c": {"shape": [1, 2, 2], "dtype": "uint8", "likelihood": "bernoulli", "scaling": "unit"},
        },
        "splits": {"train": {"shards": [shard | {"path": "train/a.arrow"}, shard]}, "val": {"shards": []}},
    } | changes


def test_a_manifest_survives_its_file(tmp_path: Path) -> None:
    manifest = Manifest.model_validate(content(origin={"seed": 1}))
    save_manifest(manifest, tmp_path)
    assert load_manifest(tmp_path) == manifest
    assert [path.name for path in tmp_path.iterdir()] == ["dataset.json"]


def test_a_split_sums_over_its_shards() -> None:
    manifest = Manifest.model_validate(content())
    assert manifest.splits["train"].rows == 6
    assert manifest.splits["train"].observed == {"a": 6, "b": 2, "c": 0}
    assert manifest.splits["val"].rows == 0
    assert manifest.input_dims == {"a": (2,), "b": (1,), "c": (1, 2, 2)}


def test_the_fingerprint_is_of_the_content_and_not_of_the_origin() -> None:
    manifest = Manifest.model_validate(content())
    assert manifest.fingerprint == Manifest.model_validate(content(origin={"made": "today"})).fingerprint
    assert manifest.fingerprint != Manifest.model_validate(content(id_type="string")).fingerprint


@pytest.mark.parametrize("path", ["../a.arrow", "/etc/passwd", "train/../../a.arrow", "", "C:\\a.arrow", "a\\..\\b"])
def test_a_path_that_leaves_the_folder_is_refused(tmp_path: Path, path: str) -> None:
    changed = content()
    changed["splits"]["train"]["shards"][0]["path"] = path
    (tmp_path / "dataset.json").write_text(json.dumps({"format": "dmvae-dataset", "version": 1} | changed))
    with pytest.raises(DatasetError, match="Shards must lie inside the dataset's folder"):
        load_manifest(tmp_path)


@pytest.mark.parametrize(
    ("modality", "change", "message"),
    [
        ("a", {"mean": None}, "must have one number for each element"),
        ("a", {"std": [1.0]}, "must have one number for each element"),
        ("a", {"std": [1.0, 0.0]}, "Standard deviations must be positive"),
        ("a", {"shape": [0]}, "at least 1"),
        ("a", {"classes": 3}, "must be categorical with classes"),
        ("b", {"classes": None}, "must be categorical with classes"),
        ("b", {"likelihood": "normal"}, "must be categorical with classes"),
        ("c", {"scaling": "none"}, "Scaling of uint8 must be 'unit'"),
        ("c", {"color": "red"}, "color"),
    ],
)
def test_a_modality_that_contradicts_itself_is_refused(modality: str, change: dict[str, Any], message: str) -> None:
    changed = content()
    changed["modalities"][modality] |= change
    with pytest.raises(ValueError, match=message):
        Manifest.model_validate(changed)


def test_counts_that_cannot_be_are_refused() -> None:
    changed = content()
    changed["splits"]["train"]["shards"][0]["observed"]["a"] = 4
    with pytest.raises(ValueError, match="between 0 and"):
        Manifest.model_validate(changed)
    changed["splits"]["train"]["shards"][0] = changed["splits"]["train"]["shards"][1]
    with pytest.raises(ValueError, match="listed more than once"):
        Manifest.model_validate(changed)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("{", "as JSON"),
        ("[]", "format = 'dmvae-dataset'"),
        ('{"format": "other"}', "format = 'dmvae-dataset'"),
        ('{"format": "dmvae-dataset", "version": 4}', "expected version 1 or 2 or 3, got 4"),
        ('{"format": "dmvae-dataset", "version": 1}', "Field required"),
    ],
)
def test_a_file_that_is_no_manifest_is_refused(tmp_path: Path, text: str, message: str) -> None:
    (tmp_path / "dataset.json").write_text(text)
    with pytest.raises(DatasetError, match=message):
        load_manifest(tmp_path)


def test_an_edited_manifest_is_refused(tmp_path: Path) -> None:
    save_manifest(Manifest.model_validate(content()), tmp_path)
    path = tmp_path / "dataset.json"
    path.write_text(path.read_text().replace("2.5", "2.6"))
    with pytest.raises(DatasetError, match="was edited"):
        load_manifest(tmp_path)


@pytest.mark.parametrize(("field", "value"), [("mean", 1e308), ("mean", -1e308), ("std", 1e-320), ("std", 1e308)])
def test_a_scaling_outside_the_range_of_float32_is_refused(field: str, value: float) -> None:
    tree = content()
    tree["modalities"]["a"] |= {field: [value, 1.0]}
    with pytest.raises(ValueError, match=rf"Values of {field} must lie in the range of float32"):
        Manifest.model_validate(tree)
