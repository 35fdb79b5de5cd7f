"""The likelihoods and networks of a model, built from its configuration."""

import inspect
import warnings
from collections.abc import Callable, Collection, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Generic, TypeVar

from torch import nn

from dmvae.config.model import DMVAEConfig
from dmvae.config.own_code import check_trust, packages_of, versions
from dmvae.distributions.likelihoods import Likelihood, build, own_path
from dmvae.distributions.likelihoods.columns import Columns
from dmvae.model.serialization import find_carried_code
from dmvae.nn.networks import Dimensions
from dmvae.nn.own_networks import PARTS, build_networks, own_paths

Module = TypeVar("Module", bound=nn.Module)


class Fixed(Mapping[str, Module], Generic[Module]):
    """The modules of a model of one kind, by modality; they cannot be replaced."""

    def __init__(self, modules: Mapping[str, Module]) -> None:
        self._by_name = dict(modules)

    def __getitem__(self, name: str) -> Module:
        return self._by_name[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self._by_name)

    def __len__(self) -> int:
        return len(self._by_name)

    def __setitem__(self, name: str, module: nn.Module) -> None:
        """Refuse, for a module put here would be neither trained nor saved.

        Raises:
            TypeError: always.
        """
        raise TypeError(
            f"Cannot replace the module of {name!r} in a model: it would be neither trained nor saved. "
            f"Pass it when the model is made: DMVAE(config, encoders={{...}}, decoders={{...}})."
        )


@dataclass(frozen=True, eq=False)
class Parts:
    """The modules of a model, by modality.

    Attributes:
        likelihoods: distributions of the values.
        encoders: networks from values to posteriors.
        decoders: networks from latents to the likelihoods' parameters.
        custom: which networks were given by hand, as `encoders.image`.
        packages: versions of the packages of own code.
    """

    likelihoods: dict[str, Likelihood]
    encoders: dict[str, nn.Module]
    decoders: dict[str, nn.Module]
    custom: tuple[str, ...]
    packages: dict[str, str]


def assemble(
    config: DMVAEConfig, encoders: Mapping[str, nn.Module] | None, decoders: Mapping[str, nn.Module] | None
) -> Parts:
    """Build every likelihood, and the networks that are not given.

    Raises:
        ValueError: if the config lacks shapes, names an unknown architecture or likelihood, or networks are
            given for a modality that it does not have.
    """
    given = {"encoders": dict(encoders or {}), "decoders": dict(decoders or {})}
    custom = tuple(f"{kind}.{name}" for kind, modules in given.items() for name in sorted(modules))
    _check_custom(config, custom)
    parts = Parts({}, {}, {}, custom, {})
    for name in config.modalities:
        parts.likelihoods[name] = build(config, name)
        settings, dims = config.architecture(name), dimensions(config, name, parts.likelihoods[name])
        encoder, decoder = given["encoders"].get(name), given["decoders"].get(name)
        left = [part for part, network in zip(PARTS, (encoder, decoder), strict=True) if network is None]
        built = build_networks(settings, dims, name, left) if left else {}
        encoder, decoder = built.get("encoder", encoder), built.get("decoder", decoder)
        assert encoder is not None
        assert decoder is not None
        if name in config.missing_cells:
            _check_takes_cells(name, encoder.forward, parts.likelihoods[name].log_prob)
        parts.encoders[name], parts.decoders[name] = encoder, decoder
    parts.packages.update(versions(own_code_of(config).values()))
    for package, version in parts.packages.items():
        before = config.packages.get(package, version)
        if version != before:
            warnings.warn(f"The model was made with {package} {before}, but {version} is imported.", stacklevel=3)
    return parts


def own_code_of(config: DMVAEConfig) -> dict[str, str]:
    """Return the import paths of the code that a configuration names and the package does not have, by setting."""
    paths = {
        f"architectures.{name}.{part}": path
        for name, settings in config.architectures.items()
        for part, path in own_paths(settings).items()
    }
    likelihoods = {name: own_path(likelihood) for name, likelihood in (config.decoders_dist or {}).items()}
    return paths | {f"decoders_dist.{name}": path for name, path in likelihoods.items() if path is not None}


def check_own_code(config: DMVAEConfig, trust: Collection[str], folder: Path) -> None:
    """Check that own code which a model's folder names may be imported.

    Raises:
        ValueError: naming what is not trusted.
    """
    paths = own_code_of(config)
    check_trust(paths, trust, str(folder))
    find_carried_code(folder, packages_of(paths.values()))


def dimensions(config: DMVAEConfig, name: str, likelihood: Likelihood) -> Dimensions:
    """Return the sizes that the networks of a modality are built for."""
    table = likelihood if isinstance(likelihood, Columns) else None
    return Dimensions(
        shape=config.shapes[name],
        output_shape=likelihood.output_shape,
        shared_dim=config.latent_dim,
        private_dim=config.private_dims[name],
        classes=likelihood.classes,
        pad=likelihood.pad,
        counts=likelihood.are_counts,
        start=likelihood.start,
        kinds=() if table is None else table.kinds,
        column_classes=() if table is None else table.num_classes,
        missing_cells=name in config.missing_cells,
    )


def _check_takes_cells(name: str, encode: Callable[..., Any], log_prob: Callable[..., Any]) -> None:
    """Check that an encoder and a likelihood, which a user may have written, know of missing cells."""
    for function, arguments in ((encode, ("values", "cells")), (log_prob, ("output", "value", "cells"))):
        try:
            inspect.signature(function).bind(*arguments)
        except TypeError:
            what = "encoder's forward" if function is encode else "likelihood's log_prob"
            raise ValueError(
                f"Modality {name!r} has missing cells, so its {what} must take ({', '.join(arguments)}), but takes "
                f"{inspect.signature(function)}. Add the argument `cells`: true where a value is observed."
            ) from None


def _check_custom(config: DMVAEConfig, custom: tuple[str, ...]) -> None:
    known = {f"{kind}.{name}" for kind in ("encoders", "decoders") for name in config.modalities}
    unknown = sorted(set(custom) - known)
    if unknown:
        raise ValueError(f"Networks given for unknown modalities: {unknown}. Available: {list(config.modalities)}.")
    absent = sorted(set(config.custom_architectures) - set(custom))
    if absent:
        raise ValueError(
            f"Cannot build the model: {', '.join(absent)} were given by hand when it was made. Pass them again as "
            "encoders={...} and decoders={...}."
        )
