"""Metrics, artifacts and the status of one MLflow run, written to disk first and delivered in the background.

An outbox is a folder with two delivery logs, `metrics.jsonl` and `artifacts.jsonl`. A line is appended before anything
is sent, and `LOG.offset` moves once MLflow has confirmed the lines before it. After a crash in between, the same lines
are sent again: MLflow ignores a metric that it already has (key, value, timestamp and step), and repeating the other
calls changes nothing.
"""

import os
import shutil
import threading
import time
from collections.abc import Mapping
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path
from typing import Annotated, Literal

from pydantic import AfterValidator, Field

from dmvae.config.section import scrub
from dmvae.data.records import Record
from dmvae.platform.tracking.delivery_log import DeliveryLog, Entry, hold_lock
from dmvae.platform.tracking.tracked_run import TrackedRun, archive_other_run

Ending = Literal["FINISHED", "FAILED", "KILLED"]
_Whole = Annotated[int, Field(ge=0, lt=2**63)]  # what databases hold


def _check_inside(path: str | None) -> str | None:
    if path is not None and (path.startswith("/") or ".." in path.split("/")):
        raise ValueError("artifact_path must be a folder of the run in MLflow")
    return path


class MetricsLine(Record):
    """Metrics of one step."""

    metrics: dict[str, float]
    step: _Whole
    timestamp: _Whole


class StatusLine(Record):
    """A change of the run's status, and why if that needs saying."""

    status: Literal["RUNNING", "FINISHED", "FAILED", "KILLED"]
    reason: str = ""
    timestamp: _Whole


class ArtifactLine(Record):
    """A file or folder to upload, by its path from the outbox, inside the folder of the run."""

    artifact: str
    artifact_path: Annotated[str | None, AfterValidator(_check_inside)] = None
    timestamp: _Whole = 0


class _Environment:
    """Environment variables that are set while at least one block is inside, and restored afterwards."""

    def __init__(self, values: Mapping[str, str]) -> None:
        self._values, self._before, self._inside = values, dict[str, str | None](), 0
        self._lock = threading.Lock()

    def __enter__(self) -> None:
        with self._lock:
            if self._inside == 0:
                self._before = {name: os.environ.get(name) for name in self._values}
                os.environ.update(self._values)
            self._inside += 1

    def __exit__(self, *_: object) -> None:
        with self._lock:
            self._inside -= 1
            for name, value in self._before.items() if self._inside == 0 else ():
                if value is None:
                    os.environ.pop(name, None)
                else:
                    os.environ[name] = value


# the outbox retries by itself, and MLflow's own retries would block a thread for minutes; the links that MLflow prints
# contain passwords
fail_fast = _Environment(
    {
        "MLFLOW_HTTP_REQUEST_MAX_RETRIES": "0",
        "MLFLOW_HTTP_REQUEST_TIMEOUT": "30",
        "MLFLOW_SUPPRESS_PRINTING_URL_TO_STDOUT": "true",
    }
)


class Outbox:
    """Records one MLflow run: on disk at once, delivered in the background; one process at a time, rank 0.

    No call waits for MLflow, and none fails because MLflow is unreachable. The steps of a metric only increase: a step
    that the outbox already has is skipped, so a resumed run may log steps again that it had logged before.

    Args:
        run: to record.
        background: whether to deliver in the background; else nothing is delivered until `drain`.
        wait_seconds: how long to wait for another process that holds the outbox.

    Raises:
        TrackingError: if another process still holds the outbox after `wait_seconds`.
    """

    def __init__(self, run: TrackedRun, *, background: bool = True, wait_seconds: float | int = 30.0) -> None:
        self._run = replace(run, outbox_dir=run.outbox_dir.absolute())
        self._dir = self._run.outbox_dir
        self._dir.mkdir(parents=True, exist_ok=True)
        self.status, self._last_step = "RUNNING", dict[str, int]()
        with ExitStack() as stack:
            stack.enter_context(hold_lock(self._dir / "spool.lock", wait_seconds))
            stack.enter_context(fail_fast)
            archive_other_run(self._dir, run.run_id)
            self._run.write_down()
            metrics, artifacts = self._dir / "metrics.jsonl", self._dir / "artifacts.jsonl"
            self._metrics = DeliveryLog(metrics, MetricsLine | StatusLine, self._send_metrics, batch_size=100)
            stack.callback(self._metrics.close, 0)
            self._artifacts = DeliveryLog(artifacts, ArtifactLine, self._send_artifacts, batch_size=1)
            for entry in self._metrics.entries():
                self.status = entry.get("status", self.status)
                self._last_step.update(dict.fromkeys(entry.get("metrics", ()), entry.get("step", 0)))
            self._stack = stack.pop_all()
        if background:
            self._metrics.start()
            self._artifacts.start()

    def __enter__(self) -> "Outbox":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    @property
    def num_rejected(self) -> int:
        """How many values MLflow has rejected through this object; they are kept in files beside the logs."""
        return self._metrics.num_rejected + self._artifacts.num_rejected

    def log_metrics(self, metrics: Mapping[str, float | int], step: int) -> None:
        """Record metrics at a step; NaN is stored as it is, infinities as 1.8e308.

        Raises:
            OSError: if the disk is full or cannot be written.
        """
        fresh = {key: float(value) for key, value in metrics.items() if step > self._last_step.get(key, step - 1)}
        if fresh:
            self.mark_running()
            self._metrics.append({"metrics": fresh, "step": step, "timestamp": _now()})
            self._last_step.update(dict.fromkeys(fresh, step))

    def log_artifact(self, local_path: Path, artifact_path: str | None = None) -> None:
        """Queue a file or folder for upload to `artifact_path`; it must not change before it is uploaded.

        What lies outside the folder of the run is copied into the outbox first: nothing else is ever uploaded.

        Raises:
            ValueError: if `local_path` does not exist.
            OSError: if it cannot be copied.
        """
        if not local_path.exists():
            raise ValueError(f"Artifact not found: {local_path}.")
        self.mark_running()
        if not local_path.resolve().is_relative_to(self._run.folder):
            target = self._dir / "files" / local_path.name
            shutil.rmtree(target, ignore_errors=True)
            target.parent.mkdir(exist_ok=True)
            local_path = Path((shutil.copytree if local_path.is_dir() else shutil.copy2)(local_path, target))
        relative = os.path.relpath(local_path.absolute(), self._dir)
        self._artifacts.append({"artifact": relative, "artifact_path": artifact_path, "timestamp": _now()})

    def mark_running(self) -> None:
        """Record that the run is running again, if it had ended."""
        if self.status != "RUNNING":
            self._set_status("RUNNING", "resumed")

    def end(self, status: Ending, reason: str = "") -> None:
        """Record that the run has ended, and why if that needs saying."""
        self._set_status(status, reason)

    def drain(self) -> int:
        """Deliver everything now; return the number of lines.

        Raises:
            UnreachableError: if MLflow does not answer.
        """
        return self._metrics.drain() + self._artifacts.drain()

    def close(self, timeout_seconds: float | int = 10.0) -> bool:
        """Deliver for up to `timeout_seconds` and release the outbox; return whether everything was delivered."""
        deadline = time.monotonic() + timeout_seconds
        logs = (self._metrics, self._artifacts)
        delivered = [log.close(max(0.0, deadline - time.monotonic())) for log in logs]
        self._stack.close()
        return all(delivered)

    def _send_metrics(self, entries: list[Entry]) -> list[Entry]:
        # here and not above: importing MLflow takes seconds, which training need not wait for
        from dmvae.platform.tracking.mlflow_delivery import deliver_metrics

        return deliver_metrics(self._run, entries)

    def _send_artifacts(self, entries: list[Entry]) -> list[Entry]:
        from dmvae.platform.tracking.mlflow_delivery import deliver_artifacts

        return deliver_artifacts(self._run, entries)

    def _set_status(self, status: str, reason: str) -> None:
        self.status = status
        self._metrics.append({"status": status, "reason": scrub(reason)[:500], "timestamp": _now()})


def _now() -> int:
    return int(time.time() * 1000)
