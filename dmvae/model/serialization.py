"""Model folders on disk: the configuration as JSON and the weights as safetensors; nothing is a pickle."""

import sys
from collections.abc import Iterable, Mapping
from importlib.util import find_spec
from pathlib import Path

import torch
from torch import Tensor, nn

from dmvae.config.model import DMVAEConfig

MODEL_CONFIG = "model.json"
MODEL_WEIGHTS = "model.safetensors"


def write_folder(folder: Path, config: DMVAEConfig, weights: Mapping[str, Tensor]) -> None:
    """Write `model.json` and `model.safetensors` into a folder, each atomically."""
    from safetensors.torch import save_file

    folder.mkdir(parents=True, exist_ok=True)
    # the format refuses tensors that share storage (tied weights) or have strides: hence copies
    tensors = {
        name: tensor.detach().cpu().clone(memory_format=torch.contiguous_format) for name, tensor in weights.items()
    }
    partial_weights, partial_config = (folder / f".{file}.partial" for file in (MODEL_WEIGHTS, MODEL_CONFIG))
    save_file(tensors, partial_weights)
    partial_config.write_text(config.model_dump_json(indent=2) + "\n")
    partial_weights.replace(folder / MODEL_WEIGHTS)
    partial_config.replace(folder / MODEL_CONFIG)


def read_folder(folder: Path) -> tuple[DMVAEConfig, dict[str, Tensor]]:
    """Read the configuration and the weights of a model or a checkpoint, onto the CPU.

    Raises:
        FileNotFoundError: if the folder has no model.
        ValueError: if a file cannot be read.
    """
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    absent = [file for file in (MODEL_CONFIG, MODEL_WEIGHTS) if not (folder / file).is_file()]
    if absent:
        raise FileNotFoundError(f"Model not found: {folder} has no {' and no '.join(absent)}.")
    config = read_config(folder)
    try:
        return config, load_file(folder / MODEL_WEIGHTS)
    except SafetensorError as error:
        raise ValueError(f"Cannot read {folder / MODEL_WEIGHTS}: {error}.") from error


def read_config(folder: Path) -> DMVAEConfig:
    """Read the configuration of a model or a checkpoint.

    Raises:
        ValueError: if it cannot be read.
    """
    try:
        return DMVAEConfig.model_validate_json((folder / MODEL_CONFIG).read_bytes())
    except ValueError as error:
        raise ValueError(f"Cannot read {folder / MODEL_CONFIG}: {error}") from error


def find_carried_code(folder: Path, packages: Iterable[str]) -> None:
    """Let own code that is not installed be imported from the registered model that `folder` is a part of."""
    code = folder.absolute().parents[1] / "code"
    if not (code.parent / "MLmodel").is_file():
        return
    absent = [name for name in packages if find_spec(name) is None]
    if absent and str(code) not in sys.path and any(code.glob(f"{name}*") for name in absent):
        sys.path.append(str(code))


def assign_weights(model: nn.Module, weights: Mapping[str, Tensor], folder: Path) -> None:
    """Put weights of a folder in the place of a model's own.

    Raises:
        ValueError: naming the tensors whose names or shapes are not those that the configuration requires.
    """
    own = model.state_dict()
    expected = {name: tuple(tensor.shape) for name, tensor in own.items()}
    found = {name: tuple(tensor.shape) for name, tensor in weights.items()}
    if expected != found:
        differing = sorted(n for n in expected.keys() | found.keys() if expected.get(n) != found.get(n))
        raise ValueError(f"{folder / MODEL_WEIGHTS} does not fit {MODEL_CONFIG} beside it: {differing[:5]} differ.")
    # tensors of a file differ from those of a model in alignment and layout, on which the last bits of sums depend
    copies = {name: torch.empty_like(own[name], dtype=t.dtype).copy_(t) for name, t in weights.items()}
    model.load_state_dict(copies, assign=True)
