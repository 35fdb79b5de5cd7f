"""Checkpoints: whole or refused, and never a pickle."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from dmvae.config.model import DMVAEConfig
from dmvae.config.training import OptimConfig
from dmvae.data.files import sha256_of
from dmvae.model.dmvae import DMVAE
from dmvae.training import checkpoint
from dmvae.training.checkpoint import CheckpointError
from dmvae.training.state import Position, TrainState, build_optimizer


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
    checkpoint.save(state, {"name": "x"}, tmp_path / "c")
    checkpoint.load(other, tmp_path / "c")
    assert (other.position, other.best, other.epochs_since_best, other.halvings) == (Position(3, 7), 1.5, 2, 1)
    for mine, theirs in zip(state.model.parameters(), other.model.parameters(), strict=True):
        assert torch.equal(mine, theirs)
        moments = state.optimizer.state[mine]
        assert moments
        assert all(torch.equal(value, other.optimizer.state[theirs][key]) for key, value in moments.items())
    assert json.loads((tmp_path / "c" / "run.json").read_text()) == {"name": "x"}


def test_a_checkpoint_is_a_model_and_holds_no_pickle(tmp_path: Path) -> None:
    state = make_state()
    checkpoint.save(state, {}, tmp_path / "c")
    loaded = DMVAE.load(tmp_path / "c")
    assert all(torch.equal(a, b) for a, b in zip(loaded.parameters(), state.model.parameters(), strict=True))
    assert {file.suffix for file in (tmp_path / "c").iterdir()} == {".json", ".safetensors"}


@pytest.mark.parametrize(
    "name", ["model.safetensors", "optimizer.safetensors", "state.json", "model.json", "checksums.json"]
)
@pytest.mark.parametrize(("fault", "bit"), [("absent", 0), ("cut", 0), ("flipped", 1), ("flipped", 128)])
def test_a_broken_checkpoint_is_refused_and_the_file_named(name: str, fault: str, bit: int, tmp_path: Path) -> None:
    folder = tmp_path / "c"
    checkpoint.save(make_state(), {}, folder)
    file = folder / name
    content = bytearray(file.read_bytes())
    if fault == "absent":
        file.unlink()
    elif fault == "cut":
        file.write_bytes(content[: len(content) // 2])
    else:
        content[len(content) // 2] ^= bit
        file.write_bytes(content)
    with pytest.raises(CheckpointError, match="checksum" if name == "checksums.json" else name):
        checkpoint.load(make_state(), folder)


@pytest.mark.parametrize("content", ["[]", "null", "{}", '{"../run.json": "0"}'])
def test_a_list_of_checksums_that_leaves_files_out_is_refused(content: str, tmp_path: Path) -> None:
    checkpoint.save(make_state(), {}, tmp_path / "c")
    (tmp_path / "c" / "checksums.json").write_text(content)
    with pytest.raises(CheckpointError, match=r"must list model\.json"):
        checkpoint.verify(tmp_path / "c")


def test_a_checkpoint_that_the_disk_does_not_take_leaves_nothing(tmp_path: Path) -> None:
    program = (
        "import resource, signal\n"
        "from pathlib import Path\n"
        "from dmvae.training import checkpoint\n"
        "from tests.training.test_checkpoint import make_state\n"
        "state = make_state()\n"
        "signal.signal(signal.SIGXFSZ, signal.SIG_IGN)\n"
        "resource.setrlimit(resource.RLIMIT_FSIZE, (2000, 2000))\n"
        f"checkpoint.save(state, {{}}, Path({str(tmp_path)!r}, 'c'))\n"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=False)
    assert "Cannot write checkpoint" in done.stderr.splitlines()[-1]
    assert list(tmp_path.iterdir()) == []


def test_a_checkpoint_of_another_model_is_refused(tmp_path: Path) -> None:
    checkpoint.save(make_state(), {}, tmp_path / "c")
    with pytest.raises(CheckpointError, match="another model"):
        checkpoint.load(make_state(latent_dim=4), tmp_path / "c")


def admit(folder: Path) -> None:
    """Make the checksums of a checkpoint agree with its files."""
    files = [file for file in folder.iterdir() if file.name != checkpoint.CHECKSUMS]
    (folder / checkpoint.CHECKSUMS).write_text(json.dumps({file.name: sha256_of(file) for file in files}))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"position": {"epoch": -5, "step": 0}}, r"state\.json, position\.epoch: .*but got -5"),
        ({"position": {"epoch": 1}}, r"position\.step: this field is missing"),
        ({"best": "good"}, "best: "),
        ({"window": [[1.0], [1.0]]}, "window: expected"),
        ({"newer": 1}, "newer: unknown field"),
        ({"version": 2}, "upgrade dmvae"),
    ],
)
def test_a_malformed_checkpoint_whose_checksums_agree_is_refused_and_changes_nothing(
    change: dict[str, object], message: str, tmp_path: Path
) -> None:
    state, folder = make_state(), tmp_path / "c"
    checkpoint.save(state, {}, folder)
    content = json.loads((folder / "state.json").read_text())
    (folder / "state.json").write_text(json.dumps(content | change))
    admit(folder)
    other = make_state()
    with torch.no_grad():
        for parameter in other.model.parameters():
            parameter.add_(1.0)
    before = [parameter.clone() for parameter in other.model.parameters()]
    with pytest.raises(CheckpointError, match=message):
        checkpoint.load(other, folder)
    assert all(torch.equal(*pair) for pair in zip(before, other.model.parameters(), strict=True))


@pytest.mark.parametrize("wrong", ["nan", "name", "shape"])
def test_tensors_of_a_checkpoint_that_do_not_fit_are_named(wrong: str, tmp_path: Path) -> None:
    folder = tmp_path / "c"
    checkpoint.save(make_state(), {}, folder)
    file = folder / ("model.safetensors" if wrong == "nan" else "optimizer.safetensors")
    tensors = load_file(file)
    name = next(name for name in sorted(tensors) if not name.endswith("/step"))
    if wrong == "nan":
        tensors[name].view(-1)[0] = torch.nan
    elif wrong == "name":
        tensors["x/exp_avg"] = tensors.pop(name)
        name = "x/exp_avg"
    else:
        tensors[name] = tensors[name][None].contiguous()
    save_file(tensors, file)
    admit(folder)
    with pytest.raises(CheckpointError, match=name):
        checkpoint.load(make_state(), folder)
