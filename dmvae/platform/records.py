"""The records of runs, studies and registered models that other parts of the platform read back, and their fields."""

from pathlib import Path
from typing import Any

from pydantic import BaseModel, ConfigDict, Field

from dmvae.data.records import Record, read_record
from dmvae.platform.errors import RunError

_REMEDY = "Restore it, or remove its folder."


class _Open(BaseModel):
    """A part of a record that has more fields, which are not read."""

    model_config = ConfigDict(extra="allow", frozen=True)


class DatasetEntry(_Open):
    """The dataset of a run."""

    fingerprint: str


class Settings(_Open):
    """The content of `run.json` or `study.json`: a configuration, and the dataset it was resolved for."""

    name: str
    dataset: DatasetEntry


class RunData(_Open):
    """The section `data` of a run."""

    dataset: str
    train_split: str


class Run(Settings):
    """The content of `run.json`."""

    data: RunData
    model: dict[str, Any]


class RunResult(Record):
    """The content of `result.json` of a run."""

    epochs: int = Field(ge=0)
    patience: int | None
    metrics: dict[str, float | None]
    run_id: str


class EvaluationSummary(_Open):
    """The content of `summary.json` of an evaluation."""

    figures: dict[str, float | None]


class Card(_Open):
    """The content of a registered model's `card.json`."""

    dataset: DatasetEntry


def read_settings(file: Path) -> dict[str, Any] | None:
    """Return the content of `run.json` or `study.json`; None if there is no such file.

    Raises:
        RecordError: if it is not valid.
    """
    found: Settings | None = read_record(file, Settings, _REMEDY)
    return None if found is None else found.model_dump()


def read_run(file: Path) -> dict[str, Any] | None:
    """Return the content of `run.json`; None if there is no such file.

    Raises:
        RecordError: if it is not valid.
    """
    found: Run | None = read_record(file, Run, _REMEDY)
    return None if found is None else found.model_dump()


def read_result(file: Path) -> RunResult | None:
    """Return the content of a run's `result.json`; None if there is no such file.

    Raises:
        RecordError: if it is not valid.
    """
    found: RunResult | None = read_record(file, RunResult, "Remove it: the same command then evaluates the run again.")
    return found


def required(record: Any, file: Path) -> Any:
    """Return a record that must be there.

    Raises:
        RunError: if it is None.
    """
    if record is None:
        raise RunError(f"{file} not found. {_REMEDY}")
    return record
