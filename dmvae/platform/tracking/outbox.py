"""Metrics, artifacts and the status of one MLflow run, written to disk first and delivered in the background.

A spool is a folder with two lanes, `metrics.jsonl` and `artifacts.jsonl`. A line is appended before anything is sent,
and `LANE.offset` moves once MLflow has confirmed what is before it. A crash in between sends the same lines again:
MLflow ignores a metric it already has (key, value, timestamp and step), and the other calls say the same thing twice.
"""

import json
import os
import re
import threading
import time
from collections.abc import Mapping
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

from dmvae.data.files import write_atomically
from dmvae.platform.tracking.delivery_log import DeliveryLog, Entry, hold

Ending = Literal["FINISHED", "FAILED", "KILLED"]

RUN_FILE = "mlflow.json"

# The spool retries by itself; MLflow's own retries would keep a thread for minutes. Its printed links repeat passwords.
_BRISK = {
    "MLFLOW_HTTP_REQUEST_MAX_RETRIES": "0",
    "MLFLOW_HTTP_REQUEST_TIMEOUT": "30",
    "MLFLOW_SUPPRESS_PRINTING_URL_TO_STDOUT": "true",
}


def scrub(text: str) -> str:
    """Return `text` without the user names, passwords and tokens of the URLs in it."""
    text = re.sub(r"(://)[^/\s]*@", r"\1", text)
    return re.sub(r"(?i)([?&][^=&\s]*(?:token|password|secret|signature|sig|key)=)[^&\s]+", r"\1***", text)


class _Scope:
    """Environment variables that hold while at least one block is inside; afterwards the user's own are back."""

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


brisk_requests = _Scope(_BRISK)


@dataclass(frozen=True)
class TrackedRun:
    """All that a worker needs to write to a run; it travels to other processes."""

    uri: str = field(repr=False)
    run_id: str
    spool_dir: Path

    def spool(self, *, background: bool = True, wait_seconds: float | int = 30.0) -> "Outbox":
        """Open the run's spool for writing: one process at a time, rank 0."""
        return Outbox(self.spool_dir, self.uri, self.run_id, background=background, wait_seconds=wait_seconds)


class Outbox:
    """What a training process writes about its run: kept on disk at once, delivered in the background.

    No call waits for MLflow, and none fails because MLflow is away. The steps of a metric only grow: a step that the
    spool already has is skipped, so a run that goes on from a checkpoint may log the steps behind it again.

    `background=False` delivers nothing until `drain`.

    Raises:
        TrackingError: if another process still writes to this spool after `wait_seconds`.
    """

    def __init__(
        self, spool_dir: Path, uri: str, run_id: str, *, background: bool = True, wait_seconds: float | int = 30.0
    ) -> None:
        self._dir = spool_dir.absolute()
        self._dir.mkdir(parents=True, exist_ok=True)
        self._run = TrackedRun(uri, run_id, self._dir)
        self.status, self._last_step = "RUNNING", dict[str, int]()
        with ExitStack() as stack:
            stack.enter_context(hold(self._dir / "spool.lock", wait_seconds))
            stack.enter_context(brisk_requests)
            set_aside(self._dir, run_id)
            record_run(self._dir, uri, run_id)
            self._metrics = DeliveryLog(self._dir / "metrics.jsonl", self._send_metrics, batch_size=100)
            self._artifacts = DeliveryLog(self._dir / "artifacts.jsonl", self._send_artifacts, batch_size=1)
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
        """How many values MLflow has refused through this object; they are kept beside the spool."""
        return self._metrics.num_rejected + self._artifacts.num_rejected

    def log(self, metrics: Mapping[str, float | int], step: int) -> None:
        """Record the values of `metrics` at `step`, whatever they are: MLflow takes NaN, and infinities as 1.8e308."""
        fresh = {key: float(value) for key, value in metrics.items() if step > self._last_step.get(key, step - 1)}
        if fresh:
            self.take_up()
            self._metrics.append({"metrics": fresh, "step": step, "timestamp": _now()})
            self._last_step.update(dict.fromkeys(fresh, step))

    def artifact(self, local_path: Path, artifact_path: str | None = None) -> None:
        """Have a file or folder uploaded into the folder `artifact_path` of the run; it must stay as it is until then.

        Raises:
            ValueError: if there is nothing at `local_path`.
        """
        if not local_path.exists():
            raise ValueError(f"an artifact exists when it is queued; got {local_path}. Write it first.")
        self.take_up()
        relative = os.path.relpath(local_path.absolute(), self._dir)
        self._artifacts.append({"artifact": relative, "artifact_path": artifact_path, "timestamp": _now()})

    def take_up(self) -> None:
        """Record that the run goes on, if the spool says that it ended."""
        if self.status != "RUNNING":
            self._set_status("RUNNING", "taken up again")

    def end(self, status: Ending, reason: str = "") -> None:
        """Record that the run is over, and why if that needs saying."""
        self._set_status(status, reason)

    def drain(self) -> int:
        """Deliver everything here and now; return the number of lines.

        Raises:
            UnreachableError: if MLflow does not answer.
        """
        return self._metrics.drain() + self._artifacts.drain()

    def close(self, timeout_seconds: float | int = 10.0) -> bool:
        """Deliver what `timeout_seconds` allow and let go of the spool; return whether MLflow has everything."""
        deadline = time.monotonic() + timeout_seconds
        lanes = (self._metrics, self._artifacts)
        delivered = [lane.close(max(0.0, deadline - time.monotonic())) for lane in lanes]
        self._stack.close()
        return all(delivered)

    def _send_metrics(self, entries: list[Entry]) -> list[Entry]:
        from dmvae.platform.tracking import (
            mlflow_delivery as courier,  # MLflow's import takes two seconds, which nobody waits for here
        )

        return courier.deliver_metrics(self._run, entries)

    def _send_artifacts(self, entries: list[Entry]) -> list[Entry]:
        from dmvae.platform.tracking import mlflow_delivery as courier

        return courier.deliver_artifacts(self._run, entries)

    def _set_status(self, status: str, reason: str) -> None:
        self.status = status
        self._metrics.append({"status": status, "reason": scrub(reason)[:500], "timestamp": _now()})


def record_run(spool_dir: Path, uri: str, run_id: str) -> None:
    """Write down which run a spool belongs to, unless that is known; no secret of `uri` is written."""
    path = spool_dir / RUN_FILE
    if not path.exists():
        write_atomically(path, json.dumps({"run_id": run_id, "uri": scrub(uri)}))


def set_aside(spool_dir: Path, run_id: str) -> None:
    """Move a spool of another run, which this node kept of a run at the same URI, to where `sync` still finds it."""
    path = spool_dir / RUN_FILE
    other = json.loads(path.read_text())["run_id"] if path.exists() else run_id
    if other != run_id:
        aside = spool_dir.with_name(f"{spool_dir.name}-{other}")
        aside.mkdir(exist_ok=True)
        for file in spool_dir.iterdir():
            if file.suffix != ".lock":
                file.rename(aside / file.name)


def _now() -> int:
    return int(time.time() * 1000)
