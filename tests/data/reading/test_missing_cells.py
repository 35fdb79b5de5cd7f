"""Missing cells from a source to batches: kept, counted, verified, scaled by what is observed, and read as masks."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch

from dmvae.config.data import PrepareConfig
from dmvae.data.batch import Batch
from dmvae.data.errors import DatasetError
from dmvae.data.format import manifest as manifests
from dmvae.data.format.schema import MISSING_INTEGER
from dmvae.data.preparation.build_manifest import build_manifest
from dmvae.data.preparation.prepare import prepare
from dmvae.data.preparation.rows import Rows
from dmvae.data.preparation.writer import write_dataset
from dmvae.data.reading.dataset import Dataset, open_dataset
from dmvae.data.reading.loader import read_epoch
from dmvae.data.reading.sampler import EpochSampler

ROWS = 60


def source(seed: int = 0) -> dict[str, np.ndarray]:
    """Return arrays with missing cells in all but `whole`; the rows 3 and 4 lack x, cell by cell or by their mask."""
    rng = np.random.default_rng(seed)
    x = rng.normal(5, 3, (ROWS, 4)).astype(np.float32)
    x[rng.random(x.shape) < 0.3] = np.nan
    x[3] = np.nan
    code = rng.integers(0, 3, (ROWS, 2))
    code[::7, 1] = MISSING_INTEGER
    counts = rng.poisson(6, (ROWS, 3)).astype(np.float64)
    counts[::5, 0] = np.nan
    has_x = np.arange(ROWS) != 4
    return {
        "x": x,
        "mask.x": has_x,
        "code": code,
        "counts": counts,
        "whole": rng.normal(size=(ROWS, 2)),
        "split": np.where(np.arange(ROWS) < 40, "train", "test"),
    }


def prepared(folder: Path, arrays: dict[str, np.ndarray], **settings: Any) -> Dataset:
    np.savez(folder / "rows.npz", **arrays)
    path = folder / "data"
    told = {"dataset": str(path), "source": {"kind": "npz", "path": str(folder / "rows.npz")}, "replace": True}
    prepare(PrepareConfig.model_validate({**told, **settings}), lambda text: None)
    return open_dataset(path)


@pytest.fixture
def dataset(tmp_path: Path) -> Dataset:
    return prepared(tmp_path, source(), scaling={"x": "standardise"}, likelihood={"counts": "poisson"})


def rows_of(dataset: Dataset, split: str = "train") -> tuple[Batch, np.ndarray]:
    """Return all rows of a split, and their numbers in the source."""
    opened = dataset.split(split)
    return opened.read(np.arange(len(opened)), torch.float64), opened.ids()


def test_cells_that_are_missing_in_the_source_are_missing_in_batches(dataset: Dataset) -> None:
    arrays = source()
    for split in ("train", "test"):
        batch, ids = rows_of(dataset, split)
        assert set(batch.cells) == {"x", "code", "counts"}
        has_x = ~np.isnan(arrays["x"][ids]) & arrays["mask.x"][ids][:, None]
        assert np.array_equal(batch.cells["x"].numpy(), has_x)
        assert np.array_equal(batch.masks["x"].numpy(), has_x.any(1))
        assert np.array_equal(batch.cells["code"].numpy(), arrays["code"][ids] != MISSING_INTEGER)
        assert np.array_equal(batch.cells["counts"].numpy(), ~np.isnan(arrays["counts"][ids]))
        for name, cells in batch.cells.items():
            assert bool((batch.data[name][~cells] == 0).all())
        assert np.array_equal(batch.data["code"][batch.cells["code"]], arrays["code"][ids][batch.cells["code"]])
        info = dataset.manifest.modalities["x"]
        scaled = (arrays["x"][ids] - np.array(info.mean)) / np.array(info.std)
        assert batch.data["x"][batch.cells["x"]].numpy() == pytest.approx(scaled[has_x])


def test_statistics_are_those_of_observed_training_cells(dataset: Dataset) -> None:
    arrays, info = source(), dataset.manifest.modalities
    train = arrays["split"] == "train"
    x = np.where(arrays["mask.x"][:, None], arrays["x"], np.nan)[train].astype(np.float64)
    assert info["x"].mean == pytest.approx(np.nanmean(x, axis=0))
    assert info["x"].std == pytest.approx(np.nanstd(x, axis=0))
    counts = arrays["counts"][train]
    assert info["counts"].size_factor == pytest.approx(np.nansum(counts, axis=1).mean())
    shares = np.nansum(counts, axis=1) * (~np.isnan(counts)).sum(axis=1)
    assert info["counts"].rate == pytest.approx(np.nansum(counts) / shares.sum())
    assert info["code"].classes == 3


def test_the_manifest_counts_cells_and_older_releases_refuse_it(
    dataset: Dataset, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    manifest = dataset.manifest
    assert (manifest.version, manifest.missing_cells) == (3, ("x", "code", "counts"))
    observed = manifest.splits["train"].observed_cells
    batch, _ = rows_of(dataset)
    assert observed == {name: int(cells.sum()) for name, cells in batch.cells.items()}
    monkeypatch.setattr(manifests, "VERSIONS", (1, 2))
    with pytest.raises(DatasetError, match=r"expected version 1 or 2, got 3\. Prepare the dataset again, or use the"):
        open_dataset(tmp_path / "data")


def test_a_dataset_without_missing_cells_is_written_as_before(tmp_path: Path) -> None:
    arrays = source()
    dataset = prepared(tmp_path, {"whole": arrays["whole"], "split": arrays["split"]})
    content = json.loads((tmp_path / "data" / "dataset.json").read_text())
    assert content["version"] == 1
    assert set(content["splits"]["train"]["shards"][0]) == {
        "path", "rows", "record_batch_rows", "bytes", "sha256", "observed"
    }  # fmt: skip
    batch, _ = rows_of(dataset)
    assert batch.cells is None
    assert batch.masks is None


@pytest.mark.parametrize("world_size", [1, 2, 3])
def test_workers_read_the_same_cells_in_any_number(dataset: Dataset, world_size: int) -> None:
    split = dataset.split("train")
    sampler = EpochSampler(split.record_batch_rows, seed=0, batch_size=12, streams=6)
    found = {}
    for rank in range(world_size):
        for _, _, batch in read_epoch(split, sampler, 0, 0, rank, world_size):
            found |= {int(row.ids[0]): row for row in batch}
    everything, ids = rows_of(dataset)
    assert len(found) == len(ids)
    for place, number in enumerate(ids.tolist()):
        for name, cells in everything.cells.items():
            assert torch.equal(found[number].cells[name][0], cells[place])


def test_nulls_among_integers_and_floats_of_lists_and_columns_are_missing_cells(tmp_path: Path) -> None:
    table = pa.table(
        {
            "words": pa.array([[1, None, 2], [0, 1, 1], None], pa.list_(pa.int64())),
            "values": pa.array([[1.5, None], [0.5, 2.0], [None, None]], pa.list_(pa.float32())),
            "a": pa.array([1, None, None], pa.int64()),
            "b": pa.array([None, 2.5, None], pa.float64()),
            "full": pa.array([1.0, 2.0, 3.0]),
            "split": ["train"] * 3,
        }
    )
    pq.write_table(table, tmp_path / "rows.parquet")
    groups = {
        "words": {"columns": "words"},
        "values": {"columns": "values"},
        "pair": {"columns": "[ab]", "dtype": "float64"},
        "full": {"columns": "full"},
    }
    config = {"kind": "parquet", "path": str(tmp_path / "rows.parquet"), "modalities": groups, "split": "split"}
    prepare(PrepareConfig.model_validate({"dataset": str(tmp_path / "data"), "source": config}), lambda text: None)
    batch, ids = rows_of(open_dataset(tmp_path / "data"))
    order = torch.from_numpy(np.argsort(ids))
    assert batch.cells["words"][order].int().tolist() == [[1, 0, 1], [1, 1, 1], [0, 0, 0]]
    assert batch.cells["values"][order].int().tolist() == [[1, 0], [1, 1], [0, 0]]
    assert batch.cells["pair"][order].int().tolist() == [[1, 0], [0, 1], [0, 0]]
    assert batch.masks["words"][order].tolist() == [True, True, False]
    assert batch.data["pair"][order].tolist() == [[1.0, 0.0], [0.0, 2.5], [0.0, 0.0]]


def shards_of(folder: Path, x: np.ndarray) -> Path:
    present = {"x": np.ones(len(x), dtype=bool)}
    return write_dataset(folder / "raw", {"train": Rows(np.arange(len(x)), {"x": x}, present)}, replace=True)


def test_infinite_cells_and_present_rows_without_a_cell_are_refused(tmp_path: Path) -> None:
    for wrong, message in (
        ([[1.0, np.inf], [np.nan, 2.0]], r"must be finite, but got inf in .*row 0 \(id 0\)"),
        ([[1.0, 2.0], [np.nan, np.nan]], r"No cell is observed in .*column 'x', row 1 \(id 1\)"),
    ):
        with pytest.raises(DatasetError, match=message):
            shards_of(tmp_path, np.array(wrong))
    arrays = source()
    arrays["x"][7, 1] = -np.inf
    with pytest.raises(DatasetError, match=r"'x' must be finite, but got infinity in .*row 7"):
        prepared(tmp_path, arrays)


def test_cells_that_do_not_match_the_manifest_are_refused(tmp_path: Path) -> None:
    folder = shards_of(tmp_path, np.array([[1.0, np.nan], [3.0, 2.0]]))
    manifest = build_manifest(folder)
    shard = manifest.splits["train"].shards[0]
    for cells, message in (({"x": 4}, "it says 4 cells of modality 'x' are observed"), ({}, "must be finite")):
        wrong = shard.model_copy(update={"observed_cells": cells})
        split = manifest.splits["train"].model_copy(update={"shards": (wrong,)})
        manifests.save_manifest(manifest.model_copy(update={"splits": {"train": split}}), folder)
        with pytest.raises(DatasetError, match=message):
            open_dataset(folder).verify()
    manifests.save_manifest(manifest, folder)
    assert open_dataset(folder).verify() == ()


def test_a_feature_that_no_training_row_has_cannot_be_scaled(tmp_path: Path) -> None:
    arrays = source()
    arrays["x"][:40, 2] = np.nan
    with pytest.raises(DatasetError, match="no row of the split 'train' has feature 2 of modality 'x'"):
        prepared(tmp_path, arrays, scaling={"x": "standardise"})
