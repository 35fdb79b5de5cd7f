"""Parts that are frozen or have a learning rate of their own."""

from pathlib import Path

import pytest
import torch
from torch import nn

from dmvae.config.model import DMVAEConfig
from dmvae.config.training import OptimConfig, TrainConfig
from dmvae.data.batch import Batch
from dmvae.data.reading.dataset import open_dataset
from dmvae.model.dmvae import DMVAE
from dmvae.model.parts import path_of
from dmvae.training import checkpoint
from dmvae.training.loop import CheckpointDue, train
from dmvae.training.settings import resolve
from dmvae.training.setup import WorkerData, build_state
from dmvae.training.state import TrainState, build_optimizer
from dmvae.training.step import Collectives, WorkerBatch, train_epoch
from tests.runs import make_config, make_dataset

LEFT = ["encoders.left", "decoders.left"]


@pytest.fixture(scope="module")
def dataset(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_dataset(tmp_path_factory.mktemp("freeze"))


def configure(dataset: Path, **changes: object) -> TrainConfig:
    return resolve(make_config(dataset.parent, dataset, **changes), open_dataset(dataset))


def weights(state: TrainState) -> dict[str, torch.Tensor]:
    return {path_of(name): tensor.clone() for name, tensor in state.model.state_dict().items()}


def test_a_modality_is_added_to_a_trained_model_whose_parts_keep_their_bits(dataset: Path, tmp_path: Path) -> None:
    """The old model knows the left modality alone; the right one is new."""
    old_config = configure(dataset)
    alone = {"input_dims": {"left": (5,)}, "architectures": {"left": {"hidden_dims": [8]}}}
    old_model = {**old_config.model.model_dump(), "decoders_dist": None, **alone}
    old = DMVAE(DMVAEConfig.model_validate(old_model)).double()
    old.save(tmp_path / "old")
    parts = {"encoders": "encoders", "decoders": "decoders"}
    optim = {"freeze": LEFT, "algorithm": "adamw", "weight_decay": 0.1}
    config = configure(dataset, init_from=str(tmp_path / "old"), init_map=parts, optim=optim)
    state = build_state(config, torch.device("cpu"))
    start = weights(state)
    list(train(state, WorkerData(config, 0, 1, torch.float64), config, Collectives(state.model)))
    end, given = weights(state), {path_of(name): tensor for name, tensor in old.state_dict().items()}
    for path, tensor in end.items():
        assert torch.equal(tensor, start[path]) == ("left" in path), path
        assert "left" not in path or torch.equal(tensor, given[path].to(tensor.dtype))
    assert len({id(p) for p in state.optimizer.state}) == sum(1 for p in state.model.parameters() if p.requires_grad)


def test_a_run_with_frozen_parts_resumes_with_the_same_bits(dataset: Path, tmp_path: Path) -> None:
    optim = {"freeze": ["encoders.left.body"], "rate_factors": {"decoders": 0.1, "decoders.right": 3.0}}
    config = configure(dataset, training={"checkpoint_steps": 3}, optim=optim)
    straight = build_state(config, torch.device("cpu"))
    for event in train(straight, WorkerData(config, 0, 1, torch.float64), config, Collectives(straight.model)):
        if isinstance(event, CheckpointDue) and not (tmp_path / "c").exists():
            checkpoint.save(straight, {}, tmp_path / "c")
    resumed = build_state(config, torch.device("cpu"))
    checkpoint.load(resumed, tmp_path / "c")
    list(train(resumed, WorkerData(config, 0, 1, torch.float64), config, Collectives(resumed.model)))
    ends = [weights(state) for state in (straight, resumed)]
    assert all(torch.equal(tensor, ends[1][path]) for path, tensor in ends[0].items())


def test_the_most_specific_factor_counts(dataset: Path) -> None:
    factors = {"decoders": 0.1, "decoders.right": 3.0, "encoders.left.heads.bias": 0.5}
    config = configure(dataset, optim={"rate_factors": factors})
    state = build_state(config, torch.device("cpu"))
    names = {parameter: path_of(name) for name, parameter in state.model.named_parameters()}
    found = {names[p]: group["rate_factor"] for group in state.optimizer.param_groups for p in group["params"]}
    assert found["decoders.left.body.0.weight"] == 0.1
    assert found["decoders.right.body.0.weight"] == 3.0
    assert found["encoders.left.heads.bias"] == 0.5
    assert found["encoders.left.heads.weight"] == 1.0


def test_a_factor_scales_the_first_step_of_its_part(dataset: Path) -> None:
    distances = {}
    for factor in (1.0, 0.1):
        config = configure(dataset, optim={"rate_factors": {"encoders.left": factor}})
        state = build_state(config, torch.device("cpu"))
        before = weights(state)
        data = WorkerData(config, 0, 1, torch.float64)
        next(iter(train_epoch(state, data.batches(0, 0), config, Collectives(state.model), data.steps_per_epoch)))
        distances[factor] = {path: tensor - before[path] for path, tensor in weights(state).items()}
    for path, distance in distances[1.0].items():
        scale = 0.1 if path.startswith("encoders.left") else 1.0
        torch.testing.assert_close(distances[0.1][path], scale * distance, rtol=1e-6, atol=1e-12)


class Normalised(nn.Module):
    """An encoder with running statistics and dropout."""

    def __init__(self) -> None:
        super().__init__()
        self.norm, self.body, self.dropout = nn.BatchNorm1d(3), nn.Linear(3, 6), nn.Dropout(0.5)

    def forward(self, x: torch.Tensor) -> object:
        from dmvae.nn.networks import EncoderOutput

        return EncoderOutput(*self.dropout(self.body(self.norm(x))).split([2, 2, 1, 1], dim=-1))


def test_what_is_frozen_has_no_dropout_and_keeps_its_running_statistics() -> None:
    model = {"input_dims": {"a": (3,)}, "latent_dim": 2, "modalities_specific_dim": 1}
    optim = OptimConfig(freeze=("encoders.a",))
    config = TrainConfig.model_validate({"name": "x", "data": {"dataset": "d"}, "model": model, "optim": optim})
    encoder = Normalised()
    state = TrainState(built := DMVAE(config.model, encoders={"a": encoder}), build_optimizer(built, optim))
    batch = Batch({"a": 5 + torch.randn(8, 3)}, ids=torch.arange(8))
    before = {name: tensor.clone() for name, tensor in encoder.state_dict().items()}
    list(train_epoch(state, [WorkerBatch(batch, 0, 0, 8)], config, Collectives(built), 1))
    assert all(torch.equal(tensor, before[name]) for name, tensor in encoder.state_dict().items())
    assert not encoder.dropout.training
    assert built.decoders["a"].training


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"optim": {"freeze": ["encoders.lef"]}}, r"freeze: no weights are called 'encoders.lef'.*'encoders.left'"),
        ({"optim": {"freeze": ["likelihoods.left"]}}, "freeze: no weights are called 'likelihoods.left'. Available:"),
        ({"optim": {"freeze": ["encoders", "decoders"]}}, "leaves no weights to train"),
        ({"optim": {"rate_factors": {"encoders.middle": 0.1}}}, "optim.rate_factors.*'encoders.middle'"),
        ({"optim": {"freeze": LEFT, "rate_factors": {"encoders.left": 2.0}}}, "rate_factors, beside optim.freeze"),
        ({"optim": {"freeze": ["image"]}}, "Invalid part 'image'"),
        ({"init_map": {"encoders": "encoders"}}, "init_map has no effect without init_from"),
    ],
)
def test_prefixes_without_effect_are_refused(changes: dict[str, object], message: str, dataset: Path) -> None:
    with pytest.raises(ValueError, match=message):
        configure(dataset, **changes)
