"""A run's records and checkpoints, on a disk and in an object store alike: what a kill leaves is repaired."""

import itertools
import json
from pathlib import Path
from typing import Any

import pytest

from dmvae.platform.errors import RunError
from dmvae.platform.folders import LocalFolder
from dmvae.platform.remote_fs import RemoteFolder
from dmvae.platform.train.run_store import RunStore
from dmvae.training import checkpoint
from tests.training.test_checkpoint import make_state

_buckets = itertools.count()


class _KilledError(Exception):
    pass


@pytest.fixture(params=["folder", "uri"])
def store(request: pytest.FixtureRequest, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> RunStore:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    place = str(tmp_path / "runs") if request.param == "folder" else f"memory://bucket-{next(_buckets)}/runs"
    opened = RunStore.open(place, "one")
    opened.download()
    return opened


def save(store: RunStore, step: int, score: float | None, is_best: bool = False) -> None:
    store.save(make_state(), {}, {"step": step, "score": score}, is_best)


def names(store: RunStore) -> list[str]:
    return [name for name in (store.folder / "checkpoints").names() if name.endswith("_000") or name == "best"]


def damage(store: RunStore, name: str) -> None:
    file = store.folder / "checkpoints" / name / "run.json"
    file.write("{ }")


def test_the_best_and_the_newest_checkpoint_are_published(store: RunStore) -> None:
    for step, score in ((1, 3.0), (2, 2.0), (3, None), (4, 2.5)):
        save(store, step, score, is_best=step <= 2)
    assert store.publish(print) == {"step": 2, "score": 2.0}
    for kept, step in (("best", 2), ("last", 4)):
        assert "checksums.json" in (store.folder / kept).names()
        checkpoint.verify(store.run_dir / kept)
        assert checkpoint.read_report(store.run_dir / kept)["step"] == step


def test_what_completes_the_best_goes_wherever_the_best_goes(store: RunStore) -> None:
    save(store, 1, 3.0, is_best=True)
    store.publish(print, lambda folder: (folder / "prior.safetensors").write_text("fitted"))
    assert "prior.safetensors" in (store.folder / "best").names()
    assert "prior.safetensors" not in (store.folder / "last").names()
    checkpoint.verify(store.run_dir / "best")


def test_a_best_checkpoint_that_a_kill_left_without_its_copy_becomes_the_best(
    store: RunStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    save(store, 1, 3.0, is_best=True)
    put = type(store.folder).put

    def killed(self: Any, source: Path) -> None:
        if self.name.startswith("best"):
            raise _KilledError
        put(self, source)

    with monkeypatch.context() as patch:
        patch.setattr(type(store.folder), "put", killed)
        with pytest.raises(_KilledError):
            save(store, 2, 2.0, is_best=True)
    save(store, 3, None)
    for _ in range(2):
        assert len(store.repair(print)) == 3
        assert store.publish(print) == {"step": 2, "score": 2.0}
        assert sum(name.startswith("best") for name in names(store)) == 1


def test_what_a_kill_left_half_written_is_removed(store: RunStore) -> None:
    save(store, 1, 1.0, is_best=True)
    checkpoints = store.folder / "checkpoints"
    if isinstance(checkpoints, LocalFolder):
        (checkpoints.root / ".checkpoint_0000000002_000.partial").mkdir()
        (checkpoints.root / "best").rename(checkpoints.root / ".best.old")
    else:
        (checkpoints / "checkpoint_0000000002_000" / "model.json").write("{}")
    (kept,) = store.repair(print)
    assert kept.name == "checkpoint_0000000001_000"
    assert len(names(store)) == 2
    assert not any(name.endswith((".partial", ".old")) for name in checkpoints.names())


def test_a_damaged_checkpoint_is_named_and_the_one_before_it_published(store: RunStore) -> None:
    save(store, 1, 1.0, is_best=True)
    save(store, 2, 2.0)
    damage(store, "checkpoint_0000000002_000")
    said: list[str] = []
    if isinstance(store.folder, RemoteFolder):
        assert len(store.repair(said.append)) == 2, "its content is compared when it is read"
        store.publish(said.append)
    else:
        assert [found.name for found in store.repair(said.append)] == ["checkpoint_0000000001_000"]
        assert "broken_checkpoint_0000000002_000" in (store.folder / "checkpoints").names()
        save(store, 2, 2.0)
        assert "checkpoint_0000000002_001" in (store.folder / "checkpoints").names()
    (line,) = said
    assert line.startswith("warning: Checkpoint ")
    assert line.endswith("Skipping it.")
    assert "run.json" in line


def test_a_run_without_a_finite_validation_metric_has_nothing_to_publish(store: RunStore) -> None:
    save(store, 1, float("nan"))
    with pytest.raises(RunError, match="no undamaged checkpoint with a finite validation metric"):
        store.publish(print)


def test_records_are_read_back_where_the_run_never_was(store: RunStore, tmp_path: Path) -> None:
    (store.run_dir / "tracking").mkdir(parents=True)
    (store.run_dir / "tracking" / "mlflow.json").write_text(json.dumps({"run_id": "r", "uri": "u"}))
    store.write_record("run.json", {"name": "one"})
    other = RunStore(store.folder, store.run_dir if isinstance(store.folder, LocalFolder) else tmp_path / "other")
    other.download()
    assert json.loads((other.run_dir / "run.json").read_text()) == {"name": "one"}
    assert json.loads((other.run_dir / "tracking" / "mlflow.json").read_text())["run_id"] == "r"
    assert not (other.run_dir / "result.json").exists()
