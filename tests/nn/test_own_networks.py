"""A person's own networks by import path: found, called, checked."""

import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from pydantic import ValidationError
from torch import nn

from dmvae.config.model import ArchitectureConfig, DMVAEConfig
from dmvae.config.own_code import OwnCodeError
from dmvae.data.batch import Batch
from dmvae.model.dmvae import DMVAE
from dmvae.nn.networks import Dimensions
from dmvae.nn.own_networks import build_networks, check_networks
from dmvae.training.settings import blank_model
from tests.example_package import wrong
from tests.example_package.nets import ResNetEncoder, TableDecoder, TableEncoder, TextDecoder

NETS, WRONG = "tests.example_package.nets", "tests.example_package.wrong"


def config(**architecture: Any) -> DMVAEConfig:
    return DMVAEConfig.model_validate(
        {"input_dims": {"a": [6], "b": [2]}, "latent_dim": 3, "architectures": {"a": architecture}}
    )


def image_dims() -> Dimensions:
    return Dimensions((3, 64, 64), (3, 64, 64), 4, 2)


def test_a_path_gives_both_networks_with_its_params() -> None:
    model = DMVAE(config(name=f"{NETS}:table", params={"width": 5}))
    assert isinstance(model.encoders["a"], TableEncoder)
    assert model.encoders["a"].body[1].out_features == 5
    assert torch.isfinite(model(Batch({"a": torch.rand(4, 6), "b": torch.rand(4, 2)})).loss)


def test_paths_give_the_networks_one_by_one_and_the_name_gives_the_rest() -> None:
    both = DMVAE(config(encoder=f"{NETS}:TableEncoder", decoder=f"{NETS}:TableDecoder", params={"width": 5}))
    assert isinstance(both.decoders["a"], TableDecoder)
    one = DMVAE(config(encoder=f"{NETS}:TableEncoder", name="skip_mlp", hidden_dims=[7]))
    assert isinstance(one.encoders["a"], TableEncoder)
    assert type(one.decoders["a"]) is type(DMVAE(config(name="skip_mlp")).decoders["a"])


def test_the_model_records_which_version_of_the_package_it_has() -> None:
    model = DMVAE(config(name=f"{NETS}:table"))
    assert model.config.packages["tests"].startswith("sha256:")
    assert DMVAE(config()).config.packages == {}
    assert DMVAE(config(name="mlp")).config.packages == {}


@pytest.mark.parametrize(
    ("architecture", "words"),
    [
        ({"name": "nets:"}, "Invalid import path 'nets:': write MODULE:ATTRIBUTE"),
        ({"encoder": "ResNet"}, "Invalid import path 'ResNet'"),
        ({"name": f"{NETS}:table", "encoder": f"{NETS}:TableEncoder"}, "gives both networks, so encoder cannot be set"),
        ({"name": f"{NETS}:table", "hidden_dims": [3]}, "Pass them in params"),
        ({"name": "conv", "encoder": "a:b", "decoder": "a:c"}, "name='conv' has no effect"),
    ],
)
def test_settings_that_contradict_each_other_are_refused(architecture: dict[str, Any], words: str) -> None:
    with pytest.raises(ValidationError, match=words):
        ArchitectureConfig.model_validate(architecture)


@pytest.mark.parametrize(
    ("architecture", "words"),
    [
        ({"name": "nowhere.nets:ResNet"}, r"architectures\.a\.name: module 'nowhere' not found .* PYTHONPATH"),
        ({"name": "tests.nowhere:ResNet"}, r"module 'tests\.nowhere' not found"),
        ({"name": f"{NETS}:ResNet152"}, "has no attribute 'ResNet152'"),
        ({"name": f"{WRONG}:NUMBER"}, "must be a class or a function, but got int"),
        ({"name": f"{NETS}:table", "params": {"widht": 3}}, r"unexpected keyword argument 'widht'.*width: int"),
        ({"name": f"{WRONG}:alone"}, r"must return the pair \(encoder, decoder\), but got TableEncoder"),
        ({"name": f"{WRONG}:failing"}, r"'tests\.example_package\.wrong:failing' failed with KeyError: 'weights'"),
        ({"name": f"{WRONG}:lazy"}, r"encoder of modality 'a' has lazy layers"),
        ({"decoder": f"{WRONG}:OneColumn"}, r"'a' must return `reconstruction` of shape \(2, 6\) .* got \(2, 1\)"),
        ({"encoder": f"{WRONG}:WithoutStyle"}, r"encoder of modality 'a' .*`style_embedding`, but got SimpleNamespace"),
        ({"encoder": f"{WRONG}:Normalised"}, r"'a' has batch normalisation \(norm: BatchNorm1d\)"),
        ({"name": "mlp", "params": {"width": 3}}, r"params have no effect: architecture 'mlp' takes none"),
        ({"name": "resnet"}, "Unknown architecture 'resnet' for modality 'a'"),
    ],
)
def test_networks_that_do_not_work_are_refused_in_one_line(architecture: dict[str, Any], words: str) -> None:
    with pytest.raises(ValueError, match=words) as refusal:
        blank_model(config(**architecture))
    assert "\n" not in str(refusal.value)


def test_networks_are_tried_out_without_memory_where_they_allow_it() -> None:
    huge = config(name=f"{NETS}:table", params={"width": 10**9})
    assert blank_model(huge).device.type == "meta"
    assert blank_model(config(encoder=f"{WRONG}:NeedsNumbers")).device.type == "cpu"


def test_trying_out_changes_neither_mode_nor_random_numbers() -> None:
    state = torch.get_rng_state()
    blank_model(config(encoder=f"{WRONG}:NeedsNumbers"))
    assert torch.equal(torch.get_rng_state(), state)
    network = TableEncoder(Dimensions((6,), (6,), 3, 2)).train()
    check_networks({"encoder": network}, Dimensions((6,), (6,), 3, 2), "a", torch.zeros(()))
    assert network.training


def test_a_wrong_shape_in_python_names_modality_got_and_wanted() -> None:
    dims = Dimensions((6,), (6,), 3, 2)
    model = DMVAE(config(), decoders={"a": wrong.OneColumn(dims)})
    with pytest.raises(ValueError, match=r"'a' must return `reconstruction` of shape \(\d+, 6\) .* got \(\d+, 1\)"):
        model(Batch({"a": torch.rand(4, 6), "b": torch.rand(4, 2)}))
    model = DMVAE(config(), encoders={"a": wrong.WithoutStyle(dims)})
    with pytest.raises(ValueError, match=r"encoder of modality 'a' must return .*`style_embedding`"):
        model(Batch({"a": torch.rand(4, 6)}))


def test_batch_normalisation_on_one_row_names_the_modality() -> None:
    model = DMVAE(config(), encoders={"a": wrong.Normalised(Dimensions((6,), (6,), 3, 2))})
    mask = torch.tensor([False, True, False])
    with pytest.raises(ValueError, match=r"encoder of modality 'a' failed on the 1 rows of the batch that have it"):
        model(Batch({"a": torch.rand(3, 6), "b": torch.rand(3, 2)}, {"a": mask}))


def test_a_network_in_a_model_cannot_be_replaced() -> None:
    model = DMVAE(config())
    with pytest.raises(TypeError, match=r"Cannot replace the module of 'a' .* Pass it when the model is made"):
        model.encoders["a"] = nn.Linear(1, 1)  # type: ignore[index]
    with pytest.raises(AttributeError, match="encoders"):
        model.encoders = {}  # type: ignore[misc]


@pytest.mark.parametrize("norm", ["group", "batch"])
def test_the_example_packages_networks_fit(norm: str) -> None:
    settings = ArchitectureConfig(name=f"{NETS}:resnet", params={"norm": norm})
    networks = build_networks(settings, image_dims(), "image")
    assert isinstance(networks["encoder"], ResNetEncoder)
    if norm == "batch":
        with pytest.raises(ValueError, match=r"block\.body\.1: BatchNorm2d, and 1 more.* Use GroupNorm"):
            check_networks(networks, image_dims(), "image", torch.zeros(()))
    else:
        check_networks(networks, image_dims(), "image", torch.zeros(()))


def test_an_error_of_an_own_network_tells_its_input() -> None:
    dims, others = (Dimensions((5,), (5, 4), shared, 2, classes=4) for shared in (4, 3))
    with pytest.raises(OwnCodeError, match=r"decoder of modality 'text' failed on \(2, 6\), torch\.float32: Runtime"):
        check_networks({"decoder": TextDecoder(others)}, dims, "text", torch.zeros(()))


def test_an_installed_package_announces_names(tmp_path: Path) -> None:
    info = tmp_path / "plugin-1.5.dist-info"
    info.mkdir()
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: plugin\nVersion: 1.5\n")
    (info / "RECORD").write_text("plugin_nets.py,,\n")
    (info / "entry_points.txt").write_text(
        "[dmvae.architectures]\ntable = plugin_nets:table\n[dmvae.likelihoods]\ncauchy = plugin_nets:Cauchy\n"
    )
    (tmp_path / "plugin_nets.py").write_text(
        "from dmvae.distributions.likelihoods.laplace import Laplace as Cauchy\n"
        "from tests.example_package.nets import table\n"
    )
    program = (
        "from dmvae import DMVAE, DMVAEConfig\n"
        "config = DMVAEConfig(input_dims={'a': (6,)}, architectures={'a': {'name': 'table', 'params': {'width': 5}}},"
        " decoders_dist={'a': 'cauchy'})\n"
        "model = DMVAE(config)\n"
        "print(model.encoders['a'].body[1].out_features, model.config.packages)\n"
        f"model.save({str(tmp_path / 'model')!r})\n"
        "try:\n"
        f"    DMVAE.load({str(tmp_path / 'model')!r})\n"
        "except ValueError as error:\n"
        "    print(error)\n"
        f"DMVAE.load({str(tmp_path / 'model')!r}, trust=['plugin_nets'])\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, check=False, cwd=Path(__file__).parents[2],
        env={"PYTHONPATH": f"{tmp_path}:{Path(__file__).parents[2]}"},
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-2000:]
    first, refusal = done.stdout.splitlines()
    assert first == "5 {'plugin_nets': '1.5'}"
    assert "trust=('plugin_nets',)" in refusal
    assert "decoders_dist.a = 'plugin_nets:Cauchy'" in refusal
