"""A training state on disk: a model's folder, the optimiser's moments, where training stood, and their checksums.

Nothing here is a pickle: tensors are safetensors, the rest is JSON.
"""

import json
import shutil
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file

from dmvae.data.files import flush, sha256_of
from dmvae.model.dmvae import MODEL_CONFIG, MODEL_WEIGHTS
from dmvae.model.loss import TermSums
from dmvae.training.loop import Position, TrainState

RUN_CONFIG = "run.json"
_OPTIMIZER = "optimizer.safetensors"
STATE = "state.json"
CHECKSUMS = "checksums.json"
_FILES = (MODEL_CONFIG, MODEL_WEIGHTS, _OPTIMIZER, RUN_CONFIG, STATE)


class CheckpointError(ValueError):
    """A checkpoint is not whole, or does not belong to what asks for it."""


def save(state: TrainState, run: dict[str, Any], folder: Path, report: dict[str, Any] | None = None) -> None:
    """Write a checkpoint: `folder` appears whole, or not at all.

    Args:
        state: of the run.
        run: the resolved configuration with the dataset's fingerprint, as `run.json` keeps it.
        folder: must not exist; until it is whole, it is called `.NAME.partial`.
        report: figures that belong to it, which `read_report` gives back.

    Raises:
        OSError: if it cannot be written; what there is of it is removed.
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
        raise OSError(error.errno, f"a checkpoint could not be written ({error.strerror})", str(folder)) from error
    except SafetensorError as error:  # its own word for an OSError
        shutil.rmtree(partial, ignore_errors=True)
        raise OSError(f"a checkpoint could not be written ({error}): {folder}") from error


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


def read_report(folder: Path) -> dict[str, Any]:
    """Return the figures that a checkpoint was written with."""
    report: dict[str, Any] = json.loads((folder / STATE).read_text())["report"]
    return report


def load(state: TrainState, folder: Path) -> None:
    """Bring a state of the same run back to where the checkpoint was written.

    Raises:
        CheckpointError: if the folder is not a whole checkpoint, or one of another model.
    """
    verify(folder)
    weights = load_file(folder / MODEL_WEIGHTS)
    own = {name: tensor.shape for name, tensor in state.model.state_dict().items()}
    differing = sorted(
        name for name in own.keys() | weights.keys() if name not in weights or own.get(name) != weights[name].shape
    )
    if differing:
        raise CheckpointError(f"{folder} is a checkpoint of another model; they differ in {differing[:5]}.")
    state.model.load_state_dict(weights)
    counters = json.loads((folder / STATE).read_text())
    _restore_moments(state, load_file(folder / _OPTIMIZER))
    state.position = Position(**counters["position"])
    state.best, state.epochs_since_best = counters["best"], counters["epochs_since_best"]
    state.halvings, state.skipped = counters["halvings"], counters["skipped"]
    window = torch.tensor(counters["window"], dtype=torch.float64, device=state.model.device)
    state.window = TermSums(state.window.names, window[0], window[1])


def verify(folder: Path) -> None:
    """Check that a checkpoint is whole.

    Raises:
        CheckpointError: naming the file that is missing or altered.
    """
    if not (folder / CHECKSUMS).is_file():
        raise CheckpointError(f"a checkpoint has {CHECKSUMS}, written last; {folder} has none. It was cut off.")
    try:
        checksums = json.loads((folder / CHECKSUMS).read_text())
    except ValueError as error:
        raise CheckpointError(f"{folder / CHECKSUMS} is not JSON ({error}). It was cut off or altered.") from None
    if not isinstance(checksums, dict) or checksums.keys() != set(_FILES):
        raise CheckpointError(f"{folder / CHECKSUMS} does not list {', '.join(_FILES)}. It was altered.")
    for name in _FILES:
        if not (folder / name).is_file() or sha256_of(folder / name) != checksums[name]:
            raise CheckpointError(f"{folder / name} is not what was written (its checksum differs). It was altered.")


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


def _restore_moments(state: TrainState, tensors: dict[str, torch.Tensor]) -> None:
    parameters = dict(state.model.named_parameters())
    for name, value in tensors.items():
        parameter, _, key = name.rpartition("/")
        # Adam counts its steps in float32 whatever the weights are
        target = parameters[parameter]
        moved = value.clone().to(target.device) if key == "step" else value.clone().to(target.device, target.dtype)
        state.optimizer.state[target][key] = moved
