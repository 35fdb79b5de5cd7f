import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest
import torch

from dmvae import Batch
from dmvae.data.errors import DatasetError
from dmvae.data.preparation.build_manifest import build_manifest
from dmvae.data.preparation.rows import Rows
from dmvae.data.preparation.writer import write_dataset
from dmvae.data.reading.dataset import open_dataset

HINTS = {"rna": "negative_binomial", "tags": "poisson"}


def counted(num: int = 40, **changes: object) -> Rows:
    """Counts in floats and in integers with size factors, none where nothing is counted, and a float modality."""
    rng = np.random.default_rng(0)
    data = {
        "rna": rng.poisson(3, (num, 5)).astype(np.float32),
        "tags": rng.poisson(3, (num, 2)),
        "protein": rng.normal(size=(num, 3)).astype(np.float32),
    }
    rna = np.arange(num) % 2 == 0
    present = {"rna": rna, "tags": rna & (np.arange(num) % 3 == 0), "protein": np.ones(num, dtype=bool)}
    data["rna"][~rna] = np.nan
    fields = {"size_factors": np.where(rna, rng.gamma(2, size=num), np.nan)} | changes
    return Rows(np.arange(num) + 7, data, present, **fields)


def test_size_factors_are_written_and_read_back(tmp_path: Path) -> None:
    rows = counted()
    write_dataset(tmp_path / "data", {"train": rows}, likelihood=HINTS, shard_bytes=1, record_batch_rows=8)
    dataset = open_dataset(tmp_path / "data")
    assert dataset.manifest.size_factor == "float64"
    assert dataset.manifest.modalities["tags"].classes is None
    order = np.random.default_rng(1).permutation(len(rows))
    batch = dataset.split("train").read(order, torch.float64)
    np.testing.assert_array_equal(batch.size_factors, rows.size_factors[order])
    here = rows.present["rna"][order]
    np.testing.assert_array_equal(batch.data["rna"][here], rows.data["rna"][order][here])
    assert batch.data["tags"].dtype == torch.float64
    dataset.verify()


def test_a_dataset_without_size_factors_has_none_and_its_old_fingerprint(tmp_path: Path) -> None:
    write_dataset(tmp_path / "data", {"train": counted(size_factors=None)}, likelihood=HINTS)
    dataset = open_dataset(tmp_path / "data")
    assert dataset.split("train").read(np.arange(3)).size_factors is None
    manifest = tmp_path / "data/dataset.json"
    content = json.loads(manifest.read_text())
    assert "size_factor" not in content
    manifest.write_text(json.dumps({**content, "size_factor": None}))  # as an earlier version wrote it
    assert open_dataset(tmp_path / "data").manifest == dataset.manifest


def test_another_float_type_of_size_factors_is_read_too(tmp_path: Path) -> None:
    counts = pa.FixedSizeListArray.from_arrays(pa.array([1.0, 2, 3, 4], pa.float32()), 2)
    columns = {
        "id": pa.array([1, 2]),
        "rna": pa.ExtensionArray.from_storage(pa.fixed_shape_tensor(pa.float32(), [2]), counts),
        "size_factor": pa.array([0.5, 2.0], pa.float32()),
    }
    (tmp_path / "train").mkdir()
    table = pa.table(columns)
    with pa.ipc.new_file(tmp_path / "train/a.arrow", table.schema) as writer:
        writer.write_table(table)
    assert build_manifest(tmp_path, likelihood={"rna": "poisson"}).size_factor == "float32"


def spoil(name: str, row: int, value: float) -> Callable[[Rows], None]:
    def change(rows: Rows) -> None:
        values = rows.size_factors if name == "size_factor" else rows.data[name]
        values[row] = value

    return change


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (spoil("rna", 4, 1.5), r"whole numbers of 0 or more, but got 1.5 in .*column 'rna', row 4 \(id 11\)"),
        (spoil("rna", 4, -1), "whole numbers of 0 or more, but got -1"),
        (spoil("rna", 4, np.inf), "whole numbers of 0 or more, but got inf"),
        (spoil("rna", 4, np.nan), r"No cell is observed in .*column 'rna', row 4 \(id 11\)"),
        (spoil("tags", 6, -2), r"whole numbers of 0 or more, but got -2 in .*column 'tags', row 6"),
        (spoil("size_factor", 4, 0), r"positive and finite, but got 0.0 in .*'size_factor', row 4 \(id 11\)"),
        (spoil("size_factor", 4, np.inf), "positive and finite, but got inf"),
        (spoil("size_factor", 4, np.nan), r"Missing size factor for the counts of modality 'rna' in .*row 4 \(id 11\)"),
    ],
)
def test_counts_and_size_factors_that_are_none_are_refused(
    tmp_path: Path, change: Callable[[Rows], None], message: str
) -> None:
    rows = counted()
    change(rows)
    with pytest.raises(DatasetError, match=message):
        write_dataset(tmp_path / "data", {"train": rows}, likelihood=HINTS)
    assert not list(tmp_path.iterdir())


def test_counts_are_not_scaled(tmp_path: Path) -> None:
    with pytest.raises(DatasetError, match="without scaling"):
        write_dataset(tmp_path / "data", {"train": counted()}, likelihood=HINTS, scaling={"rna": "standardise"})


def test_size_factors_stay_with_their_rows() -> None:
    batch = Batch({"x": torch.arange(6.0).view(6, 1)}, size_factors=torch.arange(6.0))
    for rows in (slice(1, 4), torch.tensor([5, 0]), torch.arange(6) % 2 == 0):
        assert torch.equal(batch[rows].size_factors, batch[rows].data["x"][:, 0])
    assert batch.to("cpu").size_factors is not None
    with pytest.raises(ValueError, match="same number of rows"):
        Batch({"x": torch.zeros(3, 1)}, size_factors=torch.ones(2))


@pytest.mark.parametrize("given", [True, False])
def test_the_manifest_says_what_size_factor_training_rows_have(tmp_path: Path, given: bool) -> None:
    rows = counted() if given else counted(size_factors=None)
    write_dataset(tmp_path / "data", {"train": rows, "val": counted(6)} if given else {"train": rows}, likelihood=HINTS)
    modalities = open_dataset(tmp_path / "data").manifest.modalities
    here = rows.present["rna"]
    expected = rows.size_factors[here].mean() if given else rows.data["rna"][here].sum(1).mean()
    assert modalities["rna"].size_factor == pytest.approx(expected, rel=1e-6)
    assert modalities["rna"].rate == pytest.approx(rows.data["rna"][here].mean() / expected, rel=1e-6)
    assert modalities["protein"].size_factor is None
