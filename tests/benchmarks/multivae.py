"""The reference implementation as the other side: MultiVae's DMVAE around the same layers and the same weights."""

import copy
import importlib
import subprocess
import sys
import types
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


def reference(model: DMVAE) -> Any:
    """Return MultiVae's model of the same configuration, with copies of our networks."""
    models = importlib.import_module("multivae.models")
    model = copy.deepcopy(model)
    for layers in (*model.encoders.values(), *model.decoders.values()):
        layers.to(memory_format=torch.contiguous_format)  # as its users have them; how ours are laid out is our doing
    encoders = {name: _encoder(copy.deepcopy(network), model, name) for name, network in model.encoders.items()}
    decoders = {name: _decoder(copy.deepcopy(network), model, name) for name, network in model.decoders.items()}
    config = models.DMVAEConfig(
        n_modalities=len(encoders),
        latent_dim=model.config.latent_dim,
        input_dims=dict(model.config.shapes),
        modalities_specific_dim=model.config.private_dims,
        decoders_dist=model.config.distributions,
    )
    return models.DMVAE(config, encoders, decoders)


def _encoder(network: torch.nn.Module, model: DMVAE, name: str) -> Any:
    architectures = importlib.import_module("multivae.models.nn.base_architectures")
    outputs = importlib.import_module("pythae.models.base.base_utils")

    class Encoder(architectures.BaseMultilatentEncoder):  # type: ignore[misc, name-defined]
        def __init__(self) -> None:
            super().__init__()
            self.network = network
            self.latent_dim, self.style_dim = model.config.latent_dim, model.config.private_dims[name]

        def forward(self, x: torch.Tensor) -> Any:
            return outputs.ModelOutput(**vars(self.network(x)))

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
