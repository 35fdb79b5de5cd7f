"""Batches for training and evaluation, read ahead in a thread."""

from collections import deque
from collections.abc import Callable, Generator, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import closing
from itertools import islice
from math import prod
from typing import TypeVar

import numpy as np
import torch

from dmvae.batch import Batch
from dmvae.data.dataset import Split
from dmvae.data.order import EpochOrder

LOOKAHEAD_ROWS = 8192
LOOKAHEAD_BYTES = 64 << 20
"""Batches are read together up to these limits, and so many again while the last are in use."""

Item = TypeVar("Item")
Result = TypeVar("Result")
Slice = tuple[int, int, int]
"""Step of the epoch, and positions [start, stop) of its global batch."""


def read_epoch(
    split: Split,
    order: EpochOrder,
    epoch: int,
    start_step: int = 0,
    rank: int = 0,
    world_size: int = 1,
    dtype: torch.dtype = torch.float32,
) -> Iterator[tuple[int, int, Batch]]:
    """Yield this worker's rows of every global batch of an epoch, from `start_step` on.

    Yields:
        The step, the position in the global batch of the worker's first row, and its rows. With more workers than
        rows a worker has none, and takes part all the same.

    Raises:
        DatasetError: if a shard fails its check on first use.
        ValueError: if the order is not of this split, or a step or rank is out of range.
    """
    if order.num_rows != len(split):
        raise ValueError(f"an order belongs to one split; got {order.num_rows} rows for a split of {len(split)}.")
    if not 0 <= start_step <= order.num_batches:
        raise ValueError(f"an epoch has {order.num_batches} steps; got start_step={start_step}.")
    slices = ((step, *order.worker_slice(step, rank, world_size)) for step in range(start_step, order.num_batches))
    chunks = _group(slices, _lookahead(split, dtype))

    def read(chunk: list[Slice]) -> list[tuple[int, int, Batch]]:
        lengths = [stop - start for _, start, stop in chunk]
        batches = split.read_batches(order.rows_of(epoch, chunk), lengths, dtype)
        return [(step, start, batch) for (step, start, _), batch in zip(chunk, batches, strict=True)]

    return _chain(_ahead(read, chunks))


def read_rows(
    split: Split,
    block_rows: int,
    rank: int = 0,
    world_size: int = 1,
    dtype: torch.dtype = torch.float32,
) -> Iterator[tuple[int, Batch]]:
    """Yield a split's rows in the order of the files, in blocks of `block_rows`; worker r has blocks r, r + W, ...

    The blocks are the same for any number of workers W, so that sums over blocks are too.

    Yields:
        The block's number (its first row is that times `block_rows`) and its rows; the last block may be short.

    Raises:
        DatasetError: if a shard fails its check on first use.
        ValueError: if a block has no rows, or the rank is out of range.
    """
    if block_rows < 1:
        raise ValueError(f"a block has at least one row; got block_rows={block_rows}.")
    if not 0 <= rank < world_size:
        raise ValueError(f"a rank is at least 0 and less than the number of workers; got {rank} of {world_size}.")

    def read(block: int) -> tuple[int, Batch]:
        start = block * block_rows
        return block, split.read(np.arange(start, min(start + block_rows, len(split))), dtype)

    return _ahead(read, range(rank, -(-len(split) // block_rows), world_size))


def _lookahead(split: Split, dtype: torch.dtype) -> int:
    elements = sum(prod(info.shape) for info in split.manifest.modalities.values())
    return max(1, min(LOOKAHEAD_ROWS, LOOKAHEAD_BYTES // (elements * dtype.itemsize)))


def _group(slices: Iterable[Slice], rows: int) -> Iterator[list[Slice]]:
    """Put slices together as long as they have at most `rows` rows; a slice that has more is by itself."""
    group: list[Slice] = []
    held = 0
    for step, start, stop in slices:
        if group and held + stop - start > rows:
            yield group
            group, held = [], 0
        group.append((step, start, stop))
        held += stop - start
    if group:
        yield group


def _chain(chunks: Generator[list[Item], None, None]) -> Iterator[Item]:
    """Yield the items of lists, and close the generator of lists when the consumer stops."""
    with closing(chunks):
        for chunk in chunks:
            yield from chunk


def _ahead(read: Callable[[Item], Result], items: Iterable[Item]) -> Generator[Result, None, None]:
    """Yield `read(item)` in order, one item being read while the last is in use.

    An exception in the thread is raised here. When the consumer stops, the thread ends after the item it is at.
    """
    remaining = iter(items)
    reader = ThreadPoolExecutor(max_workers=1, thread_name_prefix="dmvae-read")
    try:
        pending: deque[Future[Result]] = deque(reader.submit(read, item) for item in islice(remaining, 1))
        while pending:
            result = pending.popleft().result()
            pending.extend(reader.submit(read, item) for item in islice(remaining, 1))
            yield result
    finally:
        reader.shutdown(cancel_futures=True)
