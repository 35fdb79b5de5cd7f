"""Which MLflow run to write to, and where its outbox is; no secret of a URI is ever written down."""

import json
import re
from dataclasses import dataclass, field
from pathlib import Path

from dmvae.data.files import write_atomically

RUN_FILE = "mlflow.json"


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

    def write_down(self) -> None:
        """Write which run the outbox belongs to, unless that is known."""
        path = self.outbox_dir / RUN_FILE
        if not path.exists():
            write_atomically(path, json.dumps({"run_id": self.run_id, "uri": scrub(self.uri)}))


def archive_other_run(outbox_dir: Path, run_id: str) -> None:
    """Move another run's outbox, left by an earlier run at the same URI, to a folder where `sync` finds it."""
    path = outbox_dir / RUN_FILE
    other = json.loads(path.read_text())["run_id"] if path.exists() else run_id
    if other != run_id:
        archive = outbox_dir.with_name(f"{outbox_dir.name}-{other}")
        archive.mkdir(exist_ok=True)
        for file in outbox_dir.iterdir():
            if file.suffix != ".lock":
                file.rename(archive / file.name)


def scrub(text: str) -> str:
    """Return `text` without the user names, passwords and tokens of the URLs in it."""
    text = re.sub(r"(://)[^/\s]*@", r"\1", text)
    return re.sub(r"(?i)([?&][^=&\s]*(?:token|password|secret|signature|sig|key)=)[^&\s]+", r"\1***", text)
