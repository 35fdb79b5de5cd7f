"""Shards on a node's disk: one copy for all, within a bound, never half of one."""

import hashlib
import threading
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import BinaryIO

import pytest

from dmvae.data.errors import DatasetError
from dmvae.data.format.manifest import ShardInfo
from dmvae.data.storage import shard_cache
from dmvae.data.storage.shard_cache import ShardCache

SIZE = 1000


def content(number: int) -> bytes:
    return bytes([number]) * SIZE


def info_of(number: int) -> ShardInfo:
    digest = hashlib.sha256(content(number)).hexdigest()
    return ShardInfo(path=f"{number}.arrow", rows=1, record_batch_rows=1, bytes=SIZE, sha256=digest, observed={})


class Source:
    """Gives shards, and remembers which were asked for."""

    def __init__(self) -> None:
        self.copied: list[int] = []

    def __call__(self, number: int) -> Callable[[BinaryIO], None]:
        def copy(file: BinaryIO) -> None:
            self.copied.append(number)
            time.sleep(0.02)
            file.write(content(number))

        return copy


def get(cache: ShardCache, number: int, source: Source) -> object:
    staged = cache.get(info_of(number), f"s3://bucket/{number}", source(number))
    assert staged.path.read_bytes() == content(number)
    return staged


def held(folder: Path) -> int:
    total = 0
    for path in folder.iterdir():
        with suppress(FileNotFoundError):  # evicted meanwhile
            total += path.stat().st_size
    return total


def test_many_at_once_copy_a_shard_once(tmp_path: Path) -> None:
    source = Source()
    threads = [
        # a cache of its own each, as another process would have
        threading.Thread(target=lambda: get(ShardCache(tmp_path, 10 * SIZE), 1, source))
        for _ in range(8)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert source.copied == [1]
    assert sorted(path.suffix for path in tmp_path.iterdir()) == [".arrow", ".lock"]


def test_the_bound_holds_and_the_least_recently_used_goes_first(tmp_path: Path) -> None:
    cache, source = ShardCache(tmp_path, 3 * SIZE), Source()
    for number in (1, 2, 3, 1, 4, 1, 5):
        get(cache, number, source)
        assert held(tmp_path) <= 3 * SIZE
    assert source.copied == [1, 2, 3, 4, 5], "1 was used in between and stayed"
    get(cache, 2, source)
    assert source.copied[-1] == 2


def test_a_shard_in_use_is_not_evicted(tmp_path: Path) -> None:
    cache, source = ShardCache(tmp_path, 2 * SIZE), Source()
    first, second = get(cache, 1, source), get(cache, 2, source)
    with pytest.raises(
        DatasetError, match=r"s3://bucket/3 needs 1,000 bytes, but 2,000 of 2,000 bytes in .* are in use"
    ):
        get(cache, 3, source)
    del second
    get(cache, 3, source)
    assert source.copied == [1, 2, 3]
    get(cache, 1, source)
    assert source.copied == [1, 2, 3]
    del first


def test_what_failed_or_is_not_the_manifests_leaves_nothing(tmp_path: Path) -> None:
    cache = ShardCache(tmp_path, 3 * SIZE)

    def fail(file: BinaryIO) -> None:
        file.write(content(1)[:10])
        raise DatasetError("gone")

    with pytest.raises(DatasetError, match="gone"):
        cache.get(info_of(1), "s3://bucket/1", fail)
    with pytest.raises(DatasetError, match=r"Checksum mismatch in s3://bucket/1"):
        cache.get(info_of(1), "s3://bucket/1", Source()(2))
    assert [path.name for path in tmp_path.iterdir()] == ["room.lock"]


def test_a_shard_that_cannot_fit_evicts_nothing(tmp_path: Path) -> None:
    get(ShardCache(tmp_path, SIZE), 1, Source())
    with pytest.raises(DatasetError, match="Raise DMVAE_CACHE_GB"):
        get(ShardCache(tmp_path, SIZE - 1), 2, Source())
    assert [path.name for path in tmp_path.glob("*.arrow")] == [f"{info_of(1).sha256}.arrow"]


def test_who_comes_too_late_to_copy_leaves_no_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    cache, source = ShardCache(tmp_path, 2 * SIZE), Source()
    get(cache, 1, source)
    share, looks = shard_cache._lock_shared, iter([True])
    # not there when it is looked for, there when the lock is had
    monkeypatch.setattr(shard_cache, "_lock_shared", lambda path: None if next(looks, False) else share(path))
    get(cache, 1, source)
    assert source.copied == [1]
    assert not list(tmp_path.glob("*.part"))


def test_what_a_killed_process_left_is_taken_over_or_evicted(tmp_path: Path) -> None:
    cache, source = ShardCache(tmp_path, 2 * SIZE), Source()
    for number in (1, 2):
        (tmp_path / f"{info_of(number).sha256}.part").write_bytes(bytes(SIZE))
    get(cache, 1, source)
    get(cache, 3, source)
    assert held(tmp_path) <= 2 * SIZE
    assert not list(tmp_path.glob("*.part"))


def test_the_bound_comes_from_the_environment_or_half_of_the_disk(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert ShardCache(tmp_path).limit > 1 << 20
    monkeypatch.setenv("DMVAE_CACHE_GB", "0.5")
    assert ShardCache(tmp_path).limit == 500_000_000
    monkeypatch.setenv("DMVAE_CACHE_GB", "much")
    with pytest.raises(DatasetError, match="DMVAE_CACHE_GB must be a number of gigabytes, but got 'much'"):
        ShardCache(tmp_path)
