"""A model on disk: its configuration as JSON, its weights as safetensors; nothing is a pickle."""

from collections.abc import Mapping
from pathlib import Path

import torch
from torch import Tensor

from dmvae.config.model import DMVAEConfig

MODEL_CONFIG = "model.json"
MODEL_WEIGHTS = "model.safetensors"


def write_folder(folder: Path, config: DMVAEConfig, weights: Mapping[str, Tensor]) -> None:
    """Write `model.json` and `model.safetensors` into a folder, each whole or not at all."""
    from safetensors.torch import save_file

    folder.mkdir(parents=True, exist_ok=True)
    # the format refuses tensors that share storage (tied weights) and strides: hence copies
    tensors = {
        name: tensor.detach().cpu().clone(memory_format=torch.contiguous_format) for name, tensor in weights.items()
    }
    partial_weights, partial_config = (folder / f".{file}.partial" for file in (MODEL_WEIGHTS, MODEL_CONFIG))
    save_file(tensors, partial_weights)
    partial_config.write_text(config.model_dump_json(indent=2) + "\n")
    partial_weights.replace(folder / MODEL_WEIGHTS)
    partial_config.replace(folder / MODEL_CONFIG)


def read_folder(folder: Path) -> tuple[DMVAEConfig, dict[str, Tensor]]:
    """Read the configuration and the weights, on the CPU, of a model's folder or a checkpoint's.

    Raises:
        FileNotFoundError: if the folder is no model's.
        ValueError: if a file cannot be read.
    """
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    absent = [file for file in (MODEL_CONFIG, MODEL_WEIGHTS) if not (folder / file).is_file()]
    if absent:
        raise FileNotFoundError(f"a model's folder holds {MODEL_CONFIG} and {MODEL_WEIGHTS}; {folder} lacks {absent}.")
    try:
        config = DMVAEConfig.model_validate_json((folder / MODEL_CONFIG).read_bytes())
    except ValueError as error:
        raise ValueError(f"{folder / MODEL_CONFIG} holds a DMVAEConfig; {error}") from error
    try:
        return config, load_file(folder / MODEL_WEIGHTS)
    except SafetensorError as error:
        raise ValueError(f"{folder / MODEL_WEIGHTS} holds tensors; it cannot be read: {error}.") from error


def check_weights(folder: Path, own: Mapping[str, Tensor], weights: Mapping[str, Tensor]) -> None:
    """Check that a folder's weights are those that its configuration makes.

    Raises:
        ValueError: naming what differs.
    """
    expected = {name: tuple(tensor.shape) for name, tensor in own.items()}
    found = {name: tuple(tensor.shape) for name, tensor in weights.items()}
    if expected != found:
        differing = sorted(n for n in expected.keys() | found.keys() if expected.get(n) != found.get(n))
        raise ValueError(
            f"{folder / MODEL_WEIGHTS} holds the weights of {MODEL_CONFIG} beside it; they differ in {differing[:5]}."
        )
