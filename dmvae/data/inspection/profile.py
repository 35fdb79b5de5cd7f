"""Profile a dataset in one pass: statistics of its values, missing patterns, labels, and hashes of its rows."""

from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

import numpy as np

from dmvae.data.format.shard import MappedShard
from dmvae.data.inspection.duplicates import Hashes, RowHash, SplitOverlap, hash_ids
from dmvae.data.inspection.value_stats import ValueStats
from dmvae.data.progress import Progress
from dmvae.data.reading.dataset import Dataset

Array = np.ndarray[Any, np.dtype[Any]]

DISTINCTIVE_BITS = 64
"""Rows with this many bits are equal only if one is a copy of the other, not by coincidence."""
_MAX_KINDS = 1 << 16


class CappedCounter:
    """Counts how often each of a few kinds occurs; beyond 65,536 kinds, the rarest are counted as `others`."""

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

    def __add__(self, other: "CappedCounter") -> "CappedCounter":
        both = CappedCounter()
        both.counts, both.others = self.counts + other.counts, self.others + other.others
        return both


@dataclass(eq=False)
class SplitProfile:
    """The profile of one split.

    Attributes:
        rows: the number of rows.
        values: statistics by modality; without modalities that no row has.
        patterns: the number of rows for each combination of modalities, a tuple of booleans in the manifest's order.
        labels: the number of rows for each label; rows without a label are not counted.
        first_empty: the position of the first row without any modality; -1 if there is none.
        hashes: hashes of its rows.
    """

    rows: int
    values: dict[str, ValueStats] = field(default_factory=dict)
    patterns: CappedCounter = field(default_factory=CappedCounter)
    labels: CappedCounter = field(default_factory=CappedCounter)
    first_empty: int = -1
    hashes: Hashes = field(default_factory=lambda: Hashes.of(0, ()))


@dataclass(eq=False)
class DatasetProfile:
    """The profile of a dataset; splits without rows are left out.

    Attributes:
        dataset: the dataset.
        splits: in the order of the manifest.
        overlaps: by modality, the values of the smaller splits that also occur in the largest one.
    """

    dataset: Dataset
    splits: dict[str, SplitProfile]
    overlaps: dict[str, SplitOverlap] = field(default_factory=dict)

    @property
    def train(self) -> str:
        """The training split: `train`, or the largest split if there is no `train`."""
        return "train" if "train" in self.splits else max(self.splits, key=lambda name: self.splits[name].rows)

    def values(self, modality: str) -> ValueStats | None:
        """Return the statistics of a modality over all splits; None if no row has it."""
        parts = [split.values[modality] for split in self.splits.values() if modality in split.values]
        return ValueStats.merge(parts) if parts else None

    def id_of(self, split: str, position: int) -> str:
        """Return the id of a row, for a message."""
        for shard in self.dataset.split(split).shards():
            if position < shard.rows:
                return str(shard.ids(np.array([position]))[0])
            position -= shard.rows
        raise AssertionError(position)

    def shared_rows(self, name: str, other: str) -> "SharedRows":
        """Return which rows of the smaller of two splits (the first, if they are equal) also occur in the other."""
        largest = self.by_size[-1]
        if largest == name or (self.splits[name].rows > self.splits[other].rows and largest != other):
            name, other = other, name
        mine, theirs = self.splits[name].hashes, self.splits[other].hashes
        values = {}
        for modality, hashes in mine.values.items():
            values[modality] = (
                self.overlaps[modality].contains(hashes)
                if other == largest
                else (hashes > 0) & np.isin(hashes, theirs.values[modality])
            )
        return SharedRows(name, other, np.isin(mine.ids, theirs.ids), np.isin(mine.contents, theirs.contents), values)

    @cached_property
    def distinctive(self) -> frozenset[str]:
        """The modalities in which most rows have distinct values, so that equal values are copies, not coincidence."""
        return frozenset(
            name
            for name in self.dataset.manifest.modalities
            if (values := self.values(name)) is not None
            and values.bits >= DISTINCTIVE_BITS
            and max((_distinct(split.hashes.values.get(name)) for split in self.splits.values()), default=0.0) >= 0.5
        )

    @property
    def by_size(self) -> list[str]:
        """The names of the splits, the largest one last."""
        return sorted(self.splits, key=lambda name: self.splits[name].rows)


@dataclass(frozen=True, eq=False)
class SharedRows:
    """Which rows of `split` also occur in `other`: by id, by all their contents, and by each modality's values."""

    split: str
    other: str
    ids: Array
    contents: Array
    values: dict[str, Array]


def _distinct(hashes: Array | None) -> float:
    """Return the share of distinct values among nonzero hashes."""
    observed = np.zeros(0) if hashes is None else hashes[hashes > 0]
    return len(np.unique(observed)) / max(len(observed), 1)


def profile_dataset(dataset: Dataset, progress: Callable[[str], None]) -> DatasetProfile:
    """Read every row once, the largest split last.

    Memory grows by 16 bytes for each row, and outside the largest split by 8 more for each modality.

    Args:
        dataset: the dataset; checksums of its shards are not checked.
        progress: called with progress lines.

    Raises:
        DatasetError: if a shard cannot be read.
    """
    manifest = dataset.manifest
    sizes = {name: split.rows for name, split in manifest.splits.items() if split.rows}
    profile = DatasetProfile(dataset, {name: SplitProfile(rows) for name, rows in sizes.items()})
    reader = _Reader(profile, sum(sizes.values()), progress)
    order = profile.by_size
    for name in order[:-1]:
        reader.read(name, keep_values=True)
    smaller = [profile.splits[name].hashes for name in order[:-1]]
    if smaller:
        profile.overlaps.update({modality: SplitOverlap(smaller, modality) for modality in manifest.modalities})
    for name in order[-1:]:
        reader.read(name, keep_values=False)
    return profile


class _Reader:
    """Reads one split after another into a profile."""

    def __init__(self, profile: DatasetProfile, total: int, progress: Callable[[str], None]) -> None:
        self._profile = profile
        self._manifest = profile.dataset.manifest
        modalities = self._manifest.modalities
        self._hash = {
            name: RowHash(info.column.row_bytes, seed) for seed, (name, info) in enumerate(modalities.items(), 1)
        }
        self._hash_row = RowHash(8 * len(modalities), 0)
        self._first: dict[str, ValueStats] = {}
        self._done, self._progress = 0, Progress(progress, "read", total)

    def read(self, name: str, *, keep_values: bool) -> None:
        split, modalities = self._profile.splits[name], self._manifest.modalities
        split.hashes = Hashes.of(split.rows, modalities if keep_values else ())
        start = 0
        for shard in self._profile.dataset.split(name).shards():
            for rows in _blocks(shard):
                self._read_block(split, shard, rows, start)
                self._done += len(rows)
                self._progress.update(self._done)
            start += shard.rows

    def _read_block(self, split: SplitProfile, shard: MappedShard, rows: Array, start: int) -> None:
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
            elif modality in self._profile.overlaps:
                self._profile.overlaps[modality].add(hashes)
            self._add_values(split, modality, values, start + rows[mask])
        split.hashes.ids[here] = hash_ids(shard.ids(rows))
        split.hashes.contents[here] = self._hash_row(parts)
        split.patterns.add(present)
        empty = ~present.any(axis=1)
        if split.first_empty < 0 and empty.any():
            split.first_empty = int(start + rows[empty][0])
        if self._manifest.has_label:
            split.labels.add(shard.gather("label", rows)[shard.present("label", rows)])

    def _add_values(self, split: SplitProfile, modality: str, values: Array, positions: Array) -> None:
        if not len(values):
            return
        if modality not in self._first:
            may_miss_cells = modality in self._manifest.missing_cells
            self._first[modality] = ValueStats(values, self._manifest.modalities[modality].classes, may_miss_cells)
        if modality not in split.values:
            split.values[modality] = ValueStats(self._first[modality])
        split.values[modality].add(values, positions)


def _blocks(shard: MappedShard) -> Iterator[Array]:
    """Yield the positions of all rows, about 1 MiB of rows at a time, however large the record batches are."""
    step = shard.columns.record_batch_rows
    for start in range(0, shard.rows, step):
        yield np.arange(start, min(start + step, shard.rows))
