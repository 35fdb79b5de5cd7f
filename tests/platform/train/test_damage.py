"""A bit of a shard that flips after the shard was verified, with its times kept, is found within the epoch."""

import os
from pathlib import Path

import pytest

from dmvae.config.training import TrainConfig
from dmvae.platform.errors import RunError
from dmvae.platform.train.trainer import train_run
from tests.runs import make_config, make_dataset

pytestmark = pytest.mark.usefixtures("cluster")


def flip(shard: Path) -> None:
    """Change one bit in place, as a disk does: size, times and the file itself stay the same."""
    before = shard.stat()
    with shard.open("r+b") as file:
        file.seek(before.st_size // 2)
        (byte,) = file.read(1)
        file.seek(before.st_size // 2)
        file.write(bytes([byte ^ 1]))
    os.utime(shard, ns=(before.st_atime_ns, before.st_mtime_ns))
    assert shard.stat().st_mtime_ns == before.st_mtime_ns


def config_of(folder: Path, dataset: Path, name: str, epochs: int) -> TrainConfig:
    training = {"epochs": epochs}
    return make_config(folder, dataset, name=name, training=training, workers={"num": 2, "max_failures": 0})


@pytest.mark.acceptance
def test_a_flipped_bit_stops_a_fresh_run_and_a_resumed_one(tmp_path: Path) -> None:
    dataset = make_dataset(tmp_path, rows=600)
    train_run(config_of(tmp_path, dataset, "run", 1), print)
    (shard,) = (dataset / "train").glob("*.arrow")
    flip(shard)
    for name in ("fresh", "run"):
        with pytest.raises(RunError, match=f"Checksum mismatch in .*{shard.name}, record batch"):
            train_run(config_of(tmp_path, dataset, name, 2), print)
    flip(shard)  # back again: the same command resumes
    assert train_run(config_of(tmp_path, dataset, "run", 2), print).metrics
