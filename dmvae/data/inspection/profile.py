"""One pass over a dataset: what its values are, what is missing together, its labels, and hashes to find copies by."""

from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

import numpy as np

from dmvae.data.format.shard import MappedShard
from dmvae.data.inspection.duplicates import Hashes, RowHash, SplitOverlap, hash_ids
from dmvae.data.inspection.value_stats import Values
from dmvae.data.progress import Progress
from dmvae.data.reading.dataset import Dataset

Array = np.ndarray[Any, np.dtype[Any]]

TELLING_BITS = 64
"""Of a row's values, from which equal ones are no everyday coincidence."""
_MAX_KINDS = 1 << 16


class Tally:
    """Counts of things of which there should be few; beyond 65,536 kinds the rarest become `others`."""

    def __init__(self) -> None:
        self.counts: Counter[Any] = Counter()
        self.others = 0

    def add(self, things: Array) -> None:
        """Count each entry along the first axis."""
        kinds, counts = np.unique(things, return_counts=True, axis=0)
        for kind, count in zip(kinds.tolist(), counts.tolist(), strict=True):
            self.counts[tuple(kind) if isinstance(kind, list) else kind] += count
        if len(self.counts) > _MAX_KINDS:
            kept = Counter(dict(self.counts.most_common(_MAX_KINDS // 2)))
            self.others += self.counts.total() - kept.total()
            self.counts = kept

    def __add__(self, other: "Tally") -> "Tally":
        both = Tally()
        both.counts, both.others = self.counts + other.counts, self.others + other.others
        return both


@dataclass(eq=False)
class SplitCensus:
    """What one split holds.

    Attributes:
        rows: how many.
        values: by modality; without those that no row of any split has.
        patterns: how many rows have which modalities: a tuple of truth values in the manifest's order.
        labels: how many rows have which label; those without one are in none.
        first_empty: the position of the first row that has nothing; -1: there is none.
        hashes: what stands for its rows.
    """

    rows: int
    values: dict[str, Values] = field(default_factory=dict)
    patterns: Tally = field(default_factory=Tally)
    labels: Tally = field(default_factory=Tally)
    first_empty: int = -1
    hashes: Hashes = field(default_factory=lambda: Hashes.of(0, ()))


@dataclass(eq=False)
class Census:
    """What a dataset holds, split by split; splits without rows are left out.

    Attributes:
        dataset: whose.
        splits: in the order of the manifest.
        meetings: by modality, which values of the smaller splits the largest one has too.
    """

    dataset: Dataset
    splits: dict[str, SplitCensus]
    meetings: dict[str, SplitOverlap] = field(default_factory=dict)

    @property
    def train(self) -> str:
        """The split that is trained on: `train`, or the largest one where none is called so."""
        return "train" if "train" in self.splits else max(self.splits, key=lambda name: self.splits[name].rows)

    def values(self, modality: str) -> Values | None:
        """Return what all splits together hold of a modality; None if no row has it."""
        parts = [split.values[modality] for split in self.splits.values() if modality in split.values]
        return Values.together(parts) if parts else None

    def id_of(self, split: str, position: int) -> str:
        """Return the id of a row, for a person."""
        for shard in self.dataset.split(split).shards():
            if position < shard.rows:
                return str(shard.ids(np.array([position]))[0])
            position -= shard.rows
        raise AssertionError(position)

    def in_common(self, name: str, other: str) -> "Common":
        """Compare the rows of two splits, the smaller one's (the first's if they are equal) being told of."""
        largest = self.by_size[-1]
        if largest == name or (self.splits[name].rows > self.splits[other].rows and largest != other):
            name, other = other, name
        mine, theirs = self.splits[name].hashes, self.splits[other].hashes
        values = {}
        for modality, hashes in mine.values.items():
            values[modality] = (
                self.meetings[modality].met(hashes)
                if other == largest
                else (hashes > 0) & np.isin(hashes, theirs.values[modality])
            )
        return Common(name, other, np.isin(mine.ids, theirs.ids), np.isin(mine.contents, theirs.contents), values)

    @cached_property
    def telling(self) -> frozenset[str]:
        """Modalities of which most rows have values of their own, so that equal ones are copies and no coincidence."""
        return frozenset(
            name
            for name in self.dataset.manifest.modalities
            if (values := self.values(name)) is not None
            and values.bits >= TELLING_BITS
            and max((_distinct(split.hashes.values.get(name)) for split in self.splits.values()), default=0.0) >= 0.5
        )

    @property
    def by_size(self) -> list[str]:
        """Names of the splits, the largest one last."""
        return sorted(self.splits, key=lambda name: self.splits[name].rows)


@dataclass(frozen=True, eq=False)
class Common:
    """Which rows of the split `of` are in `other` too: by id, by all that they hold, by each modality's values."""

    of: str
    other: str
    ids: Array
    contents: Array
    values: dict[str, Array]


def _distinct(hashes: Array | None) -> float:
    """Return the share of different ones among hashes that are not 0."""
    observed = np.zeros(0) if hashes is None else hashes[hashes > 0]
    return len(np.unique(observed)) / max(len(observed), 1)


def take_census(dataset: Dataset, progress: Callable[[str], None]) -> Census:
    """Read every row once, the largest split last.

    Memory: a few times the size of a row, and per row 16 bytes, with 8 more per modality outside the largest split.

    Args:
        dataset: whose shards are read as they are, without a check of their checksums.
        progress: told every few seconds how far it is.

    Raises:
        DatasetError: if a shard cannot be read.
    """
    manifest = dataset.manifest
    sizes = {name: split.rows for name, split in manifest.splits.items() if split.rows}
    census = Census(dataset, {name: SplitCensus(rows) for name, rows in sizes.items()})
    reader = _Reader(census, sum(sizes.values()), progress)
    order = census.by_size
    for name in order[:-1]:
        reader.read(name, keep_values=True)
    smaller = [census.splits[name].hashes for name in order[:-1]]
    if smaller:
        census.meetings.update({modality: SplitOverlap(smaller, modality) for modality in manifest.modalities})
    for name in order[-1:]:
        reader.read(name, keep_values=False)
    return census


class _Reader:
    """Reads split after split into a census."""

    def __init__(self, census: Census, total: int, progress: Callable[[str], None]) -> None:
        self._census = census
        self._manifest = census.dataset.manifest
        modalities = self._manifest.modalities
        self._hash = {
            name: RowHash(info.column.row_bytes, seed) for seed, (name, info) in enumerate(modalities.items(), 1)
        }
        self._hash_row = RowHash(8 * len(modalities), 0)
        self._first: dict[str, Values] = {}
        self._done, self._progress = 0, Progress(progress, "read", total)

    def read(self, name: str, *, keep_values: bool) -> None:
        split, modalities = self._census.splits[name], self._manifest.modalities
        split.hashes = Hashes.of(split.rows, modalities if keep_values else ())
        start = 0
        for shard in self._census.dataset.split(name).shards():
            for rows in _blocks(shard):
                self._read_block(split, shard, rows, start)
                self._done += len(rows)
                self._progress.update(self._done)
            start += shard.rows

    def _read_block(self, split: SplitCensus, shard: MappedShard, rows: Array, start: int) -> None:
        here = slice(start + rows[0], start + rows[0] + len(rows))
        parts = np.zeros((len(rows), len(self._hash)), dtype=np.uint64)
        present = np.stack([shard.present(modality, rows) for modality in self._hash], axis=1)
        for number, modality in enumerate(self._hash):
            mask = present[:, number]
            values = shard.gather(modality, rows[mask]).reshape(-1, shard.columns.modalities[modality].size)
            parts[mask, number] = self._hash[modality](values)
            hashes = parts[:, number].copy()
            hashes[np.flatnonzero(mask)[~values.any(axis=1)]] = 0
            if modality in split.hashes.values:
                split.hashes.values[modality][here] = hashes
            elif modality in self._census.meetings:
                self._census.meetings[modality].pass_by(hashes)
            self._add_values(split, modality, values, start + rows[mask])
        split.hashes.ids[here] = hash_ids(shard.ids(rows))
        split.hashes.contents[here] = self._hash_row(parts)
        split.patterns.add(present)
        empty = ~present.any(axis=1)
        if split.first_empty < 0 and empty.any():
            split.first_empty = int(start + rows[empty][0])
        if self._manifest.has_label:
            split.labels.add(shard.gather("label", rows)[shard.present("label", rows)])

    def _add_values(self, split: SplitCensus, modality: str, values: Array, positions: Array) -> None:
        if not len(values):
            return
        if modality not in self._first:
            self._first[modality] = Values(values, self._manifest.modalities[modality].classes)
        if modality not in split.values:
            split.values[modality] = Values(self._first[modality])
        split.values[modality].add(values, positions)


def _blocks(shard: MappedShard) -> Iterator[Array]:
    """Yield the positions of all rows, about 1 MiB of them at a time, however large its record batches are."""
    step = shard.columns.record_batch_rows
    for start in range(0, shard.rows, step):
        yield np.arange(start, min(start + step, shard.rows))
