"""The code that a registered model brings along: the package's modules, and own code as source or as a requirement."""

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Collection, Iterable
from dataclasses import dataclass
from importlib.metadata import distribution as installed
from importlib.metadata import packages_distributions, version
from pathlib import Path

from dmvae.config.own_code import distribution, packages_of
from dmvae.platform.errors import RunError

_PACKAGES = ("torch", "pydantic", "jaxtyping", "safetensors", "numpy", "mlflow")
# own code is loaded to see what it imports when it is built, beside what loading this package does
_PROGRAM = """
import json, sys
from pathlib import Path
from dmvae.model.predictor import Predictor
before = set(sys.modules)
Predictor.load(Path(sys.argv[1]), json.loads(sys.argv[2]))
files = {name: getattr(module, "__file__", None) for name, module in sorted(sys.modules.items())}
print()
print(json.dumps({name: [file, name not in before] for name, file in files.items() if file}))
"""


@dataclass(frozen=True)
class ShippedCode:
    """What a registered model needs to be loaded elsewhere.

    Attributes:
        files: source files by module.
        requirements: pinned distributions.
        own: how each package of own code comes along, in words.
    """

    files: dict[str, Path]
    requirements: list[str]
    own: dict[str, str]

    def copy(self, folder: Path) -> list[Path]:
        """Copy the source files to a folder; return the packages in it."""
        for module, file in self.files.items():
            path = Path(*module.split("."))
            target = folder / (path / file.name if file.stem == "__init__" else path.with_suffix(file.suffix))
            target.parent.mkdir(parents=True, exist_ok=True)
            shutil.copy2(file, target)
        return sorted(folder.iterdir())


def find_code(content: Path, paths: Collection[str]) -> ShippedCode:
    """Find the code that loading a model runs.

    A package that came from an index is a requirement. Of any other, the modules that loading the model imports are
    shipped as source, and what these import is a requirement.

    Args:
        content: folder of the model.
        paths: import paths of its own code, which is run.

    Raises:
        RunError: if the model cannot be loaded in a process of its own.
    """
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, sys.path))}
    command = [sys.executable, "-c", _PROGRAM, str(content), json.dumps(list(paths))]
    found = subprocess.run(command, capture_output=True, text=True, check=False, env=environment)  # noqa: S603
    if found.returncode:
        reason = (found.stderr.strip().splitlines() or ["no reason given"])[-1]
        raise RunError(f"Cannot load the model in a process of its own: {reason}.")
    modules = json.loads(found.stdout.splitlines()[-1])
    required = {package: _requirement(package) for package in packages_of(paths) if package != "dmvae"}
    shipped = ["dmvae", *(package for package, pin in required.items() if not pin)]
    files = {name: Path(file) for name, (file, _) in modules.items() if name.split(".")[0] in shipped}
    pins = [*map(_pin, _PACKAGES), *(pin for pin in required.values() if pin)]
    if len(shipped) > 1:
        pins += _imported({name.split(".")[0] for name, (_, new) in modules.items() if new} - required.keys(), pins)
    own = {}
    for package, pin in required.items():
        num = len([name for name in files if name.split(".")[0] == package])
        own[package] = f"requirement {pin}" if pin else f"source, {num} file{'s' if num > 1 else ''}"
    return ShippedCode(files, pins, own)


def _requirement(package: str) -> str:
    """Return the requirement that installs a package; empty if it was installed from a folder, or not at all."""
    name, number = distribution(package)
    return f"{name}=={number}" if name and installed(name).read_text("direct_url.json") is None else ""


def _imported(packages: Iterable[str], known: Collection[str]) -> list[str]:
    """Return the requirements of imported packages that are not known yet."""
    by_package = packages_distributions()
    names = {name for package in packages for name in by_package.get(package, []) if name != "dmvae"}
    return [pin for pin in sorted(map(_pin, names)) if pin not in known]


def _pin(name: str) -> str:
    return f"{name}=={version(name).partition('+')[0]}"
