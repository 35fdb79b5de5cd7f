from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest

from dmvae.data.errors import DatasetError
from dmvae.data.format.manifest import load_manifest, save_manifest
from dmvae.data.preparation.build_manifest import build_manifest
from dmvae.data.preparation.writer import write_dataset
from dmvae.data.reading.dataset import open_dataset
from tests.data.preparation.test_rows import make_rows


@pytest.fixture(autouse=True)
def _own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))


def tensors(values: np.ndarray[Any, Any], present: list[bool] | None = None) -> pa.Array:
    """Build a column with pyarrow and numpy alone, as a stranger would."""
    mask = None if present is None else pa.array([not here for here in present])
    lists = pa.FixedSizeListArray.from_arrays(pa.array(values.reshape(-1)), int(np.prod(values.shape[1:])), mask=mask)
    return pa.ExtensionArray.from_storage(pa.fixed_shape_tensor(lists.type.value_type, values.shape[1:]), lists)


def write_shard(path: Path, columns: dict[str, Any], options: Any = None, max_chunksize: int | None = None) -> None:
    table = pa.table(columns)
    path.parent.mkdir(parents=True, exist_ok=True)
    with pa.OSFile(str(path), "wb") as file, pa.ipc.new_file(file, table.schema, options=options) as writer:
        writer.write_table(table, max_chunksize=max_chunksize)


def test_a_manifest_computed_from_the_shards_is_the_one_that_was_written(tmp_path: Path) -> None:
    rows = make_rows(60)
    settings: dict[str, Any] = {"scaling": {"single": "standardise"}, "likelihood": {"double": "laplace"}}
    splits = {"train": rows.take(slice(0, 40)), "val": rows.take(slice(40, 60))}
    folder = write_dataset(tmp_path / "data", splits, shard_bytes=1500, record_batch_rows=8, **settings)
    manifest = load_manifest(folder)
    assert len(manifest.splits["train"].shards) > 1
    assert build_manifest(folder, **settings) == manifest


def test_shards_made_with_pyarrow_alone_become_a_dataset(tmp_path: Path) -> None:
    values = np.arange(12, dtype=np.float32).reshape(3, 2, 2)
    columns = {"id": ["a", "b", "c"], "x": tensors(values, [True, False, True]), "size_factor": [1.0, 2.0, 3.0]}
    write_shard(tmp_path / "train/1.arrow", columns)
    write_shard(tmp_path / "train/2.arrow", columns | {"id": ["d", "e", "f"]}, max_chunksize=2)
    save_manifest(build_manifest(tmp_path), tmp_path)
    batch = open_dataset(tmp_path).split("train").read(np.array([4, 0, 5]))
    assert batch.masks is not None
    assert batch.ids is not None
    assert batch.ids.tolist() == ["e", "a", "f"]
    assert batch.masks["x"].tolist() == [False, True, True]
    assert np.array_equal(batch.data["x"].numpy(), np.stack([np.zeros((2, 2)), values[0], values[2]]))


def test_moments_are_those_of_the_observed_training_rows(tmp_path: Path) -> None:
    rows = make_rows(100)
    rows.data["double"][:] += 1e5
    write_dataset(tmp_path / "data", {"train": rows, "val": make_rows(20)}, record_batch_rows=16)
    for name in ("half", "single", "double"):
        info = build_manifest(tmp_path / "data", scaling={name: "standardise"}).modalities[name]
        values = rows.data[name][rows.present[name]].astype(np.float64).reshape(-1, np.prod(info.shape))
        np.testing.assert_allclose(info.mean, values.mean(axis=0), rtol=1e-12, atol=1e-12)
        np.testing.assert_allclose(info.std, values.std(axis=0), rtol=1e-9)


def test_a_constant_feature_is_centred_and_not_divided(tmp_path: Path) -> None:
    write_shard(tmp_path / "train/a.arrow", {"id": [1, 2, 3], "x": tensors(np.array([[0.1, 0.0], [0.1, 0], [0.1, 0]]))})
    info = build_manifest(tmp_path, scaling={"x": "standardise"}).modalities["x"]
    assert info.std == (1.0, 1.0)
    assert info.mean == pytest.approx((0.1, 0.0))


def test_classes_are_one_more_than_the_largest_in_any_split(tmp_path: Path) -> None:
    write_shard(tmp_path / "train/a.arrow", {"id": [1, 2], "x": tensors(np.array([[0], [2]]))})
    write_shard(tmp_path / "val/a.arrow", {"id": [3, 4], "x": tensors(np.array([[5], [9]]), [True, False])})
    assert build_manifest(tmp_path).modalities["x"].classes == 6
    assert build_manifest(tmp_path, classes={"x": 30}).modalities["x"].classes == 30
    with pytest.raises(DatasetError, match="between 0 and 3, but got 5"):
        build_manifest(tmp_path, classes={"x": 4})


X = tensors(np.ones((4, 2)))


@pytest.mark.parametrize(
    ("columns", "message"),
    [
        ({"x": X}, "Column 'id' not found in .*a.arrow"),
        ({"id": [1, 2, 3, 4]}, "No modality found in .*a.arrow"),
        ({"id": [0.5, 1, 2, 3], "x": X}, "'id' must be int64 or string, but is double"),
        ({"id": pa.array([1, 2, None, 4]), "x": X}, "Missing id in .*row 2"),
        ({"id": [1, 2, 3, 4], "x": X, "label": ["a", "b", "c", "d"]}, "'label' must be int64, but is string"),
        (
            {"id": [1, 2, 3, 4], "x": X, "label": [0, 1, -7, 2]},
            r"Labels must be 0 or more, or null, but got -7 in .*row 2 \(id 3\)",
        ),
        (
            {"id": [1, 2, 3, 4], "x": X, "size_factor": [1, 2, 3, 4]},
            "'size_factor' must be of a float type, but is int64",
        ),
        (
            {"id": [1, 2, 3, 4], "x": [1.0, 2.0, 3.0, 4.0]},
            "'x' must be of type arrow.fixed_shape_tensor, but is double",
        ),
        ({"id": [1, 2, 3, 4], "x": tensors(np.ones((4, 2), dtype=np.int32))}, "'x' must be uint8.*but are int32"),
        ({"id": [1, 2, 3, 4], "joint": X}, "Cannot read .*a.arrow: .*'joint'"),
    ],
)
def test_columns_that_break_a_law_are_refused(tmp_path: Path, columns: dict[str, Any], message: str) -> None:
    write_shard(tmp_path / "train/a.arrow", columns)
    with pytest.raises(DatasetError, match=message):
        build_manifest(tmp_path)


def test_null_elements_inside_a_tensor_are_refused(tmp_path: Path) -> None:
    lists = pa.FixedSizeListArray.from_arrays(pa.array([1.0, None, 3.0, 4.0]), 2)
    column = pa.ExtensionArray.from_storage(pa.fixed_shape_tensor(pa.float64(), [2]), lists)
    write_shard(tmp_path / "train/a.arrow", {"id": [1, 2], "x": column})
    with pytest.raises(DatasetError, match="'x' has null elements inside rows"):
        build_manifest(tmp_path)


def test_a_compressed_shard_is_refused(tmp_path: Path) -> None:
    columns = {"id": list(range(500)), "x": tensors(np.ones((500, 9)))}
    write_shard(tmp_path / "train/a.arrow", columns, pa.ipc.IpcWriteOptions(compression="zstd"))
    with pytest.raises(DatasetError, match="is compressed"):
        build_manifest(tmp_path)


def test_record_batches_of_different_sizes_are_refused(tmp_path: Path) -> None:
    table = pa.table({"id": [1, 2, 3, 4], "x": X})
    (tmp_path / "train").mkdir()
    with pa.OSFile(str(tmp_path / "train/a.arrow"), "wb") as file, pa.ipc.new_file(file, table.schema) as writer:
        writer.write_table(table.slice(0, 1))
        writer.write_table(table.slice(1, 3))
    with pytest.raises(DatasetError, match=r"must have the same number of rows .*have \[1, 3\]"):
        build_manifest(tmp_path)


def test_shards_that_disagree_are_refused(tmp_path: Path) -> None:
    write_shard(tmp_path / "train/a.arrow", {"id": [1, 2, 3, 4], "x": X})
    write_shard(tmp_path / "val/a.arrow", {"id": [1], "x": tensors(np.ones((1, 3)))})
    with pytest.raises(DatasetError, match="Shards must have the same columns"):
        build_manifest(tmp_path)


def test_a_folder_without_shards_is_refused(tmp_path: Path) -> None:
    (tmp_path / "train").mkdir()
    with pytest.raises(DatasetError, match="No shards found in"):
        build_manifest(tmp_path)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"scaling": {"wird": "standardise"}}, r"Unknown modalities \['wird'\] .*has image"),
        (
            {"scaling": {"image": "standardise"}},
            "Cannot apply scaling 'standardise' to modality 'image' of type uint8",
        ),
        ({"likelihood": {"single": "categorical"}}, "other types cannot be categorical"),
        ({"likelihood": {"word": "normal"}}, "other types cannot be categorical"),
        ({"classes": {"single": 3}}, "other types cannot be categorical"),
    ],
)
def test_settings_that_do_not_fit_a_modality_are_refused(
    tmp_path: Path, settings: dict[str, Any], message: str
) -> None:
    with pytest.raises(DatasetError, match=message):
        write_dataset(tmp_path / "data", {"train": make_rows()}, **settings)
    assert not (tmp_path / "data").exists()


def test_standardising_without_an_observed_training_row_is_refused(tmp_path: Path) -> None:
    rows = make_rows()
    rows.present["single"][:] = False
    with pytest.raises(DatasetError, match="no row of the split 'train' has modality 'single'"):
        write_dataset(tmp_path / "data", {"train": rows}, scaling={"single": "standardise"})


def test_scalings_take_their_figures_from_the_observed_training_rows(tmp_path: Path) -> None:
    rows = make_rows(100)
    rows.data["double"][:] = np.abs(rows.data["double"])
    scaling: Any = {"single": "unit", "double": "log1p"}
    folder = write_dataset(tmp_path / "data", {"train": rows, "val": make_rows(50, seed=1)}, scaling=scaling)
    info = load_manifest(folder).modalities["single"]
    seen = rows.data["single"][rows.present["single"]].reshape(-1, 4).astype(np.float64)
    assert info.low == tuple(seen.min(axis=0))
    assert info.high == tuple(seen.max(axis=0))
    assert info.log_jacobian == pytest.approx(np.log(np.ptp(seen, axis=0)).sum())
    assert load_manifest(folder).modalities["double"].log_jacobian is None
    split = open_dataset(folder).split("train")
    batch, order = split.read(np.arange(len(split))), np.arange(len(rows))
    for name in ("single", "double"):
        assert batch.masks is not None
        assert not batch.data[name][~batch.masks[name]].any()
    read = batch.data["single"][batch.masks["single"]].flatten(1)
    assert read.amin(0).tolist() == [0] * 4
    assert read.amax(0).tolist() == [1] * 4
    here = rows.present["double"]
    np.testing.assert_allclose(batch.data["double"][here[order]], np.log1p(rows.data["double"][here]), rtol=1e-6)


def test_the_logarithm_of_negative_values_is_refused(tmp_path: Path) -> None:
    rows = make_rows(20)
    row = int(np.flatnonzero(rows.present["double"])[3])
    rows.data["double"][row] = -2
    with pytest.raises(DatasetError, match=rf"must be 0 or more, but got -2.0 in .*row {row} \(id {rows.ids[row]}\)"):
        write_dataset(tmp_path / "data", {"train": rows}, scaling={"double": "log1p"})
