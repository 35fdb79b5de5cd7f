"""Names of features, classes and labels on their way from a source into the manifest."""

import datetime
import json
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from dmvae.config.data import PrepareConfig
from dmvae.config.sources import Source
from dmvae.data.format.manifest import Manifest
from dmvae.data.preparation.class_names import ClassNames
from dmvae.data.preparation.prepare import prepare
from dmvae.data.reading.dataset import Dataset, open_dataset

LABELS: dict[str, tuple[pa.Array, list[int], tuple[str, ...] | None]] = {
    "text": (pa.array(["ctrl", "case", None, "", "ctrl"]), [1, 0, -1, -1, 1], ("case", "ctrl")),
    "numbers in text": (pa.array(["10", "9", None, "9", "10"]), [1, 0, -1, 0, 1], ("9", "10")),
    "booleans": (pa.array([True, False, None, False, True]), [1, 0, -1, 0, 1], ("false", "true")),
    "categories": (
        pa.array(["low", "high", None, "low", "mid"]).dictionary_encode().cast(pa.dictionary(pa.int8(), pa.string())),
        [0, 1, -1, 0, 2],
        ("low", "high", "mid"),
    ),
    "whole floats": (pa.array([0.0, 1.0, None, float("nan"), 1.0]), [0, 1, -1, -1, 1], None),
    "decimals": (pa.array([0, 1, None, 1, 1]).cast(pa.decimal128(25, 2)), [0, 1, -1, 1, 1], None),
    "dates": (
        pa.array([datetime.date(2024, 1, 2), datetime.date(2023, 1, 2), None, None, datetime.date(2024, 1, 2)]),
        [1, 0, -1, -1, 1],
        ("2023-01-02", "2024-01-02"),
    ),
}


def made(source: dict[str, Any] | Source, folder: Path, **settings: Any) -> Dataset:
    tree = {"dataset": str(folder / "out"), "source": source, "splits": {"train": 1.0}, **settings}
    return open_dataset(prepare(PrepareConfig.model_validate(tree), progress=lambda _: None))


def read(dataset: Dataset) -> Any:
    """The rows of the training split in the order of their ids."""
    split = dataset.split("train")
    return split.read(np.argsort(split.ids()))


@pytest.mark.parametrize("kind", LABELS)
def test_labels_of_every_type_are_numbered_and_keep_their_names(tmp_path: Path, kind: str) -> None:
    column, numbers, names = LABELS[kind]
    pq.write_table(pa.table({"label": column, "a": np.arange(5.0), "b": np.ones(5)}), tmp_path / "t.parquet")
    dataset = made({"kind": "parquet", "path": f"{tmp_path}/t.parquet"}, tmp_path)
    assert read(dataset).labels.tolist() == numbers
    assert dataset.manifest.label_names == names
    assert dataset.manifest.label_name(0) == (names or ("0",))[0]


@pytest.mark.parametrize(
    ("labels", "numbers", "names"),
    [
        (np.array(["ctrl", "case", "ctrl"]), [1, 0, 1], ("case", "ctrl")),
        (np.array([b"b", b"a", b"b"]), [1, 0, 1], ("a", "b")),
        (np.array([True, False, True]), [1, 0, 1], ("false", "true")),
        (np.array([1.0, np.nan, 0.0]), [1, -1, 0], None),
        (np.array([4, -3, 0]), [4, -1, 0], None),
    ],
)
def test_labels_of_arrays_are_read_alike(
    tmp_path: Path, labels: Any, numbers: list[int], names: tuple[str, ...] | None
) -> None:
    np.savez(tmp_path / "t.npz", x=np.eye(3), label=labels)
    dataset = made({"kind": "npz", "path": f"{tmp_path}/t.npz"}, tmp_path)
    assert [max(label, -1) for label in read(dataset).labels.tolist()] == numbers
    assert dataset.manifest.label_names == names


def test_the_columns_of_a_table_name_the_features(tmp_path: Path) -> None:
    (tmp_path / "t.csv").write_text("id,iron,zinc\n1,0.5,2\n2,1.5,3\n")
    (tmp_path / "rows.csv").write_text("id,label\n1,ill\n2,well\n")
    tree = {"kind": "csv", "rows": f"{tmp_path}/rows.csv", "modalities": {"blood": {"path": f"{tmp_path}/t.csv"}}}
    dataset = made(tree, tmp_path)
    assert dataset.manifest.modalities["blood"].features == ("iron", "zinc")
    assert dataset.manifest.label_names == ("ill", "well")
    assert json.loads((tmp_path / "out/dataset.json").read_text())["version"] == 2


def test_the_order_in_which_labels_are_read_does_not_number_them() -> None:
    one, other = ClassNames(), ClassNames()
    read_first, read_second = one.encode(pa.array(["b", "a"])), other.encode(pa.array(["a", "b"]))
    assert one.names == other.names == ("a", "b")
    assert one.final[read_first].tolist() == [1, 0]
    assert other.final[read_second].tolist() == [0, 1]


def test_a_modality_with_another_number_of_names_is_refused() -> None:
    shard = {"path": "a", "rows": 1, "record_batch_rows": 1, "bytes": 1, "sha256": "0" * 64, "observed": {"a": 1}}
    info = {"shape": [2], "dtype": "float32", "likelihood": "normal", "features": ["one"]}
    tree = {"id_type": "int64", "has_label": False, "modalities": {"a": info}, "splits": {"t": {"shards": [shard]}}}
    with pytest.raises(ValueError, match="one name for each feature, but got 1 for shape"):
        Manifest.model_validate(tree)
