import os
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
import torch

from dmvae.data.errors import DatasetError
from dmvae.data.preparation.rows import Rows
from dmvae.data.preparation.writer import write_dataset
from dmvae.data.reading.dataset import open_dataset
from dmvae.data.reading.split import Split
from tests.data.preparation.test_rows import make_rows


@pytest.fixture(autouse=True)
def _own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))


def written(folder: Path, rows: Rows, **settings: Any) -> Split:
    """Write rows in record batches of 8 and shards of 16 rows, so that small numbers of rows have several of both."""
    shard_bytes = 16 * rows.columns.row_bytes
    path = write_dataset(folder, {"train": rows}, shard_bytes=shard_bytes, record_batch_rows=8, **settings)
    return open_dataset(path).split("train")


def first_shard(split: Split) -> Path:
    return Path(split.where) / split.manifest.splits["train"].shards[0].path


@pytest.mark.parametrize("complete", [True, False])
@pytest.mark.parametrize("string_ids", [True, False])
@pytest.mark.parametrize("num", [1, 16, 50])
def test_reading_gives_what_was_written(tmp_path: Path, num: int, string_ids: bool, complete: bool) -> None:
    rows = make_rows(num, complete=complete, string_ids=string_ids)
    split = written(tmp_path / "data", rows)
    positions = np.random.default_rng(1).integers(0, num, 80)
    batch = split.read(positions, dtype=torch.float64)
    assert len(split) == num
    assert np.asarray(batch.ids).tolist() == rows.ids[positions].tolist()
    assert batch.labels is not None
    assert rows.labels is not None
    assert np.array_equal(batch.labels.numpy(), rows.labels[positions])
    for name, values in batch.data.items():
        present = rows.present[name][positions]
        expected = np.where(
            present.reshape(-1, *[1] * (values.dim() - 1)), rows.data[name][positions].astype(values.numpy().dtype), 0
        )
        assert np.array_equal(values.numpy(), expected / 255 if name == "image" else expected)
        if batch.masks is not None and name in batch.masks:
            assert np.array_equal(batch.masks[name].numpy(), present)
        else:
            assert rows.present[name].all()


def test_a_complete_split_has_no_masks(tmp_path: Path) -> None:
    assert written(tmp_path / "data", make_rows(complete=True)).read(np.arange(5)).masks is None


def test_only_modalities_that_miss_somewhere_have_a_mask(tmp_path: Path) -> None:
    rows = make_rows(complete=True)
    rows.present["word"][40] = False
    masks = written(tmp_path / "data", rows).read(np.arange(5)).masks
    assert masks is not None
    assert list(masks) == ["word"]
    assert masks["word"].all()


def test_floats_come_in_the_type_asked_for_and_integers_as_they_are(tmp_path: Path) -> None:
    split = written(tmp_path / "data", make_rows())
    for dtype in (torch.float32, torch.float64, torch.bfloat16):
        types = {name: values.dtype for name, values in split.read(np.arange(9), dtype=dtype).data.items()}
        assert types == {"image": dtype, "word": torch.int64, "half": dtype, "single": dtype, "double": dtype}


def test_reading_no_rows_gives_empty_tensors_of_the_right_shape(tmp_path: Path) -> None:
    batch = written(tmp_path / "data", make_rows(string_ids=True)).read(np.arange(0))
    assert len(batch) == 0
    assert {name: tuple(values.shape) for name, values in batch.data.items()} == {
        "image": (0, 1, 4, 3),
        "word": (0, 2),
        "half": (0, 3),
        "single": (0, 2, 2),
        "double": (0, 1),
    }


def test_a_dataset_without_labels_gives_none(tmp_path: Path) -> None:
    split = written(tmp_path / "data", make_rows(labels=False))
    assert split.read(np.arange(3)).labels is None
    assert split.labels() is None


def test_ids_and_labels_of_all_rows_are_in_the_order_of_the_files(tmp_path: Path) -> None:
    rows = make_rows(string_ids=True)
    split = written(tmp_path / "data", rows)
    labels = split.labels()
    assert split.ids().tolist() == rows.ids.tolist()
    assert labels is not None
    assert rows.labels is not None
    assert labels.tolist() == rows.labels.tolist()


def test_standardised_values_have_mean_0_and_deviation_1_where_observed(tmp_path: Path) -> None:
    rows = make_rows(200)
    rows.data["double"][:] += 1e6
    split = written(tmp_path / "data", rows, scaling={"double": "standardise", "single": "standardise"})
    batch = split.read(np.arange(200))
    assert batch.masks is not None
    for name in ("double", "single"):
        values = batch.data[name][batch.masks[name]].double()
        torch.testing.assert_close(values.mean(dim=0), torch.zeros_like(values[0]), atol=1e-4, rtol=0)
        torch.testing.assert_close(values.std(dim=0, correction=0), torch.ones_like(values[0]), atol=1e-4, rtol=0)


def test_the_log_jacobian_turns_the_scaled_density_into_the_stored_values_density(tmp_path: Path) -> None:
    rows = make_rows(100)
    split = written(tmp_path / "data", rows, scaling={"single": "standardise"})
    info = split.manifest.modalities["single"]
    batch = split.read(np.arange(100), dtype=torch.float64)
    assert batch.masks is not None
    here = batch.masks["single"]
    raw = torch.from_numpy(rows.data["single"]).double()[here]
    mean, std = (torch.tensor(part, dtype=torch.float64).reshape(2, 2) for part in (info.mean, info.std))
    scaled_nll = -torch.distributions.Normal(0.0, 1.0).log_prob(batch.data["single"][here]).sum(dim=(1, 2))
    raw_nll = -torch.distributions.Normal(mean, std).log_prob(raw).sum(dim=(1, 2))
    torch.testing.assert_close(scaled_nll + info.log_jacobian, raw_nll)
    assert split.manifest.modalities["image"].log_jacobian == pytest.approx(12 * np.log(255))
    assert split.manifest.modalities["double"].log_jacobian == 0


def test_the_split_counts_observed_rows(tmp_path: Path) -> None:
    rows = make_rows()
    rows.present["half"][:] = False
    observed = written(tmp_path / "data", rows).observed
    assert observed == {name: int(mask.sum()) for name, mask in rows.present.items()}
    assert observed["half"] == 0


def test_record_batches_add_up_to_the_split(tmp_path: Path) -> None:
    sizes = written(tmp_path / "data", make_rows(50)).record_batch_rows
    assert sizes.tolist() == [8, 8, 8, 8, 8, 8, 2]


def test_pyarrow_alone_can_read_a_shard(tmp_path: Path) -> None:
    rows = make_rows(10)
    split = written(tmp_path / "data", rows)
    with pa.memory_map(str(first_shard(split))) as file:
        table = pa.ipc.open_file(file).read_all()
    assert table["id"].to_pylist() == rows.ids.tolist()
    assert table["double"].combine_chunks().is_valid().to_pylist() == rows.present["double"].tolist()
    first = int(np.flatnonzero(rows.present["single"])[0])
    tensor = table["single"].combine_chunks()[first].to_numpy()
    assert np.array_equal(tensor, rows.data["single"][first])


def test_positions_outside_the_split_are_refused(tmp_path: Path) -> None:
    split = written(tmp_path / "data", make_rows(10))
    for wrong in (10, -1):
        with pytest.raises(DatasetError, match=r"out of range: split .* has 10 rows"):
            split.read(np.array([0, wrong]))


def test_an_unknown_or_empty_split_is_refused_with_the_known_ones(tmp_path: Path) -> None:
    rows = make_rows(10)
    dataset = open_dataset(write_dataset(tmp_path / "data", {"train": rows, "val": rows.take(slice(0, 0))}))
    with pytest.raises(DatasetError, match=r"Unknown split 'vall'.*train \(10 rows\), val \(0 rows\)"):
        dataset.split("vall")
    with pytest.raises(DatasetError, match=r"Split 'val' .*has no rows.*train \(10 rows\)"):
        dataset.split("val")


def test_a_folder_that_is_no_dataset_is_refused(tmp_path: Path) -> None:
    with pytest.raises(DatasetError, match="does not exist"):
        open_dataset(tmp_path / "nowhere")
    with pytest.raises(DatasetError, match=r"No dataset.json found in"):
        open_dataset(tmp_path)


def test_a_missing_shard_is_refused(tmp_path: Path) -> None:
    split = written(tmp_path / "data", make_rows())
    first_shard(split).unlink()
    with pytest.raises(DatasetError, match=r"Shard not found: .*does not exist"):
        open_dataset(tmp_path / "data")


def test_a_truncated_shard_is_refused(tmp_path: Path) -> None:
    split = written(tmp_path / "data", make_rows())
    os.truncate(first_shard(split), 1000)
    with pytest.raises(DatasetError, match=r"Size mismatch in .*part-00000.arrow: expected \d+ bytes, got 1000"):
        open_dataset(tmp_path / "data")


def test_a_file_of_the_right_size_that_is_no_shard_is_refused(tmp_path: Path) -> None:
    path = first_shard(written(tmp_path / "data", make_rows()))
    path.write_bytes(b"x" * path.stat().st_size)
    with pytest.raises(DatasetError, match=r"Cannot read .*part-00000.arrow as an Arrow IPC file"):
        open_dataset(tmp_path / "data")


def test_a_shard_with_other_columns_is_refused(tmp_path: Path) -> None:
    rows = make_rows(16)
    split = written(tmp_path / "data", rows)
    renamed = {("wird" if name == "word" else name): values for name, values in rows.data.items()}
    masks = {("wird" if name == "word" else name): mask for name, mask in rows.present.items()}
    other = written(tmp_path / "other", Rows(rows.ids, renamed, masks, rows.labels))
    first_shard(split).write_bytes(first_shard(other).read_bytes())
    with pytest.raises(DatasetError, match="wird"):
        open_dataset(tmp_path / "data")


def test_a_shard_that_leads_out_of_the_folder_is_refused(tmp_path: Path) -> None:
    path = first_shard(written(tmp_path / "data", make_rows()))
    path.rename(tmp_path / "elsewhere.arrow")
    path.symlink_to(tmp_path / "elsewhere.arrow")
    with pytest.raises(DatasetError, match="a link out of the dataset's folder"):
        open_dataset(tmp_path / "data")


def test_a_dataset_can_be_moved(tmp_path: Path) -> None:
    rows = make_rows()
    written(tmp_path / "data", rows)
    (tmp_path / "data").rename(tmp_path / "moved")
    assert open_dataset(tmp_path / "moved").split("train").ids().tolist() == rows.ids.tolist()
