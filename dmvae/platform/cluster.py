"""The Ray cluster that a job runs on, and the lines that its processes send to the user."""

import logging
import math
import os
import signal
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import ray
from ray._private.state import state
from ray._private.utils import get_num_cpus
from ray.util.queue import Empty, Queue

_SERVE = {"RAY_SERVE_HTTP_PROXY_CALLBACK_IMPORT_PATH": "dmvae.platform.serve.body_limit:middlewares"}
"""What Ray Serve's proxies read when they start: how much of a body, and how long, they wait for."""


@contextmanager
def local_cluster(num_cpus: int) -> Iterator[None]:
    """Connect to the cluster at RAY_ADDRESS (set in submitted jobs), or start a local one; disconnect after the block.

    A cluster that is connected already is used and left as it is. What workers print stays in Ray's log files.

    Args:
        num_cpus: the fewest CPUs of a local cluster, which may be more than the machine has.
    """
    if ray.is_initialized():
        yield
        return
    is_submitted = bool(os.environ.get("RAY_ADDRESS"))
    for name, value in _SERVE.items():
        os.environ.setdefault(name, value)
    ray.init(
        address=None if is_submitted else "local",
        num_cpus=None if is_submitted else max(usable_cpus(), num_cpus),
        logging_level=logging.ERROR,
        log_to_driver=False,
    )
    _keep_handler_of_sigterm()
    try:
        yield
    finally:
        ray.shutdown()


def usable_cpus() -> int:
    """Return how many CPUs of this machine the process may use: those of its affinity, and of its cgroup's quota."""
    return max(1, min(len(os.sched_getaffinity(0)), int(get_num_cpus(override_docker_cpu_warning=True))))


def _keep_handler_of_sigterm() -> None:
    """Install Python's handler again: `ray.init` puts one in its place that aborts the process."""
    if threading.current_thread() is threading.main_thread():
        signal.signal(signal.SIGTERM, signal.getsignal(signal.SIGTERM))


@contextmanager
def messages(log: Callable[[str], None]) -> Iterator[Queue]:
    """Yield a queue for workers' lines; `log` is called here with each as it arrives."""
    queue, done = Queue(actor_options={"num_cpus": 0}), threading.Event()

    def listen() -> None:
        while not done.is_set() or not queue.empty():
            try:
                log(queue.get(timeout=0.5))
            except Empty:
                continue

    listener = threading.Thread(target=listen, name="messages", daemon=True)
    listener.start()
    try:
        yield queue
    finally:
        done.set()
        listener.join(timeout=10)
        queue.shutdown()


def resources() -> dict[str, float]:
    """Return the resources of the connected cluster by name: `CPU`, `GPU` and so on."""
    found: dict[str, float] = ray.cluster_resources()  # type: ignore[no-untyped-call]
    return found


def limits() -> dict[str, float]:
    """Return the resources of the connected cluster once its autoscaler has started all nodes that it may.

    An autoscaler of version 1 does not tell its limits; a cluster without CPUs is then taken to have no limit.
    """
    found = resources()
    may_come = state.get_max_resources_from_cluster_config()  # as Ray Train asks, before it waits
    if may_come is None:
        return found if found.get("CPU", 0) else {**found, "CPU": math.inf, "GPU": math.inf}
    return {name: max(found.get(name, 0.0), float(may_come.get(name, 0))) for name in found.keys() | may_come.keys()}
