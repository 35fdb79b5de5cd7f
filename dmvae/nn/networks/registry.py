"""The architectures that `architectures` can name."""

from collections.abc import Callable
from dataclasses import dataclass

from torch import nn

from dmvae.config.model import ArchitectureConfig
from dmvae.nn.networks.interface import Dimensions

Builder = Callable[[ArchitectureConfig, Dimensions], nn.Module]
Check = Callable[[ArchitectureConfig, Dimensions], str | None]


def _no_fault(architecture: ArchitectureConfig, dims: Dimensions) -> str | None:
    return None


@dataclass(frozen=True)
class Architecture:
    """A pair of networks.

    Attributes:
        encoder: builds the encoder.
        decoder: builds the decoder.
        fault: says why settings and sizes do not suit it; None if they do.
    """

    encoder: Builder
    decoder: Builder
    fault: Check = _no_fault


_REGISTRY: dict[str, Architecture] = {}


def register(name: str, encoder: Builder, decoder: Builder, fault: Check = _no_fault) -> None:
    """Make a pair of networks available as `name` in `architectures`.

    Raises:
        ValueError: if the name is taken.
    """
    if name in _REGISTRY:
        raise ValueError(f"Architecture {name!r} is already registered. Choose another name.")
    _REGISTRY[name] = Architecture(encoder, decoder, fault)


def is_registered(name: str) -> bool:
    """Tell whether an architecture is registered as `name`."""
    return name in _REGISTRY


def architecture_of(settings: ArchitectureConfig, dims: Dimensions, modality: str) -> Architecture:
    """Return the architecture that a modality's settings name.

    Raises:
        ValueError: if no architecture of that name is registered, or the settings or sizes do not suit it.
    """
    if settings.name not in _REGISTRY:
        available = ", ".join(sorted(_REGISTRY))
        raise ValueError(f"Unknown architecture {settings.name!r} for modality {modality!r}. Available: {available}.")
    architecture = _REGISTRY[settings.name]
    fault = architecture.fault(settings, dims)
    if fault is not None:
        raise ValueError(f"Cannot use architecture {settings.name!r} for modality {modality!r}: {fault}")
    return architecture
