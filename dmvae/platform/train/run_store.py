"""Where a run's records and checkpoints are kept: a folder, or a URI from which any node can resume the run.

    run.json, result.json, mlflow.json      configuration, metrics, and the MLflow run (in tracking/ of a local folder)
    checkpoints/checkpoint_STEP_ATTEMPT/    the newest three
    checkpoints/best/                       the best; at a URI best_STEP_ATTEMPT/, two while one replaces the other
    best/, last/                            of a finished run

Metrics are in MLflow; the outbox that delivers them stays on the machine where they were written.
"""

import json
import math
import shutil
from collections.abc import Callable, Collection, Mapping
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from dmvae.platform.errors import RunError
from dmvae.platform.folders import Folder, LocalFolder, open_folder
from dmvae.platform.remote_fs import cached_run_dir
from dmvae.platform.tracking.tracked_run import RUN_FILE, archive_other_run, parse_run_record
from dmvae.platform.train.ray_snapshot import SNAPSHOT_FILE, build_snapshot
from dmvae.training import checkpoint
from dmvae.training.state import TrainState

RESULT = "result.json"
BEST, LAST, CHECKPOINTS = "best", "last", "checkpoints"
SCORE = "score"
"""The reported metric that selects the best checkpoint: smaller is better; None within an epoch."""
NUM_KEPT = 3
"""How many checkpoints are kept, the newest; the best one has a copy of its own."""
_PREFIX, _BROKEN = "checkpoint_", "broken_"


@dataclass(frozen=True)
class RunStore:
    """One run's records and checkpoints; it can be sent to other processes.

    Attributes:
        folder: where the run is, for every node.
        run_dir: its folder on this machine, with `tracking/`, `best/` and `last/`; the same if `folder` is local.
    """

    folder: Folder
    run_dir: Path

    @classmethod
    def open(cls, runs_dir: str, name: str) -> "RunStore":
        """Return the store of a run in a folder, or at a URI, of runs.

        Raises:
            ValueError: if no file system handles the URI, or it contains credentials.
        """
        folder = open_folder(runs_dir) / name
        return cls(folder, folder.root if isinstance(folder, LocalFolder) else cached_run_dir(folder))

    @property
    def where(self) -> str:
        """The run's folder or URI, for messages."""
        return self.folder.where

    @property
    def is_empty(self) -> bool:
        """Whether the run has no checkpoint yet."""
        return not self._checkpoint_names()

    def download(self) -> None:
        """Copy the records at the URI to `run_dir`; if the URI has no run, remove an earlier one from `run_dir`.

        Raises:
            StorageError: if the URI cannot be read or created.
        """
        if isinstance(self.folder, LocalFolder):
            return
        self.folder.make()
        records = {name: (self.folder / name).read() for name in (checkpoint.RUN_CONFIG, RESULT)}
        tracked = (self.folder / RUN_FILE).read()
        if records[checkpoint.RUN_CONFIG] is None:
            shutil.rmtree(self.run_dir, ignore_errors=True)
            return
        outbox_dir = self.run_dir / "tracking"
        outbox_dir.mkdir(parents=True, exist_ok=True)
        for name, text in records.items():
            if text is None:
                (self.run_dir / name).unlink(missing_ok=True)
            else:
                LocalFolder(self.run_dir / name).write(text)
        if tracked is not None:
            where = (self.folder / RUN_FILE).where
            archive_other_run(outbox_dir, parse_run_record(tracked, where).run_id)
            LocalFolder(outbox_dir / RUN_FILE).write(tracked)

    def write_record(self, name: str, record: Mapping[str, Any]) -> None:
        """Write `run.json` or `result.json`, and at a URI which MLflow run it belongs to.

        Raises:
            OSError: if it cannot be written.
        """
        text = json.dumps(record, indent=2) + "\n"
        LocalFolder(self.run_dir / name).write(text)
        if not isinstance(self.folder, LocalFolder):
            (self.folder / RUN_FILE).write((self.run_dir / "tracking" / RUN_FILE).read_text())
            (self.folder / name).write(text)

    def save(self, state: TrainState, run: dict[str, Any], report: dict[str, Any], is_best: bool) -> Folder:
        """Write a checkpoint, and a copy as the best one if it is; return the checkpoint.

        Args:
            state: of the run.
            run: the content of `run.json`.
            report: what Ray is told of the checkpoint, with `step`.
            is_best: whether it is the best so far.

        Raises:
            OSError: if it cannot be written; the earlier checkpoints are untouched.
        """
        checkpoints = self._checkpoints
        target = checkpoints / free_name(report["step"], checkpoints.names())
        with target.draft() as draft:
            checkpoint.save(state, run, draft, report)
            target.put(draft)
            if is_best:
                self._set_best(target, draft)
        return target

    def repair(self, log: Callable[[str], None]) -> list[Folder]:
        """Make the checkpoints consistent after a kill, and Ray's list agree with them; return them, oldest first.

        What a kill left half written is removed. A damaged checkpoint is logged, and renamed to `broken_NAME`.
        """
        self._checkpoints.repair()
        for name in self._checkpoint_names():
            fault = (self._checkpoints / name).fault()
            if fault:
                log(f"warning: {fault} Skipping it.")
                self._rename_damaged(name)
        reports = {name: report for name in self._checkpoint_names() if (report := self._report(name))}
        self._checkpoints.make()
        (self._checkpoints / SNAPSHOT_FILE).write(json.dumps(build_snapshot(reports)))
        self._catch_up_best(reports)
        return [self._checkpoints / name for name in reports]

    def publish(
        self, log: Callable[[str], None], complete: Callable[[Path], None] = lambda folder: None
    ) -> dict[str, Any]:
        """Copy the best and the newest checkpoint to `best/` and `last/`; return what the best was reported with.

        Args:
            log: called with lines for the user.
            complete: adds files to the folder of the best, before it is copied to a URI.

        Raises:
            RunError: if there is no undamaged checkpoint, or none with a finite validation metric.
        """
        names = self._checkpoint_names()
        scores = _finite_scores({name: self._report(name) for name in names})
        self._publish(BEST, [*self._best_names(), *sorted(scores, key=lambda name: scores[name])], log, complete)
        self._publish(LAST, [*reversed(names)], log, lambda folder: None)
        return checkpoint.read_report(self.run_dir / BEST)

    @property
    def _checkpoints(self) -> Folder:
        return self.folder / CHECKPOINTS

    def _checkpoint_names(self) -> list[str]:
        """Return the checkpoints, oldest first; Ray's own list begins with the same prefix."""
        return [name for name in self._checkpoints.names() if name.startswith(_PREFIX) and name[-1].isdigit()]

    def _best_names(self) -> list[str]:
        """Return the copies of the best checkpoint, newest first."""
        names = reversed(self._checkpoints.names())
        return [name for name in names if name == BEST or (name.startswith(f"{BEST}_") and name[-1].isdigit())]

    def _report(self, name: str) -> dict[str, Any]:
        """Return what a checkpoint was reported with; nothing of a damaged one."""
        file = self._checkpoints / name / checkpoint.STATE
        with suppress(ValueError):
            report = checkpoint.parse_report(file.read() or "", file.where)
            if isinstance(report.get("step"), int) and isinstance(report.get(SCORE, 0.0), float | int | None):
                return report
        return {}

    def _set_best(self, best: Folder, files: Path) -> None:
        older = self._best_names()
        name = BEST if best.replaces else f"{BEST}_{best.name.removeprefix(_PREFIX)}"
        (self._checkpoints / name).put(files)
        for other in older:
            if other != name:
                (self._checkpoints / other).remove()

    def _catch_up_best(self, reports: Mapping[str, dict[str, Any]]) -> None:
        """Copy the best checkpoint if a kill prevented it: the copy is made after the checkpoint."""
        best = next(iter(self._best_names()), None)
        if best is not None and (self._checkpoints / best).fault():
            return  # `publish` reports it
        scores = _finite_scores(reports)
        name = min(scores, key=lambda name: scores[name], default=None)
        known = math.inf if best is None else self._report(best).get(SCORE, -math.inf)
        if name is not None and scores[name] < known:
            missed = self._checkpoints / name
            with suppress(checkpoint.CheckpointError), missed.fetch() as files:
                checkpoint.verify(files)  # a damaged one at a URI is reported when the run resumes from it
                self._set_best(missed, files)

    def _rename_damaged(self, name: str) -> None:
        if isinstance(self._checkpoints, LocalFolder):
            target = self._checkpoints / f"{_BROKEN}{name}"
            target.remove()
            (self._checkpoints / name).root.rename(target.root)

    def _publish(
        self, kept: str, names: list[str], log: Callable[[str], None], complete: Callable[[Path], None]
    ) -> None:
        for name in names:
            with (self._checkpoints / name).fetch() as files:
                fault = LocalFolder(files).fault()
                if fault:
                    log(f"warning: {fault} Skipping it.")
                    continue
                LocalFolder(self.run_dir / kept).put(files)
            complete(self.run_dir / kept)
            if not isinstance(self.folder, LocalFolder):
                (self.folder / kept).put(self.run_dir / kept)
            return
        raise RunError(
            f"{self._checkpoints.where} has no undamaged checkpoint with a finite validation metric. "
            "Remove the run and train it again."
        )


def free_name(step: int, taken: Collection[str]) -> str:
    """Return a new checkpoint's name: names sort by step, then by attempt; Ray takes equal names for one checkpoint."""
    names = (f"{_PREFIX}{step:010d}_{attempt:03d}" for attempt in range(1000))
    return next(name for name in names if name not in taken and f"{_BROKEN}{name}" not in taken)


def _finite_scores(reports: Mapping[str, dict[str, Any]]) -> dict[str, float]:
    scores = {name: report.get(SCORE) for name, report in reports.items()}
    return {name: score for name, score in scores.items() if score is not None and math.isfinite(score)}
