"""The likelihoods that `decoders_dist` can name."""

import inspect
from collections.abc import Callable

import torch

from dmvae.config.likelihoods import SPECS, LikelihoodSpec
from dmvae.config.model import DMVAEConfig
from dmvae.config.own_code import LIKELIHOODS, OwnCodeError, announced, import_object, is_import_path
from dmvae.distributions.likelihoods.likelihood import Likelihood

_REGISTRY: dict[str, Callable[..., Likelihood]] = {}
_PATHS: dict[str, str] = {}
"""Import paths of what was imported because a configuration names it, by that name."""


def register(name: str, likelihood: Callable[..., Likelihood], spec: LikelihoodSpec | None = None) -> None:
    """Make `likelihood(shape, **decoder_dist_params)` available as `name` in `decoders_dist`.

    Args:
        name: not taken yet.
        likelihood: a class, or a function that returns a `Likelihood`.
        spec: lets configurations check its parameters, `jobs.prepare` its values, and `jobs.inspect` suggest it.

    Raises:
        ValueError: if the name is taken.
    """
    if name in _REGISTRY:
        raise ValueError(f"Likelihood {name!r} is already registered. Choose another name.")
    _REGISTRY[name] = likelihood
    if spec is not None:
        SPECS[name] = spec


def own_path(name: str) -> str | None:
    """Return the import path that a likelihood's name is or that an installed package announces it as, if any."""
    if is_import_path(name):
        return name
    return _PATHS.get(name) if name in _REGISTRY else announced(LIKELIHOODS).get(name)


def find(name: str, modality: str) -> Callable[..., Likelihood]:
    """Return what builds a likelihood; own code is imported, and its class attribute `spec` entered in `SPECS`.

    Raises:
        ValueError: if no likelihood of that name is registered or announced, or it cannot be imported.
    """
    path = own_path(name)
    if path is not None and name not in _REGISTRY:
        found = import_object(path, f"model.decoders_dist.{modality}")
        if name not in _REGISTRY:  # its module may register it
            register(name, found, getattr(found, "spec", None))
        _PATHS[name] = path
    if name not in _REGISTRY:
        available = ", ".join(sorted(_REGISTRY))
        raise ValueError(f"Unknown likelihood {name!r} for modality {modality!r}. Available: {available}.")
    return _REGISTRY[name]


def build(config: DMVAEConfig, modality: str) -> Likelihood:
    """Build the likelihood that `config` names for `modality`.

    Raises:
        ValueError: if no likelihood of that name is known, it does not take the parameters given, or what is
            registered returns no `Likelihood`.
    """
    dist, params = config.distributions[modality], config.dist_params(modality)
    likelihood = find(dist, modality)
    try:
        inspect.signature(likelihood).bind(config.shapes[modality], **params)
    except TypeError as error:
        raise ValueError(
            f"Cannot build likelihood {dist!r} for modality {modality!r}: {error}. "
            f"Correct decoder_dist_params.{modality}."
        ) from None
    built = likelihood(config.shapes[modality], **params)
    if not isinstance(built, Likelihood):
        raise ValueError(
            f"Likelihood {dist!r} must return a dmvae.distributions.likelihoods.Likelihood, but got "
            f"{type(built).__name__} for modality {modality!r}."
        )
    return built


def check_likelihood(likelihood: Likelihood, modality: str) -> None:
    """Check, on two rows of zeros, that own code returns one log-likelihood for each row, and means.

    Raises:
        ValueError: naming the modality, what `log_prob` returned and what it must return.
        OwnCodeError: if it raises an error.
    """
    value = torch.zeros(2, *likelihood.shape, dtype=torch.float32 if likelihood.classes is None else torch.int64)
    output = torch.zeros(2, *likelihood.output_shape)
    try:
        found = likelihood.log_prob(output, likelihood.observe(value, None))
        likelihood.mean(output)
    except Exception as error:
        raise OwnCodeError(
            f"The likelihood {type(likelihood).__name__} of modality {modality!r} failed on an output "
            f"{tuple(output.shape)}: {type(error).__name__}: {error}"
        ) from error
    if found.shape != (2,):
        raise ValueError(
            f"`log_prob` of the likelihood {type(likelihood).__name__} of modality {modality!r} must return one number "
            f"for each row, shape (2,) for 2 rows, but got {tuple(found.shape)}. Sum over the modality's elements."
        )
