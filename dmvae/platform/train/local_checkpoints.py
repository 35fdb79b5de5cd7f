"""A run's checkpoints on disk, and Ray's list of them.

A checkpoint is written where it stays, under a name that appears when it is whole, and then made known to Ray. Ray
overwrites its list in place; so before a run starts, the list is made anew from what is there.
"""

import json
import math
import shutil
from collections.abc import Callable, Collection, Mapping
from pathlib import Path
from typing import Any

import ray
from ray.train.v2._internal.constants import CHECKPOINT_MANAGER_SNAPSHOT_FILENAME

from dmvae.data.files import write_atomically
from dmvae.training import checkpoint
from dmvae.training.state import TrainState

BEST = "best"
SCORE = "score"
"""The reported figure that chooses the best checkpoint: smaller is better; None within an epoch."""
NUM_KEPT = 3
"""Checkpoints that stay, the newest; the best one has a copy of its own."""
PREFIX, _BROKEN = "checkpoint_", "broken_"
_NAMES = f"{PREFIX}[0-9]*"  # not Ray's list, which begins alike


def put(state: TrainState, run: dict[str, Any], report: dict[str, Any], folder: Path, is_best: bool) -> Path:
    """Write a checkpoint into `folder`, and a copy as its `best`; return the checkpoint.

    Args:
        state: of the run.
        run: as `run.json` keeps it.
        report: what Ray is told of it, with `step`.
        folder: of all checkpoints of the run.
        is_best: whether it is the best so far.

    Raises:
        OSError: if the disk does not take it; the ones that were there are untouched.
    """
    target = folder / free_name(report["step"], [path.name for path in folder.glob("*")])
    checkpoint.save(state, run, target, report)
    if is_best:
        replace(target, folder / BEST)
    return target


def replace(source: Path, target: Path) -> None:
    """Put a copy of a folder in the place of another, which is there until the copy is whole.

    Raises:
        OSError: if the disk does not take it.
    """
    partial, old = target.with_name(f".{target.name}.partial"), target.with_name(f".{target.name}.old")
    try:
        shutil.rmtree(partial, ignore_errors=True)
        shutil.copytree(source, partial)
    except (OSError, shutil.Error) as error:
        shutil.rmtree(partial, ignore_errors=True)
        raise OSError(f"{target} could not be written: {error}") from error
    shutil.rmtree(old, ignore_errors=True)
    if target.exists():
        target.rename(old)
    partial.rename(target)
    shutil.rmtree(old, ignore_errors=True)


def mend(folder: Path, say: Callable[[str], None]) -> list[Path]:
    """Make Ray's list agree with the whole checkpoints in `folder`, and return them, oldest first.

    What a kill left half written is removed. A broken checkpoint is named and set aside.
    """
    for left in [*folder.glob(".*.partial"), *folder.glob(".*.old")]:
        if left.name == f".{BEST}.old" and not (folder / BEST).exists():
            left.rename(folder / BEST)
        else:
            shutil.rmtree(left)
    whole = []
    for found in sorted(folder.glob(_NAMES)):
        try:
            checkpoint.verify(found)
            whole.append(found)
        except checkpoint.CheckpointError as error:
            say(f"warning: a checkpoint is not used, the one before it is: {error}")
            shutil.rmtree(folder / f"{_BROKEN}{found.name}", ignore_errors=True)
            found.rename(folder / f"{_BROKEN}{found.name}")
    if folder.exists():
        reports = {path.name: checkpoint.read_report(path) for path in whole}
        write_atomically(folder / CHECKPOINT_MANAGER_SNAPSHOT_FILENAME, json.dumps(snapshot(reports)))
        _mend_best(folder, reports)
    return whole


def _mend_best(folder: Path, reports: Mapping[str, dict[str, Any]]) -> None:
    best = folder / BEST
    try:
        if best.exists():
            checkpoint.verify(best)
    except checkpoint.CheckpointError:  # it will be named at the end
        return
    missed = missed_best(reports, checkpoint.read_report(best) if best.exists() else None)
    if missed is not None:
        replace(folder / missed, best)


def missed_best(reports: Mapping[str, dict[str, Any]], best: Mapping[str, Any] | None) -> str | None:
    """Return the checkpoint that a kill kept from becoming the best: its copy is made after it, and `best` is older."""
    scores = {name: report.get(SCORE) for name, report in reports.items()}
    judged = {name: score for name, score in scores.items() if score is not None and math.isfinite(score)}
    name = min(judged, key=lambda name: judged[name], default=None)
    return name if name is not None and (best is None or judged[name] < best.get(SCORE, -math.inf)) else None


def free_name(step: int, taken: Collection[str]) -> str:
    """Name a checkpoint: it sorts by step, then by attempt. Ray would take two reports of one name for one folder."""
    names = (f"{PREFIX}{step:010d}_{attempt:03d}" for attempt in range(1000))
    return next(name for name in names if name not in taken and f"{_BROKEN}{name}" not in taken)


def snapshot(reports: Mapping[str, dict[str, Any]]) -> dict[str, Any]:
    """Return what Ray 2.60 reads at the start of a run: the whole checkpoints' reports by name, oldest first."""
    entries = [{"version": 0, "checkpoint_dir_name": name, "metrics": report} for name, report in reports.items()]
    return {
        "ray_version": ray.__version__,
        "checkpoint_results": entries,
        "checkpoint_report_indices": list(range(len(entries))),
        "latest_checkpoint_result": entries[-1] if entries else None,
        "pending_training_results": [],
        "pending_validation_specs": [],
        "current_report_index": len(entries),
        "validated_checkpoint_dir_names": [],
        "timed_out_validation_checkpoint_dir_names": [],
        "failed_validation_checkpoint_dir_names": [],
    }
