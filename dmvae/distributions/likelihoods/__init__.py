"""Likelihoods p(x_m | z), a module for each, and the registry of their names.

Loading the package loads all of its modules, and each registers its likelihood.
"""

from importlib import import_module
from pkgutil import iter_modules

from dmvae.distributions.likelihoods.likelihood import Likelihood, log_prob_each, stack
from dmvae.distributions.likelihoods.registry import build, check_likelihood, find, own_path, register

__all__ = ["Likelihood", "build", "check_likelihood", "find", "log_prob_each", "own_path", "register", "stack"]

for _module in iter_modules(__path__):
    import_module(f"{__name__}.{_module.name}")
