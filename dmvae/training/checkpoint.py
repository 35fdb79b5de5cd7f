"""Checkpoints on disk: a model folder, the optimiser's moments, the position in the run, and checksums.

Tensors are safetensors and the rest is JSON; nothing is a pickle.
"""

import json
import shutil
from pathlib import Path
from typing import Annotated, Any

import torch
from pydantic import Field
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file

from dmvae.data.files import flush, sha256_of
from dmvae.data.records import Record, RecordError, parse_record, read_record
from dmvae.model.loss import TermSums
from dmvae.model.serialization import CHECKSUMS as CHECKSUMS
from dmvae.model.serialization import MODEL_CONFIG, MODEL_WEIGHTS, read_weights
from dmvae.training.state import Position, TrainState

RUN_CONFIG = "run.json"
_OPTIMIZER = "optimizer.safetensors"
STATE = "state.json"
_REMEDY = "Remove the checkpoint; the run then resumes from the one before it."
_FILES = (MODEL_CONFIG, MODEL_WEIGHTS, _OPTIMIZER, RUN_CONFIG, STATE)


class CheckpointError(ValueError):
    """A checkpoint is damaged or incomplete, or belongs to another model."""


def save(state: TrainState, run: dict[str, Any], folder: Path, report: dict[str, Any] | None = None) -> None:
    """Write a checkpoint atomically: `folder` appears complete, or not at all.

    Args:
        state: of the run.
        run: the resolved configuration and the dataset's fingerprint, the content of `run.json`.
        folder: must not exist; it is called `.NAME.partial` until it is complete.
        report: metrics to keep with the checkpoint, which `read_report` returns.

    Raises:
        OSError: if it cannot be written; the partial folder is removed.
    """
    partial = folder.with_name(f".{folder.name}.partial")
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir(parents=True)
    try:
        _write(state, run, report or {}, partial)
        flush(partial)
        partial.rename(folder)
        flush(folder.parent)
    except OSError as error:
        shutil.rmtree(partial, ignore_errors=True)
        raise OSError(error.errno, f"Cannot write checkpoint: {error.strerror}", str(folder)) from error
    except SafetensorError as error:  # how safetensors reports an OSError
        shutil.rmtree(partial, ignore_errors=True)
        raise OSError(f"Cannot write checkpoint {folder}: {error}") from error


def _write(state: TrainState, run: dict[str, Any], report: dict[str, Any], folder: Path) -> None:
    state.model.save(folder)
    save_file(_moments(state), folder / _OPTIMIZER)
    (folder / RUN_CONFIG).write_text(json.dumps(run, indent=2) + "\n")
    (folder / STATE).write_text(json.dumps(_counters(state) | {"report": report}, indent=2) + "\n")
    for name in _FILES:
        flush(folder / name)
    checksums = {name: sha256_of(folder / name) for name in _FILES}
    (folder / CHECKSUMS).write_text(json.dumps(checksums, indent=2) + "\n")
    flush(folder / CHECKSUMS)


class _Position(Record):
    epoch: Annotated[int, Field(ge=0, lt=2**31)]
    step: Annotated[int, Field(ge=0, lt=2**63)]


class _Counters(Record):
    """The content of `state.json`."""

    position: _Position
    best: float | None
    epochs_since_best: Annotated[int, Field(ge=0)]
    halvings: Annotated[int, Field(ge=0)]
    skipped: Annotated[int, Field(ge=0)]
    window: tuple[list[float], list[float]]
    report: dict[str, Any]


def read_report(folder: Path) -> dict[str, Any]:
    """Return the metrics that were saved with a checkpoint.

    Raises:
        CheckpointError: if they cannot be read.
    """
    return _read_counters(folder).report


def parse_report(text: str, where: str) -> dict[str, Any]:
    """Return the metrics in the text of a `state.json`; `where` names it in messages.

    Raises:
        CheckpointError: if it is not valid.
    """
    try:
        return parse_record(text, where, _Counters, _REMEDY).report
    except RecordError as error:
        raise CheckpointError(str(error)) from None


def load(state: TrainState, folder: Path) -> None:
    """Restore a state of the same run from a checkpoint; a state is left as it was if that fails.

    Raises:
        CheckpointError: if the checkpoint is damaged or incomplete, or belongs to another model.
    """
    verify(folder)
    counters, own = _read_counters(folder), state.model.state_dict()
    try:
        weights, moments = read_weights(folder, own), load_file(folder / _OPTIMIZER)
    except (ValueError, SafetensorError) as error:
        raise CheckpointError(
            f"Checkpoint {folder} is damaged or belongs to another model: {error} Restore the settings of its run."
        ) from None
    _check_moments(state, moments, folder)
    if {len(part) for part in counters.window} != {len(state.window.names)}:
        raise CheckpointError(f"Checkpoint {folder}, {STATE}, window: expected {len(state.window.names)} terms.")
    state.model.load_state_dict(weights)
    _restore_moments(state, moments)
    state.position = Position(counters.position.epoch, counters.position.step)
    state.best, state.epochs_since_best = counters.best, counters.epochs_since_best
    state.halvings, state.skipped = counters.halvings, counters.skipped
    window = torch.tensor(counters.window, dtype=torch.float64, device=state.model.device)
    state.window = TermSums(state.window.names, window[0], window[1])


def verify(folder: Path) -> None:
    """Check that a checkpoint is complete and undamaged, and that its position can be read.

    Raises:
        CheckpointError: if a file is missing, altered or malformed.
    """
    if not (folder / CHECKSUMS).is_file():
        raise CheckpointError(f"Checkpoint {folder} is incomplete: it has no {CHECKSUMS}, which is written last.")
    try:
        checksums = read_record(folder / CHECKSUMS, dict[str, str] | None | list[Any], _REMEDY)
    except RecordError as error:
        raise CheckpointError(f"Checkpoint {folder} is damaged: {error}") from None
    if not isinstance(checksums, dict) or checksums.keys() != set(_FILES):
        raise CheckpointError(f"Checkpoint {folder} is damaged: {CHECKSUMS} must list {', '.join(_FILES)}.")
    for name in _FILES:
        if not (folder / name).is_file() or sha256_of(folder / name) != checksums[name]:
            raise CheckpointError(f"Checkpoint {folder} is damaged: {name} is missing, or its checksum differs.")
    _read_counters(folder)


def _read_counters(folder: Path) -> _Counters:
    try:
        found = read_record(folder / STATE, _Counters, _REMEDY)
    except RecordError as error:
        raise CheckpointError(str(error)) from None
    if found is None:
        raise CheckpointError(f"Checkpoint {folder} is damaged: {STATE} is missing.")
    return found


def _counters(state: TrainState) -> dict[str, Any]:
    return {
        "position": {"epoch": state.position.epoch, "step": state.position.step},
        "best": state.best,
        "epochs_since_best": state.epochs_since_best,
        "halvings": state.halvings,
        "skipped": state.skipped,
        "window": [state.window.total.tolist(), state.window.count.tolist()],
    }


def _moments(state: TrainState) -> dict[str, torch.Tensor]:
    """Name the optimiser's tensors after the parameters: `NAME/exp_avg`."""
    names: dict[torch.Tensor, str] = {parameter: name for name, parameter in state.model.named_parameters()}
    return {
        f"{names[parameter]}/{key}": value.detach().cpu().contiguous()
        for parameter, moments in state.optimizer.state.items()
        for key, value in moments.items()
    }


def _check_moments(state: TrainState, tensors: dict[str, torch.Tensor], folder: Path) -> None:
    parameters = dict(state.model.named_parameters())
    for name, value in tensors.items():
        parameter, _, key = name.rpartition("/")
        shape = () if key == "step" else None if parameter not in parameters else tuple(parameters[parameter].shape)
        is_known = parameter in parameters and key in ("step", "exp_avg", "exp_avg_sq")
        if not is_known or tuple(value.shape) != shape or not value.is_floating_point():
            raise CheckpointError(
                f"Checkpoint {folder}, {_OPTIMIZER}: {name!r} does not fit the model or the optimizer."
            )


def _restore_moments(state: TrainState, tensors: dict[str, torch.Tensor]) -> None:
    parameters = dict(state.model.named_parameters())
    for name, value in tensors.items():
        parameter, _, key = name.rpartition("/")
        # Adam counts its steps in float32 whatever the weights are
        target = parameters[parameter]
        moved = value.clone().to(target.device) if key == "step" else value.clone().to(target.device, target.dtype)
        state.optimizer.state[target][key] = moved
