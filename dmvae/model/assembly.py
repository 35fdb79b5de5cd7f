"""The likelihoods and networks of a model, built from its configuration."""

import inspect
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from torch import nn

from dmvae.config.model import DMVAEConfig
from dmvae.distributions.likelihoods import Likelihood, build
from dmvae.distributions.likelihoods.columns import Columns
from dmvae.nn.networks import Dimensions, architecture_of


@dataclass(frozen=True, eq=False)
class Parts:
    """The modules of a model, by modality.

    Attributes:
        likelihoods: distributions of the values.
        encoders: networks from values to posteriors.
        decoders: networks from latents to the likelihoods' parameters.
        custom: which networks were given by hand, as `encoders.image`.
    """

    likelihoods: dict[str, Likelihood]
    encoders: dict[str, nn.Module]
    decoders: dict[str, nn.Module]
    custom: tuple[str, ...]


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
    parts = Parts({}, {}, {}, custom)
    for name in config.modalities:
        parts.likelihoods[name] = build(config, name)
        settings, dims = config.architecture(name), _dimensions(config, name, parts.likelihoods[name])
        encoder, decoder = given["encoders"].get(name), given["decoders"].get(name)
        if encoder is None or decoder is None:
            architecture = architecture_of(settings, dims, name)
            encoder = architecture.encoder(settings, dims) if encoder is None else encoder
            decoder = architecture.decoder(settings, dims) if decoder is None else decoder
        if name in config.missing_cells:
            _check_takes_cells(name, encoder.forward, parts.likelihoods[name].log_prob)
        parts.encoders[name], parts.decoders[name] = encoder, decoder
    return parts


def _dimensions(config: DMVAEConfig, name: str, likelihood: Likelihood) -> Dimensions:
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
