"""Communication between the workers of a run, through torch.distributed."""

import time
from collections.abc import Callable
from typing import Any

import ray.train.torch
import torch
import torch.distributed as dist
from torch import Tensor
from torch.nn.parallel import DistributedDataParallel

from dmvae.model.dmvae import DMVAE
from dmvae.training.step import Collectives


def distribute(
    model: DMVAE, world_size: int, device: torch.device, stop_requested: Callable[[], bool] | None
) -> Collectives:
    """Return the collectives of a model that several workers train; gradients are averaged over them.

    Whether to stop is what `stop_requested` tells rank 0.
    """
    # unused parameters are normal: a worker's rows may all lack a modality. Looking for them also keeps DDP from
    # rebuilding its buckets after the first step, which would change the order of sums and, on resuming, the last bits
    wrapped = DistributedDataParallel(
        model,
        device_ids=[device] if device.type == "cuda" else None,
        find_unused_parameters=True,
        gradient_as_bucket_view=True,
    )
    stop = None if stop_requested is None else lambda: bool(_of_rank_0(stop_requested()))
    clock = lambda: _of_rank_0(time.monotonic())  # noqa: E731
    return Collectives(wrapped, world_size, _all_reduce, clock, stop, wrapped.no_sync)


def agree(message: str, world_size: int) -> str:
    """Return the same message on every worker: one about the sender's own rows, if there is any."""
    messages: list[Any] = [message]
    if world_size > 1:
        messages = [None] * world_size
        dist.all_gather_object(messages, message)
    return str(min(messages, key=lambda text: (not text, "another worker" in text)))


def _all_reduce(tensor: Tensor) -> Tensor:
    total = tensor.clone()
    dist.all_reduce(total)
    return total


def _of_rank_0(value: float) -> float:
    # NCCL cannot send tensors in host memory
    shared = torch.tensor([value], dtype=torch.float64, device=ray.train.torch.get_device())
    dist.broadcast(shared, 0)
    return float(shared)
