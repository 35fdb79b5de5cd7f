"""Checkpoints: whole or refused, and never a pickle."""

import json
from pathlib import Path

import pytest
import torch

from dmvae import checkpoint
from dmvae.checkpoint import CheckpointError
from dmvae.config.model import DMVAEConfig
from dmvae.config.training import OptimConfig
from dmvae.model import DMVAE
from dmvae.training import Position, TrainState, build_optimizer


def make_state(latent_dim: int = 3) -> TrainState:
    torch.manual_seed(0)
    model = DMVAE(DMVAEConfig(input_dims={"a": (4,), "b": (2, 3)}, latent_dim=latent_dim))
    state = TrainState(model, build_optimizer(model, OptimConfig()))
    model(_Rows()).loss.backward()
    state.optimizer.step()
    state.position, state.best, state.epochs_since_best, state.halvings = Position(3, 7), 1.5, 2, 1
    return state


class _Rows:
    data = {"a": torch.ones(5, 4), "b": torch.ones(5, 2, 3)}  # noqa: RUF012


def test_a_checkpoint_brings_everything_back(tmp_path: Path) -> None:
    state, other = make_state(), make_state()
    with torch.no_grad():
        for parameter in state.model.parameters():
            parameter.add_(1.0)
    checkpoint.save(state, {"name": "x"}, tmp_path)
    checkpoint.load(other, tmp_path)
    assert (other.position, other.best, other.epochs_since_best, other.halvings) == (Position(3, 7), 1.5, 2, 1)
    for mine, theirs in zip(state.model.parameters(), other.model.parameters(), strict=True):
        assert torch.equal(mine, theirs)
        moments = state.optimizer.state[mine]
        assert moments
        assert all(torch.equal(value, other.optimizer.state[theirs][key]) for key, value in moments.items())
    assert json.loads((tmp_path / "run.json").read_text()) == {"name": "x"}


def test_a_checkpoint_is_a_model_and_holds_no_pickle(tmp_path: Path) -> None:
    state = make_state()
    checkpoint.save(state, {}, tmp_path)
    loaded = DMVAE.load(tmp_path)
    assert all(torch.equal(a, b) for a, b in zip(loaded.parameters(), state.model.parameters(), strict=True))
    assert {file.suffix for file in tmp_path.iterdir()} == {".json", ".safetensors"}


@pytest.mark.parametrize(
    "name", ["model.safetensors", "optimizer.safetensors", "state.json", "model.json", "checksums.json"]
)
@pytest.mark.parametrize("fault", ["absent", "cut", "flipped"])
def test_a_broken_checkpoint_is_refused_and_the_file_named(name: str, fault: str, tmp_path: Path) -> None:
    checkpoint.save(make_state(), {}, tmp_path)
    file = tmp_path / name
    content = bytearray(file.read_bytes())
    if fault == "absent":
        file.unlink()
    elif fault == "cut":
        file.write_bytes(content[: len(content) // 2])
    else:
        content[len(content) // 2] ^= 1
        file.write_bytes(content)
    with pytest.raises(CheckpointError, match="checksum" if name == "checksums.json" else name):
        checkpoint.load(make_state(), tmp_path)


def test_a_checkpoint_of_another_model_is_refused(tmp_path: Path) -> None:
    checkpoint.save(make_state(), {}, tmp_path)
    with pytest.raises(CheckpointError, match="another model"):
        checkpoint.load(make_state(latent_dim=4), tmp_path)
