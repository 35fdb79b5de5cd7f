"""Batches for training and evaluation, read ahead in a thread."""

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
"""Rows are gathered from the shards together, up to these limits; what is held is as stored, not yet converted."""
OPEN_AHEAD_CHUNKS = 8
"""So many such portions before their rows are gathered, the shards that they need are fetched and verified."""
LOOKAHEAD_BATCHES = 4
"""Converted batches that wait for the consumer."""

Item = TypeVar("Item")
Slice = tuple[int, int, int]
"""Step of the epoch, and positions [start, stop) of its global batch."""
Chunk = tuple[list[Slice], Int64[np.ndarray, " row"]]
"""Slices that are read together, and their rows."""


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
    """Yield this worker's rows of every global batch of an epoch, from `start_step` on; `pin`: in pinned memory.

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
    """Yield `chunks`, with the shards of the next ones on their way."""
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

    blocks = range(rank, -(-len(split) // block_rows), world_size)
    bounds = ((block, block * block_rows, min((block + 1) * block_rows, len(split))) for block in blocks)
    chunks = _open_ahead(split, (([bound], np.arange(*bound[1:])) for bound in bounds))
    return _ahead((bound[0], split.read(rows, dtype)) for (bound,), rows in chunks)


def _lookahead(split: Split) -> int:
    row_bytes = sum(info.column.row_bytes for info in split.manifest.modalities.values())
    return max(1, min(LOOKAHEAD_ROWS, LOOKAHEAD_BYTES // row_bytes))


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


def _ahead(items: Iterator[Item]) -> Generator[Item, None, None]:
    """Yield `items`, made in a thread a few ahead of the consumer.

    An exception in the thread is raised here. When the consumer stops, the thread ends after the item it is at.
    """
    reader = ThreadPoolExecutor(max_workers=1, thread_name_prefix="dmvae-read")
    try:
        pending: deque[Future[Item | None]] = deque(reader.submit(next, items, None) for _ in range(LOOKAHEAD_BATCHES))
        while (item := pending.popleft().result()) is not None:
            pending.append(reader.submit(next, items, None))
            yield item
    finally:
        reader.shutdown(cancel_futures=True)
