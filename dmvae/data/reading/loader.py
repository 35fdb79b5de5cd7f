"""Load batches for training and evaluation, ahead of the consumer in a thread."""

from collections import deque
from collections.abc import Generator, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from typing import TypeVar

import numpy as np
import torch
from jaxtyping import Int64

from dmvae.data.batch import Batch
from dmvae.data.reading.sampler import EpochSampler
from dmvae.data.reading.split import Split

LOOKAHEAD_ROWS = 8192
LOOKAHEAD_BYTES = 64 << 20
"""Limits of the rows that are gathered from the shards at once; they stay as stored until converted."""
OPEN_AHEAD_CHUNKS = 8
"""How many such chunks ahead the shards that they need are fetched and verified."""
LOOKAHEAD_BATCHES = 4
"""Converted batches that wait for the consumer, at most."""

Item = TypeVar("Item")
Slice = tuple[int, int, int]
"""A step of the epoch, and positions [start, stop) of its global batch."""
Chunk = tuple[list[Slice], Int64[np.ndarray, " row"]]
"""Slices that are read at once, and their rows."""


def read_epoch(
    split: Split,
    order: EpochSampler,
    epoch: int,
    start_step: int = 0,
    rank: int = 0,
    world_size: int = 1,
    dtype: torch.dtype = torch.float32,
    pin: bool = False,
) -> Iterator[tuple[int, int, Batch]]:
    """Yield this worker's rows of every global batch of an epoch.

    Args:
        split: the rows.
        order: the order of the rows.
        epoch: the epoch.
        start_step: the first step to yield.
        rank: the number of this worker.
        world_size: the number of workers.
        dtype: see `Split.read`.
        pin: yield batches in pinned memory.

    Yields:
        The step, the position of the worker's first row in the global batch, and its rows. With more workers than rows,
        some workers get empty batches, so that all take part in every step.

    Raises:
        DatasetError: if a shard fails its check on first use.
        ValueError: if the order belongs to another split, or a step or rank is out of range.
    """
    if order.num_rows != len(split):
        raise ValueError(
            f"Sampler does not match split {split.name!r}: it orders {order.num_rows} rows, but the split has "
            f"{len(split)}."
        )
    if not 0 <= start_step <= order.num_batches:
        raise ValueError(f"start_step must be between 0 and {order.num_batches}, but got {start_step}.")
    slices = ((step, *order.worker_slice(step, rank, world_size)) for step in range(start_step, order.num_batches))
    batches = _read_chunks(split, order, epoch, _group(slices, _lookahead(split)), dtype)
    return _ahead((step, first, batch.pin_memory()) for step, first, batch in batches) if pin else _ahead(batches)


def _read_chunks(
    split: Split, order: EpochSampler, epoch: int, chunks: Iterable[list[Slice]], dtype: torch.dtype
) -> Iterator[tuple[int, int, Batch]]:
    for chunk, rows in _open_ahead(split, ((chunk, order.rows_of(epoch, chunk)) for chunk in chunks)):
        batches = split.read_batches(rows, [stop - start for _, start, stop in chunk], dtype)
        for (step, start, _), batch in zip(chunk, batches, strict=True):
            yield step, start, batch


def _open_ahead(split: Split, chunks: Iterable[Chunk]) -> Iterator[Chunk]:
    """Yield `chunks` while the shards of the next ones are being fetched."""
    waiting: deque[Chunk] = deque()
    for chunk in chunks:
        split.open_ahead(chunk[1])
        waiting.append(chunk)
        if len(waiting) > OPEN_AHEAD_CHUNKS:
            yield waiting.popleft()
    yield from waiting


def read_rows(
    split: Split,
    block_rows: int,
    rank: int = 0,
    world_size: int = 1,
    dtype: torch.dtype = torch.float32,
) -> Iterator[tuple[int, Batch]]:
    """Yield a split's rows in the order of the files, in blocks of `block_rows`; worker r gets blocks r, r + W, ...

    The blocks, and therefore sums over blocks, do not depend on the number of workers W.

    Yields:
        The block's number (its first row is the number times `block_rows`) and its rows; the last block may be short.

    Raises:
        DatasetError: if a shard fails its check on first use.
        ValueError: if `block_rows` or the rank is out of range.
    """
    if block_rows < 1:
        raise ValueError(f"block_rows must be at least 1, but got {block_rows}.")
    if not 0 <= rank < world_size:
        raise ValueError(f"rank must be between 0 and {world_size - 1}, but got {rank}.")

    blocks = range(rank, -(-len(split) // block_rows), world_size)
    bounds = ((block, block * block_rows, min((block + 1) * block_rows, len(split))) for block in blocks)
    chunks = _open_ahead(split, (([bound], np.arange(*bound[1:])) for bound in bounds))
    return _ahead((bound[0], split.read(rows, dtype)) for (bound,), rows in chunks)


def _lookahead(split: Split) -> int:
    row_bytes = sum(info.column.row_bytes for info in split.manifest.modalities.values())
    return max(1, min(LOOKAHEAD_ROWS, LOOKAHEAD_BYTES // row_bytes))


def _group(slices: Iterable[Slice], rows: int) -> Iterator[list[Slice]]:
    """Group consecutive slices of at most `rows` rows together; a larger slice is a group by itself."""
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


def _ahead(items: Iterator[Item]) -> Generator[Item, None, None]:
    """Yield `items`, which a thread makes a few ahead of the consumer.

    An exception in the thread is raised here. When the consumer stops, the thread ends after its current item.
    """
    reader = ThreadPoolExecutor(max_workers=1, thread_name_prefix="dmvae-read")
    try:
        pending: deque[Future[Item | None]] = deque(reader.submit(next, items, None) for _ in range(LOOKAHEAD_BATCHES))
        while (item := pending.popleft().result()) is not None:
            pending.append(reader.submit(next, items, None))
            yield item
    finally:
        reader.shutdown(cancel_futures=True)
