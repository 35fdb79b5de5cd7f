import tomllib
from typing import Any

import pytest
from pydantic import ValidationError

from dmvae import DMVAEConfig
from dmvae.config.section import RESERVED_NAMES

EVERYTHING: dict[str, Any] = {
    "n_modalities": 3,
    "latent_dim": 4,
    "input_dims": {"image": (1, 28, 28), "text": (20,), "code": (2, 3)},
    "modalities_specific_dim": {"image": 4, "text": 2, "code": 1},
    "decoders_dist": {"image": "bernoulli", "text": "laplace", "code": "categorical"},
    "decoder_dist_params": {"text": {"scale": 0.75}, "code": {"classes": 5}},
    "uses_likelihood_rescaling": True,
    "rescale_factors": {"image": 1.0, "text": 39.2, "code": 0.0},
    "beta": 2.5,
    "modalities_specific_betas": {"image": 0.5, "text": 0.0, "code": 1.0},
    "architectures": {"image": {"name": "conv", "dropout": 0.1}, "text": {"hidden_dims": (8, 4)}},
    "custom_architectures": ("encoders.code",),
}

TOML = """
latent_dim = 4
beta = 2.5
modalities_specific_dim = 3
[input_dims]
image = [1, 28, 28]
text = [20]
[decoders_dist]
image = "bernoulli"
[decoder_dist_params.text]
scale = "learned"
[architectures.text]
hidden_dims = []
"""


def test_every_field_survives_json() -> None:
    config = DMVAEConfig(**EVERYTHING)
    again = DMVAEConfig.model_validate_json(config.model_dump_json())
    assert again == config
    assert again.modalities == ("image", "text", "code")
    assert again.shapes["image"] == (1, 28, 28)


def test_a_whole_number_for_a_scale_and_a_number_of_classes_keep_their_types() -> None:
    config = DMVAEConfig.model_validate_json(DMVAEConfig(**EVERYTHING).model_dump_json())
    assert type(config.dist_params("code")["classes"]) is int
    assert type(config.dist_params("text")["scale"]) is float


def test_toml_gives_the_same_config_as_python() -> None:
    written = DMVAEConfig(
        latent_dim=4,
        beta=2.5,
        modalities_specific_dim=3,
        input_dims={"image": (1, 28, 28), "text": (20,)},
        decoders_dist={"image": "bernoulli"},
        decoder_dist_params={"text": {"scale": "learned"}},
        architectures={"text": {"hidden_dims": ()}},
    )
    assert DMVAEConfig(**tomllib.loads(TOML)) == written


def test_what_is_left_out_has_the_documented_defaults() -> None:
    config = DMVAEConfig(input_dims={"a": (4,), "b": (2, 3)})
    assert config.private_dims == {"a": 2, "b": 2}
    assert config.private_betas == {"a": 1.0, "b": 1.0}
    assert config.distributions == {"a": "normal", "b": "normal"}
    assert config.reconstruction_weights == {"a": 1.0, "b": 1.0}


def test_default_rescaling_is_the_largest_size_over_the_own_size() -> None:
    config = DMVAEConfig(input_dims={"a": (4,), "b": (2, 3)}, uses_likelihood_rescaling=True)
    assert config.reconstruction_weights == {"a": 1.5, "b": 1.0}


def test_one_number_holds_for_every_modality() -> None:
    config = DMVAEConfig(input_dims={"a": (4,), "b": (3,)}, modalities_specific_dim=7, modalities_specific_betas=0.5)
    assert config.private_dims == {"a": 7, "b": 7}
    assert config.private_betas == {"a": 0.5, "b": 0.5}


def test_a_modality_without_a_private_latent_has_no_beta() -> None:
    dims = {"input_dims": {"a": (4,), "b": (3,)}, "modalities_specific_dim": {"a": 0, "b": 2}}
    assert DMVAEConfig(**dims, modalities_specific_betas=0.5).private_betas["b"] == 0.5
    assert DMVAEConfig(**dims, modalities_specific_betas={"b": 0.5}).private_betas == {"a": 1.0, "b": 0.5}
    with pytest.raises(ValueError, match="Remove their betas"):
        DMVAEConfig(**dims, modalities_specific_betas={"a": 0.5, "b": 0.5})
    with pytest.raises(ValueError, match="Remove their betas"):
        DMVAEConfig(input_dims={"a": (4,), "b": (3,)}, modalities_specific_dim=0, modalities_specific_betas=2.0)


@pytest.mark.parametrize("field", ["latent_dim", "beta", "input_dims"])
def test_a_config_is_frozen(field: str) -> None:
    config = DMVAEConfig(**EVERYTHING)
    with pytest.raises(ValidationError, match="frozen"):
        setattr(config, field, getattr(config, field))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"latent_dims": 3}, "latent_dims"),
        ({"architectures": {"image": {"nam": "conv"}}}, "nam"),
        ({"n_modalities": 2}, "n_modalities"),
        ({"input_dims": {}}, "at least one modality"),
        ({"input_dims": {"image": ()}}, "at least one dimension"),
        ({"input_dims": {"image": (0,)}}, "input_dims"),
        ({"latent_dim": 0}, "latent_dim"),
        ({"modalities_specific_dim": 0}, "modalities_specific_dim"),
        ({"modalities_specific_dim": {"image": 0, "text": 2, "code": 1}}, "modalities_specific_dim"),
        ({"modalities_specific_dim": {"image": 2, "text": 2}}, "code"),
        ({"modalities_specific_betas": {"image": 2, "text": 2}}, "code"),
        ({"modalities_specific_betas": {"image": 1, "text": 1, "code": -0.1}}, "modalities_specific_betas"),
        ({"modalities_specific_dim": {"image": 0, "text": 2, "code": 1}}, r"betas.*\['image'\] have none"),
        ({"cross": "posteriors"}, "cross"),
        ({"beta": -1.0}, "beta"),
        ({"beta": float("nan")}, "beta"),
        ({"beta": float("inf")}, "beta"),
        ({"rescale_factors": {"image": -1.0, "text": 1.0, "code": 1.0}}, "rescale_factors"),
        ({"rescale_factors": {"image": 1.0, "text": 1.0}}, "code"),
        ({"uses_likelihood_rescaling": False}, "uses_likelihood_rescaling"),
        ({"decoder_dist_params": {"image": {"scale": 1.0}, "code": {"classes": 5}}}, "scale"),
        ({"decoder_dist_params": {"text": {"scale": 0.0}, "code": {"classes": 5}}}, "scale"),
        ({"decoder_dist_params": {"text": {"scale": "learnt"}, "code": {"classes": 5}}}, "learned"),
        ({"decoder_dist_params": {"code": {"classes": 1}}}, "classes"),
        ({"decoder_dist_params": {"code": {"classes": 2.5}}}, "classes"),
        ({"decoder_dist_params": None}, "classes"),
        ({"architectures": {"image": {"dropout": 1.0}}}, "dropout"),
        ({"architectures": {"text": {"hidden_dims": (0,)}}}, "hidden_dims"),
    ],
)
def test_a_setting_that_cannot_hold_is_refused_by_name(changes: dict[str, Any], message: str) -> None:
    DMVAEConfig(**EVERYTHING)
    with pytest.raises(ValueError, match=message):
        DMVAEConfig(**(EVERYTHING | changes))


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("modalities_specific_dim", 1),
        ("decoders_dist", "normal"),
        ("decoder_dist_params", {"scale": 1.0}),
        ("rescale_factors", 1.0),
        ("modalities_specific_betas", 1.0),
        ("architectures", {}),
    ],
)
def test_a_modality_that_is_not_in_input_dims_is_refused_with_the_known_ones(field: str, value: object) -> None:
    settings = {"input_dims": {"image": (3,), "text": (4,)}, "uses_likelihood_rescaling": True}
    with pytest.raises(ValueError, match=rf"{field}: \['txet'\]. Available: \['image', 'text'\]"):
        DMVAEConfig(**settings, **{field: {"image": value, "text": value, "txet": value}})


def test_rescale_factors_without_the_switch_are_refused_before_the_shapes_are_known() -> None:
    with pytest.raises(ValueError, match="uses_likelihood_rescaling"):
        DMVAEConfig(n_modalities=1, rescale_factors={"a": 2.0})


@pytest.mark.parametrize("name", sorted(RESERVED_NAMES))
def test_reserved_names_are_no_modalities(name: str) -> None:
    with pytest.raises(ValueError, match=repr(name)):
        DMVAEConfig(input_dims={name: (3,)})


def test_the_reserved_names_are_the_documented_ones() -> None:
    assert {"all", "joint", "shared", "id", "label", "size_factor"} == RESERVED_NAMES


@pytest.mark.parametrize("name", ["", "1a", "_a", "a b", "a.b", "a/b", "ä", "a\n", "-a"])
def test_illegal_names_are_no_modalities(name: str) -> None:
    with pytest.raises(ValueError, match="Invalid modality name"):
        DMVAEConfig(input_dims={name: (3,)})


@pytest.mark.parametrize("name", ["type", "values", "keys", "items", "forward", "training", "a-b_c2", "z"])
def test_any_other_legal_name_is_a_modality(name: str) -> None:
    assert DMVAEConfig(input_dims={name: (3,)}).modalities == (name,)


def test_a_config_without_shapes_says_so_when_they_are_needed() -> None:
    with pytest.raises(ValueError, match="input_dims"):
        _ = DMVAEConfig(n_modalities=2).modalities


@pytest.mark.parametrize("scale", [1e-320, 1e-40, 1e40])
def test_a_scale_outside_the_range_of_float32_is_refused(scale: float) -> None:
    with pytest.raises(ValidationError, match=r"scale must be a number greater than 0 \(at least 1e-30"):
        DMVAEConfig.model_validate({"input_dims": {"a": [2]}, "decoder_dist_params": {"a": {"scale": scale}}})
