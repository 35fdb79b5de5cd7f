import os
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest

from dmvae.data.errors import DatasetError
from dmvae.data.format.manifest import load_manifest, save_manifest
from dmvae.data.preparation.build_manifest import build_manifest
from dmvae.data.preparation.rows import Rows
from dmvae.data.preparation.writer import write_dataset
from dmvae.data.reading.dataset import Dataset, open_dataset
from dmvae.data.reading.split import Split
from dmvae.data.storage import verify
from dmvae.data.storage.shard_cache import cache_folder
from tests.data.preparation.test_rows import make_rows


@pytest.fixture(autouse=True)
def _own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))


def numbers(num: int = 6, **changes: Any) -> Rows:
    """Rows with one modality of floats, `x` = row + 0.25, and one of classes, `y`; ids count from 100."""
    rows = {
        "ids": np.arange(100, 100 + num),
        "data": {"x": np.arange(num, dtype=np.float64)[:, None] + 0.25, "y": np.full((num, 1), 3)},
        "present": {"x": np.ones(num, dtype=bool), "y": np.ones(num, dtype=bool)},
    }
    return Rows(**(rows | changes))


def lists_of_ones(num: int) -> pa.Array:
    return pa.ExtensionArray.from_storage(
        pa.fixed_shape_tensor(pa.int64(), [1]), pa.FixedSizeListArray.from_arrays(pa.array([1] * num), 1)
    )


def altered(folder: Path, old: Any, new: Any, *, admit: bool) -> Dataset:
    """Write `numbers`, replace a value in the file and, if `admit`, its checksum in the manifest."""
    write_dataset(folder, {"train": numbers()}, classes={"y": 4})
    shard = folder / "train/part-00000.arrow"
    content = shard.read_bytes()
    assert content.count(old.tobytes()) == 1
    shard.write_bytes(content.replace(old.tobytes(), new.tobytes()))
    if admit:
        manifest = load_manifest(folder)
        info = manifest.splits["train"].shards[0].model_copy(update={"sha256": verify.sha256_of(shard)})
        split = manifest.splits["train"].model_copy(update={"shards": (info,)})
        save_manifest(manifest.model_copy(update={"splits": {"train": split}}), folder)
    return open_dataset(folder)


def test_an_altered_shard_is_refused_before_its_first_row_is_read(tmp_path: Path) -> None:
    split = altered(tmp_path / "data", np.float64(2.25), np.float64(9), admit=False).split("train")
    with pytest.raises(DatasetError, match=r"Checksum mismatch in .*part-00000.arrow"):
        split.read(np.array([0]))


def test_a_value_that_is_not_finite_is_named_by_file_column_row_and_id(tmp_path: Path) -> None:
    for number, wrong in enumerate((np.nan, np.inf)):
        split = altered(tmp_path / f"data{number}", np.float64(2.25), np.float64(wrong), admit=True).split("train")
        with pytest.raises(
            DatasetError, match=r"finite, but got (nan|inf) in .*part-00000.arrow, column 'x', row 2 \(id 102"
        ):
            split.verify()


def test_a_class_out_of_range_is_refused(tmp_path: Path) -> None:
    rows = numbers(data={"x": np.ones((6, 1)), "y": np.array([[0], [1], [4], [2], [3], [0]])})
    with pytest.raises(DatasetError, match=r"between 0 and 3, but got 4 in .*column 'y', row 2 \(id 102\)"):
        write_dataset(tmp_path / "data", {"train": rows}, classes={"y": 4})
    rows.data["y"][2] = -1
    with pytest.raises(DatasetError, match="got -1 in"):
        write_dataset(tmp_path / "data", {"train": rows})
    assert list(tmp_path.iterdir()) == []


def test_garbage_under_a_null_is_no_error(tmp_path: Path) -> None:
    tensors = pa.fixed_shape_tensor(pa.float64(), [1])
    absent = pa.array([False, True, True, False])
    lists = pa.FixedSizeListArray.from_arrays(pa.array([1.0, np.nan, np.inf, 4.0]), 1, mask=absent)
    table = pa.table({"id": [1, 2, 3, 4], "x": pa.ExtensionArray.from_storage(tensors, lists), "y": lists_of_ones(4)})
    (tmp_path / "train").mkdir()
    with pa.OSFile(str(tmp_path / "train/a.arrow"), "wb") as file, pa.ipc.new_file(file, table.schema) as writer:
        writer.write_table(table)
    save_manifest(build_manifest(tmp_path), tmp_path)
    split = open_dataset(tmp_path).split("train")
    split.verify(full=True)
    assert split.read(np.arange(4)).data["x"][:, 0].tolist() == [1, 0, 0, 4]


def test_a_shard_is_verified_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_dataset(tmp_path / "data", {"train": make_rows()})
    checked: list[Path] = []
    real = verify.sha256_of
    monkeypatch.setattr(verify, "sha256_of", lambda path: (checked.append(path), real(path))[1])

    def use() -> Split:
        split = open_dataset(tmp_path / "data").split("train")
        split.read(np.array([0]))
        return split

    use()
    use().verify()
    assert len(checked) == 1
    use().verify(full=True)
    assert len(checked) == 2
    (tmp_path / "data/train/part-00000.arrow").touch()
    (tmp_path / "data").rename(tmp_path / "moved")
    (tmp_path / "moved").rename(tmp_path / "data")
    use()
    assert len(checked) == 2


def flip_keeping_times(file: Path, byte: int) -> None:
    """Flip a bit of a file as rot does, or a restore that keeps times."""
    status, content = file.stat(), bytearray(file.read_bytes())
    content[byte] ^= 4
    file.write_bytes(content)
    os.utime(file, ns=(status.st_atime_ns, status.st_mtime_ns))


def test_every_bit_that_flips_after_verification_is_found_when_its_rows_are_read(tmp_path: Path) -> None:
    write_dataset(tmp_path / "data", {"train": make_rows(60, string_ids=True)}, record_batch_rows=8)
    everything = np.arange(60)
    open_dataset(tmp_path / "data").split("train").read(everything)
    file = tmp_path / "data/train/part-00000.arrow"
    whole = file.read_bytes()
    for byte in range(0, len(whole), max(1, len(whole) // 300)):
        flip_keeping_times(file, byte)
        with pytest.raises(DatasetError, match=r"part-00000\.arrow"):
            open_dataset(tmp_path / "data").split("train").read(everything)
        file.write_bytes(whole)
    open_dataset(tmp_path / "data").split("train").read(everything)


def test_damage_names_the_record_batch_and_leaves_others_readable(tmp_path: Path) -> None:
    write_dataset(tmp_path / "data", {"train": numbers(60)}, record_batch_rows=8)
    dataset = open_dataset(tmp_path / "data")
    dataset.split("train").read(np.arange(60))
    file = tmp_path / "data/train/part-00000.arrow"
    shard = dataset.split("train")
    where = next(shard.shards())
    start = 8 * int(where._starts[3]) + 8
    flip_keeping_times(file, start)
    split = open_dataset(tmp_path / "data").split("train")
    split.read(np.arange(24))
    with pytest.raises(DatasetError, match=r"record batch 3 \(rows 24 to 31\)"):
        split.read(np.array([30]))
    split.read(np.arange(32, 60))


def test_shards_that_changed_places_are_found(tmp_path: Path) -> None:
    rows = numbers(40)
    write_dataset(tmp_path / "data", {"train": rows.take(slice(0, 20)), "val": rows.take(slice(20, 40))})
    for name in ("train", "val"):
        open_dataset(tmp_path / "data").split(name).read(np.arange(20))
    one, two = (tmp_path / f"data/{name}/part-00000.arrow" for name in ("train", "val"))
    first, second = one.read_bytes(), two.read_bytes()
    assert len(first) == len(second)
    times = one.stat().st_mtime_ns, two.stat().st_mtime_ns
    one.write_bytes(second)
    two.write_bytes(first)
    os.utime(one, ns=(times[0], times[0]))
    os.utime(two, ns=(times[1], times[1]))
    for name in ("train", "val"):
        with pytest.raises(DatasetError, match="record batch 0"):
            open_dataset(tmp_path / "data").split(name).read(np.array([0]))


def test_verification_works_where_nothing_can_be_remembered(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "file"))
    write_dataset(tmp_path / "data", {"train": make_rows()})
    open_dataset(tmp_path / "data").split("train").verify()


def test_a_damaged_memory_of_checks_is_ignored(tmp_path: Path) -> None:
    write_dataset(tmp_path / "data", {"train": make_rows()})
    open_dataset(tmp_path / "data").split("train").verify()
    (memory,) = cache_folder().glob("sums/*.npy")
    for content in (b"", b"[", memory.read_bytes()[:-4]):
        memory.write_bytes(content)
        open_dataset(tmp_path / "data").split("train").read(np.array([0]))


def test_ids_that_occur_twice_are_found(tmp_path: Path) -> None:
    rows = numbers(ids=np.array([1, 2, 3, 2, 4, 5]))
    split = open_dataset(write_dataset(tmp_path / "data", {"train": rows})).split("train")
    split.verify()
    with pytest.raises(DatasetError, match=r"1 duplicate ids in split .*; 2 occurs 2 times"):
        split.verify(full=True)


def test_rows_with_nothing_observed_are_found(tmp_path: Path) -> None:
    absent = np.array([True, True, True, True, False, True])
    rows = numbers(present={"x": absent, "y": absent})
    dataset = open_dataset(write_dataset(tmp_path / "data", {"train": rows}))
    with pytest.raises(DatasetError, match=r"Row without any modality in .*row 4 \(id 104\)"):
        dataset.verify()


def test_ids_in_two_splits_are_a_remark(tmp_path: Path) -> None:
    rows = numbers()
    splits = {"train": rows, "val": rows.take(slice(4, 6)), "test": rows.take(slice(0, 0))}
    assert open_dataset(write_dataset(tmp_path / "data", splits)).verify() == ("2 ids are in both train and val",)


def test_a_count_that_the_shard_does_not_bear_out_is_refused(tmp_path: Path) -> None:
    folder = write_dataset(tmp_path / "data", {"train": numbers()})
    manifest = load_manifest(folder)
    info = manifest.splits["train"].shards[0].model_copy(update={"observed": {"x": 5, "y": 6}})
    split = manifest.splits["train"].model_copy(update={"shards": (info,)})
    save_manifest(manifest.model_copy(update={"splits": {"train": split}}), folder)
    with pytest.raises(DatasetError, match="Wrong count in the manifest"):
        open_dataset(folder).split("train").verify()
