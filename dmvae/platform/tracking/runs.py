"""MLflow runs: opened by the driver, written through a spool, brought in later where MLflow was away.

Everything goes through a client with an explicit URI and run id; MLflow's global state is neither read nor set.
"""

import json
import logging
import os
import sqlite3
import subprocess
import threading
from collections.abc import Callable, Iterator, Mapping
from contextlib import closing, contextmanager
from dataclasses import dataclass, field
from getpass import getuser
from importlib.metadata import version
from pathlib import Path
from platform import python_version
from shutil import which
from socket import gethostname
from typing import Any, Literal, TypeVar

from mlflow import MlflowClient
from mlflow.entities import Dataset, DatasetInput, InputTag, Param, RunTag
from mlflow.exceptions import MlflowException

from dmvae.config.tracking import TrackingConfig
from dmvae.platform.resume import flatten
from dmvae.platform.tracking.delivery_log import TrackingError, UnreachableError, hold
from dmvae.platform.tracking.mlflow_delivery import RefusedError, answers, connect, is_gone, sqlite_path
from dmvae.platform.tracking.outbox import RUN_FILE, Ending, TrackedRun, brisk_requests, record_run, scrub

T = TypeVar("T")

_log = logging.getLogger(__name__)
_PATIENCE_SECONDS = 12.0
_MIGRATION_SECONDS = 120.0  # a new database file takes 3 s, and several times that on a busy machine
_ROOT = Path(__file__).parents[3]
_PARAM_LENGTH, _TAG_LENGTH, _DIGEST_LENGTH = 6000, 5000, 36


@dataclass(frozen=True)
class DatasetRecord:
    """What MLflow shows of the data behind a run."""

    name: str
    digest: str
    source: str
    profile: Mapping[str, Any] = field(default_factory=dict)
    context: str = "training"


@dataclass(frozen=True)
class SyncResult:
    """What became of one spool; `lines` were delivered now, `rejected` of their values refused by MLflow."""

    spool_dir: Path
    run_id: str
    state: Literal["delivered", "in use", "undelivered"]
    lines: int = 0
    rejected: int = 0
    killed: bool = False
    message: str = ""


def tracking_uri(config: TrackingConfig) -> str:
    """Return the URI that `config` stands for, with an sqlite file made absolute for workers that start elsewhere."""
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
    spool_dir: Path,
    params: Mapping[str, Any],
    tags: Mapping[str, str] | None = None,
    dataset: DatasetRecord | None = None,
) -> Iterator[TrackedRun]:
    """Open the run `name` from the driver, or take up the one that `spool_dir` belongs to, and end it after the block.

    Leaving the block ends the run as FINISHED, FAILED (an exception) or KILLED (an interrupt), unless its spool already
    says how it ended. Database and experiment are made here, so that workers never race for them.

    Raises:
        TrackingError: if a server cannot be reached within 12 seconds or refuses the run, if the recorded run is gone,
            or if another driver works on `spool_dir`.
    """
    uri, spool_dir = tracking_uri(config), spool_dir.absolute()
    spool_dir.mkdir(parents=True, exist_ok=True)
    with hold(spool_dir / "driver.lock"):
        with brisk_requests, _explained(uri):
            client, experiment_id = _within(_patience(uri), lambda: _open_experiment(uri, config.experiment))
            with answers(uri):
                run_id = _take_up(client, uri, spool_dir) or _create(client, experiment_id, name, uri, spool_dir)
                _describe(client, run_id, format_params(params), {**_environment(), **(tags or {})}, dataset)
        run = TrackedRun(uri, run_id, spool_dir)
        status: Ending = "KILLED"
        reason = "interrupted"
        try:
            yield run
            status, reason = "FINISHED", ""
        except Exception as error:
            status, reason = "FAILED", f"{type(error).__name__}: {error}"
            raise
        finally:
            end_run(run, status, reason)


def end_run(run: TrackedRun, status: Ending, reason: str = "", timeout_seconds: float | int = 10.0) -> bool:
    """End `run` unless its spool says that it has ended; return whether MLflow has everything, and warn if not."""
    try:
        with run.spool() as spool:
            if spool.status == "RUNNING":
                spool.end(status, reason)
            delivered = spool.close(timeout_seconds)
    except (TrackingError, OSError) as error:
        _log.warning("the end of run %s (%s) is not recorded: %s", run.run_id, status, error)
        return False
    if not delivered:
        _log.warning("MLflow does not have all of this run yet; later: python -m jobs.sync %s", run.spool_dir)
    return delivered


def sync(folder: Path) -> list[SyncResult]:
    """Bring in every spool under `folder` that nobody works on; doing it again changes nothing.

    A run whose processes are gone without having said how it ended is marked KILLED. Recorded URIs hold no credentials:
    where MLFLOW_TRACKING_URI is the same URI with them, it is used instead.
    """
    results, away = list[SyncResult](), dict[str, str]()
    for record in sorted(folder.rglob(RUN_FILE)):
        recorded = json.loads(record.read_text())
        run = TrackedRun(_with_credentials(recorded["uri"]), recorded["run_id"], record.parent)
        if run.uri not in away:
            away[run.uri] = _why_away(run.uri)
        if away[run.uri]:
            results.append(SyncResult(run.spool_dir, run.run_id, "undelivered", message=away[run.uri]))
        else:
            results.append(_sync_one(run))
    return results


def _sync_one(run: TrackedRun) -> SyncResult:
    killed = False
    try:
        with hold(run.spool_dir / "driver.lock"), run.spool(background=False, wait_seconds=0) as spool:
            killed = spool.status == "RUNNING"
            if killed:
                spool.end("KILLED", "its processes ended without saying how; marked by sync")
            lines = spool.drain()
            return SyncResult(run.spool_dir, run.run_id, "delivered", lines, spool.num_rejected, killed)
    except TrackingError as error:
        return SyncResult(run.spool_dir, run.run_id, "in use", message=str(error))
    except UnreachableError as error:
        return SyncResult(run.spool_dir, run.run_id, "undelivered", killed=killed, message=str(error))


def _with_credentials(uri: str) -> str:
    full = os.environ.get("MLFLOW_TRACKING_URI", "")
    return full if scrub(full) == uri else uri


def _why_away(uri: str) -> str:
    """Return why MLflow cannot be reached, or nothing if it can."""
    try:
        with brisk_requests:
            _within(_patience(uri), lambda: _ask(uri))
    except (RefusedError, UnreachableError) as error:
        return str(error)
    return ""


def _ask(uri: str) -> None:
    with answers(uri):
        connect(uri).search_experiments(max_results=1)


@contextmanager
def _explained(uri: str) -> Iterator[None]:
    try:
        yield
    except (RefusedError, UnreachableError) as error:
        raise TrackingError(
            f"a run is recorded in an MLflow that answers; got uri={scrub(uri)!r}: {error}. Start the server, or "
            "correct `tracking.uri` or MLFLOW_TRACKING_URI."
        ) from None


def _patience(uri: str) -> float:
    return _PATIENCE_SECONDS if sqlite_path(uri) is None else 2 * _MIGRATION_SECONDS


def _within(seconds: float | int, call: Callable[[], T]) -> T:
    """Return `call()`, or give up on it: database drivers have time limits of their own, of minutes."""
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
    """Return a client and the experiment's id, having made the database and the experiment if need be."""
    database = sqlite_path(uri)
    location = None if database is None else (database.parent / "mlruns" / experiment).as_uri()
    with _first_come(database), answers(uri):
        client = connect(uri)
        found = client.get_experiment_by_name(experiment)
        if found is None:
            try:
                # MLflow's pages then show curves and runs first, not language models
                kind = {"mlflow.experimentKind": "custom_model_development"}
                return client, client.create_experiment(experiment, location, tags=kind)
            except MlflowException:
                found = client.get_experiment_by_name(experiment)  # another driver was faster
                if found is None:
                    raise
    if found.lifecycle_stage == "deleted":
        raise TrackingError(
            f"an experiment to record in is not deleted; got {experiment!r}. Restore it or set `tracking.experiment`."
        )
    return client, found.experiment_id


@contextmanager
def _first_come(database: Path | None) -> Iterator[None]:
    """Let one process at a time fill a new database file: MLflow's migrations do not survive company."""
    if database is None:
        yield
        return
    try:
        database.parent.mkdir(parents=True, exist_ok=True)
        # MLflow tries a path that cannot work for minutes; sqlite says so at once.
        with closing(sqlite3.connect(database, _PATIENCE_SECONDS)) as connection:
            connection.execute("PRAGMA schema_version")
        with hold(database.with_name(database.name + ".lock"), _MIGRATION_SECONDS):
            yield
    except (OSError, sqlite3.Error) as error:
        raise UnreachableError(f"{database}: {error}") from None


def _take_up(client: MlflowClient, uri: str, spool_dir: Path) -> str | None:
    """Return the id of the run that `spool_dir` belongs to, RUNNING again, or None for a new folder."""
    record = spool_dir / RUN_FILE
    if not record.exists():
        return None
    run = TrackedRun(uri, json.loads(record.read_text())["run_id"], spool_dir)
    if is_gone(client, run):
        raise TrackingError(
            f"a run is taken up where it was recorded; got run {run.run_id}, which {scrub(uri)} does not have or has "
            f"deleted. Correct the URI, restore the run, or remove {spool_dir} to record a new one."
        )
    with run.spool() as spool:
        spool.take_up()
    return run.run_id


def _create(client: MlflowClient, experiment_id: str, name: str, uri: str, spool_dir: Path) -> str:
    run_id: str = client.create_run(experiment_id, run_name=name).info.run_id
    record_run(spool_dir, uri, run_id)
    return run_id


def _describe(
    client: MlflowClient, run_id: str, params: dict[str, str], tags: dict[str, str], dataset: DatasetRecord | None
) -> None:
    """Log parameters, tags and data; a parameter that changed since the run began becomes a tag, as MLflow keeps it."""
    known = client.get_run(run_id).data.params
    changed = {key: value for key, value in params.items() if known.get(key, value) != value}
    if changed:
        _log.warning("run %s goes on with other settings, tagged `changed.KEY`: %s", run_id, changed)
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


def _environment() -> dict[str, str]:
    """Return the versions, the host, the user and, in a checkout, the commit that a run was started with."""
    versions = {f"version.{name}": version(name) for name in ("torch", "ray", "mlflow")}
    source = {"mlflow.source.type": "JOB", "mlflow.source.name": "dmvae", "mlflow.user": _user()}
    return {"version.python": python_version(), **versions, "host": gethostname(), **source, **_commit()}


def _user() -> str:
    try:
        return getuser()
    except (KeyError, OSError):  # a container's user without a name
        return str(os.getuid())


def _commit() -> dict[str, str]:
    git = which("git")
    if git is None or not (_ROOT / ".git").exists():
        return {}
    describe = [git, "-C", str(_ROOT), "describe", "--always", "--dirty", "--abbrev=40", "--exclude=*"]
    answer = subprocess.run(describe, capture_output=True, text=True, check=False)  # noqa: S603
    if answer.returncode:
        return {}
    commit, dirty, _ = answer.stdout.strip().partition("-dirty")
    return {"mlflow.source.git.commit": commit, "git.dirty": str(bool(dirty)).lower()}


def _shorten(text: str, length: int) -> str:
    return text if len(text) <= length else text[: length - 3] + "..."
