"""Model folders that someone changed: refused with one line that names the file and the tensor or setting."""

import json
import resource
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from dmvae.config.model import DMVAEConfig
from dmvae.model.dmvae import DMVAE


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    torch.manual_seed(0)
    config = DMVAEConfig.model_validate({"input_dims": {"a": [3], "b": [2]}, "latent_dim": 2})
    DMVAE(config).save(tmp_path / "model")
    return tmp_path / "model"


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf"), 1e30])
def test_weights_that_are_no_weights_are_refused(value: float, folder: Path) -> None:
    weights = load_file(folder / "model.safetensors")
    name = sorted(weights)[0]
    weights[name].view(-1)[0] = value
    save_file(weights, folder / "model.safetensors")
    with pytest.raises(ValueError, match=f"model.safetensors are damaged: tensor '{name}' has"):
        DMVAE.load(folder)


@pytest.mark.parametrize(
    "dtype", [torch.int64, torch.int8, torch.uint8, torch.float8_e4m3fn, torch.bool, torch.float64]
)
def test_types_of_weights_are_the_same_floats(dtype: torch.dtype, folder: Path) -> None:
    weights = load_file(folder / "model.safetensors")
    name = sorted(weights)[0]
    save_file(weights | {name: weights[name].to(dtype)}, folder / "model.safetensors")
    with pytest.raises(ValueError, match=f"model.safetensors (has tensor '{name}' of type|mixes types)"):
        DMVAE.load(folder)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_a_model_of_one_type_loads_in_it(dtype: torch.dtype, folder: Path) -> None:
    DMVAE.load(folder).to(dtype).save(folder)
    assert DMVAE.load(folder).dtype == dtype


def test_a_small_file_cannot_ask_for_memory(folder: Path) -> None:
    config = json.loads((folder / "model.json").read_text())
    config["latent_dim"] = 2**30
    (folder / "model.json").write_text(json.dumps(config))
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    with pytest.raises(ValueError, match=r"does not fit model\.json beside it: .*expected shape .*10737418"):
        DMVAE.load(folder)
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 100_000


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("", "is empty"),
        ("{}", "model.json"),
        ("[" * 20_000, "is not valid JSON"),
        ('{"latent_dim": -1}', r"model\.json, latent_dim: "),
        ('{"latent_dims": 3}', r"model\.json, latent_dims: unknown field"),
        ('{"version": 7}', "expected version 1, got 7.* upgrade dmvae"),
    ],
)
def test_a_damaged_configuration_is_named(content: str, message: str, folder: Path) -> None:
    (folder / "model.json").write_text(content)
    with pytest.raises(ValueError, match=message) as raised:
        DMVAE.load(folder)
    assert "\n" not in str(raised.value)
