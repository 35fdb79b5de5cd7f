"""Encoders and decoders, a module per architecture, and the registry of their names.

Loading the package loads all of its modules, and each registers its architecture.
"""

from importlib import import_module
from pkgutil import iter_modules

from dmvae.nn.networks.interface import DecoderOutput, Dimensions, EncoderOutput
from dmvae.nn.networks.registry import Architecture, architecture_of, is_registered, register

__all__ = [
    "Architecture", "DecoderOutput", "Dimensions", "EncoderOutput", "architecture_of", "is_registered", "register",
]  # fmt: skip

for _module in iter_modules(__path__):
    import_module(f"{__name__}.{_module.name}")
