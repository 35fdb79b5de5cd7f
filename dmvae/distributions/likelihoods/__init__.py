"""log p(x_m | z) of each kind of modality, a module per likelihood, and the registry of their names.

Every module here is loaded with the package and registers its likelihood by itself.
"""

from importlib import import_module
from pkgutil import iter_modules

from dmvae.distributions.likelihoods.likelihood import Likelihood, log_prob_each, stack
from dmvae.distributions.likelihoods.registry import build, register

__all__ = ["Likelihood", "build", "log_prob_each", "register", "stack"]

for _module in iter_modules(__path__):
    import_module(f"{__name__}.{_module.name}")
