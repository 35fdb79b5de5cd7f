"""The Ray cluster that a job runs on, and what its processes tell the person in front of it."""

import logging
import math
import os
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import ray
from ray._private.state import state
from ray.util.queue import Empty, Queue


@contextmanager
def local_cluster(num_cpus: int) -> Iterator[None]:
    """Connect to the cluster that RAY_ADDRESS names (a submitted job has it), else start one with `num_cpus` or more.

    A cluster that is connected already is used as it is, and left. What workers print stays in Ray's own log files.
    """
    if ray.is_initialized():
        yield
        return
    is_submitted = bool(os.environ.get("RAY_ADDRESS"))
    ray.init(
        address=None if is_submitted else "local",
        num_cpus=None if is_submitted else max(os.cpu_count() or 1, num_cpus),
        logging_level=logging.ERROR,
        log_to_driver=False,
    )
    try:
        yield
    finally:
        ray.shutdown()


@contextmanager
def messages(say: Callable[[str], None]) -> Iterator[Queue]:
    """Yield a queue for workers' lines to a person; `say` gets them here as they come."""
    queue, done = Queue(actor_options={"num_cpus": 0}), threading.Event()

    def listen() -> None:
        while not done.is_set() or not queue.empty():
            try:
                say(queue.get(timeout=0.5))
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
    """Return what the connected cluster has: `CPU`, `GPU` and so on."""
    found: dict[str, float] = ray.cluster_resources()  # type: ignore[no-untyped-call]
    return found


def limits() -> dict[str, float]:
    """Return what the connected cluster has, or may have once its autoscaler has started nodes.

    A cluster without a CPU waits for nodes; where its autoscaler does not tell (version 1), there may be any number.
    """
    found = resources()
    may_come = state.get_max_resources_from_cluster_config()  # as Ray Train asks, before it waits
    if may_come is None:
        return found if found.get("CPU", 0) else {**found, "CPU": math.inf, "GPU": math.inf}
    return {name: max(found.get(name, 0.0), float(may_come.get(name, 0))) for name in found.keys() | may_come.keys()}
