"""Model folders on disk: the configuration as JSON and the weights as safetensors; nothing is a pickle.

A prior that was fitted to the latents lies beside them in `prior.safetensors`. The header of that file is JSON with its
format and the SHA-256 of the weights that it belongs to.
"""

import math
import sys
from collections.abc import Iterable, Mapping
from importlib.util import find_spec
from pathlib import Path

import torch
from torch import Tensor

from dmvae.config.model import DMVAEConfig
from dmvae.data.files import flush, sha256_of
from dmvae.data.records import read_record
from dmvae.distributions.gaussian_mixture import FittedPrior

MODEL_CONFIG = "model.json"
MODEL_WEIGHTS = "model.safetensors"
MODEL_PRIOR = "prior.safetensors"
CHECKSUMS = "checksums.json"
"""Of a checkpoint: the SHA-256 of each file, written last."""
_PRIOR_FORMAT = "1"
_REMEDY = "Copy the model from its source again, or train it again."
_FLOATS = ("F32", "F64", "F16", "BF16")
_LARGEST = 1e18
"""The largest weight that is taken for one: the square of a larger one is no number in float32."""


def write_folder(
    folder: Path, config: DMVAEConfig, weights: Mapping[str, Tensor], prior: FittedPrior | None = None
) -> None:
    """Write the configuration, the weights and the prior, if any, into a folder, each whole and flushed to the disk."""
    from safetensors.torch import save_file

    folder.mkdir(parents=True, exist_ok=True)
    (folder / MODEL_PRIOR).unlink(missing_ok=True)  # of other weights
    # the format refuses tensors that share storage (tied weights) or have strides: hence copies
    tensors = {
        name: tensor.detach().cpu().clone(memory_format=torch.contiguous_format) for name, tensor in weights.items()
    }
    partial_weights, partial_config = (folder / f".{file}.partial" for file in (MODEL_WEIGHTS, MODEL_CONFIG))
    save_file(tensors, partial_weights)
    partial_config.write_text(config.model_dump_json(indent=2) + "\n")
    for partial, name in ((partial_weights, MODEL_WEIGHTS), (partial_config, MODEL_CONFIG)):
        flush(partial)
        partial.replace(folder / name)
    flush(folder)
    if prior is not None:
        write_prior(folder, prior)


def write_prior(folder: Path, prior: FittedPrior) -> None:
    """Write `prior.safetensors` beside the weights that it belongs to, atomically."""
    from safetensors.torch import save_file

    header = {"format": _PRIOR_FORMAT, "weights": sha256_of(folder / MODEL_WEIGHTS)}
    partial = folder / f".{MODEL_PRIOR}.partial"
    save_file(prior.tensors(), partial, metadata=header)
    flush(partial)
    partial.replace(folder / MODEL_PRIOR)
    flush(folder)


def read_prior(folder: Path) -> FittedPrior | None:
    """Read the fitted prior of a model folder; None if it has none.

    Raises:
        ValueError: if the file cannot be read, has a newer format, or belongs to other weights.
    """
    from safetensors import SafetensorError, safe_open

    file = folder / MODEL_PRIOR
    if not file.is_file():
        return None
    try:
        with safe_open(file, framework="pt") as opened:
            header = opened.metadata() or {}
            tensors = {name: opened.get_tensor(name) for name in opened.keys()}  # noqa: SIM118 (no mapping)
        prior = FittedPrior.from_tensors(tensors)
    except (SafetensorError, KeyError, TypeError) as error:
        raise ValueError(
            f"Cannot read {file}: {error}. Restore it, or remove it to use the standard normal."
        ) from error
    if header.get("format") != _PRIOR_FORMAT:
        raise ValueError(
            f"Cannot read {file}: expected format {_PRIOR_FORMAT}, got {header.get('format')}. Upgrade dmvae."
        )
    if header.get("weights") != sha256_of(folder / MODEL_WEIGHTS):
        raise ValueError(
            f"{file} was fitted to other weights than {MODEL_WEIGHTS} beside it. "
            "Restore the weights, or remove it to use the standard normal."
        )
    return prior


def read_config(folder: Path) -> DMVAEConfig:
    """Read the configuration of a model or a checkpoint.

    Raises:
        FileNotFoundError: if the folder has no model.
        ValueError: if the file cannot be read, naming the setting.
    """
    absent = [file for file in (MODEL_CONFIG, MODEL_WEIGHTS) if not (folder / file).is_file()]
    if absent:
        raise FileNotFoundError(f"Model not found: {folder} has no {' and no '.join(absent)}.")
    _check_sums(folder)
    config = read_record(folder / MODEL_CONFIG, DMVAEConfig, _REMEDY)
    assert config is not None
    return config


def find_carried_code(folder: Path, packages: Iterable[str]) -> None:
    """Let own code that is not installed be imported from the registered model that `folder` is a part of."""
    code = folder.absolute().parents[1] / "code"
    if not (code.parent / "MLmodel").is_file():
        return
    absent = [name for name in packages if find_spec(name) is None]
    if absent and str(code) not in sys.path and any(code.glob(f"{name}*") for name in absent):
        sys.path.append(str(code))


def _check_sums(folder: Path) -> None:
    """Compare the files with their checksums, if the folder is a checkpoint."""
    sums: dict[str, str] = read_record(folder / CHECKSUMS, dict[str, str], _REMEDY) or {}
    for name in (MODEL_CONFIG, MODEL_WEIGHTS):
        if name in sums and sha256_of(folder / name) != sums[name]:
            raise ValueError(f"Checkpoint {folder} is damaged: the checksum of {name} differs. {_REMEDY}")


def read_weights(folder: Path, own: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Read the weights of a model or a checkpoint, onto the CPU, once their names, shapes and types fit.

    Args:
        folder: of the model.
        own: the state of the model that its configuration describes, on any device, such as `meta`.

    Raises:
        ValueError: if the file cannot be read, does not fit, or has values that no training leaves, by tensor.
    """
    from safetensors.torch import load_file

    check_header(folder, own)
    file = folder / MODEL_WEIGHTS
    weights = load_file(file)
    for name, tensor in weights.items():
        largest = tensor.abs().max().item() if tensor.is_floating_point() and tensor.numel() else 0.0
        if not largest <= _LARGEST:  # false for NaN too
            what = f"a value of {largest:.3g}" if math.isfinite(largest) else "NaN or infinity"
            raise ValueError(f"Weights in {file} are damaged: tensor {name!r} has {what}. {_REMEDY}")
    return weights


def check_header(folder: Path, own: Mapping[str, Tensor]) -> None:
    """Check names, shapes and types of the weights in a folder, without reading any.

    Args:
        folder: of the model.
        own: as in `read_weights`.

    Raises:
        ValueError: if the file cannot be read, or does not fit.
    """
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(folder / MODEL_WEIGHTS, "pt") as header:
            slices = {name: header.get_slice(name) for name in header.keys()}  # noqa: SIM118
            _check_shapes(folder, own, {name: tuple(part.get_shape()) for name, part in slices.items()})
            _check_types(folder, own, {name: part.get_dtype() for name, part in slices.items()})
    except SafetensorError as error:
        raise ValueError(f"Cannot read {folder / MODEL_WEIGHTS}: {error}. {_REMEDY}") from error


def _check_shapes(folder: Path, own: Mapping[str, Tensor], found: Mapping[str, tuple[int, ...]]) -> None:
    expected = {name: tuple(tensor.shape) for name, tensor in own.items()}
    if expected != found:
        differing = sorted(n for n in expected.keys() | found.keys() if expected.get(n) != found.get(n))
        first = differing[0]
        raise ValueError(
            f"{folder / MODEL_WEIGHTS} does not fit {MODEL_CONFIG} beside it: {differing[:5]} differ (expected shape "
            f"{expected.get(first)} for the first, got {found.get(first)}). {_REMEDY}"
        )


def _check_types(folder: Path, own: Mapping[str, Tensor], found: Mapping[str, str]) -> None:
    floats = {name: dtype for name, dtype in found.items() if own[name].is_floating_point()}
    wrong = {name: dtype for name, dtype in floats.items() if dtype not in _FLOATS}
    wrong |= {name: found[name] for name in found.keys() - floats.keys() if found[name] != "I64"}
    if wrong:
        name = min(wrong)
        expected = ", ".join(_FLOATS) if name in floats else "I64"
        raise ValueError(
            f"{folder / MODEL_WEIGHTS} has tensor {name!r} of type {wrong[name]}, but expected {expected}. Convert the "
            f"weights with safetensors and torch, or save the model again."
        )
    if len(set(floats.values())) > 1:
        first = {dtype: name for name, dtype in sorted(floats.items(), reverse=True)}
        mixed = ", ".join(f"{dtype} ({name!r})" for dtype, name in sorted(first.items()))
        raise ValueError(
            f"{folder / MODEL_WEIGHTS} mixes types, but all weights must have one: {mixed}. Convert the model with "
            f"model.to(torch.float32), and save it again."
        )
