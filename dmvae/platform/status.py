"""What the runs and studies under a folder are doing, read from their files: nothing is changed and no lock is kept."""

import fcntl
import json
import time
from collections.abc import Iterator
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from typing import Any

from dmvae.data.progress import minutes
from dmvae.platform.train.run_store import CHECKPOINTS, RESULT
from dmvae.training import checkpoint

_STUDY = "study.json"
_SILENT_SECONDS = 600.0


@dataclass(frozen=True)
class Status:
    """One run or study.

    Attributes:
        folder: of it.
        state: `finished`, `running`, `silent` (its process lives, but has recorded nothing for ten minutes),
            `stopped`, `failed`, or `unreadable`.
        details: what is done, the best figure, the age of the last checkpoint, and why it ended.
    """

    folder: Path
    state: str
    details: tuple[str, ...]

    def line(self) -> str:
        """Return one line for the user."""
        return f"{self.folder!s:<32} {self.state:<10} {'  '.join(self.details)}".rstrip()


def statuses(folder: Path) -> Iterator[Status]:
    """Yield the state of every run and study in `folder`, or of the one that it is; a study's trials are counted."""
    for record in (_STUDY, checkpoint.RUN_CONFIG):
        if (folder / record).is_file():
            yield _read(folder, record)
            return
    for entry in sorted(folder.iterdir()) if folder.is_dir() else ():
        if entry.is_dir() and any((entry / record).is_file() for record in (_STUDY, checkpoint.RUN_CONFIG)):
            yield from statuses(entry)


def _read(folder: Path, record: str) -> Status:
    try:
        recorded = json.loads((folder / record).read_text())
        return _study(folder, recorded) if record == _STUDY else _run(folder, recorded)
    except (OSError, ValueError, KeyError, TypeError) as error:
        return Status(folder, "unreadable", (f"{type(error).__name__}: {error}",))


def _run(folder: Path, recorded: dict[str, Any]) -> Status:
    epochs, monitor = recorded["training"]["epochs"], recorded["training"]["monitor"]
    details = list[str]()
    newest = max((folder / CHECKPOINTS).glob(f"checkpoint_[0-9]*/{checkpoint.STATE}"), default=None)
    state = json.loads(newest.read_text()) if newest is not None else None
    if state is not None and newest is not None:
        best = state["best"]
        details.append(f"epoch {state['position']['epoch']} of {epochs}")
        details.append(f"best val/{monitor} {best:.4g}" if isinstance(best, float) else "no epoch is validated")
        details.append(f"last checkpoint {_age(newest)} ago")
    else:
        details.append(f"no checkpoint yet, {epochs} epochs wanted")
    if (folder / RESULT).is_file():
        result = json.loads((folder / RESULT).read_text())
        if result["epochs"] == epochs:
            nll = [f"{name} {value:.5g}" for name, value in result["metrics"].items() if name.endswith("/nll")]
            return Status(folder, "finished", (*details[:2], *nll))
    return _ended_or_alive(folder, details)


def _study(folder: Path, recorded: dict[str, Any]) -> Status:
    results = list(folder.glob(f"trials/[0-9]*/{RESULT}"))
    done = len(results)
    failed = sum(json.loads(file.read_text())["status"] == "failed" for file in results)
    details = [f"{done} of {recorded['trials']} trials finished" + (f", {failed} failed" if failed else "")]
    best = folder / "best.toml"
    if best.is_file():
        details.append(f"best configuration: {best}")
    if done >= recorded["trials"] and best.is_file() and not _is_held(folder):
        return Status(folder, "finished", tuple(details))
    return _ended_or_alive(folder, details)


def _ended_or_alive(folder: Path, details: list[str]) -> Status:
    log = folder / "tracking" / "metrics.jsonl"
    if _is_held(folder):
        details.append(f"since {_time(folder / 'tracking' / 'driver.lock')}")
        if log.is_file() and time.time() - log.stat().st_mtime > _SILENT_SECONDS:
            return Status(folder, "silent", (*details, f"recorded nothing for {_age(log)}"))
        return Status(folder, "running", tuple(details))
    ending = _last_ending(log)
    if ending.get("status") == "FAILED":
        return Status(folder, "failed", (*details, str(ending.get("reason", ""))))
    return Status(folder, "stopped", (*details, str(ending.get("reason", "")) or "its process is gone"))


def _is_held(folder: Path) -> bool:
    """Return whether a driver, here or where the file system's locks reach, holds the run."""
    file = folder / "tracking" / "driver.lock"
    if not file.is_file():
        return False
    with file.open() as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_SH | fcntl.LOCK_NB)
        except BlockingIOError:
            return True
    return False


def _last_ending(log: Path) -> dict[str, Any]:
    """Return the last line of the outbox that says how the run ended; they are among the last ones."""
    if not log.is_file():
        return {}
    with log.open("rb") as file:
        file.seek(max(0, log.stat().st_size - 65536))
        lines = file.read().splitlines()
    entries = [json.loads(line) for line in lines[1:] if line.endswith(b"}")]
    return next((entry for entry in reversed(entries) if "status" in entry), {})


def _age(file: Path) -> str:
    return minutes(max(0.0, time.time() - file.stat().st_mtime))


def _time(file: Path) -> str:
    return datetime.fromtimestamp(file.stat().st_mtime).strftime("%Y-%m-%d %H:%M")
