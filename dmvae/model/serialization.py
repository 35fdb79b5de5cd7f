"""Model folders on disk: the configuration as JSON and the weights as safetensors; nothing is a pickle."""

from collections.abc import Mapping
from pathlib import Path

import torch
from torch import Tensor

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
    try:
        config = DMVAEConfig.model_validate_json((folder / MODEL_CONFIG).read_bytes())
    except ValueError as error:
        raise ValueError(f"Cannot read {folder / MODEL_CONFIG}: {error}") from error
    try:
        return config, load_file(folder / MODEL_WEIGHTS)
    except SafetensorError as error:
        raise ValueError(f"Cannot read {folder / MODEL_WEIGHTS}: {error}.") from error


def check_weights(folder: Path, own: Mapping[str, Tensor], weights: Mapping[str, Tensor]) -> None:
    """Check that weights have the names and shapes that the configuration requires.

    Raises:
        ValueError: naming the tensors that differ.
    """
    expected = {name: tuple(tensor.shape) for name, tensor in own.items()}
    found = {name: tuple(tensor.shape) for name, tensor in weights.items()}
    if expected != found:
        differing = sorted(n for n in expected.keys() | found.keys() if expected.get(n) != found.get(n))
        raise ValueError(f"{folder / MODEL_WEIGHTS} does not fit {MODEL_CONFIG} beside it: {differing[:5]} differ.")
