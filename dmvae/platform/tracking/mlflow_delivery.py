"""Sends the lines of an outbox to MLflow, and tells rejected ones from those to retry."""

import logging
import os
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from itertools import groupby
from pathlib import Path

from mlflow import MlflowClient
from mlflow.entities import Metric
from mlflow.exceptions import MlflowException
from sqlalchemy.exc import SQLAlchemyError

from dmvae.config.section import scrub
from dmvae.platform.tracking.delivery_log import Entry, UnreachableError
from dmvae.platform.tracking.tracked_run import TrackedRun

REASON_TAG = "dmvae.reason"

# only what can never succeed: SQLAlchemy's pool timeout arrives as BAD_REQUEST, and an expired token may be renewed
_REJECTIONS = frozenset({"INVALID_PARAMETER_VALUE", "RESOURCE_DOES_NOT_EXIST"})
_HTTP_REJECTIONS = frozenset({400, 413})


class RefusedError(Exception):
    """MLflow rejected a call that can never succeed."""


def sqlite_path(uri: str) -> Path | None:
    """Return the file behind an sqlite URI, None for any other URI."""
    return Path(uri.removeprefix("sqlite:///")) if uri.startswith("sqlite:///") else None


@contextmanager
def answers(uri: str) -> Iterator[None]:
    """Raise `RefusedError` or `UnreachableError` in place of what MLflow raises, without secrets.

    A missing database file counts as unreachable: MLflow would create an empty one.
    """
    database = sqlite_path(uri)
    if database is not None and not database.exists():
        raise UnreachableError(f"{database} does not exist")
    try:
        yield
    except MlflowException as error:
        kind = RefusedError if error.error_code in _REJECTIONS else UnreachableError
        raise kind(_reason(error)) from None
    except ImportError as error:  # the driver of a database
        raise RefusedError(_reason(error)) from None
    except (OSError, SQLAlchemyError) as error:  # `requests` raises OSError
        status = getattr(getattr(error, "response", None), "status_code", None)
        kind = RefusedError if status in _HTTP_REJECTIONS else UnreachableError
        raise kind(_reason(error)) from None


def connect(uri: str) -> MlflowClient:
    """Return a client for `uri`.

    Raises:
        RefusedError: if MLflow does not support the URI.
        UnreachableError: if the database file does not exist.
    """
    logging.getLogger("mlflow.store.db.utils").addFilter(_has_no_traceback)  # a page for every attempt
    with answers(uri):
        return MlflowClient(uri)


def deliver_metrics(run: TrackedRun, entries: list[Entry]) -> list[Entry]:
    """Send metrics and changes of status in order; return the rejected ones."""
    client, rejected = connect(run.uri), list[Entry]()
    for is_metrics, group in groupby(entries, lambda entry: "metrics" in entry):
        if is_metrics:
            metrics = [
                Metric(key, value, entry["timestamp"], entry["step"])
                for entry in group
                for key, value in entry["metrics"].items()
            ]
            rejected += _log(client, run, metrics)
        else:
            rejected += _each(client, run, _set_status, group)
    return rejected


def deliver_artifacts(run: TrackedRun, entries: list[Entry]) -> list[Entry]:
    """Upload files and folders; return the rejected ones."""
    return _each(connect(run.uri), run, _upload, entries)


def is_gone(client: MlflowClient, run: TrackedRun) -> bool:
    """Return whether MLflow does not have the run, or has deleted it."""
    try:
        with answers(run.uri):
            return bool(client.get_run(run.run_id).info.lifecycle_stage == "deleted")
    except RefusedError:
        return True


def _has_no_traceback(record: logging.LogRecord) -> bool:
    return record.exc_info is None


def _reason(error: Exception) -> str:
    return scrub(str(error)).partition("\n")[0].rstrip(".")


def _log(client: MlflowClient, run: TrackedRun, metrics: list[Metric]) -> list[Entry]:
    try:
        with answers(run.uri), _refusals():
            client.log_batch(run.run_id, metrics)
    except RefusedError as error:
        if len(metrics) == 1 or is_gone(client, run):
            return [
                {"key": m.key, "value": m.value, "step": m.step, "timestamp": m.timestamp, "error": str(error)}
                for m in metrics
            ]
        middle = len(metrics) // 2
        return _log(client, run, metrics[:middle]) + _log(client, run, metrics[middle:])
    return []


def _each(
    client: MlflowClient,
    run: TrackedRun,
    send: Callable[[MlflowClient, TrackedRun, Entry], None],
    entries: Iterable[Entry],
) -> list[Entry]:
    rejected = list[Entry]()
    for entry in entries:
        try:
            with answers(run.uri), _refusals():
                send(client, run, entry)
        except RefusedError as error:
            rejected.append({**entry, "error": str(error)})
    return rejected


@contextmanager
def _refusals() -> Iterator[None]:
    """Raise `RefusedError` for a value that no request can hold."""
    try:
        yield
    except (TypeError, ValueError, OverflowError) as error:
        if isinstance(error, OSError):  # some errors of `requests` are both
            raise
        raise RefusedError(_reason(error)) from None


def _set_status(client: MlflowClient, run: TrackedRun, entry: Entry) -> None:
    if entry["reason"]:
        client.set_tag(run.run_id, REASON_TAG, entry["reason"])
    if entry["status"] == "RUNNING":
        client.update_run(run.run_id, "RUNNING")
    else:
        client.set_terminated(run.run_id, entry["status"], entry["timestamp"])


def _upload(client: MlflowClient, run: TrackedRun, entry: Entry) -> None:
    client.log_artifact(run.run_id, str(_artifact(run, entry["artifact"])), entry["artifact_path"])


def _artifact(run: TrackedRun, recorded: str) -> Path:
    """Return the path of what a line names: readable, and with all that it leads to inside the folder of the run.

    Raises:
        RefusedError: if it is not; what a stranger wrote into a run's folder must not send other files anywhere.
    """
    try:
        path = (run.outbox_dir / recorded).resolve(strict=True)
        for file in (path, *(path.rglob("*") if path.is_dir() else ())):
            if not file.resolve(strict=True).is_relative_to(run.folder):
                raise RefusedError(f"{file} is or leads outside the folder of the run, {run.folder}")
            if not (file.is_file() or file.is_dir()) or not os.access(file, os.R_OK):
                raise RefusedError(f"{file} is not a file that can be read")
    except (OSError, RuntimeError, ValueError) as error:
        raise RefusedError(f"{recorded} cannot be uploaded: {error}") from None
    return path
