"""The likelihoods that `decoders_dist` can name."""

import inspect
from collections.abc import Callable

from dmvae.config.likelihoods import SPECS, LikelihoodSpec
from dmvae.config.model import DMVAEConfig
from dmvae.distributions.likelihoods.likelihood import Likelihood

_REGISTRY: dict[str, Callable[..., Likelihood]] = {}


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


def build(config: DMVAEConfig, modality: str) -> Likelihood:
    """Build the likelihood that `config` names for `modality`.

    Raises:
        ValueError: if no likelihood of that name is registered, it does not take the parameters given, or what is
            registered returns no `Likelihood`.
    """
    dist, params = config.distributions[modality], config.dist_params(modality)
    if dist not in _REGISTRY:
        available = ", ".join(sorted(_REGISTRY))
        raise ValueError(f"Unknown likelihood {dist!r} for modality {modality!r}. Available: {available}.")
    try:
        inspect.signature(_REGISTRY[dist]).bind(config.shapes[modality], **params)
    except TypeError as error:
        raise ValueError(
            f"Cannot build likelihood {dist!r} for modality {modality!r}: {error}. "
            f"Correct decoder_dist_params.{modality}."
        ) from None
    built = _REGISTRY[dist](config.shapes[modality], **params)
    if not isinstance(built, Likelihood):
        raise ValueError(
            f"Likelihood {dist!r} must return a dmvae.distributions.likelihoods.Likelihood, but got "
            f"{type(built).__name__} for modality {modality!r}."
        )
    return built
