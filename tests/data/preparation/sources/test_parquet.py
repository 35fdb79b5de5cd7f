import datetime
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from dmvae.config.data import PrepareConfig
from dmvae.config.sources import ColumnGroup, ParquetSource
from dmvae.data.errors import DatasetError
from dmvae.data.preparation import stream
from dmvae.data.preparation.prepare import prepare, read_source
from dmvae.data.reading.dataset import open_dataset
from tests.data.preparation.test_rows import read_all


def write(path: Path, columns: dict[str, Any], **options: Any) -> str:
    pq.write_table(pa.table(columns), path, **options)
    return str(path)


def test_every_kind_of_column_is_read_with_what_is_missing(tmp_path: Path) -> None:
    images = [bytes(range(6)), None, bytes(range(6, 12))]
    path = write(
        tmp_path / "rows.parquet",
        {
            "id": ["a", "b", "c"],
            "label": pa.array([1, None, 0], pa.int8()),
            "image": pa.array(images, pa.binary(6)),
            "spectrum": pa.array([[1.5, 2.5], [float("nan")] * 2, None], pa.list_(pa.float32())),
            "cube": pa.array([[[1, 2], [3, 4]], None, [[5, 6], [7, 8]]]),
            "gene_1": pa.array([1, 2, None], pa.int32()),
            "gene_2": pa.array([3, 4, None], pa.int32()),
        },
    )
    groups = {
        "image": ColumnGroup(columns="image", shape=(1, 2, 3)),
        "spectrum": ColumnGroup(columns="spectrum"),
        "cube": ColumnGroup(columns="cube"),
        "genes": ColumnGroup(columns="gene_*", dtype="float32"),
    }
    rows = read_all(ParquetSource(path=path, modalities=groups))
    assert rows.ids.tolist() == ["a", "b", "c"]
    assert rows.labels is not None
    assert rows.labels.tolist() == [1, -1, 0]
    assert {name: mask.tolist() for name, mask in rows.present.items()} == {
        "image": [True, False, True],
        "spectrum": [True, False, False],
        "cube": [True, False, True],
        "genes": [True, True, False],
    }
    assert rows.data["image"][2].tolist() == [[[6, 7, 8], [9, 10, 11]]]
    assert rows.data["spectrum"][0].tolist() == [1.5, 2.5]
    assert rows.data["cube"][2].tolist() == [[5, 6], [7, 8]]
    assert rows.data["cube"].dtype == np.int64
    assert rows.data["genes"][1].tolist() == [2, 4]
    assert rows.data["genes"].dtype == np.float32


def test_a_folder_in_small_batches_comes_back_from_shards(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(stream, "CHUNK_BYTES", 140)
    values = np.random.default_rng(0).normal(size=(60, 3)).astype(np.float32)
    missing = np.arange(60) % 4 == 1
    missing[:30] = True  # the whole first file, whose lists therefore have no length
    (tmp_path / "parts").mkdir()
    for part, rows in enumerate(np.split(np.arange(60), 2)):
        lists = pa.array([None if missing[row] else values[row].tolist() for row in rows], pa.list_(pa.float32()))
        write(tmp_path / "parts" / f"{part}.parquet", {"id": rows, "x": lists, "y": values[rows, 0]})
    config = PrepareConfig(
        dataset=str(tmp_path / "dataset"), source=ParquetSource(path=str(tmp_path / "parts")), splits={"train": 1.0}
    )
    split = open_dataset(prepare(config, progress=lambda _: None)).split("train")
    batch, ids = split.read(np.arange(60)), split.ids()
    assert (batch.masks["x"].numpy() == ~missing[ids]).all()
    assert (batch.data["x"].numpy()[~missing[ids]] == values[ids][~missing[ids]]).all()
    assert (batch.data["y"].numpy() == values[ids][:, :1]).all()


@pytest.mark.parametrize("first", [{}, {"b": pa.nulls(2)}])
def test_a_modality_that_the_first_file_does_not_have_is_read_from_others(
    tmp_path: Path, first: dict[str, Any]
) -> None:
    write(tmp_path / "0.parquet", {"id": [0, 1], "a": [0.5, 1.5]} | first)
    write(tmp_path / "1.parquet", {"id": [2, 3], "a": [2.5, 3.5], "b": [[1.0, 2.0], [3.0, 4.0]]})
    rows = read_all(ParquetSource(path=str(tmp_path)))
    assert rows.present["b"].tolist() == [False, False, True, True]
    assert rows.data["b"][2:].tolist() == [[1, 2], [3, 4]]


def test_rows_that_miss_it_may_come_before_those_that_have_a_shaped_modality(tmp_path: Path) -> None:
    lists = pa.array([None] * 600 + [[1.0, 2.0, 3.0, 4.0]] * 10, pa.list_(pa.float32()))
    path = write(tmp_path / "rows.parquet", {"x": lists, "y": np.zeros(610)})
    groups = {"x": ColumnGroup(columns="x", shape=(2, 2)), "y": ColumnGroup(columns="y")}
    rows = read_all(ParquetSource(path=path, modalities=groups))
    assert rows.present["x"].sum() == 10
    assert rows.data["x"][-1].tolist() == [[1, 2], [3, 4]]


def test_chunks_are_small_though_the_first_rows_are(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(stream, "CHUNK_BYTES", 1 << 16)
    lists = pa.array([None] * 300 + [[0.0] * 1024] * 100, pa.list_(pa.float32()))
    source = ParquetSource(path=write(tmp_path / "rows.parquet", {"x": lists}))
    assert max(len(chunk.rows) for chunk in read_source(source, 0, tmp_path).chunks) <= 16


def test_labels_may_be_whole_floats_as_pandas_writes_integers_with_gaps(tmp_path: Path) -> None:
    path = write(tmp_path / "rows.parquet", {"x": [1.0, 2.0, 3.0], "label": [2.0, float("nan"), None]})
    assert read_all(ParquetSource(path=path)).labels.tolist() == [2, -1, -1]


@pytest.mark.parametrize(
    ("columns", "message"),
    [
        ({"x": [1.0, 2.0], "label": [1.0, 0.5]}, "Labels must be integers, text, .* but got 0.5 in .*row 1"),
        ({"x": [1.0, 2.0], "id": [3, None]}, "Missing id in .*row 1"),
        (
            {"x": [1.0], "id": pa.array([2**63], pa.uint64())},
            "Cannot read .*bad.parquet .* 9223372036854775808 not in range",
        ),
        ({"x": [datetime.time(1)]}, "must hold numbers, lists of numbers or fixed-size binary, but got time"),
        ({"x": [1.0], "joint": [1.0]}, "Cannot read .*bad.parquet: .*'joint'"),
        ({"x": [1.0, 2.0], "size_factor": [1.0, 0.0]}, "must be positive and finite, but got 0.0 in .*row 1"),
        ({"id": [1]}, "No modality found in .*bad.parquet"),
    ],
)
def test_columns_that_break_a_law_are_named(tmp_path: Path, columns: dict[str, Any], message: str) -> None:
    path = write(tmp_path / "bad.parquet", columns)
    config = PrepareConfig(dataset=str(tmp_path / "dataset"), source=ParquetSource(path=path))
    with pytest.raises(DatasetError, match=message):
        prepare(config, progress=lambda _: None)
    assert [path.name for path in tmp_path.iterdir()] == ["bad.parquet"]


def test_what_is_no_parquet_or_matches_nothing_is_named(tmp_path: Path) -> None:
    (tmp_path / "text.parquet").write_text("no")
    path = write(tmp_path / "good.parquet", {"x": [1.0]})
    with pytest.raises(DatasetError, match=r"Cannot read .*text.parquet as Parquet"):
        read_all(ParquetSource(path=str(tmp_path / "text.parquet")))
    with pytest.raises(DatasetError, match=r"No Parquet file found at .*nowhere"):
        read_all(ParquetSource(path=str(tmp_path / "nowhere")))
    with pytest.raises(
        DatasetError, match=r"'gene_\*' matches no column of .*which has x\..*source.modalities.g.columns"
    ):
        read_all(ParquetSource(path=path, modalities={"g": ColumnGroup(columns="gene_*")}))
    with pytest.raises(DatasetError, match=r"Column 'cell' not found in .*source.id"):
        read_all(ParquetSource(path=path, id="cell"))
