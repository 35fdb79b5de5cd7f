"""Code written for the MultiVae page of DMVAE runs once its import line is changed."""

import copy
import pickle
from collections.abc import Mapping
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from dmvae import DMVAE, Batch, DecoderOutput, DMVAEConfig, EncoderOutput, ModelOutput
from dmvae.config.data import DataConfig
from dmvae.config.training import TrainConfig
from dmvae.training.validation import validate

SHAPES = {"photo": (3, 4, 4), "sound": (6,), "text": (5,)}
STYLES = {"photo": 4, "sound": 2, "text": 3}
BETAS = {"photo": 1.0, "sound": 2.5, "text": 3.0}


class Rows:
    """A map-style dataset of the kind that MultiVae has: items are rows without a batch dimension."""

    def __init__(self, data: Mapping[str, Any], masks: Mapping[str, Any] | None = None, labels: Any = None) -> None:
        self.data, self.masks, self.labels = data, masks, labels

    def __len__(self) -> int:
        return len(self.data["photo"])

    def __getitem__(self, index: Any) -> "Rows":
        masks = None if self.masks is None else {name: mask[index] for name, mask in self.masks.items()}
        labels = None if self.labels is None else self.labels[index]
        return Rows({name: values[index] for name, values in self.data.items()}, masks, labels)


class StyledEncoder(nn.Module):
    """An encoder of the user's own, whose output is an object with the four names."""

    def __init__(self, shape: tuple[int, ...], shared: int, style: int) -> None:
        super().__init__()
        self.sizes = [shared, shared, style, style]
        self.linear = nn.Linear(int(np.prod(shape)), sum(self.sizes))

    def forward(self, x: Tensor) -> EncoderOutput:
        return EncoderOutput(*self.linear(x.flatten(1)).split(self.sizes, dim=-1))


class PlainDecoder(nn.Module):
    def __init__(self, latents: int, shape: tuple[int, ...]) -> None:
        super().__init__()
        self.linear, self.shape = nn.Linear(latents, int(np.prod(shape))), shape

    def forward(self, z: Tensor) -> DecoderOutput:
        return DecoderOutput(self.linear(z).unflatten(-1, self.shape))


@pytest.fixture(params=["complete", "incomplete"])
def dataset(request: pytest.FixtureRequest) -> Rows:
    data = {name: torch.randn(6, *shape) for name, shape in SHAPES.items()}
    masks = None
    if request.param == "incomplete":
        masks = {"photo": torch.Tensor([0, 0, 0, 1, 1, 1]), "sound": torch.ones(6), "text": torch.ones(6)}
    return Rows(data, masks, labels=np.array([0, 1] * 3))


@pytest.fixture(params=["default networks", "own networks"])
def model(request: pytest.FixtureRequest) -> DMVAE:
    config = DMVAEConfig(
        n_modalities=3,
        latent_dim=7,
        input_dims=SHAPES,
        beta=2.5,
        modalities_specific_dim=STYLES,
        modalities_specific_betas=BETAS,
    )
    if request.param == "default networks":
        return DMVAE(model_config=config)
    return DMVAE(
        model_config=config,
        encoders={name: StyledEncoder(shape, 7, STYLES[name]) for name, shape in SHAPES.items()},
        decoders={name: PlainDecoder(7 + STYLES[name], shape) for name, shape in SHAPES.items()},
    )


def test_the_settings_are_readable_under_their_names(model: DMVAE) -> None:
    assert model.model_config.latent_dim == model.latent_dim == 7
    assert model.beta == model.model_config.beta == 2.5
    assert model.private_betas == BETAS
    assert model.style_dims == STYLES
    assert set(model.encoders) == set(model.decoders) == set(SHAPES)
    assert all(isinstance(network, nn.Module) for network in (*model.encoders.values(), *model.decoders.values()))


def test_private_betas_default_to_one() -> None:
    assert DMVAE(DMVAEConfig(input_dims=SHAPES)).private_betas == dict.fromkeys(SHAPES, 1.0)


def test_the_loss_is_a_scalar_with_a_gradient(model: DMVAE, dataset: Rows) -> None:
    loss = model(dataset, epoch=2).loss
    assert loss.shape == torch.Size([])
    assert loss.requires_grad


def test_an_unknown_argument_of_a_call_is_refused(model: DMVAE, dataset: Rows) -> None:
    with pytest.raises(TypeError, match=r"Unknown arguments \['epochs'\]"):
        model(dataset, epochs=2)


@pytest.mark.parametrize(("num", "leading"), [(1, (1,)), (2, (2, 1))])
def test_a_row_without_a_batch_dimension_is_a_batch_of_one(
    model: DMVAE, dataset: Rows, num: int, leading: tuple[int, ...]
) -> None:
    latents = model.encode(dataset[3], N=num)
    assert isinstance(latents, ModelOutput)
    assert latents.z.shape == (*leading, 7)
    assert {name: tuple(z.shape) for name, z in latents.modalities_z.items()} == {
        name: (*leading, dim) for name, dim in STYLES.items()
    }


def test_a_row_alone_has_the_latents_that_it_has_in_a_batch(model: DMVAE, dataset: Rows) -> None:
    together = model.encode(dataset, return_mean=True).z
    for row in (0, 3):
        torch.testing.assert_close(model.encode(dataset[row], return_mean=True).z[0], together[row])


@pytest.mark.parametrize("cond_mod", ["sound", ["sound"], ["sound", "text"]])
def test_predictions_have_a_row_for_each_row(model: DMVAE, dataset: Rows, cond_mod: Any) -> None:
    assert model.encode(dataset, cond_mod=cond_mod, N=10).z.shape == (10, 6, 7)
    assert model.predict(dataset, cond_mod=cond_mod).photo.shape == (6, 3, 4, 4)
    assert model.predict(dataset, cond_mod=cond_mod, N=10).photo.shape == (10, 6, 3, 4, 4)
    assert model.predict(dataset, cond_mod=cond_mod, N=10, flatten=True).photo.shape == (60, 3, 4, 4)


def test_samples_of_the_prior_decode(model: DMVAE) -> None:
    latents = model.generate_from_prior(n_samples=10)
    assert latents.z.shape == (10, model.latent_dim)
    assert {name: z.shape[1] for name, z in latents.modalities_z.items()} == model.style_dims
    assert model.decode(latents).photo.shape == (10, 3, 4, 4)


def test_a_network_learns_from_the_rows_that_have_its_modality_only(model: DMVAE, dataset: Rows) -> None:
    model(dataset[:3], epoch=1).loss.backward()
    if dataset.masks is not None:
        assert all(p.grad is None or not p.grad.any() for p in model.encoders["photo"].parameters())
    model(dataset[3:], epoch=1).loss.backward()
    assert all(p.grad is not None and bool(p.grad.any()) for p in model.encoders["photo"].parameters())


@pytest.mark.parametrize("K", [1, 2])
def test_one_importance_sample_is_enough(model: DMVAE, dataset: Rows, K: int) -> None:  # noqa: N803
    assert bool(model.compute_joint_nll(dataset, K=K, batch_size_K=1).isfinite())
    assert all(bool(x.isfinite()) for x in model.compute_cond_nll(dataset, "sound", ["text"], K=K).values())


def test_arrays_and_dicts_are_rows(model: DMVAE, dataset: Rows) -> None:
    arrays = {name: values.numpy() for name, values in dataset.data.items()}
    expected = model.encode(Rows(dataset.data), return_mean=True).z
    for rows in (arrays, Rows(arrays), Batch(arrays), dict(dataset.data)):
        torch.testing.assert_close(model.encode(rows, return_mean=True).z, expected)


def test_masks_labels_and_ids_may_be_arrays() -> None:
    batch = Batch(
        {"sound": np.zeros((3, 6)), "text": np.zeros((3, 5), np.float32)},
        {"text": np.array([True, False, True])},
        labels=np.array([0, 1, 1]),
        ids=["a", "b", "c"],
    )
    assert batch.masks is not None
    assert batch.masks["text"].tolist() == [True, False, True]
    assert batch[1].ids.tolist() == ["b"]  # type: ignore[union-attr]
    assert Batch({"text": np.zeros((2, 5))}, ids=np.arange(2)).ids.tolist() == [0, 1]  # type: ignore[union-attr]


WRONG: dict[str, tuple[Any, str]] = {
    "an array": (np.zeros((2, 6)), "inputs must be a Batch.* but got ndarray"),
    "a tensor": (torch.zeros(2, 6), "inputs must be a Batch.* but got Tensor"),
    "objects": ({"sound": np.array([["a"] * 6], dtype=object)}, r"data\['sound'\] must be an array of numbers.*object"),
    "text": ({"text": ["a", "b"]}, r"data\['text'\] must be an array of numbers"),
    "lengths": ({"sound": np.zeros((2, 6)), "text": np.zeros((3, 5))}, "same number of rows"),
    "names": ({"sund": np.zeros((2, 6))}, r"Unknown modalities in data: \['sund'\]"),
    "shapes": ({"sound": np.zeros((2, 7))}, r"Rows of 'sound' must have shape \(6,\)"),
}


@pytest.mark.parametrize("fault", WRONG)
def test_an_error_names_the_argument(fault: str) -> None:
    inputs, message = WRONG[fault]
    with pytest.raises((TypeError, ValueError), match=message):
        DMVAE(DMVAEConfig(input_dims=SHAPES)).encode(inputs)


def test_a_copy_and_a_pickle_are_models_of_their_own(model: DMVAE, dataset: Rows) -> None:
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    for twin in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        torch.testing.assert_close(twin.encode(dataset, return_mean=True).z, model.encode(dataset, return_mean=True).z)
        with torch.no_grad():
            for parameter in twin.parameters():
                parameter.add_(1)
        assert twin.encoders["text"] is not model.encoders["text"]
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_a_model_in_half_precision_trains_and_predicts(model: DMVAE, dataset: Rows, dtype: torch.dtype) -> None:
    precise = model.encode(dataset, return_mean=True).z
    model.to(dtype)
    torch.testing.assert_close(model.encode(dataset, return_mean=True).z, precise, atol=0.1, rtol=0.1)
    model(dataset).loss.backward()
    assert all(p.grad is not None and bool(p.grad.isfinite().all()) for p in model.decoders["text"].parameters())
    assert model.predict(dataset, N=2).sound.shape == (2, 6, 6)
    assert bool(model.joint_nll(dataset, K=10).nll.isfinite().all())


def test_rows_without_ids_validate() -> None:
    model = DMVAE(DMVAEConfig(input_dims={"text": (5,)})).double()
    rows = torch.randn(7, 5, dtype=torch.float64)
    config = TrainConfig(name="run", data=DataConfig(dataset="unused"), model=model.config)
    whole, _ = validate(model, [Batch({"text": rows})], config, lambda tensor: tensor)
    numbered, _ = validate(model, [Batch({"text": rows}, ids=torch.arange(7))], config, lambda tensor: tensor)
    parts, _ = validate(model, [Batch({"text": rows[:3]}), Batch({"text": rows[3:]})], config, lambda tensor: tensor)
    assert whole == numbered
    assert parts["loss"] == pytest.approx(whole["loss"], rel=1e-12)
