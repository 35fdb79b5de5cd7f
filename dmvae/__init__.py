"""The Private-Shared Disentangled Multimodal VAE: a model, its training and its search on incomplete data.

The public names are resolved on first use, so that importing a part of the package loads only what it needs.
"""

from importlib import import_module
from importlib.metadata import PackageNotFoundError, version
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from dmvae.config.model import DMVAEConfig as DMVAEConfig
    from dmvae.data.batch import Batch as Batch
    from dmvae.distributions.likelihoods import Likelihood as Likelihood
    from dmvae.fitting.fit import fit as fit
    from dmvae.fitting.fitted import Fitted as Fitted
    from dmvae.fitting.fitted import load as load
    from dmvae.model.dmvae import DMVAE as DMVAE
    from dmvae.model.nll.estimate import NLLEstimate as NLLEstimate
    from dmvae.model.outputs import DMVAEOutput as DMVAEOutput
    from dmvae.model.outputs import ModelOutput as ModelOutput
    from dmvae.nn.networks import DecoderOutput as DecoderOutput
    from dmvae.nn.networks import EncoderOutput as EncoderOutput

_HOMES = {
    "Batch": "dmvae.data.batch",
    "DMVAE": "dmvae.model.dmvae",
    "DMVAEConfig": "dmvae.config.model",
    "DMVAEOutput": "dmvae.model.outputs",
    "DecoderOutput": "dmvae.nn.networks",
    "EncoderOutput": "dmvae.nn.networks",
    "Fitted": "dmvae.fitting.fitted",
    "Likelihood": "dmvae.distributions.likelihoods",
    "ModelOutput": "dmvae.model.outputs",
    "NLLEstimate": "dmvae.model.nll.estimate",
    "fit": "dmvae.fitting.fit",
    "load": "dmvae.fitting.fitted",
}

__all__ = [
    "DMVAE", "Batch", "DMVAEConfig", "DMVAEOutput", "DecoderOutput", "EncoderOutput", "Fitted", "Likelihood",
    "ModelOutput", "NLLEstimate", "__version__", "fit", "load",
]  # fmt: skip


def __getattr__(name: str) -> Any:
    if name == "__version__":
        try:
            return version("dmvae")
        except PackageNotFoundError:  # a copy of the package that is not installed, such as a registered model's
            return "unknown"
    if name not in _HOMES:
        raise AttributeError(f"module 'dmvae' has no attribute {name!r}")
    return getattr(import_module(_HOMES[name]), name)


def __dir__() -> list[str]:
    return sorted([*globals(), *_HOMES, "__version__"])
