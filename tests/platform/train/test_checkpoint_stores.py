"""What a kill leaves of a run's checkpoints is put in order, on a disk and in an object store alike."""

from pathlib import Path
from typing import Any

import pytest

from dmvae.platform.remote_fs import Remote
from dmvae.platform.train import local_checkpoints as shelf
from dmvae.platform.train import remote_checkpoints as depot
from dmvae.training import checkpoint
from tests.training.test_checkpoint import make_state


class _KilledError(Exception):
    pass


def _kill(*_: Any) -> None:
    raise _KilledError


def report(step: int, score: float | None) -> dict[str, Any]:
    return {"step": step, "score": score}


def test_a_best_checkpoint_that_a_kill_left_without_its_copy_becomes_the_best(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    shelf.put(make_state(), {}, report(1, 3.0), tmp_path, is_best=True)
    with monkeypatch.context() as patch:
        patch.setattr(shelf, "replace", _kill)
        with pytest.raises(_KilledError):
            shelf.put(make_state(), {}, report(2, 2.0), tmp_path, is_best=True)
    shelf.put(make_state(), {}, report(3, None), tmp_path, is_best=False)
    for _ in range(2):
        assert len(shelf.mend(tmp_path, print)) == 3
        assert checkpoint.read_report(tmp_path / "best") == report(2, 2.0)


def test_the_same_of_a_store(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    place = Remote.at("memory://bucket/kill") / "checkpoints"
    depot.put(make_state(), {}, report(1, 3.0), place, is_best=True)
    upload = Remote.upload
    with monkeypatch.context() as patch:
        patch.setattr(Remote, "upload", lambda to, what: _kill() if "/best_" in to.path else upload(to, what))
        with pytest.raises(_KilledError):
            depot.put(make_state(), {}, report(2, 2.0), place, is_best=True)
    depot.put(make_state(), {}, report(3, None), place, is_best=False)
    for _ in range(2):
        assert len(depot.mend(place)) == 3
        assert [name for name in place.names() if name.startswith("best_")] == ["best_0000000002_000"]
    (place / "best_0000000002_000").download(tmp_path / "best")
    checkpoint.verify(tmp_path / "best")
