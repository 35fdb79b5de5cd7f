import errno
import resource
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest

from dmvae.data.errors import DatasetError
from dmvae.data.preparation.rows import Rows
from dmvae.data.preparation.writer import write_dataset
from dmvae.data.reading.dataset import open_dataset
from tests.data.preparation.test_rows import make_rows

KILLED = """
import sys
import numpy as np
from dmvae.data.preparation.rows import Rows
from dmvae.data.preparation.writer import write_dataset

num = 20_000
rows = Rows(np.arange(num), {"x": np.ones((num, 8))}, {"x": np.ones(num, dtype=bool)})
write_dataset(sys.argv[1], {"train": rows}, shard_bytes=1, record_batch_rows=2)
"""


def test_a_dataset_is_not_overwritten_unless_told_to(tmp_path: Path) -> None:
    write_dataset(tmp_path / "data", {"train": make_rows(10)})
    with pytest.raises(DatasetError, match=r"already exists.*replace = true"):
        write_dataset(tmp_path / "data", {"train": make_rows(20)})
    assert len(open_dataset(tmp_path / "data").split("train")) == 10
    write_dataset(tmp_path / "data", {"train": make_rows(20)}, replace=True)
    assert len(open_dataset(tmp_path / "data").split("train")) == 20
    assert [path.name for path in tmp_path.iterdir()] == ["data"]


def test_a_dataset_that_cannot_be_replaced_stays(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_dataset(tmp_path / "data", {"train": make_rows(10)})
    rename = Path.rename

    def fail(path: Path, target: Path) -> Path:
        if path.suffix == ".part":
            raise OSError(errno.EIO, "Input/output error")
        return rename(path, target)

    monkeypatch.setattr(Path, "rename", fail)
    with pytest.raises(DatasetError, match="Input/output error"):
        write_dataset(tmp_path / "data", {"train": make_rows(20)}, replace=True)
    assert len(open_dataset(tmp_path / "data").split("train")) == 10
    assert [path.name for path in tmp_path.iterdir()] == ["data"]


def test_a_dataset_behind_a_link_is_replaced_where_it_lies(tmp_path: Path) -> None:
    write_dataset(tmp_path / "disk" / "data", {"train": make_rows(10)})
    (tmp_path / "data").symlink_to(tmp_path / "disk" / "data")
    write_dataset(tmp_path / "data", {"train": make_rows(20)}, replace=True)
    assert len(open_dataset(tmp_path / "disk" / "data").split("train")) == 20
    assert sorted(path.name for path in tmp_path.iterdir()) == ["data", "disk"]


def test_something_else_is_never_replaced(tmp_path: Path) -> None:
    (tmp_path / "data").mkdir()
    (tmp_path / "data/thesis.tex").write_text("years of work")
    with pytest.raises(DatasetError, match="exists and is not a dataset"):
        write_dataset(tmp_path / "data", {"train": make_rows(10)}, replace=True)
    assert (tmp_path / "data/thesis.tex").read_text() == "years of work"


def test_an_empty_folder_is_filled(tmp_path: Path) -> None:
    (tmp_path / "data").mkdir()
    write_dataset(tmp_path / "data", {"train": make_rows(10)})
    assert len(open_dataset(tmp_path / "data").split("train")) == 10


def test_the_same_rows_give_the_same_bytes(tmp_path: Path) -> None:
    for name in ("one", "two"):
        rows = make_rows(40)
        if name == "two":
            rows.data["word"][~rows.present["word"]] = 77
        write_dataset(tmp_path / name, {"train": rows}, record_batch_rows=8)
    one, two = ([path.read_bytes() for path in sorted((tmp_path / name).rglob("*.*"))] for name in ("one", "two"))
    assert one == two


def test_a_shard_is_closed_when_it_is_large_enough(tmp_path: Path) -> None:
    rows = make_rows(100)
    write_dataset(tmp_path / "data", {"train": rows}, shard_bytes=20 * rows.columns.row_bytes, record_batch_rows=10)
    shards = open_dataset(tmp_path / "data").manifest.splits["train"].shards
    assert [shard.rows for shard in shards] == [20] * 5


def test_a_record_batch_has_about_a_mebibyte() -> None:
    for elements in (1, 100, 5000, 1_000_000):
        rows = Rows(np.arange(1), {"x": np.zeros((1, elements))}, {"x": np.ones(1, dtype=bool)})
        num = rows.columns.record_batch_rows
        assert num in (64, 4096) or 2**19 <= num * rows.columns.row_bytes <= 2**21


def test_a_killed_process_leaves_nothing_that_looks_like_a_dataset(tmp_path: Path) -> None:
    target = tmp_path / "data"
    with subprocess.Popen([sys.executable, "-c", KILLED, str(target)]) as process:
        while not list(tmp_path.glob(".data.*/train/part-00003.arrow")) and process.poll() is None:
            time.sleep(0.01)
        process.kill()
    assert process.returncode == -signal.SIGKILL
    assert list(tmp_path.rglob("*.arrow"))
    assert not list(tmp_path.rglob("dataset.json"))
    with pytest.raises(DatasetError, match="does not exist"):
        open_dataset(target)
    write_dataset(target, {"train": make_rows(10)})
    assert len(open_dataset(target).split("train")) == 10


def test_no_room_is_a_clear_error_that_leaves_nothing(tmp_path: Path) -> None:
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (5000, hard))
    try:
        with pytest.raises(DatasetError, match="Disk full"):
            write_dataset(tmp_path / "data", {"train": make_rows(500)})
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert list(tmp_path.iterdir()) == []


def test_a_folder_that_cannot_be_written_is_a_clear_error(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(DatasetError, match=r"Cannot write .*Choose another folder"):
        write_dataset(tmp_path / "file/data", {"train": make_rows(10)})
