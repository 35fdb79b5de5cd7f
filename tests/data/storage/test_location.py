"""Datasets in an object store: a real server, reached over a wire that can be cut."""

import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch

from dmvae.cli import run_verb
from dmvae.config.data import PrepareConfig
from dmvae.data.errors import DatasetError
from dmvae.data.preparation.prepare import prepare_and_upload
from dmvae.data.preparation.writer import write_dataset
from dmvae.data.reading.dataset import open_dataset
from dmvae.data.reading.loader import read_epoch
from dmvae.data.reading.sampler import EpochSampler
from dmvae.data.reading.split import Split
from dmvae.data.storage import location
from dmvae.data.storage.location import absolute, upload
from tests.data.preparation.test_rows import make_rows
from tests.data.storage.test_shard_cache import held
from tests.objects import Wire, object_store
from tests.runs import make_config, make_dataset, train_here

pytestmark = pytest.mark.slow

URI = "s3://bucket/sets/rows"


@pytest.fixture(scope="module")
def store() -> Iterator[tuple[Wire, dict[str, str]]]:
    with object_store() as (wire, environment):
        yield wire, environment


@pytest.fixture
def wire(store: tuple[Wire, dict[str, str]], local: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Wire:
    """An empty cache, and the dataset `local` at `URI`."""
    for name, value in {**store[1], "DMVAE_CACHE": str(tmp_path / "cache")}.items():
        monkeypatch.setenv(name, value)
    upload(local, URI, replace=True)
    store[0].asked.clear()
    return store[0]


@pytest.fixture(scope="module")
def local(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """2,400 rows in 8 shards of some 20 KB and 200 KB altogether, in record batches of 64."""
    rows = make_rows(2400)
    folder = tmp_path_factory.mktemp("local") / "rows"
    return write_dataset(folder, {"train": rows}, shard_bytes=300 * rows.columns.row_bytes, record_batch_rows=64)


def ids(split: Split) -> list[int]:
    order = EpochSampler(split.record_batch_rows, seed=3, batch_size=100, streams=4)
    return [row for _, _, batch in read_epoch(split, order, epoch=0) for row in torch.as_tensor(batch.ids).tolist()]


def test_rows_are_those_of_the_local_dataset_and_are_fetched_once(wire: Wire, local: Path) -> None:
    here, there = open_dataset(local).split("train"), open_dataset(URI).split("train")
    assert not wire.shards_asked(), "opening reads no shard"
    one, other = here.read(np.arange(2400)), there.read(np.arange(2400))
    assert all(torch.equal(one.data[name], other.data[name]) for name in one.data)
    assert ids(here) == ids(there)
    assert ids(open_dataset(URI).split("train")) == ids(there)
    shards = here.manifest.splits["train"].shards
    assert len(shards) == 8
    assert wire.shards_asked() == {f"bucket/sets/rows/{shard.path}": 1 for shard in shards}


def test_two_workers_stage_a_shard_once(wire: Wire, tmp_path: Path) -> None:
    program = (
        "import sys\n"
        "from dmvae.data.reading.dataset import open_dataset\n"
        "from dmvae.data.reading.loader import EpochSampler, read_epoch\n"
        f"split = open_dataset({URI!r}).split('train')\n"
        "order = EpochSampler(split.record_batch_rows, seed=3, batch_size=100, streams=4)\n"
        "print(sum(len(batch) for _, _, batch in read_epoch(split, order, 0, 0, int(sys.argv[1]), 2)))"
    )
    workers = [
        subprocess.Popen([sys.executable, "-c", program, str(rank)], stdout=subprocess.PIPE) for rank in range(2)
    ]
    assert [int(worker.communicate()[0]) for worker in workers] == [1200, 1200]
    assert set(wire.shards_asked().values()) == {1}
    assert len(wire.shards_asked()) == 8


def test_a_cache_smaller_than_the_dataset_keeps_its_bound(
    wire: Wire, local: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    total = open_dataset(local).manifest.bytes
    bound = int(0.8 * total)
    monkeypatch.setenv("DMVAE_CACHE_GB", str(bound / 1e9))
    monkeypatch.setattr("dmvae.data.reading.loader.LOOKAHEAD_ROWS", 100)
    split = open_dataset(URI).split("train")
    order = EpochSampler(split.record_batch_rows, seed=3, batch_size=100, streams=1, window_rows=128)
    largest, found = 0, []
    for _, _, batch in read_epoch(split, order, epoch=0):
        found += torch.as_tensor(batch.ids).tolist()
        largest = max(largest, held(tmp_path / "cache/shards"))
    assert sorted(found) == sorted(open_dataset(local).split("train").ids().tolist())
    assert total // 2 < largest <= bound


def test_by_shards_a_small_cache_fetches_each_about_once(
    wire: Wire, local: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    total = open_dataset(local).manifest.bytes
    monkeypatch.setenv("DMVAE_CACHE_GB", str(0.45 * total / 1e9))
    monkeypatch.setattr("dmvae.data.reading.loader.LOOKAHEAD_ROWS", 100)
    split = open_dataset(URI).split("train")
    settings = {"seed": 3, "batch_size": 50, "streams": 1, "window_rows": 128}
    by_shard = EpochSampler(split.record_batch_rows, shards=split.record_batch_shards, **settings)
    found = [row for _, _, batch in read_epoch(split, by_shard, 0) for row in torch.as_tensor(batch.ids).tolist()]
    assert sorted(found) == sorted(open_dataset(local).split("train").ids().tolist())
    assert sum(wire.shards_asked().values()) <= 10, "8 shards, a few of them twice"
    by_batch = EpochSampler(split.record_batch_rows, **settings)
    with pytest.raises(DatasetError, match=r"Shard cache is full: .* are in use"):
        for _ in read_epoch(split, by_batch, 0):
            pass


def test_a_cut_connection_costs_the_block_that_it_cut(wire: Wire, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(location, "_BLOCK_BYTES", 8000)
    wire.cuts, wire.cut = 3, 0
    split = open_dataset(URI).split("train")
    assert len(split.read(np.arange(2400))) == 2400
    assert wire.cut == 3
    again = sum(count - 1 for count in wire.asked.values())
    assert 0 < again <= 6


def test_a_shard_that_comes_late_is_waited_for(wire: Wire) -> None:
    split = open_dataset(URI).split("train")
    wire.is_down = True
    threading.Timer(3, lambda: setattr(wire, "is_down", False)).start()
    begun = time.monotonic()
    assert len(split.read(np.arange(2400))) == 2400
    assert time.monotonic() - begun > 2


def test_a_store_that_stays_away_is_one_clear_error(wire: Wire, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(location, "RETRY_SECONDS", 1.0)
    split = open_dataset(URI).split("train")
    wire.is_down = True
    try:
        with pytest.raises(DatasetError, match=r"Cannot reach s3://bucket/sets/rows/train/part-00000.arrow after"):
            split.read(np.arange(3))
    finally:
        wire.is_down = False
    assert len(split.read(np.arange(3))) == 3, "the next attempt begins anew"


def test_what_is_no_dataset_is_refused_at_once(wire: Wire, local: Path) -> None:
    begun = time.monotonic()
    with pytest.raises(DatasetError, match=r"Not found: s3://bucket/sets/none/dataset.json"):
        open_dataset("s3://bucket/sets/none")
    with pytest.raises(DatasetError, match=r"NO_SUCH_BUCKET|Not found"):
        open_dataset("s3://nobucket/rows")
    with pytest.raises(DatasetError, match="must not hold credentials"):
        open_dataset("s3://key:secret@bucket/sets/rows")
    with pytest.raises(DatasetError, match=r"Cannot open ftp://host/rows"):
        open_dataset("ftp://host/rows")
    with pytest.raises(DatasetError, match=r"Dataset s3://bucket/sets/rows already exists"):
        upload(local, URI)
    assert time.monotonic() - begun < 5


def test_an_object_that_is_absent_cut_short_or_altered_is_refused(wire: Wire, local: Path) -> None:
    system, path = location.file_system(URI)
    whole = (local / "train/part-00001.arrow").read_bytes()
    for content, message in (
        (whole[:-1], r"Size mismatch in .*part-00001.arrow: expected \d+ bytes, got \d+"),
        (None, r"Shard not found: .*part-00001.arrow"),
        (whole[:-100] + bytes(100), r"Checksum mismatch in .*part-00001.arrow"),
    ):
        if content is None:
            system.delete_file(f"{path}/train/part-00001.arrow")
        else:
            with system.open_output_stream(f"{path}/train/part-00001.arrow") as file:
                file.write(content)
        with pytest.raises(DatasetError, match=message):
            open_dataset(URI).split("train").read(np.arange(2400))


def test_training_on_a_store_is_training_on_the_folder(wire: Wire, tmp_path: Path) -> None:
    folder = make_dataset(tmp_path / "here")
    upload(folder, "s3://bucket/small")
    _, figures = train_here(make_config(tmp_path, folder))
    _, others = train_here(make_config(tmp_path, "s3://bucket/small"))
    assert list(figures) == list(others)
    assert all(figures[step]["train/loss"] == others[step]["train/loss"] for step in figures)


def test_a_file_uri_is_a_folder(local: Path) -> None:
    dataset = open_dataset(f"file://{local}")
    assert dataset.where == str(local)
    assert len(dataset.split("train").read(np.arange(5))) == 5


def test_places_hold_in_processes_that_start_elsewhere(local: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(local.parent)
    assert absolute("rows") == str(local)
    assert absolute(URI) == URI


def test_a_dataset_is_prepared_into_a_store(wire: Wire, tmp_path: Path) -> None:
    np.savez(tmp_path / "rows.npz", id=np.arange(50), x=np.random.default_rng(0).normal(size=(50, 3)))
    source = {"kind": "npz", "path": str(tmp_path / "rows.npz")}
    config = PrepareConfig.model_validate({"dataset": "s3://bucket/made", "source": source})
    lines: list[str] = []
    assert prepare_and_upload(config, lines.append) == "s3://bucket/made"
    assert lines[-1] == "wrote s3://bucket/made"
    assert {name: split.rows for name, split in open_dataset("s3://bucket/made").manifest.splits.items()} == {
        "train": 40,
        "val": 5,
        "test": 5,
    }
    with pytest.raises(DatasetError, match="already exists"):
        prepare_and_upload(config, lines.append)
    prepare_and_upload(config.model_copy(update={"replace": True}), lines.append)
    for number, uri in enumerate(("", "file://")):
        here = config.model_copy(update={"dataset": f"{uri}{tmp_path}/here{number}"})
        assert prepare_and_upload(here, lines.append) == f"{tmp_path}/here{number}"


def test_a_dataset_in_a_store_is_inspected_into_a_folder_here(
    wire: Wire, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    np.savez(tmp_path / "rows.npz", x=np.zeros((50, 3)))
    (tmp_path / "rows.toml").write_text(
        f'dataset = "s3://bucket/told"\nsource = {{ kind = "npz", path = "{tmp_path}/rows.npz" }}\n'
    )
    assert run_verb("prepare", [str(tmp_path / "rows.toml")]) == 0
    assert capsys.readouterr().out.endswith("--output told-inspection\n")
