"""Code that is not part of the package: import paths such as `mypackage.nets:ResNet`, entry points, and consent.

A configuration is checked without importing what it names. The code is imported when a model is built: a person who
writes a configuration agrees to that. A model's folder may come from a stranger, so its code needs `trust`.
"""

import re
import sys
from collections.abc import Collection, Iterable, Mapping
from functools import cache
from hashlib import sha256
from importlib import import_module, metadata
from inspect import Signature, signature
from pathlib import Path
from typing import Annotated, Any

from pydantic import AfterValidator

ARCHITECTURES, LIKELIHOODS = "dmvae.architectures", "dmvae.likelihoods"
"""The groups of entry points under which installed packages announce names."""
_NAME = r"[A-Za-z_]\w*(?:\.[A-Za-z_]\w*)*"


class OwnCodeError(ValueError):
    """A person's own code raised an error."""


def is_import_path(name: str) -> bool:
    """Tell whether a name is an import path."""
    return ":" in name


def check_import_path(path: str) -> str:
    """Return `path` if it is a module and an attribute.

    Raises:
        ValueError: if it is not.
    """
    if not re.fullmatch(f"{_NAME}:{_NAME}", path):
        raise ValueError(f"Invalid import path {path!r}: write MODULE:ATTRIBUTE, for example 'mypackage.nets:ResNet'.")
    return path


def _check_name(name: str) -> str:
    return check_import_path(name) if is_import_path(name) else name


ImportPath = Annotated[str, AfterValidator(check_import_path)]
NameOrPath = Annotated[str, AfterValidator(_check_name)]
"""A name that is built in, registered or announced by an installed package, or an import path."""


def package_of(path: str) -> str:
    """Return the top-level package of an import path."""
    return re.split("[.:]", path, maxsplit=1)[0]


def announced(group: str) -> dict[str, str]:
    """Return the import paths that installed packages announce in a group of entry points, by name."""
    return {entry.name: entry.value for entry in metadata.entry_points(group=group)}


def import_object(path: str, setting: str) -> Any:
    """Import the module of a path and return its attribute.

    Args:
        path: the import path.
        setting: that names it, for messages.

    Raises:
        ValueError: if the module cannot be imported or has no such attribute.
    """
    module, _, attribute = path.partition(":")
    try:
        found: Any = import_module(module)
    except ModuleNotFoundError as error:
        if error.name is None or not f"{module}.".startswith(f"{error.name}."):
            raise ValueError(f"{setting}: cannot import {module!r}: {error}. Install what it needs.") from error
        raise ValueError(
            f"{setting}: module {error.name!r} not found for {path!r}. Install its package, or run the command in the "
            "folder that has it (python -m jobs.VERB), or add that folder to PYTHONPATH."
        ) from None
    except Exception as error:  # a person's module can raise anything
        raise ValueError(f"{setting}: cannot import {module!r}: {type(error).__name__}: {error}.") from error
    for part in attribute.split("."):
        if not hasattr(found, part):
            raise ValueError(f"{setting}: module {module!r} has no attribute {attribute!r}. Correct {path!r}.")
        found = getattr(found, part)
    if not callable(found):
        raise ValueError(f"{setting}: {path!r} must be a class or a function, but got {type(found).__name__}.")
    return found


def check_call(function: Any, first: str, params: Mapping[str, Any], setting: str) -> None:
    """Check that a class or a function takes one argument and keywords.

    Args:
        function: what would be called.
        first: the name of the argument, for the message.
        params: the keywords.
        setting: that holds them, for the message.

    Raises:
        ValueError: naming a keyword that it does not take, or an argument that is missing.
    """
    try:
        taken = signature(function)
    except ValueError:  # builtins have none
        return
    try:
        taken.bind(None, **params)
    except TypeError as error:
        raise ValueError(
            f"{setting}: {error}: it is called with ({first}, **params), and its signature is {_shown(taken)}."
        ) from None


def _shown(taken: Signature) -> str:
    return "(" + ", ".join(str(parameter) for parameter in taken.parameters.values()) + ")"


def check_trust(paths: Mapping[str, str], trust: Collection[str], where: str) -> None:
    """Check that a person agrees to import what a model's folder names.

    Args:
        paths: import paths by setting.
        trust: packages, modules or import paths.
        where: the folder.

    Raises:
        ValueError: naming what is not trusted.
    """
    refused = {setting: path for setting, path in paths.items() if not is_trusted(path, trust)}
    if refused:
        packages = packages_of(refused.values())
        listed = ", ".join(f"{setting} = {path!r}" for setting, path in refused.items())
        raise ValueError(
            f"{where} names code that is not part of dmvae, and loading it would run that code: {listed}. If you trust "
            f"it, pass trust=({''.join(f'{name!r}, ' for name in packages).rstrip()}), or the flag --trust "
            f"{' '.join(packages)}."
        )


def is_trusted(path: str, trust: Collection[str]) -> bool:
    """Tell whether a path, its module or a package that holds the module is in `trust`."""
    return any(path == name or path.startswith((f"{name}.", f"{name}:")) for name in trust)


def packages_of(paths: Iterable[str]) -> list[str]:
    """Return the top-level packages of import paths, sorted."""
    return sorted({package_of(path) for path in paths})


def versions(paths: Iterable[str]) -> dict[str, str]:
    """Return the version of each package of imported paths, or the hash of its modules if it has none.

    Only the modules that paths name are hashed, so that a version does not depend on what else is imported.
    """
    paths = list(paths)
    return {package: distribution(package)[1] or _hash(package, paths) for package in packages_of(paths)}


@cache
def distribution(package: str) -> tuple[str, str]:
    """Return the name and the version of the distribution that installed a package; empty if none did."""
    found = metadata.packages_distributions().get(package, [])
    return (found[0], metadata.version(found[0])) if found else ("", "")


def _hash(package: str, paths: Iterable[str]) -> str:
    modules = sorted({path.partition(":")[0] for path in paths if package_of(path) == package})
    digest = sha256()
    for module in modules:
        file = getattr(sys.modules[module], "__file__", None)
        if file is not None:
            digest.update(Path(file).read_bytes())
    return f"sha256:{digest.hexdigest()[:16]}"
