import json
import math
import shutil
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from dmvae import DMVAE, Batch, DMVAEConfig
from dmvae.config.model import ArchitectureConfig
from dmvae.nn.networks import Dimensions, EncoderOutput
from dmvae.nn.networks.mlp import MLPDecoder, MLPEncoder
from tests.linear_gaussian import exact_log_prob, linear_model, sample_rows

SHAPES = {"image": (1, 3, 2), "text": (4,), "code": (2,)}
PRIVATE = {"image": 1, "text": 2, "code": 3}


def small_model(**settings: Any) -> DMVAE:
    config = {
        "input_dims": SHAPES,
        "latent_dim": 5,
        "modalities_specific_dim": PRIVATE,
        "decoders_dist": {"image": "bernoulli", "code": "categorical"},
        "decoder_dist_params": {"text": {"scale": "learned"}, "code": {"classes": 3}},
        "architectures": {name: {"hidden_dims": (6,), "dropout": 0.5} for name in SHAPES},
    }
    return DMVAE(DMVAEConfig(**(config | settings))).double()


def small_batch(rows: int = 7) -> Batch:
    """Rows of which every third lacks the image and every fifth the text; the first two have all."""
    place = torch.arange(rows)
    return Batch(
        {
            "image": torch.randint(0, 2, (rows, 1, 3, 2)).double(),
            "text": torch.randn(rows, 4, dtype=torch.float64),
            "code": torch.randint(0, 3, (rows, 2)),
        },
        {"image": place % 3 != 2, "text": place % 5 != 4},
    )


def output_shape(name: str) -> tuple[int, ...]:
    return (2, 3) if name == "code" else SHAPES[name]


@pytest.mark.parametrize("return_mean", [False, True])
@pytest.mark.parametrize(
    ("num", "flatten", "leading"), [(1, False, (7,)), (1, True, (7,)), (4, False, (4, 7)), (4, True, (28,))]
)
def test_latents_and_reconstructions_have_the_documented_shapes(
    num: int, flatten: bool, leading: tuple[int, ...], return_mean: bool
) -> None:
    model, batch = small_model(), small_batch()
    latents = model.encode(batch, N=num, flatten=flatten, return_mean=return_mean)
    assert latents.z.shape == (*leading, 5)
    assert {name: z.shape for name, z in latents.modalities_z.items()} == {m: (*leading, d) for m, d in PRIVATE.items()}
    assert latents.one_latent_space is False
    for outputs in (
        model.decode(latents),
        model.predict(batch, N=num, flatten=flatten, return_mean=return_mean),
    ):
        assert {name: tuple(x.shape) for name, x in outputs.items()} == {
            m: (*leading, *output_shape(m)) for m in SHAPES
        }


@pytest.mark.parametrize("num", [1, 3])
def test_latents_of_one_row_keep_the_row_dimension(num: int) -> None:
    model, batch = small_model(), small_batch(1)
    assert model.encode(batch, N=num).z.shape == ((1, 5) if num == 1 else (num, 1, 5))
    prior = model.generate_from_prior(num)
    assert prior.z.shape == (num, 5)
    assert prior.modalities_z["code"].shape == (num, 3)
    assert prior.one_latent_space is False
    assert model.decode(prior)["code"].shape == (num, 2, 3)


def test_flattened_samples_are_the_samples_one_after_the_other() -> None:
    model, batch = small_model(), small_batch()
    stacked = model.encode(batch, N=3, generator=torch.Generator().manual_seed(1))
    flat = model.encode(batch, N=3, flatten=True, generator=torch.Generator().manual_seed(1))
    assert torch.equal(flat.z, stacked.z.flatten(0, 1))
    assert torch.equal(flat.modalities_z["text"], stacked.modalities_z["text"].flatten(0, 1))
    torch.testing.assert_close(model.decode(flat)["text"], model.decode(stacked)["text"].flatten(0, 1))


def test_results_are_read_by_key_and_by_attribute() -> None:
    outputs = small_model().predict(small_batch(), gen_mod=["text"])
    assert outputs.text is outputs["text"]
    assert list(outputs) == ["text"]
    with pytest.raises(AttributeError, match=r"No result 'image'\. Available: text"):
        _ = outputs.image


@pytest.mark.parametrize("rows", [0, 1])
def test_no_rows_are_no_error(rows: int) -> None:
    model, batch = small_model(), small_batch(3)[:rows]
    assert model.predict(batch, N=2)["code"].shape == (2, rows, 2, 3)
    assert float(model.compute_joint_nll(batch, K=4)) >= 0


def test_conditioning_on_a_name_a_list_and_all_agree() -> None:
    model, batch = small_model(), small_batch()

    def mean(cond_mod: Any) -> Tensor:
        return model.encode(batch, cond_mod, return_mean=True).z

    assert torch.equal(mean("text"), mean(["text"]))
    assert torch.equal(mean("all"), mean(list(SHAPES)))
    assert torch.equal(mean(["code", "text"]), mean(name for name in ("text", "code", "text")))
    assert not torch.equal(mean("text"), mean("all"))


def test_a_generator_of_names_is_read_once() -> None:
    outputs = small_model().predict(small_batch(), (m for m in ("text",)), (m for m in ("image", "code")))
    assert set(outputs) == {"image", "code"}


CALLS: dict[str, Callable[[DMVAE, Any], object]] = {
    "cond_mod": lambda model, names: model.encode(small_batch(), names),
    "cond_mod of predict": lambda model, names: model.predict(small_batch(), names),
    "gen_mod": lambda model, names: model.predict(small_batch(), "all", names),
    "modalities": lambda model, names: model.decode(model.generate_from_prior(2), names),
    "subset": lambda model, names: model.compute_cond_nll(small_batch(), names, "text", K=4),
    "pred_mods": lambda model, names: model.compute_cond_nll(small_batch(), "text", names, K=4),
}


@pytest.mark.parametrize("argument", CALLS)
@pytest.mark.parametrize("names", ["imgae", ["imgae"], ["image", "imgae"], [], "", ()])
def test_an_unknown_or_empty_set_of_modalities_is_refused_with_the_known_ones(argument: str, names: Any) -> None:
    with pytest.raises(ValueError, match=rf"{argument.split()[0]} must be.*'image', 'text', 'code'"):
        CALLS[argument](small_model(), names)


@pytest.mark.parametrize("num", [0, -1])
def test_fewer_than_one_sample_is_refused(num: int) -> None:
    model = small_model()
    with pytest.raises(ValueError, match=f"N={num}"):
        model.encode(small_batch(), N=num)
    with pytest.raises(ValueError, match=str(num)):
        model.generate_from_prior(num)


def test_latents_outside_the_condition_come_from_the_prior_row_by_row() -> None:
    model, batch = small_model(), small_batch()
    many = 4000
    for cond_mod, known in (("all", {"image", "text", "code"}), (["text"], {"text"})):
        latents = model.encode(batch, cond_mod, N=many)
        shared, private = model.eval().posteriors(batch, cond_mod)
        for name, dim in PRIVATE.items():
            has = batch.masks.get(name, torch.ones(7).bool())
            prior = ~has if name in known else torch.ones(7).bool()
            expected_mean = private[name].mean.masked_fill(prior[:, None], 0.0)
            expected_std = torch.exp(0.5 * private[name].log_var).masked_fill(prior[:, None], 1.0)
            z = latents.modalities_z[name]
            assert bool(((z.mean(0) - expected_mean).abs() < 6 * expected_std / math.sqrt(many)).all())
            assert bool(((z.std(0) / expected_std - 1).abs() < 6 / math.sqrt(2 * many)).all())
            if bool(prior.any()):
                draws = z[:, prior].reshape(-1, dim)
                assert bool(draws.unique(dim=0).shape[0] == len(draws))
        assert bool(
            ((latents.z.mean(0) - shared.mean).abs() < 6 * torch.exp(0.5 * shared.log_var) / math.sqrt(many)).all()
        )


def test_a_row_that_lacks_the_condition_has_the_prior() -> None:
    model, batch = small_model(), small_batch()
    shared, private = model.posteriors(batch, "image")
    absent = ~batch.masks["image"]
    assert bool((shared.mean[absent] == 0).all())
    assert bool((shared.log_var[absent] == 0).all())
    assert bool((private["image"].mean[absent] == 0).all())
    assert bool((private["image"].log_var[~absent] != 0).all())


@pytest.mark.parametrize("garbage", [math.nan, math.inf])
def test_what_a_missing_slot_holds_is_never_encoded(garbage: float) -> None:
    model, batch = small_model(), small_batch()
    dirty = Batch(dict(batch.data), batch.masks)
    for name, mask in batch.masks.items():
        dirty.data[name] = batch.data[name].masked_fill(~mask.view(-1, *[1] * (batch.data[name].dim() - 1)), garbage)
    for method in (
        lambda rows: model.encode(rows, N=2, generator=torch.Generator().manual_seed(0)).z,
        lambda rows: model.predict(rows, generator=torch.Generator().manual_seed(0)).code,
        lambda rows: model.joint_nll(rows, K=8).nll,
    ):
        assert torch.equal(method(batch), method(dirty))


def test_a_generator_makes_every_sampling_method_reproducible() -> None:
    model, batch = small_model(), small_batch()
    for method in (
        lambda generator: model.encode(batch, generator=generator).z,
        lambda generator: model.encode(batch, ["text"], generator=generator).modalities_z["image"],
        lambda generator: model.predict(batch, N=2, generator=generator)["text"],
        lambda generator: model.generate_from_prior(3, generator=generator).z,
        lambda generator: model.generate_from_prior(3, generator=generator).modalities_z["code"],
        lambda generator: model.compute_joint_nll(batch, K=8, generator=generator),
        lambda generator: model.compute_cond_nll(batch, "text", "image", K=8, generator=generator)["image"],
    ):
        state = torch.get_rng_state()
        generator = torch.Generator().manual_seed(1)
        first, second = method(generator), method(generator)
        assert torch.equal(method(torch.Generator().manual_seed(1)), first)
        assert not torch.equal(first, second)
        assert torch.equal(torch.get_rng_state(), state)
        torch.manual_seed(3)
        drawn = method(None)
        torch.manual_seed(3)
        assert torch.equal(method(None), drawn)


INFERENCE: dict[str, Callable[[DMVAE], Any]] = {
    "encode": lambda model: model.encode(small_batch()).z,
    "decode": lambda model: model.decode(model.generate_from_prior(2))["text"],
    "predict": lambda model: model.predict(small_batch())["text"],
    "generate_from_prior": lambda model: model.generate_from_prior(2).z,
    "compute_joint_nll": lambda model: model.compute_joint_nll(small_batch(), K=4),
    "compute_cond_nll": lambda model: model.compute_cond_nll(small_batch(), "text", "image", K=4)["image"],
    "joint_nll": lambda model: model.joint_nll(small_batch(), K=4).nll,
}


@pytest.mark.parametrize("name", INFERENCE)
@pytest.mark.parametrize("mode", ["train", "eval", "mixed"])
def test_inference_leaves_the_mode_and_holds_no_graph(name: str, mode: str) -> None:
    model = small_model().train(mode != "eval")
    if mode == "mixed":
        model.encoders["text"].eval()
    before = {key: module.training for key, module in model.named_modules()}
    result = INFERENCE[name](model)
    assert {key: module.training for key, module in model.named_modules()} == before
    assert result.grad_fn is None
    assert not result.requires_grad
    assert torch.is_grad_enabled()


def test_inference_is_done_in_eval_mode() -> None:
    model, batch = small_model().train(), small_batch()
    assert torch.equal(model.encode(batch, return_mean=True).z, model.encode(batch, return_mean=True).z)
    assert not torch.equal(model.posteriors(batch)[0].mean, model.posteriors(batch)[0].mean)


def test_a_failing_inference_restores_mode_and_gradients() -> None:
    model = small_model().train()
    model.encoders["text"].register_forward_pre_hook(lambda *_: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        model.encode(small_batch())
    assert all(module.training for module in model.modules())
    assert torch.is_grad_enabled()


def test_anything_with_data_and_masks_is_a_batch() -> None:
    model, batch = small_model().eval(), small_batch()
    plain = SimpleNamespace(data=batch.data, masks={m: mask.int()[:, None] for m, mask in batch.masks.items()})
    complete = SimpleNamespace(data={"text": batch.data["text"]})
    assert torch.equal(model.encode(plain, return_mean=True).z, model.encode(batch, return_mean=True).z)
    assert torch.equal(model.joint_nll(plain, K=8).nll, model.joint_nll(batch, K=8).nll)
    assert bool(model(plain).loss.isfinite())
    assert model.predict(complete)["image"].shape == (7, 1, 3, 2)


def test_values_of_other_types_are_brought_to_the_model() -> None:
    model, batch = small_model().float(), small_batch()
    assert model.encode(batch).z.dtype == torch.float32
    assert model(batch).loss.dtype == torch.float32


@pytest.mark.parametrize(
    ("data", "message"),
    [
        ({"imgae": torch.zeros(2, 1, 3, 2)}, r"'imgae'.*Available: \['image', 'text', 'code'\]"),
        ({"image": torch.zeros(2, 3, 2)}, r"'image' must have shape \(1, 3, 2\).*\(2, 3, 2\)"),
        ({"text": torch.zeros(4)}, r"'text' must have shape \(4,\)"),
    ],
)
def test_rows_that_do_not_fit_the_model_are_refused(data: dict[str, Tensor], message: str) -> None:
    for method in (small_model().forward, small_model().encode, small_model().compute_joint_nll):
        with pytest.raises(ValueError, match=message):
            method(Batch(data))


ODD_NAMES = ("type", "values", "keys", "items", "forward", "training", "z", "a-b")


def test_modalities_may_be_called_like_methods(tmp_path: Path) -> None:
    model = DMVAE(
        DMVAEConfig(input_dims=dict.fromkeys(ODD_NAMES, (3,)), decoder_dist_params={"type": {"scale": "learned"}})
    )
    batch = Batch({name: torch.randn(4, 3) for name in ODD_NAMES}, {"items": torch.tensor([1, 0, 1, 0])})
    out = model(batch)
    out.loss.backward()
    assert {"values", "kl_private/keys", "log_likelihood/items/type"} <= out.metrics.keys()
    latents = model.encode(batch, ["keys", "type"], N=2)
    assert set(latents.modalities_z) == set(ODD_NAMES)
    reconstructions = model.decode(latents)
    assert [reconstructions[name].shape for name in ODD_NAMES] == [(2, 4, 3)] * len(ODD_NAMES)
    assert set(model.predict(batch, "items", ["values", "items"])) == {"values", "items"}
    assert set(model.compute_cond_nll(batch, "type", ["items", "values"], K=4)) == {"items", "values"}
    assert bool(model.compute_joint_nll(batch, K=4).isfinite())
    model.save(tmp_path)
    assert DMVAE.load(tmp_path).config == model.config


def test_a_saved_model_comes_back_bit_by_bit(tmp_path: Path) -> None:
    model = small_model().eval()
    model.likelihoods["text"].log_scale.data.fill_(-0.3)
    model.save(tmp_path / "new" / "folder")
    again = DMVAE.load(tmp_path / "new" / "folder")
    assert again.config == model.config
    assert again.state_dict().keys() == model.state_dict().keys()
    for name, tensor in model.state_dict().items():
        assert torch.equal(tensor, again.state_dict()[name]), name
        assert tensor.dtype == again.state_dict()[name].dtype
    assert again.likelihoods["text"].log_scale.item() == -0.3
    assert not again.training
    assert all(parameter.requires_grad for parameter in again.parameters())
    batch = small_batch()
    assert torch.equal(again.predict(batch, return_mean=True)["text"], model.predict(batch, return_mean=True)["text"])


def test_a_conv_model_comes_back(tmp_path: Path) -> None:
    config = DMVAEConfig(input_dims={"image": (1, 28, 28)}, architectures={"image": {"name": "conv"}})
    model, batch = DMVAE(config), Batch({"image": torch.rand(2, 1, 28, 28)})
    model.save(tmp_path)
    again = DMVAE.load(tmp_path)
    assert torch.equal(again.predict(batch, return_mean=True).image, model.predict(batch, return_mean=True).image)


def test_a_folder_holds_one_json_and_one_safetensors_and_no_pickle(tmp_path: Path) -> None:
    for _ in range(2):  # saving again replaces
        small_model().save(tmp_path)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["model.json", "model.safetensors"]
    header_size = int.from_bytes((tmp_path / "model.safetensors").read_bytes()[:8], "little")
    names = json.loads((tmp_path / "model.safetensors").read_bytes()[8 : 8 + header_size])
    assert set(names) - {"__metadata__"} == set(small_model().state_dict())
    assert DMVAEConfig.model_validate_json((tmp_path / "model.json").read_text()) == small_model().config


def test_loading_leaves_the_random_numbers_alone(tmp_path: Path) -> None:
    small_model().save(tmp_path)
    state = torch.get_rng_state()
    DMVAE.load(tmp_path)
    assert torch.equal(torch.get_rng_state(), state)


class OwnEncoder(nn.Module):
    """A network that is not in the registry, with a buffer that is not saved."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("offset", torch.ones(4, dtype=torch.float64), persistent=False)
        dims = Dimensions((4,), (4,), 5, 2)
        self.norm = nn.BatchNorm1d(4)
        self.net = MLPEncoder(ArchitectureConfig(hidden_dims=(3,)), dims)

    def forward(self, x: Tensor) -> EncoderOutput:
        return self.net(self.norm(x + self.offset))


def own_decoder() -> nn.Module:
    return MLPDecoder(ArchitectureConfig(hidden_dims=(3, 3)), Dimensions((2,), (2, 3), 5, 3, 3))


def test_networks_given_by_hand_are_recorded_and_asked_for(tmp_path: Path) -> None:
    config = small_model().config
    model = DMVAE(config, encoders={"text": OwnEncoder()}, decoders={"code": own_decoder()}).double()
    model(small_batch())
    model.save(tmp_path)
    assert model.config.custom_architectures == ("encoders.text", "decoders.code")
    assert config.custom_architectures == ()
    with pytest.raises(ValueError, match=r"decoders\.code, encoders\.text were given by hand"):
        DMVAE.load(tmp_path)
    with pytest.raises(ValueError, match=r"decoders\.code were given by hand"):
        DMVAE.load(tmp_path, encoders={"text": OwnEncoder()})
    again = DMVAE.load(tmp_path, encoders={"text": OwnEncoder()}, decoders={"code": own_decoder()})
    batch = small_batch()
    assert torch.equal(again.predict(batch, return_mean=True)["code"], model.predict(batch, return_mean=True)["code"])


def test_networks_that_share_weights_are_saved(tmp_path: Path) -> None:
    config = DMVAEConfig(input_dims={"a": (4,), "b": (4,)}, latent_dim=5)
    shared = MLPEncoder(ArchitectureConfig(), Dimensions((4,), (4,), 5, 2))
    model = DMVAE(config, encoders={"a": shared, "b": shared})
    model.save(tmp_path)
    again_shared = MLPEncoder(ArchitectureConfig(), Dimensions((4,), (4,), 5, 2))
    again = DMVAE.load(tmp_path, encoders={"a": again_shared, "b": again_shared})
    batch = Batch({"b": torch.randn(3, 4)})
    assert torch.equal(again.encode(batch, return_mean=True).z, model.encode(batch, return_mean=True).z)


def test_networks_for_an_unknown_modality_are_refused() -> None:
    with pytest.raises(ValueError, match=r"encoders\.txet.*Available: \['image', 'text', 'code'\]"):
        DMVAE(small_model().config, encoders={"txet": OwnEncoder()})


def test_broken_folders_are_refused_by_name(tmp_path: Path) -> None:
    good = tmp_path / "good"
    small_model().save(good)

    def broken(file: str, content: bytes | None) -> Path:
        folder = tmp_path / "broken"
        shutil.rmtree(folder, ignore_errors=True)
        shutil.copytree(good, folder)
        (folder / file).unlink()
        if content is not None:
            (folder / file).write_bytes(content)
        return folder

    weights = (good / "model.safetensors").read_bytes()
    with pytest.raises(FileNotFoundError, match=r"model\.json.*model\.safetensors"):
        DMVAE.load(tmp_path / "nowhere")
    for file in ("model.json", "model.safetensors"):
        with pytest.raises(FileNotFoundError, match=rf"has no {file}"):
            DMVAE.load(broken(file, None))
        for content in (b"", b"{", b"\xff\xfe\x00", weights[: len(weights) // 2]):
            with pytest.raises(ValueError, match=f"broken/{file}"):
                DMVAE.load(broken(file, content))
    with pytest.raises(ValueError, match="latent_dmi"):
        DMVAE.load(broken("model.json", b'{"latent_dmi": 3}'))
    other = json.loads((good / "model.json").read_text()) | {"latent_dim": 6}
    with pytest.raises(ValueError, match="heads"):
        DMVAE.load(broken("model.json", json.dumps(other).encode()))


def test_the_joint_nll_is_one_number_summed_over_rows_and_close_to_the_truth() -> None:
    model = linear_model({"a": (3,), "b": (2, 2)}, scales={"a": 0.7, "b": 0.9})
    batch = sample_rows(model, 20, missing=0.3)
    total = model.compute_joint_nll(batch, K=1000, batch_size_K=300, generator=torch.Generator().manual_seed(0))
    assert total.shape == ()
    assert float(total) == pytest.approx(-float(exact_log_prob(model, batch).sum()), abs=0.5)


def test_the_conditional_nll_is_the_mean_over_rows_that_have_the_modality() -> None:
    model = linear_model({"a": (3,), "b": (2, 2), "c": (2,)})
    batch = sample_rows(model, 30, missing=0.4)
    result = model.compute_cond_nll(batch, ["a"], ["b", "c"], K=600, generator=torch.Generator().manual_seed(0))
    assert list(result) == ["b", "c"]
    for name, value in result.items():
        rows = batch[batch.masks[name]]
        given = Batch({"a": rows.data["a"]}, {"a": rows.masks["a"]})
        both = Batch({m: rows.data[m] for m in ("a", name)}, {m: rows.masks[m] for m in ("a", name)})
        exact = exact_log_prob(model, given) - exact_log_prob(model, both)
        assert float(value) == pytest.approx(float(exact.mean()), abs=0.1)


def test_a_row_without_an_id_has_the_draws_of_its_place_in_the_batch() -> None:
    model, batch = small_model(), small_batch()
    named = Batch(batch.data, batch.masks, ids=torch.arange(7))
    results = [
        model.compute_cond_nll(rows, "text", "image", K=8, generator=torch.Generator().manual_seed(0))["image"]
        for rows in (batch, named)
    ]
    assert torch.equal(*results)
    assert torch.equal(model.joint_nll(batch, K=8).nll, model.joint_nll(named, K=8).nll)


def test_the_conditional_nll_without_rows_is_nan_and_refuses_overlap() -> None:
    model, batch = small_model(), small_batch()
    nowhere = Batch({"text": batch.data["text"], "image": batch.data["image"]}, {"image": torch.zeros(7)})
    result = model.compute_cond_nll(nowhere, ["text"], ["image", "code"], K=4)
    assert list(result) == ["image", "code"]
    assert all(math.isnan(value) for value in result.values())
    with pytest.raises(ValueError, match="'text'"):
        model.compute_cond_nll(batch, ["text"], ["image", "text"], K=4)
    with pytest.raises(ValueError, match="overlap"):
        model.compute_cond_nll(batch, "all", "text", K=4)


class ConstantEncoder(nn.Module):
    """An encoder of given log-variances."""

    def __init__(self, log_var: float) -> None:
        super().__init__()
        self.mean, self.log_var = nn.Parameter(torch.ones(5)), nn.Parameter(torch.full((5,), log_var))
        self.linear = nn.Linear(2, 5)

    def forward(self, x: Tensor) -> EncoderOutput:
        mean = self.linear(x) + self.mean
        return EncoderOutput(mean, self.log_var.to(mean.dtype).expand_as(mean), mean[:, :1], mean[:, :1] * 0)


@pytest.mark.parametrize("log_vars", [(120.0, -120.0), (-120.0, -120.0), (120.0, 120.0), (-120.0, 0.0)])
@pytest.mark.parametrize("autocast", [False, True])
def test_extreme_variances_encode_to_finite_values_and_gradients(log_vars: tuple[float, float], autocast: bool) -> None:
    config = DMVAEConfig(input_dims={"a": (2,), "b": (2,)}, latent_dim=5, modalities_specific_dim=1)
    model = DMVAE(config, encoders=dict(zip("ab", map(ConstantEncoder, log_vars), strict=True)))
    batch = Batch(
        {"a": torch.randn(4, 2), "b": torch.randn(4, 2)},
        {"a": torch.tensor([1, 1, 0, 0]), "b": torch.tensor([1, 0, 1, 0])},
    )
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        shared, _ = model.posteriors(batch)
        latents = model.encode(batch, N=3)
    assert shared.mean.dtype == shared.log_var.dtype == latents.z.dtype == torch.float32
    (shared.mean.sum() + shared.log_var.sum()).backward()
    tensors = [shared.mean, shared.log_var, latents.z]
    tensors += [p.grad for name, p in model.named_parameters() if name.startswith("_encoders")]
    assert len(tensors) == 3 + 8
    assert all(bool(tensor.isfinite().all()) for tensor in tensors)


def test_reconstructions_are_single_precision_under_autocast() -> None:
    model, batch = small_model().float(), small_batch()
    with torch.autocast("cpu", torch.bfloat16):
        outputs = model.predict(batch)
        raw = model.decoders["image"](torch.zeros(1, 6)).reconstruction
    assert raw.dtype == torch.bfloat16
    assert {output.dtype for output in outputs.values()} == {torch.float32}


def test_decoding_keeps_whatever_leading_dimensions_there_are() -> None:
    model = small_model()
    for leading in ((), (3,), (2, 3), (2, 1, 3)):
        z = torch.randn(*leading, 5, dtype=torch.float64)
        private = {name: torch.randn(*leading, dim, dtype=torch.float64) for name, dim in PRIVATE.items()}
        decoded = model.decode({"z": z, "modalities_z": private}, ["image", "code"])
        assert decoded.image.shape == (*leading, 1, 3, 2)
        assert decoded.code.shape == (*leading, 2, 3)
