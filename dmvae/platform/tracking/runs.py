"""Open MLflow runs from the driver, end them, and deliver later what MLflow could not take.

All calls use a client with an explicit URI and run id; MLflow's global state is neither read nor changed.
"""

import json
import logging
import os
import sqlite3
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import closing, contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, TypeVar

from mlflow import MlflowClient
from mlflow.entities import Dataset, DatasetInput, InputTag, Param, RunTag
from mlflow.exceptions import MlflowException

from dmvae.config.errors import Stopped
from dmvae.config.section import scrub
from dmvae.config.tracking import TrackingConfig
from dmvae.data.records import RecordError
from dmvae.platform.resume import flatten
from dmvae.platform.tracking.delivery_log import InUseError, TrackingError, UnreachableError, hold_lock
from dmvae.platform.tracking.environment import environment_tags
from dmvae.platform.tracking.mlflow_delivery import RefusedError, answers, connect, is_gone, sqlite_path
from dmvae.platform.tracking.outbox import Ending, Outbox, fail_fast
from dmvae.platform.tracking.tracked_run import RUN_FILE, TrackedRun, read_run_record

T = TypeVar("T")

_log = logging.getLogger(__name__)
_TIMEOUT_SECONDS = 12.0
RESUME_SECONDS = 600.0
"""How long a run or study that resumes waits for MLflow; a new one tells of a wrong address at once."""
_RETRY_SECONDS = 2.0
_MIGRATION_SECONDS = 120.0  # to create a database file; a busy machine needs many times as long as an idle one
_PARAM_LENGTH, _TAG_LENGTH, _DIGEST_LENGTH = 6000, 5000, 36


@dataclass(frozen=True)
class DatasetRecord:
    """What MLflow shows of a run's dataset."""

    name: str
    digest: str
    source: str
    profile: Mapping[str, Any] = field(default_factory=dict)
    context: str = "training"


@dataclass(frozen=True)
class SyncResult:
    """How the delivery of one outbox ended.

    Attributes:
        outbox_dir: its folder.
        run_id: of the MLflow run.
        state: `in use` by another process, `delivered`, or `undelivered` for the reason in `message`.
        lines: delivered now.
        rejected: lines and values that can never be delivered; they are kept beside the logs with the reason.
        killed: whether the run was marked as KILLED.
        message: why it is not delivered.
    """

    outbox_dir: Path
    run_id: str
    state: Literal["delivered", "in use", "undelivered"]
    lines: int = 0
    rejected: int = 0
    killed: bool = False
    message: str = ""


@dataclass(frozen=True)
class Waiting:
    """How to wait for MLflow, whose restart takes a minute or two.

    Attributes:
        seconds: at most; a first attempt is always made.
        log: called with a line when the waiting begins.
    """

    seconds: float
    log: Callable[[str], None]

    def until(self, call: Callable[[], T]) -> T:
        """Return `call()` once MLflow answers it.

        Raises:
            UnreachableError: if MLflow still does not answer when the time is over.
        """
        deadline, is_told = time.monotonic() + self.seconds, False
        while True:
            try:
                return call()
            except UnreachableError as error:
                if time.monotonic() >= deadline:
                    raise
                if not is_told:
                    self.log(
                        f"warning: MLflow does not answer ({error}); waiting for it up to {self.seconds / 60:.0f} min"
                    )
                is_told = True
                time.sleep(_RETRY_SECONDS)


def tracking_uri(config: TrackingConfig) -> str:
    """Return the tracking URI; a SQLite path is made absolute, for workers with another working directory."""
    uri = config.uri or os.environ.get("MLFLOW_TRACKING_URI") or "sqlite:///mlflow.db"
    database = sqlite_path(uri)
    return uri if database is None else f"sqlite:///{database.absolute()}"


def format_params(settings: Mapping[str, Any]) -> dict[str, str]:
    """Return settings as MLflow's parameters: `optim.learning_rate` is "0.001"; lists are JSON; secrets are removed."""
    return {key: _shorten(scrub(_text(value)), _PARAM_LENGTH) for key, value in flatten(settings).items()}


def _text(value: Any) -> str:
    return json.dumps(value, default=str) if isinstance(value, list | tuple | Mapping) else str(value)


@contextmanager
def open_run(
    config: TrackingConfig,
    name: str,
    outbox_dir: Path,
    params: Mapping[str, Any],
    tags: Mapping[str, str] | None = None,
    dataset: DatasetRecord | None = None,
    waiting: Waiting | None = None,
) -> Iterator[TrackedRun]:
    """Create an MLflow run, or reopen the run that `outbox_dir` belongs to, and end it after the block.

    Leaving the block ends the run as FINISHED, FAILED (an exception) or KILLED (an interrupt), unless the outbox says
    that it has ended. Database and experiment are created here, so that workers never race to create them.

    Args:
        config: names the server and the experiment.
        name: of the run.
        outbox_dir: the folder of its `Outbox`.
        params: settings to record.
        tags: to set beside those of the environment.
        dataset: to record as the run's input.
        waiting: how long to wait for a server that does not answer; None: 12 seconds.

    Raises:
        TrackingError: if a server cannot be reached in that time or rejects the run, if the recorded run was
            deleted, or if another driver uses `outbox_dir`.
    """
    uri, outbox_dir = tracking_uri(config), outbox_dir.absolute()
    outbox_dir.mkdir(parents=True, exist_ok=True)

    def establish() -> str:
        client, experiment_id = _with_timeout(_timeout_of(uri), lambda: _open_experiment(uri, config.experiment))
        with answers(uri):
            run_id = _reopen(client, uri, outbox_dir) or _create(client, experiment_id, name, uri, outbox_dir)
            _describe(client, run_id, format_params(params), {**environment_tags(), **(tags or {})}, dataset)
        return run_id

    with hold_lock(outbox_dir / "driver.lock"):
        with fail_fast, _explained(uri):
            run_id = establish() if waiting is None else waiting.until(establish)
        run = TrackedRun(uri, run_id, outbox_dir)
        status: Ending = "KILLED"
        reason = "interrupted"
        try:
            yield run
            status, reason = "FINISHED", ""
        except Stopped as stop:
            reason = str(stop)
            raise
        except Exception as error:
            status, reason = "FAILED", f"{type(error).__name__}: {error}"
            raise
        finally:
            end_run(run, status, reason)


def end_run(run: TrackedRun, status: Ending, reason: str = "", timeout_seconds: float | int = 10.0) -> bool:
    """End `run` unless its outbox says that it has ended; return whether MLflow has everything, and warn if not."""
    try:
        with Outbox(run) as outbox:
            if outbox.status == "RUNNING":
                outbox.end(status, reason)
            delivered = outbox.close(timeout_seconds)
    except (TrackingError, OSError) as error:
        _log.warning("The end of run %s (%s) could not be recorded: %s", run.run_id, status, error)
        return False
    if not delivered:
        command = sync_command(run.outbox_dir, run.uri)
        _log.warning("Some metrics are not delivered to MLflow yet. Run later: %s", command)
    return delivered


def sync(folder: Path, uri: str | None = None) -> list[SyncResult]:
    """Deliver every outbox under `folder` that no process uses; repeating it changes nothing.

    A run whose processes ended without recording how is marked as KILLED. The server that a run's folder names is never
    trusted: the folder may come from a stranger.

    Args:
        folder: of one run or of several.
        uri: where every run is delivered; None takes the configured server, and leaves runs that name another one.
    """
    results, used = list[SyncResult](), with_credentials(uri or tracking_uri(TrackingConfig()))
    reason: str | None = None
    for file in sorted(folder.rglob(RUN_FILE)):
        outbox_dir, run_id = file.parent, ""
        try:
            record = read_run_record(outbox_dir)
            if record is None:
                continue
            run_id = record.run_id
            if uri is None and not is_configured(record.uri):
                raise TrackingError(
                    f"{file} names the MLflow server {scrub(record.uri)}, but the configured one is {scrub(used)}. "
                    f"If you trust it, run: {sync_command(outbox_dir, record.uri)}"
                )
            if reason is None:
                reason = why_unreachable(used)
            if reason:
                raise UnreachableError(reason)
            results.append(_sync_one(TrackedRun(used, run_id, outbox_dir), is_other=scrub(used) != record.uri))
        except (TrackingError, UnreachableError, RecordError, OSError) as error:
            results.append(SyncResult(outbox_dir, run_id, "undelivered", message=str(error)))
    return results


def is_configured(uri: str) -> bool:
    """Return whether a recorded URI is that of the configured server, credentials aside."""
    return scrub(uri) == scrub(tracking_uri(TrackingConfig()))


def with_credentials(uri: str) -> str:
    """Return MLFLOW_TRACKING_URI if it is `uri` with credentials, else `uri`."""
    full = os.environ.get("MLFLOW_TRACKING_URI", "")
    return full if scrub(full) == uri else uri


def sync_command(outbox_dir: Path, uri: str) -> str:
    """Return the command that delivers an outbox to `uri`."""
    return f"python -m jobs.sync {outbox_dir}" + ("" if is_configured(uri) else f" --tracking.uri {scrub(uri)}")


def _sync_one(run: TrackedRun, is_other: bool) -> SyncResult:
    """Deliver an outbox; `is_other` tells that its folder names another server, which may know the run by another id.

    Raises:
        TrackingError, UnreachableError, OSError: if it cannot be delivered.
    """
    killed = False
    if is_other and is_gone(connect(run.uri), run):
        raise TrackingError(f"{scrub(run.uri)} has no run {run.run_id}. Name the server that has it: --tracking.uri.")
    try:
        with hold_lock(run.outbox_dir / "driver.lock"), Outbox(run, background=False, wait_seconds=0) as outbox:
            killed = outbox.status == "RUNNING"
            if killed:
                outbox.end("KILLED", "its processes ended without recording how; marked by sync")
            lines = outbox.drain()
            return SyncResult(run.outbox_dir, run.run_id, "delivered", lines, outbox.num_rejected, killed)
    except InUseError as error:
        return SyncResult(run.outbox_dir, run.run_id, "in use", message=str(error))
    except UnreachableError as error:
        return SyncResult(run.outbox_dir, run.run_id, "undelivered", killed=killed, message=str(error))


def why_unreachable(uri: str) -> str:
    """Return why MLflow at `uri` cannot be reached, or an empty string."""
    try:
        with fail_fast:
            _with_timeout(_timeout_of(uri), lambda: _ping(uri))
    except (RefusedError, UnreachableError) as error:
        return str(error)
    return ""


def _ping(uri: str) -> None:
    with answers(uri):
        connect(uri).search_experiments(max_results=1)


@contextmanager
def _explained(uri: str) -> Iterator[None]:
    try:
        yield
    except (RefusedError, UnreachableError) as error:
        raise TrackingError(
            f"Cannot reach MLflow at {scrub(uri)!r}: {error}. Start the server, or correct tracking.uri or "
            "MLFLOW_TRACKING_URI."
        ) from None


def _timeout_of(uri: str) -> float:
    return _TIMEOUT_SECONDS if sqlite_path(uri) is None else 2 * _MIGRATION_SECONDS


def _with_timeout(seconds: float | int, call: Callable[[], T]) -> T:
    """Return `call()`, or stop waiting for it: the timeouts of database drivers are minutes."""
    outcome: list[T] = []
    failure: list[RefusedError | UnreachableError | TrackingError] = []

    def work() -> None:
        try:
            outcome.append(call())
        except (RefusedError, UnreachableError, TrackingError) as error:
            failure.append(error)

    thread = threading.Thread(target=work, daemon=True)
    thread.start()
    thread.join(seconds)
    if outcome:
        return outcome[0]
    raise failure[0] if failure else UnreachableError(f"no answer within {seconds:g} seconds")


def _open_experiment(uri: str, experiment: str) -> tuple[MlflowClient, str]:
    """Return a client and the experiment's id; create database and experiment if they do not exist."""
    database = sqlite_path(uri)
    location = None if database is None else (database.parent / "mlruns" / experiment).as_uri()
    with _migration_lock(database), answers(uri):
        client = connect(uri)
        found = client.get_experiment_by_name(experiment)
        if found is None:
            try:
                # without this, MLflow's pages are about language models
                kind = {"mlflow.experimentKind": "custom_model_development"}
                return client, client.create_experiment(experiment, location, tags=kind)
            except MlflowException:
                found = client.get_experiment_by_name(experiment)  # another driver has created it
                if found is None:
                    raise
    if found.lifecycle_stage == "deleted":
        raise TrackingError(
            f"MLflow experiment {experiment!r} was deleted. Restore it, or set tracking.experiment to another name."
        )
    return client, found.experiment_id


@contextmanager
def _migration_lock(database: Path | None) -> Iterator[None]:
    """Let one process at a time create a database file: MLflow's migrations fail if two run at once."""
    if database is None:
        yield
        return
    try:
        database.parent.mkdir(parents=True, exist_ok=True)
        # MLflow retries an impossible path for minutes; SQLite fails at once
        with closing(sqlite3.connect(database, _TIMEOUT_SECONDS)) as connection:
            connection.execute("PRAGMA schema_version")
        with hold_lock(database.with_name(database.name + ".lock"), _MIGRATION_SECONDS):
            yield
    except (OSError, sqlite3.Error) as error:
        raise UnreachableError(f"{database}: {error}") from None


def _reopen(client: MlflowClient, uri: str, outbox_dir: Path) -> str | None:
    """Mark the run that `outbox_dir` belongs to as RUNNING and return its id; None for a new folder."""
    record = read_run_record(outbox_dir)
    if record is None:
        return None
    run = TrackedRun(uri, record.run_id, outbox_dir)
    if is_gone(client, run):
        raise TrackingError(
            f"Cannot resume MLflow run {run.run_id}: {scrub(uri)} does not have it, or has deleted it. Correct the "
            f"URI, restore the run, or remove {outbox_dir} to record a new one."
        )
    with Outbox(run) as outbox:
        outbox.mark_running()
    return run.run_id


def _create(client: MlflowClient, experiment_id: str, name: str, uri: str, outbox_dir: Path) -> str:
    run_id: str = client.create_run(experiment_id, run_name=name).info.run_id
    TrackedRun(uri, run_id, outbox_dir).write_down()
    return run_id


def _describe(
    client: MlflowClient, run_id: str, params: dict[str, str], tags: dict[str, str], dataset: DatasetRecord | None
) -> None:
    """Log parameters, tags and dataset; a changed parameter becomes a tag, since MLflow keeps the first value."""
    known = client.get_run(run_id).data.params
    changed = {key: value for key, value in params.items() if known.get(key, value) != value}
    if changed:
        _log.warning("Run %s resumes with changed settings, recorded as tags `changed.KEY`: %s", run_id, changed)
    tags |= {f"changed.{key}": value for key, value in changed.items()}
    client.log_batch(
        run_id,
        params=[Param(key, value) for key, value in params.items() if key not in known],
        tags=[RunTag(key, _shorten(scrub(str(value)), _TAG_LENGTH)) for key, value in tags.items()],
    )
    if dataset is not None:
        client.log_inputs(run_id, [_dataset_input(dataset)])


def _dataset_input(record: DatasetRecord) -> DatasetInput:
    source = scrub(record.source)
    scheme, separator, _ = source.partition("://")
    dataset = Dataset(
        name=record.name,
        digest=record.digest[:_DIGEST_LENGTH],
        source_type=scheme if separator else "local",
        source=json.dumps({"uri": source}),
        profile=json.dumps({**record.profile, "digest": record.digest}, default=str),
    )
    return DatasetInput(dataset, [InputTag("mlflow.data.context", record.context)])


def _shorten(text: str, length: int) -> str:
    return text if len(text) <= length else text[: length - 3] + "..."
