"""Parts of a model by path: what a prefix names, and what a model takes from another."""

import pytest
import torch

from dmvae import DMVAE, DMVAEConfig
from dmvae.model.parts import check_prefixes, named_parameters, start_from

OLD = {"rna": (5,), "protein": (3,)}
ALL = {kind: kind for kind in ("encoders", "decoders", "likelihoods")}


def make_model(shapes: dict[str, tuple[int, ...]], seed: int, **changes: object) -> DMVAE:
    torch.manual_seed(seed)
    given = {"input_dims": shapes, "latent_dim": 2, "modalities_specific_dim": 1, **changes}
    given |= {"decoder_dist_params": {"rna": {"scale": "learned"}}} if "rna" in shapes else {}
    return DMVAE(DMVAEConfig.model_validate(given))


def test_a_path_names_every_parameter_as_the_model_does() -> None:
    model = make_model(OLD, 0)
    named = named_parameters(model)
    assert list(named.values()) == list(model.parameters())
    assert named["encoders.rna.heads.bias"] is model.encoders["rna"].heads.bias
    assert named["decoders.protein.body.0.weight"] is model.decoders["protein"].body[0].weight


def test_a_model_with_a_new_modality_starts_from_the_old_model() -> None:
    old, new = make_model(OLD, 0), make_model({**OLD, "atac": (7,)}, 1)
    fresh = {name: tensor.clone() for name, tensor in new.state_dict().items()}
    assert start_from(new, old, ALL) == ("decoders.atac", "encoders.atac")
    for name, tensor in new.state_dict().items():
        assert torch.equal(tensor, fresh[name] if "atac" in name else old.state_dict()[name]), name


def test_a_part_may_start_from_a_part_of_another_name() -> None:
    old, new = make_model(OLD, 0), make_model({"cells": (5,), "protein": (3,)}, 1)
    fresh = new.decoders["cells"].body[0].weight.clone()
    start_from(new, old, {"encoders.cells": "encoders.rna", "encoders.protein.heads": "encoders.protein.heads"})
    assert torch.equal(new.encoders["cells"].body[0].weight, old.encoders["rna"].body[0].weight)
    assert torch.equal(new.encoders["protein"].heads.weight, old.encoders["protein"].heads.weight)
    assert not torch.equal(new.encoders["protein"].body[0].weight, old.encoders["protein"].body[0].weight)
    assert torch.equal(new.decoders["cells"].body[0].weight, fresh)


def test_without_a_map_the_whole_model_is_taken() -> None:
    old, new = make_model(OLD, 0), make_model(OLD, 1)
    assert start_from(new, old, {}) == ()
    assert all(torch.equal(tensor, old.state_dict()[name]) for name, tensor in new.state_dict().items())


@pytest.mark.parametrize(
    ("changes", "prefixes", "message"),
    [
        ({}, {"encoders.rma": "encoders.rna"}, r"init_map: no weights are called 'encoders.rma'.*'encoders.rna'\?"),
        ({}, {"encoders.rna": "encoders.atac"}, "init_map, in the model at init_from: no weights are called"),
        ({}, {"encoders.rna": "encoders.protein"}, r"body.0.weight.*must be \(256, 5\), but got \(256, 3\)"),
        ({}, {"encoders.rna": "encoders"}, r"Cannot start encoders.rna.rna.* no such weights"),
        ({"latent_dim": 4}, ALL, r"must be \(10, 256\), but got \(6, 256\)"),
        ({"latent_dim": 4}, {}, r"must be \(10, 256\), but got \(6, 256\)"),
        ({"decoders_dist": {"rna": "laplace"}}, ALL, "decoders.rna.* must be 'laplace', but got 'normal'"),
        ({"input_dims": {**OLD, "x": (2,)}}, {}, "differs in decoders.x, encoders.x"),
    ],
)
def test_parts_that_do_not_fit_are_refused(changes: dict[str, object], prefixes: dict[str, str], message: str) -> None:
    new, old = make_model(OLD, 1, **changes), make_model(OLD, 0)
    fresh = {name: tensor.clone() for name, tensor in new.state_dict().items()}
    with pytest.raises(ValueError, match=message):
        start_from(new, old, prefixes)
    assert all(torch.equal(tensor, fresh[name]) for name, tensor in new.state_dict().items())


def test_a_prefix_ends_where_a_name_does() -> None:
    with pytest.raises(ValueError, match=r"Did you mean 'encoders.image'\?"):
        check_prefixes("freeze", ["encoders.imag"], ["encoders.image.heads.bias"])
    check_prefixes("freeze", ["encoders", "encoders.image.heads"], ["encoders.image.heads.bias"])
