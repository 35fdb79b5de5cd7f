"""A run whose state is at a URI: what `shelf` is to a folder. Any node goes on with it, whatever became of the others.

    run.json, result.json, mlflow.json      what the run is, what it reached, where it is recorded
    checkpoints/checkpoint_STEP_ATTEMPT/    the newest three
    checkpoints/best_STEP_ATTEMPT/          the best, of which there are two while one takes the other's place
    best/, last/                            of a finished run

A folder is whole once its checksums are there. Metrics are in MLflow; the spool that brings them there stays where they
were written down.
"""

import json
import shutil
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from ray.train.v2._internal.constants import CHECKPOINT_MANAGER_SNAPSHOT_FILENAME

from dmvae.data.files import write_atomically
from dmvae.platform.remote_fs import Remote
from dmvae.platform.tracking.outbox import RUN_FILE, set_aside
from dmvae.platform.train import local_checkpoints as shelf
from dmvae.training import checkpoint
from dmvae.training.state import TrainState

_BEST = "best_"


def fetch_record(place: Remote, run_dir: Path, files: tuple[str, ...]) -> None:
    """Make the place, and make the small files of a run in `run_dir` those that are there, which are what counts.

    Args:
        place: of the run.
        run_dir: its folder on this machine.
        files: their names, `run.json` first: where that is not, there is no run.

    Raises:
        StorageError: if the place cannot be read or made.
    """
    place.make()
    found = {name: (place / name).read() for name in files}
    record = (place / RUN_FILE).read()
    if found[files[0]] is None:
        shutil.rmtree(run_dir, ignore_errors=True)
        return
    run_dir.mkdir(parents=True, exist_ok=True)
    for name, content in found.items():
        if content is None:
            (run_dir / name).unlink(missing_ok=True)
        else:
            write_atomically(run_dir / name, content.decode())
    if record is not None:
        spool_dir = run_dir / "tracking"
        spool_dir.mkdir(exist_ok=True)
        set_aside(spool_dir, json.loads(record)["run_id"])
        write_atomically(spool_dir / RUN_FILE, record.decode())


def put_record(place: Remote, run_dir: Path, file: str) -> None:
    """Write a small file of a run, and which MLflow run it is recorded in, to its place.

    Raises:
        StorageError: if the place cannot be written.
    """
    (place / RUN_FILE).write((run_dir / "tracking" / RUN_FILE).read_bytes())
    (place / file).write((run_dir / file).read_bytes())


def put(state: TrainState, run: dict[str, Any], report: dict[str, Any], folder: Remote, is_best: bool) -> Remote:
    """Write a checkpoint to `folder`, as `shelf.put` does.

    Raises:
        OSError: if it does not get there; the ones that were there are untouched.
    """
    there = folder.names()
    name = shelf.free_name(report["step"], there)
    with TemporaryDirectory(prefix="dmvae-") as scratch:
        whole = Path(scratch, name)
        checkpoint.save(state, run, whole, report)
        (folder / name).upload(whole)
        if is_best:
            _put_best(folder, whole, there)
    return folder / name


def _put_best(folder: Remote, whole: Path, there: list[str]) -> None:
    (folder / f"{_BEST}{whole.name.removeprefix(shelf.PREFIX)}").upload(whole)
    for old in there:
        if old.startswith(_BEST):
            (folder / old).remove()


def _copy_as_best(folder: Remote, name: str) -> None:
    there = folder.names()
    with TemporaryDirectory(prefix="dmvae-") as scratch:
        whole = Path(scratch, name)
        (folder / name).download(whole)
        with suppress(checkpoint.CheckpointError):  # of a broken one: it will be named when it is to be gone on from
            checkpoint.verify(whole)
            _put_best(folder, whole, there)


def mend(folder: Remote) -> list[Remote]:
    """Make Ray's list agree with the whole checkpoints in `folder`, and return them, oldest first.

    What a kill left half written is removed. Whether a whole one is intact shows when it is read.
    """
    names = [name for name in folder.names() if name.startswith((shelf.PREFIX, _BEST)) and name[-1].isdigit()]
    whole, bests = dict[str, Any](), dict[str, Any]()
    for name in names:
        state = (folder / name / checkpoint.STATE).read()
        if state is None or checkpoint.CHECKSUMS not in (folder / name).names():
            (folder / name).remove()
        else:
            (bests if name.startswith(_BEST) else whole)[name] = json.loads(state)["report"]
    snapshot = json.dumps(shelf.snapshot(whole)).encode()
    (folder / CHECKPOINT_MANAGER_SNAPSHOT_FILENAME).write(snapshot)
    missed = shelf.missed_best(whole, bests[max(bests)] if bests else None)
    if missed is not None:
        _copy_as_best(folder, missed)
    return [folder / name for name in whole]


def keep(place: Remote, folder: Remote, run_dir: Path, say: Callable[[str], None]) -> dict[str, Any] | None:
    """Copy the best and the last checkpoint to `best/` and `last/`, here and there; return the best one's figures.

    None if there is no whole one.
    """
    names = folder.names()
    for prefix, kept in ((_BEST, "best"), (shelf.PREFIX, "last")):
        found = [name for name in reversed(names) if name.startswith(prefix) and name[-1].isdigit()]
        if not any(_bring(folder / name, run_dir / kept, say) for name in found):
            return None
        (place / kept).remove()
        (place / kept).upload(run_dir / kept)
    return checkpoint.read_report(run_dir / "best")


def _bring(source: Remote, target: Path, say: Callable[[str], None]) -> bool:
    with TemporaryDirectory(prefix="dmvae-") as scratch:
        whole = Path(scratch, target.name)
        source.download(whole)
        try:
            checkpoint.verify(whole)
        except checkpoint.CheckpointError as error:
            say(f"warning: a checkpoint is not kept: {error}")
            return False
        shelf.replace(whole, target)
        return True
