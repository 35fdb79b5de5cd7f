"""Which MLflow run to write to, and where its outbox is; no secret of a URI is ever written down."""

import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated

from pydantic import Field

from dmvae.config.section import scrub
from dmvae.data.files import write_atomically
from dmvae.data.records import Record, parse_record, read_record

RUN_FILE = "mlflow.json"
_REMEDY = "Restore it; or remove its folder, and the metrics that were not delivered are lost."


class RunRecord(Record):
    """The content of `mlflow.json`; a part of folder names, the id cannot lead to another folder."""

    run_id: Annotated[str, Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9_.-]{0,200}$")]
    uri: str


def read_run_record(outbox_dir: Path) -> RunRecord | None:
    """Return which MLflow run an outbox belongs to, None if it does not say so.

    Raises:
        RecordError: if `mlflow.json` cannot be read or is not valid.
    """
    found: RunRecord | None = read_record(outbox_dir / RUN_FILE, RunRecord, _REMEDY)
    return found


def parse_run_record(text: str, where: str) -> RunRecord:
    """Parse the text of an `mlflow.json`; `where` names it in messages.

    Raises:
        RecordError: if it is not valid.
    """
    return parse_record(text, where, RunRecord, _REMEDY)


@dataclass(frozen=True)
class TrackedRun:
    """An MLflow run; it can be sent to other processes.

    Attributes:
        uri: of MLflow, with credentials if it has any.
        run_id: of the run.
        outbox_dir: the folder of its `Outbox`.
    """

    uri: str = field(repr=False)
    run_id: str
    outbox_dir: Path

    @property
    def folder(self) -> Path:
        """The folder of the run, links resolved: the parent of `tracking`, or an outbox of another name itself."""
        outbox_dir = self.outbox_dir.resolve()
        return outbox_dir.parent if outbox_dir.name.startswith("tracking") else outbox_dir

    def write_down(self) -> None:
        """Write which run the outbox belongs to, unless that is known."""
        path = self.outbox_dir / RUN_FILE
        if not path.exists():
            write_atomically(path, json.dumps({"run_id": self.run_id, "uri": scrub(self.uri)}))


def archive_other_run(outbox_dir: Path, run_id: str) -> None:
    """Move another run's outbox, left by an earlier run at the same URI, to a folder where `sync` finds it."""
    other = read_run_record(outbox_dir)
    if other is not None and other.run_id != run_id:
        archive = outbox_dir.with_name(f"{outbox_dir.name}-{other.run_id}")
        archive.mkdir(exist_ok=True)
        for file in outbox_dir.iterdir():
            if file.suffix != ".lock":
                file.rename(archive / file.name)
