"""Check what runs need: versions, CPUs, memory, GPUs, room for Ray's sockets, Ray, MLflow and the place of the runs."""

import os
import platform
import shutil
import tempfile
import uuid
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Literal

import psutil
import torch

from dmvae.config.operations import DoctorConfig
from dmvae.config.section import scrub
from dmvae.platform.cluster import usable_cpus
from dmvae.platform.folders import LocalFolder, open_folder
from dmvae.platform.tracking.runs import tracking_uri, why_unreachable

_PACKAGES = ("dmvae", "torch", "ray", "optuna", "mlflow", "pyarrow")
_SOCKET_PATH = 107  # bytes that Linux allows
_RAY_SOCKET = "/ray/session_2026-01-01_00-00-00_000000_1234567/sockets/plasma_store.1"
_LOW_DISK, _LOW_MEMORY = 5e9, 2e9


@dataclass(frozen=True)
class Check:
    """One line of the report: `level` is ok, warning or error, and `text` has the remedy."""

    level: Literal["ok", "warning", "error"]
    name: str
    text: str

    def line(self) -> str:
        """Return one line for the user."""
        return f"{self.level:<8} {self.name:<10} {self.text}"


def checks(config: DoctorConfig) -> Iterator[Check]:
    """Yield the outcome of every check as it is known."""
    yield Check("ok", "versions", f"Python {platform.python_version()}, " + _versions())
    yield _cpus()
    yield _memory()
    yield _gpus()
    yield _socket_paths()
    yield _disk(config)
    yield _place_of_runs(config)
    yield _mlflow(config)
    yield _ray()


def _versions() -> str:
    return ", ".join(f"{name} {version(name)}" for name in _PACKAGES)


def _cpus() -> Check:
    usable, there = usable_cpus(), os.cpu_count() or 1
    limited = f" of the machine's {there}: the cgroup or the affinity allows no more" if usable < there else ""
    return Check("ok", "CPUs", f"{usable} usable{limited}")


def _memory() -> Check:
    free = psutil.virtual_memory().available
    level: Literal["ok", "warning"] = "ok" if free > _LOW_MEMORY else "warning"
    return Check(
        level, "memory", f"{free / 1e9:.1f} GB available" + ("" if level == "ok" else "; close other programs")
    )


def _gpus() -> Check:
    if not torch.cuda.is_available():
        return Check("ok", "GPUs", "none; runs use CPUs")
    names = ", ".join(torch.cuda.get_device_name(number) for number in range(torch.cuda.device_count()))
    if torch.cuda.device_count() > 1 and not torch.distributed.is_nccl_available():
        return Check("error", "GPUs", f"{names}; this build of torch has no NCCL. Install one for CUDA")
    return Check("ok", "GPUs", names)


def _socket_paths() -> Check:
    folder = os.environ.get("RAY_TMPDIR") or tempfile.gettempdir()
    length = len(f"{folder}{_RAY_SOCKET}")
    if length <= _SOCKET_PATH:
        return Check("ok", "TMPDIR", f"{folder} is short enough for Ray's sockets")
    return Check(
        "error",
        "TMPDIR",
        f"Ray's sockets in {folder} have {length} characters; Linux allows {_SOCKET_PATH}. Set RAY_TMPDIR=/tmp",
    )


def _disk(config: DoctorConfig) -> Check:
    folder = open_folder(config.runs_dir)
    place = folder.root if isinstance(folder, LocalFolder) else Path(tempfile.gettempdir())
    while not place.exists():
        place = place.parent
    free = shutil.disk_usage(place).free
    level: Literal["ok", "warning"] = "ok" if free > _LOW_DISK else "warning"
    return Check(level, "disk", f"{free / 1e9:.1f} GB free at {place}" + ("" if level == "ok" else "; free some space"))


def _place_of_runs(config: DoctorConfig) -> Check:
    name = f".doctor-{uuid.uuid4().hex}"
    try:
        probe = open_folder(config.runs_dir) / name
        probe.make()
        (probe / "probe").write(name)
        found = (probe / "probe").read()
        probe.remove()
    except (OSError, ValueError) as error:
        return Check("error", "runs", f"{config.runs_dir} cannot be written and read: {error}")
    if found != name:
        return Check("error", "runs", f"{config.runs_dir} returned other bytes than were written")
    return Check("ok", "runs", f"{config.runs_dir} can be written and read")


def _mlflow(config: DoctorConfig) -> Check:
    uri = tracking_uri(config.tracking)
    if uri.startswith("sqlite:"):
        file = Path(uri.removeprefix("sqlite:///"))
        if not file.exists():
            return Check("ok", "MLflow", f"{uri} is made by the first run")
    fault = why_unreachable(uri)
    if fault:
        return Check("error", "MLflow", f"{scrub(uri)}: {fault}. Start the server, or correct MLFLOW_TRACKING_URI")
    return Check("ok", "MLflow", f"{scrub(uri)} answers")


def _ray() -> Check:
    import ray

    from dmvae.platform.cluster import local_cluster, resources

    address = os.environ.get("RAY_ADDRESS")
    try:
        with local_cluster(1):
            there = resources()
            ray.get(ray.remote(num_cpus=0)(_answer).remote(), timeout=60)
    except Exception as error:  # noqa: BLE001  # whatever Ray raises is the finding
        where = f"the cluster at {address}" if address else "a local cluster"
        reason = (str(error).strip() or type(error).__name__).splitlines()[-1]
        return Check("error", "Ray", f"cannot use {where}: {reason}")
    where = f"the cluster at {address}" if address else "a local cluster starts and"
    return Check("ok", "Ray", f"{where} answers: {there.get('CPU', 0):g} CPUs, {there.get('GPU', 0):g} GPUs")


def _answer() -> bool:
    return True


def report(config: DoctorConfig, progress: Callable[[str], None]) -> int:
    """Show every check; return the number of errors."""
    errors = 0
    for check in checks(config):
        progress(check.line())
        errors += check.level == "error"
    return errors
