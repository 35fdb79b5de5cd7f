"""The Private-Shared Disentangled Multimodal VAE: a model, its training and its search on incomplete data.

The public names are resolved on first use, so that importing a part of the package loads only what it needs.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from dmvae.config.model import DMVAEConfig as DMVAEConfig
    from dmvae.data.batch import Batch as Batch
    from dmvae.model.dmvae import DMVAE as DMVAE
    from dmvae.platform.serve.registry import load as load

_HOMES = {
    "Batch": "dmvae.data.batch",
    "DMVAE": "dmvae.model.dmvae",
    "DMVAEConfig": "dmvae.config.model",
    "load": "dmvae.platform.serve.registry",
}

__all__ = ["DMVAE", "Batch", "DMVAEConfig", "load"]


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module 'dmvae' has no attribute {name!r}")
    return getattr(import_module(_HOMES[name]), name)


def __dir__() -> list[str]:
    return sorted([*globals(), *_HOMES])
