"""The order of the rows in an epoch: a function of (seed, epoch, step), whatever the number of workers.

Nothing of the size of the dataset is shuffled or kept in memory: the order is defined on record batches.

1. The record batches are permuted and laid end to end in a line, which is cut into `streams` streams. A cut may pass
   through a record batch. The pieces of each stream are permuted.
2. Each stream is divided into windows of whole pieces, about `window_rows` rows long, and the rows of each window are
   permuted.
3. Batch t takes the next rows of every stream, as equal a number of each as possible. Each stream fills a contiguous
   slice of the batch, so that workers that share the batch read few record batches in common.

The place of a (step, position) in the line has a closed form, so a run resumes anywhere without replay. The hash is the
SplitMix64 finaliser (Steele, Lea and Flood 2014). Permutations sort hashes whose low bits hold the index. So the order
does not change with a library's version.
"""

import hashlib
import json
from collections.abc import Sequence
from dataclasses import dataclass, field
from itertools import pairwise
from typing import Any

import numpy as np
from jaxtyping import Int64

Array = np.ndarray[Any, np.dtype[Any]]

_Hashes = np.ndarray[Any, np.dtype[np.uint64]]
_GOLDEN = np.uint64(0x9E3779B97F4A7C15)


def _mix(x: _Hashes) -> _Hashes:
    x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return x ^ (x >> np.uint64(31))


def _key(*parts: int) -> _Hashes:
    """Hash integers, in order, into an array of one key (an array, because numpy scalars warn when they overflow)."""
    key = np.zeros(1, dtype=np.uint64)
    for part in parts:
        key = _mix((key + _GOLDEN) ^ _mix(np.array([part % 2**64], dtype=np.uint64) + _GOLDEN))
    return key


def _hashes(num: int, key: _Hashes) -> _Hashes:
    return _mix(key + _GOLDEN * np.arange(1, num + 1, dtype=np.uint64))


def permutation(num: int, key: _Hashes) -> Int64[np.ndarray, " {num}"]:
    """Return the permutation of 0..num-1 that `key` determines."""
    low = np.uint64((1 << max(num - 1, 0).bit_length()) - 1)
    tagged = (_hashes(num, key) & ~low) | np.arange(num, dtype=np.uint64)
    tagged.sort()
    return (tagged & low).astype(np.int64)


@dataclass
class _Plan:
    """The line of one epoch: the place and first row of each piece, and the first piece and place of each window."""

    epoch: int
    place: Int64[np.ndarray, " piece_or_end"]
    row: Int64[np.ndarray, " piece"]
    window_piece: Int64[np.ndarray, " window_or_end"]
    window_place: Int64[np.ndarray, " window_or_end"]
    cache: dict[int, Array] = field(default_factory=dict)


class EpochSampler:
    """Chooses the rows of each global batch of a split.

    Every epoch has every row exactly once. All batches have `batch_size` rows, except the last, which has the rest.
    Not thread-safe.

    Args:
        record_batch_rows: the number of rows of each record batch of the split, in order.
        seed: determines the order, together with the epoch and the settings here.
        batch_size: rows of a global batch, over all workers.
        streams: None means 64, or the batch size if that is smaller.
        window_rows: None chooses enough to keep the variance of label counts within 1.5 times that of a full shuffle,
            even if the rows were written sorted.
        shards: the shard of each record batch. If given, each stream reads one shard after another, so that only about
            one shard for each stream is in use at a time. None mixes record batches of all shards.

    Raises:
        ValueError: if there are no rows, or a setting is out of range.
    """

    def __init__(
        self,
        record_batch_rows: Sequence[int] | Array,
        *,
        seed: int,
        batch_size: int,
        streams: int | None = None,
        window_rows: int | None = None,
        shards: Sequence[int] | Array | None = None,
    ) -> None:
        self._group_rows = np.asarray(record_batch_rows, dtype=np.int64).reshape(-1)
        self._group_shard = None if shards is None else np.asarray(shards, dtype=np.int64)[self._group_rows > 0]
        self._group_rows = self._group_rows[self._group_rows > 0]
        if not len(self._group_rows):
            raise ValueError("Cannot order an empty split. Choose a split that has rows.")
        if batch_size < 1:
            raise ValueError(f"batch_size must be at least 1, but got {batch_size}.")
        self.seed, self.batch_size = seed, batch_size
        self.streams = min(64, batch_size) if streams is None else streams
        if not 1 <= self.streams <= batch_size:
            raise ValueError(
                f"streams must be between 1 and the batch size, but got streams={streams}, batch_size={batch_size}. "
                f"Lower data.streams, or remove it."
            )
        spread = max(4, -(-2 * batch_size // self.streams))
        self.window_rows = int(self._group_rows.max()) * spread if window_rows is None else window_rows
        if self.window_rows < 1:
            raise ValueError(f"window_rows must be at least 1, but got {window_rows}.")
        self.num_rows = int(self._group_rows.sum())
        self.num_batches = -(-self.num_rows // batch_size)
        self._last = self.num_rows - (self.num_batches - 1) * batch_size
        self._group_start = np.concatenate(([0], np.cumsum(self._group_rows)))
        # stream c fills places [cut[c], cut[c + 1]) of the line, as many as it gives to all batches together
        self._cut = self._before(np.arange(self.streams + 1), self.num_batches)
        # places of a full batch: those of the first batch, shifted by what each stream gives to a batch
        edge = np.arange(self.streams + 1) * batch_size // self.streams
        stream = self._streams_of(batch_size)
        self._first_places = (self._cut[:-1] - edge[:-1])[stream] + np.arange(batch_size)
        self._strides = np.diff(edge)[stream]
        self._plan: _Plan | None = None

    @property
    def fingerprint(self) -> str:
        """SHA-256, in hexadecimal, of everything that defines the order; it must not change when a run resumes."""
        settings = {
            "version": 1,
            "seed": self.seed,
            "batch_size": self.batch_size,
            "streams": self.streams,
            "window_rows": self.window_rows,
            "record_batch_rows": hashlib.sha256(self._group_rows.astype("<i8").tobytes()).hexdigest(),
        }
        if self._group_shard is not None:
            settings["shards"] = hashlib.sha256(self._group_shard.astype("<i8").tobytes()).hexdigest()
        return hashlib.sha256(json.dumps(settings, sort_keys=True).encode()).hexdigest()

    def batch_size_of(self, step: int) -> int:
        """Return the number of rows in global batch `step`."""
        if not 0 <= step < self.num_batches:
            raise ValueError(f"step must be between 0 and {self.num_batches - 1}, but got {step}.")
        return self._last if step == self.num_batches - 1 else self.batch_size

    def worker_slice(self, step: int, rank: int, world_size: int) -> tuple[int, int]:
        """Return a worker's positions [start, stop) in batch `step`.

        The number of rows differs by at most one between workers; with more workers than rows, some get none.
        """
        if not 0 <= rank < world_size:
            raise ValueError(f"rank must be between 0 and {world_size - 1}, but got {rank}.")
        rows = self.batch_size_of(step)
        return rank * rows // world_size, (rank + 1) * rows // world_size

    def rows(self, epoch: int, step: int, start: int = 0, stop: int | None = None) -> Int64[np.ndarray, " row"]:
        """Return the rows of the split at positions [start, stop) of global batch `step` in `epoch`."""
        return self.rows_of(epoch, [(step, start, self.batch_size_of(step) if stop is None else stop)])

    def rows_of(self, epoch: int, slices: Sequence[tuple[int, int, int]]) -> Int64[np.ndarray, " row"]:
        """Return the rows of several slices `(step, start, stop)`, concatenated."""
        if self._plan is None or self._plan.epoch != epoch:
            self._plan = self._make_plan(epoch)
        places = [self._places(step, start, stop) for step, start, stop in slices]
        return self._resolve(self._plan, np.concatenate(places) if places else np.empty(0, dtype=np.int64))

    def _before(self, stream: Array, step: int) -> Array:
        """Return the number of rows that streams before `stream` give to batches before `step`."""
        full = min(step, self.num_batches - 1)
        edge = stream * self.batch_size // self.streams
        return np.asarray(full * edge + (step - full) * (stream * self._last // self.streams))

    def _places(self, step: int, start: int, stop: int) -> Int64[np.ndarray, " row"]:
        """Return the places in the line of positions [start, stop) in batch `step`."""
        rows = self.batch_size_of(step)
        if not 0 <= start <= stop <= rows:
            raise ValueError(f"Positions {start}:{stop} are out of range: the batch of step {step} has {rows} rows.")
        if step < self.num_batches - 1:
            return np.asarray(self._first_places[start:stop] + step * self._strides[start:stop])
        stream, position = self._streams_of(rows), np.arange(rows)
        edge = np.arange(self.streams + 1) * rows // self.streams
        given = self._before(np.arange(self.streams + 1), step)
        return np.asarray((self._cut[:-1] + np.diff(given) - edge[:-1])[stream] + position)[start:stop]

    def _streams_of(self, rows: int) -> Int64[np.ndarray, " row"]:
        """Return the stream of each position in a batch of `rows` rows."""
        edge = np.arange(self.streams + 1) * rows // self.streams
        return np.searchsorted(edge, np.arange(rows), side="right") - 1

    def _make_plan(self, epoch: int) -> _Plan:
        turn = self._turns(epoch)
        order = permutation(len(self._group_rows), _key(self.seed, epoch, 1))
        order = order[np.argsort(turn[order], kind="stable")]
        end = np.cumsum(self._group_rows[order])
        # pieces: record batches in the permuted line, cut where a stream begins
        place = np.unique(np.concatenate(([0], end[:-1], self._cut[:-1][self._cut[:-1] < self.num_rows])))
        group = np.searchsorted(end, place, side="right")
        row = self._group_start[order[group]] + place - (end - self._group_rows[order])[group]
        length = np.diff(np.append(place, self.num_rows))
        stream = np.searchsorted(self._cut, place, side="right") - 1
        shuffled = np.lexsort((_hashes(len(place), _key(self.seed, epoch, 2)), turn[order[group]], stream))
        row, length, stream = row[shuffled], length[shuffled], stream[shuffled]
        place = np.concatenate(([0], np.cumsum(length)))
        # windows are staggered over the streams, so that they do not all start a new one at the same step
        offset = place[:-1] - self._cut[stream] + stream * self.window_rows // self.streams
        window = offset // self.window_rows
        opens = np.flatnonzero(np.diff(window, prepend=-1) | np.diff(stream, prepend=-1))
        window_piece = np.append(opens, len(row))
        return _Plan(epoch, place, row, window_piece, place[window_piece])

    def _turns(self, epoch: int) -> Array:
        """Return the position of each record batch's shard in the order of shards; 0 for all without shards."""
        if self._group_shard is None:
            return np.zeros(len(self._group_rows), dtype=np.int64)
        turn = np.empty(int(self._group_shard.max()) + 1, dtype=np.int64)
        turn[permutation(len(turn), _key(self.seed, epoch, 4))] = np.arange(len(turn))
        return turn[self._group_shard]

    def _resolve(self, plan: _Plan, places: Int64[np.ndarray, " row"]) -> Int64[np.ndarray, " row"]:
        rows = np.empty_like(places)
        window = np.searchsorted(plan.window_place, places, side="right") - 1
        by_window = np.argsort(window, kind="stable")
        bounds = np.flatnonzero(np.diff(window[by_window], prepend=-1, append=-1))
        for low, high in pairwise(bounds):
            index = by_window[low:high]
            number = int(window[index[0]])
            rows[index] = self._window(plan, number)[places[index] - plan.window_place[number]]
        return rows

    def _window(self, plan: _Plan, number: int) -> Int64[np.ndarray, " row"]:
        """Return the rows of a window in order; about two windows of each stream are cached."""
        if number not in plan.cache:
            while len(plan.cache) >= 2 * self.streams:
                plan.cache.pop(next(iter(plan.cache)))
            pieces = slice(plan.window_piece[number], plan.window_piece[number + 1])
            start = plan.window_place[number]
            length = np.diff(plan.place[pieces.start : pieces.stop + 1])
            first = plan.row[pieces] - (plan.place[pieces] - start)
            rows = np.repeat(first, length) + np.arange(length.sum())
            plan.cache[number] = rows[permutation(len(rows), _key(self.seed, plan.epoch, 3, int(start)))]
        return plan.cache[number]
