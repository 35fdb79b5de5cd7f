"""Apply one method to many items, in this process or on Ray actors of the connected cluster."""

from collections.abc import Callable, Iterator, Sequence
from typing import Any, TypeVar

import ray
import torch
from ray.util import ActorPool

from dmvae.config.evaluation import Device
from dmvae.platform.cluster import limits, resources

Worker = TypeVar("Worker")
Item = TypeVar("Item")
Result = TypeVar("Result")


def map_on_workers(
    worker: Callable[..., Worker],
    args: tuple[Any, ...],
    method: Callable[[Worker, Item], Result],
    items: Sequence[Item],
    workers: int,
    device: Device = "auto",
) -> Iterator[Result]:
    """Yield `method(worker(*args), item)` for every item, in the order in which the results are ready.

    Args:
        worker: a class; each process builds one instance.
        args: of the class.
        method: of the class, looked up by its name on an actor.
        items: the units of work.
        workers: with more than one, Ray actors of one CPU each; never more than there are items or CPUs.
        device: each actor gets a GPU if there is one per worker, unless this is `cpu`.
    """
    workers = min(workers, len(items))
    if workers > 1:
        # an actor that the cluster has no CPU for would be given an item and never answer
        workers = int(min(workers, limits().get("CPU", 1)))
    if workers <= 1:
        if items:
            local = worker(*args)
            yield from (method(local, item) for item in items)
        return
    gpus = (limits() if device == "gpu" else resources()).get("GPU", 0)
    has_gpus = device != "cpu" and gpus >= workers
    actor: Any = ray.remote(num_cpus=1, num_gpus=int(has_gpus))(worker)
    pool = ActorPool([actor.remote(*args) for _ in range(workers)])
    name = method.__name__
    yield from pool.map_unordered(lambda remote, item: getattr(remote, name).remote(item), list(items))


def torch_device(device: Device = "auto") -> torch.device:
    """Return this process's torch device; `auto` is a GPU if the process sees one.

    Raises:
        ValueError: if a GPU is requested and none is visible.
    """
    has_gpu = torch.cuda.is_available()
    if device == "gpu" and not has_gpu:
        raise ValueError('No GPU is visible to this process, but device is "gpu". Set device to "auto" or "cpu".')
    return torch.device("cuda" if has_gpu and device != "cpu" else "cpu")
