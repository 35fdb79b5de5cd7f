"""The reference implementation as the other side: MultiVae's models around the same layers and the same weights."""

import copy
import importlib
import subprocess
import sys
import types
from collections.abc import Mapping
from pathlib import Path
from typing import Any, ClassVar

import torch

from dmvae.data.batch import Batch
from dmvae.model.dmvae import DMVAE

PACKAGES = ("multivae==1.0.3", "pythae==0.1.2")
_UNUSED = (
    *(
        "torchvision",
        "torchvision.utils",
        "torchvision.transforms",
        "torchvision.datasets",
        "torchvision.datasets.utils",
    ),
    *("torchvision.models", "nltk", "nltk.tokenize", "imageio"),
)
FOLDER = Path(__file__).parents[2] / "build" / "multivae"


def install() -> None:
    """Install the package into a folder of its own, without its dependencies, and make it importable.

    What it imports for pictures and texts alone is stood in for by empty modules; the model needs none of it.
    """
    if not (FOLDER / "multivae").exists():
        command = [sys.executable, "-m", "pip", "install", "--quiet", "--no-deps", "--target", str(FOLDER), *PACKAGES]
        subprocess.run(command, check=True)
    if str(FOLDER) not in sys.path:
        sys.path.append(str(FOLDER))
    for name in _UNUSED:
        sys.modules.setdefault(name, _StandIn(name))


class _StandIn(types.ModuleType):
    """A module that has every name, as an empty class."""

    __path__: ClassVar[list[str]] = []

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)
        return type(name, (), {})


PEERS = ("DMVAE", "MVTCAE", "MMVAEPlus", "MoPoE")
_JOINT = ("MVTCAE", "MoPoE")  # one latent, without private parts


def reference(model: DMVAE) -> Any:
    """Return MultiVae's model of the same configuration, with copies of our networks."""
    return peer("DMVAE", model, {})


def peer(kind: str, model: DMVAE, scales: Mapping[str, float]) -> Any:
    """Return a model of MultiVae around copies of our networks, with its own settings otherwise.

    Args:
        kind: one of `PEERS`; those with one latent take our shared and private outputs together.
        model: whose private latents all have one size, unless it is for `DMVAE`.
        scales: of the normal likelihoods; 1 where there is none.
    """
    models = importlib.import_module("multivae.models")
    model = copy.deepcopy(model)
    for layers in (*model.encoders.values(), *model.decoders.values()):
        layers.to(memory_format=torch.contiguous_format)  # as its users have them; how ours are laid out is our doing
    joint, private = kind in _JOINT, model.config.private_dims
    encoders = {name: _encoder(copy.deepcopy(network), model, name, joint) for name, network in model.encoders.items()}
    decoders = {name: _decoder(copy.deepcopy(network), model, name) for name, network in model.decoders.items()}
    own = {"DMVAE": private, "MMVAEPlus": max(private.values())}
    config = getattr(models, f"{kind}Config")(
        n_modalities=len(encoders),
        latent_dim=model.config.latent_dim + (max(private.values()) if joint else 0),
        input_dims=dict(model.config.shapes),
        decoders_dist=model.config.distributions,
        **({"modalities_specific_dim": own[kind]} if kind in own else {}),
        **({"decoder_dist_params": {name: {"scale": scale} for name, scale in scales.items()}} if scales else {}),
    )
    return getattr(models, kind)(config, encoders, decoders)


def _encoder(network: torch.nn.Module, model: DMVAE, name: str, joint: bool) -> Any:
    architectures = importlib.import_module("multivae.models.nn.base_architectures")
    outputs = importlib.import_module("pythae.models.base.base_utils")

    class Encoder(architectures.BaseMultilatentEncoder):  # type: ignore[misc, name-defined]
        def __init__(self) -> None:
            super().__init__()
            self.network = network
            self.latent_dim, self.style_dim = model.config.latent_dim, model.config.private_dims[name]
            if joint:
                self.latent_dim, self.style_dim = self.latent_dim + self.style_dim, 0

        def forward(self, x: torch.Tensor) -> Any:
            out = vars(self.network(x))
            if joint:
                parts = ("embedding", "log_covariance")
                out = {part: torch.cat((out[part], out[f"style_{part}"]), dim=-1) for part in parts}
            return outputs.ModelOutput(**out)

    return Encoder()


def _decoder(network: torch.nn.Module, model: DMVAE, name: str) -> Any:
    architectures = importlib.import_module("pythae.models.nn.base_architectures")
    outputs = importlib.import_module("pythae.models.base.base_utils")

    class Decoder(architectures.BaseDecoder):  # type: ignore[misc, name-defined]
        def __init__(self) -> None:
            super().__init__()
            self.network = network
            self.latent_dim = model.config.latent_dim + model.config.private_dims[name]

        def forward(self, z: torch.Tensor) -> Any:
            return outputs.ModelOutput(reconstruction=self.network(z).reconstruction)

    return Decoder()


def inputs(batch: Batch) -> Any:
    """Return a batch as the reference implementation takes it; without masks where nothing is missing."""
    outputs = importlib.import_module("pythae.data.datasets")
    if batch.masks is None:
        return outputs.DatasetOutput(data=dict(batch.data))
    return outputs.DatasetOutput(data=dict(batch.data), masks=dict(batch.masks))
