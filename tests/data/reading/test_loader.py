import os
import threading
from itertools import chain
from pathlib import Path

import numpy as np
import pytest
import torch

from dmvae.data.batch import Batch
from dmvae.data.errors import DatasetError
from dmvae.data.preparation.writer import write_dataset
from dmvae.data.reading import loader
from dmvae.data.reading.dataset import open_dataset
from dmvae.data.reading.loader import read_epoch, read_rows
from dmvae.data.reading.sampler import EpochSampler
from dmvae.data.reading.split import Split
from tests.data.preparation.test_rows import make_rows


@pytest.fixture
def split(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Split:
    """103 rows in 3 shards of record batches of 8, read ahead by 20 rows."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setattr(loader, "LOOKAHEAD_ROWS", 20)
    rows = make_rows(103)
    size = 40 * rows.columns.row_bytes
    return open_dataset(write_dataset(tmp_path / "data", {"train": rows}, shard_bytes=size, record_batch_rows=8)).split(
        "train"
    )


def order_of(split: Split, batch_size: int = 10) -> EpochSampler:
    return EpochSampler(split.record_batch_rows, seed=3, batch_size=batch_size, streams=4)


def ids(batch: Batch) -> list[int]:
    assert isinstance(batch.ids, torch.Tensor)
    return batch.ids.tolist()


def readers() -> list[str]:
    return [thread.name for thread in threading.enumerate() if thread.name.startswith("dmvae-read")]


def test_an_epoch_has_every_row_once_in_the_order(split: Split) -> None:
    order = order_of(split)
    names = split.ids()
    steps = []
    for step, start, batch in read_epoch(split, order, epoch=1):
        assert start == 0
        assert ids(batch) == names[order.rows(1, step)].tolist()
        steps.append(step)
    assert steps == list(range(11))
    assert readers() == []


@pytest.mark.parametrize("workers", [2, 3, 7, 12])
def test_workers_batches_put_together_are_those_of_one(split: Split, workers: int) -> None:
    alone = [batch for _, _, batch in read_epoch(split, order_of(split), epoch=0)]
    together = zip(
        *(read_epoch(split, order_of(split), epoch=0, rank=rank, world_size=workers) for rank in range(workers)),
        strict=True,
    )
    for step, parts in enumerate(together):
        assert [part[0] for part in parts] == [step] * workers
        lengths = [len(part[2]) for part in parts]
        assert [part[1] for part in parts] == [sum(lengths[:rank]) for rank in range(workers)]
        for name, values in alone[step].data.items():
            assert torch.equal(torch.cat([part[2].data[name] for part in parts]), values)
        assert alone[step].masks is not None
        for name, mask in (alone[step].masks or {}).items():
            assert torch.equal(torch.cat([part[2].masks[name] for part in parts]), mask)


def test_reading_resumes_from_any_step_on_another_number_of_workers(split: Split) -> None:
    whole = [ids(batch) for _, _, batch in read_epoch(split, order_of(split), epoch=2)]
    for start_step in (0, 4, 10, 11):
        parts = [read_epoch(split, order_of(split), 2, start_step, rank, 3) for rank in range(3)]
        resumed = [[row for part in step for row in ids(part[2])] for step in zip(*parts, strict=True)]
        assert resumed == whole[start_step:]


def test_a_batch_larger_than_the_lookahead_is_read_whole(split: Split) -> None:
    sizes = [len(batch) for _, _, batch in read_epoch(split, order_of(split, 64), epoch=0)]
    assert sizes == [64, 39]


def test_little_is_read_ahead(split: Split, monkeypatch: pytest.MonkeyPatch) -> None:
    read: list[int] = []
    real = Split.read_batches
    monkeypatch.setattr(
        Split, "read_batches", lambda self, rows, *args: (read.append(len(rows)), real(self, rows, *args))[1]
    )
    batches = read_epoch(split, order_of(split), epoch=0)
    next(batches)
    batches.close()  # type: ignore[attr-defined]
    assert sum(read) <= 40
    assert max(read) <= 20


def test_batches_are_pinned_in_the_thread_when_asked_for(split: Split, monkeypatch: pytest.MonkeyPatch) -> None:
    pinned: list[str] = []
    # without a GPU there is no memory to pin
    monkeypatch.setattr(Batch, "pin_memory", lambda self: (pinned.append(threading.current_thread().name), self)[1])
    list(read_epoch(split, order_of(split), epoch=0))
    assert not pinned
    list(read_epoch(split, order_of(split), epoch=0, pin=True))
    assert len(pinned) == 11
    assert all(name.startswith("dmvae-read") for name in pinned)


def test_an_error_in_the_thread_is_raised_where_the_batch_is_wanted(split: Split) -> None:
    shard = Path(split.where) / "train/part-00001.arrow"
    content = bytearray(shard.read_bytes())
    content[2000] ^= 1
    shard.write_bytes(content)
    os.utime(shard)
    with pytest.raises(DatasetError, match=r"Checksum mismatch in .*part-00001.arrow"):
        list(read_epoch(split, order_of(split), epoch=0))
    assert readers() == []


def test_the_thread_ends_when_the_consumer_stops(split: Split) -> None:
    for batches in (read_epoch(split, order_of(split), epoch=0), read_rows(split, 10)):
        next(batches)  # type: ignore[call-overload]
        assert len(readers()) == 1
        batches.close()  # type: ignore[attr-defined]
        assert readers() == []


def test_blocks_are_the_same_for_any_number_of_workers(split: Split) -> None:
    alone = dict(read_rows(split, 25))
    assert {block: len(batch) for block, batch in alone.items()} == {0: 25, 1: 25, 2: 25, 3: 25, 4: 3}
    assert [row for batch in alone.values() for row in ids(batch)] == split.ids().tolist()
    for workers in (2, 7):
        parts = [list(read_rows(split, 25, rank, workers)) for rank in range(workers)]
        assert [[block for block, _ in part] for part in parts] == [
            list(range(rank, 5, workers)) for rank in range(workers)
        ]
        for block, batch in chain(*parts):
            assert ids(batch) == ids(alone[block])
            assert all(torch.equal(batch.data[name], values) for name, values in alone[block].data.items())


def test_requests_out_of_range_are_refused(split: Split) -> None:
    with pytest.raises(ValueError, match="does not match split"):
        read_epoch(split, EpochSampler([5], seed=0, batch_size=2), 0)
    with pytest.raises(ValueError, match=r"start_step must be between 0 and .*, but got 12"):
        read_epoch(split, order_of(split), 0, start_step=12)
    with pytest.raises(ValueError, match="rank must be between 0 and 1, but got 2"):
        list(read_epoch(split, order_of(split), 0, rank=2, world_size=2))
    with pytest.raises(ValueError, match="block_rows must be at least 1, but got 0"):
        read_rows(split, 0)
    with pytest.raises(ValueError, match="rank must be between 0 and 0, but got 1"):
        read_rows(split, 5, rank=1)


def test_positions_are_read_as_numpy_integers(split: Split) -> None:
    assert ids(split.read(np.array([102, 0]))) == split.ids()[[102, 0]].tolist()
