"""What a run was started with: versions, host, user and commit, as MLflow's tags."""

import os
import subprocess
from getpass import getuser
from importlib.metadata import version
from pathlib import Path
from platform import python_version
from shutil import which
from socket import gethostname

_ROOT = Path(__file__).parents[3]


def environment_tags() -> dict[str, str]:
    """Return the versions, the host, the user and, in a git checkout, the commit."""
    versions = {f"version.{name}": version(name) for name in ("torch", "ray", "mlflow")}
    source = {"mlflow.source.type": "JOB", "mlflow.source.name": "dmvae", "mlflow.user": _user()}
    return {"version.python": python_version(), **versions, "host": gethostname(), **source, **_commit()}


def _user() -> str:
    try:
        return getuser()
    except (KeyError, OSError):  # a container's user without a name
        return str(os.getuid())


def _commit() -> dict[str, str]:
    git = which("git")
    if git is None or not (_ROOT / ".git").exists():
        return {}
    describe = [git, "-C", str(_ROOT), "describe", "--always", "--dirty", "--abbrev=40", "--exclude=*"]
    answer = subprocess.run(describe, capture_output=True, text=True, check=False)  # noqa: S603
    if answer.returncode:
        return {}
    commit, dirty, _ = answer.stdout.strip().partition("-dirty")
    return {"mlflow.source.git.commit": commit, "git.dirty": str(bool(dirty)).lower()}
