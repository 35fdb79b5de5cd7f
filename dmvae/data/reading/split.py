"""Read rows of one split as batches, in any order."""

import threading
from collections.abc import Container, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from itertools import combinations, pairwise
from typing import Any

import numpy as np
import torch
from jaxtyping import Int64
from torch import Tensor

from dmvae.data.batch import Batch
from dmvae.data.errors import DatasetError
from dmvae.data.format.gather import Gatherer, Located
from dmvae.data.format.manifest import Manifest, ModalityInfo, ShardInfo
from dmvae.data.format.schema import missing_cells
from dmvae.data.format.shard import MappedShard, ShardFile
from dmvae.data.scaling import Scale
from dmvae.data.storage.location import DatasetLocation
from dmvae.data.storage.verify import Sums, check_sums, row_blocks, verify_shard

Array = np.ndarray[Any, np.dtype[Any]]

_OPENERS = 4
_MASK_ROWS = 2**16
"""Shards that are fetched and verified at the same time, at most."""


class Split:
    """The rows of one split; a row's position counts through the shards in the order of the manifest.

    A thread fetches, verifies and maps a shard when one of its rows is first read, or read ahead. The shard stays
    mapped, unless the whole dataset does not fit on this node. A shard that this node has verified before is not hashed
    again; instead, each record batch is compared with its recorded sum when one of its rows is first read, so that
    damage since then is found within an epoch of every run.

    Attributes:
        where: the dataset's folder or URI.
    """

    def __init__(self, location: DatasetLocation, manifest: Manifest, name: str, verify_on_use: bool) -> None:
        self.where = location.where
        self.manifest = manifest
        self.name = name
        self._location = location
        self._infos = [info for info in self.manifest.splits[name].shards if info.rows]
        self._starts = np.cumsum([0] + [info.rows for info in self._infos])
        sizes = [info.record_batch_rows for info in self._infos]
        self._rows = Gatherer(manifest.columns, [info.rows for info in self._infos], sizes)
        self._first_group = np.cumsum([0, *(-(-info.rows // info.record_batch_rows) for info in self._infos)])
        self._shards: dict[int, Future[MappedShard]] = {}
        self._opener: ThreadPoolExecutor | None = None
        self._keeps_all = location.holds(manifest.bytes)
        self._scales = {name: _Scale(info) for name, info in self.manifest.modalities.items()}
        self._with_cells = self.manifest.missing_cells
        self._incomplete = [name for name, count in self.observed.items() if count < len(self)]
        self._verify_on_use = verify_on_use
        self._sums: dict[int, Sums] = {}
        self._is_checked = np.full(len(self.record_batch_rows), not verify_on_use)
        self._lock, self._reading = threading.Lock(), threading.Lock()

    def __len__(self) -> int:
        return int(self._starts[-1])

    @property
    def observed(self) -> dict[str, int]:
        """The number of rows that have each modality."""
        return self.manifest.splits[self.name].observed

    @property
    def record_batch_rows(self) -> Int64[np.ndarray, " group"]:
        """The number of rows of each record batch in order, as `EpochSampler` takes them."""
        sizes = []
        for info in self._infos:
            full, rest = divmod(info.rows, info.record_batch_rows)
            sizes += [info.record_batch_rows] * full + [rest] * (rest > 0)
        return np.array(sizes, dtype=np.int64)

    @property
    def record_batch_shards(self) -> Int64[np.ndarray, " group"]:
        """The shard of each record batch, as `EpochSampler` takes them."""
        return np.repeat(np.arange(len(self._infos)), [-(-info.rows // info.record_batch_rows) for info in self._infos])

    def read(self, positions: Int64[np.ndarray, " row"], dtype: torch.dtype = torch.float32) -> Batch:
        """Read the rows at `positions`, in that order.

        Floats and uint8 are scaled according to the manifest and converted to `dtype`, counts are converted to `dtype`,
        and classes stay int64. Missing values are zero. A modality that every row of the split has gets no mask; if
        all have none, `masks` is None. `cells` has the modalities with missing cells somewhere in the dataset. Absent
        labels are -1, absent size factors NaN.

        Raises:
            DatasetError: if a position is out of range, or a shard fails its check on first use.
        """
        return next(self.read_batches(positions, [len(positions)], dtype))

    def read_batches(
        self, positions: Int64[np.ndarray, " row"], lengths: Sequence[int], dtype: torch.dtype = torch.float32
    ) -> Iterator[Batch]:
        """Read the rows at `positions` at once, and yield them in batches of the given lengths; see `read`.

        This is faster than one call for each batch, and faster than slicing one large batch, because a batch is
        converted when it is requested and so stays in the CPU cache.
        """
        self._check_positions(positions)
        lengths = list(lengths)
        with self._located(positions) as (rows, shards):
            stored = {name: self._rows.values(name, rows) for name in self._scales}
            present = {name: self._rows.present(name, rows) for name in self._incomplete}
            ids = self._ids(rows, shards)
            labels, factors = self._labels(rows), self._size_factors(rows)
        for name, mask in present.items():
            # with numpy and before the conversion: torch takes fifty times as long to fill the rows of a mask
            stored[name][np.flatnonzero(~mask)] = 0
        observed = {name: _take_cells(stored[name], present.get(name)) for name in self._with_cells}
        data = {name: _cut(values, lengths) for name, values in stored.items()}
        masks = {name: _cut(mask, lengths) for name, mask in present.items()}
        cells = {name: _cut(mask, lengths) for name, mask in observed.items()}
        names = _cut(ids, lengths) if ids.dtype == np.int64 else np.split(ids, np.cumsum(lengths)[:-1])
        classes = None if labels is None else _cut(labels, lengths)
        depths = None if factors is None else _cut(factors, lengths)
        for number in range(len(lengths)):
            here = {name: mask[number] for name, mask in masks.items()}
            its_cells = {name: mask[number] for name, mask in cells.items()}
            yield Batch(
                data={
                    name: scale(data[name][number], here.get(name), its_cells.get(name), dtype)
                    for name, scale in self._scales.items()
                },
                masks=here or None,
                labels=None if classes is None else classes[number],
                ids=names[number],
                size_factors=None if depths is None else depths[number].to(dtype),
                cells=its_cells or None,
            )

    def open_ahead(self, positions: Int64[np.ndarray, " row"]) -> None:
        """Start to fetch, verify and map the shards of `positions`, if the whole dataset fits on this node."""
        if self._keeps_all and len(self._shards) < len(self._infos):
            for number in self._numbers(self._rows.locate(positions)):
                self._shard(number)

    def ids(self) -> Array:
        """Return the ids of all rows, int64 or strings, without comparing the sums of all record batches."""
        return np.concatenate([self._ids(rows, shards) for rows, shards in self._by_shard(check=False)])

    def labels(self) -> Tensor | None:
        """Return the labels of all rows, -1 for a row without one; None if the dataset has no labels."""
        found = [labels for rows, _ in self._by_shard() if (labels := self._labels(rows)) is not None]
        return torch.from_numpy(np.concatenate(found)) if found else None

    def shards(self) -> Iterator[MappedShard]:
        """Yield the shards in order, without checking their checksums or values."""
        for info in self._infos:
            yield self._map(self._location.fetch(info), info)

    def never_together(self) -> list[tuple[str, str]]:
        """Return the pairs of modalities, in the dataset's order, that rows have but no row has both of."""
        names = [name for name, number in self.observed.items() if number]
        together = np.eye(len(names), dtype=bool)
        for shard in self.shards():
            for first in range(0, shard.rows, _MASK_ROWS):
                if together.all():
                    return []
                rows = np.arange(first, min(first + _MASK_ROWS, shard.rows))
                present = np.stack([shard.present(name, rows) for name in names]).astype(np.float32)
                together |= present @ present.T > 0
        return [pair for pair, met in zip(combinations(names, 2), together[np.triu_indices(len(names), 1)], strict=True)
                if not met]  # fmt: skip

    def verify(self, full: bool = False) -> None:
        """Check the checksum and the observed values of every shard.

        Args:
            full: also if the unchanged file passed the check before; and check for duplicate ids and for rows without
                any modality.

        Raises:
            DatasetError: if a check fails, with the shard, the column and the first row.
        """
        for info in self._infos:
            file = self._location.fetch(info)
            verify_shard(file, info, self.manifest, remember=not full)
            if full:
                _check_rows_not_empty(self._map(file, info))
        if full:
            self.check_ids()

    def check_ids(self) -> None:
        """Check that ids are unique.

        Raises:
            DatasetError: if an id occurs more than once.
        """
        names, counts = np.unique(self.ids(), return_counts=True)
        if (counts > 1).any():
            raise DatasetError(
                f"{int((counts > 1).sum())} duplicate ids in split {self.name!r} of {self.where}; "
                f"{names[counts > 1][0]} occurs {counts[counts > 1][0]} times. Make ids unique in the source, and "
                f"prepare the dataset again."
            )

    def _check_positions(self, positions: Array) -> None:
        if len(positions) and not 0 <= positions.min() <= positions.max() < len(self):
            raise DatasetError(
                f"Positions {positions.min()} to {positions.max()} are out of range: split {self.name!r} of "
                f"{self.where} has {len(self)} rows."
            )

    @contextmanager
    def _located(self, positions: Array, check: bool = True) -> "Iterator[tuple[Located, dict[int, MappedShard]]]":
        """Yield where rows are stored, and their shards, which stay mapped meanwhile; for one thread at a time."""
        with self._reading:
            rows = self._rows.locate(positions)
            numbers = self._numbers(rows)
            self._keep_only(numbers)
            opening = {number: self._shard(number) for number in numbers}
            shards = {number: shard.result() for number, shard in opening.items()}
            if check:
                self._check_groups(rows, shards)
            yield rows, shards

    def _check_groups(self, rows: Located, shards: Mapping[int, MappedShard]) -> None:
        """Compare the record batches of `rows` that no call has read before with the sums of the verified shard."""
        unread = ~self._is_checked[rows.group]
        if not unread.any():
            return
        groups, first = np.unique(rows.group[unread], return_index=True)
        files = rows.file[unread][first]
        for number in np.unique(files).tolist():
            mine = groups[files == number]
            check_sums(shards[number], self._sums[number], (mine - self._first_group[number]).tolist())
            self._is_checked[mine] = True

    def _by_shard(self, check: bool = True) -> "Iterator[tuple[Located, dict[int, MappedShard]]]":
        """Yield the same for all rows in order, one shard at a time."""
        for start, stop in pairwise(self._starts.tolist()):
            with self._located(np.arange(start, stop), check) as found:
                yield found

    def _numbers(self, rows: Located) -> list[int]:
        return np.flatnonzero(np.bincount(rows.file)).tolist()

    def _ids(self, rows: Located, shards: Mapping[int, MappedShard]) -> Array:
        if self.manifest.id_type == "int64":
            return self._rows.values("id", rows)
        indices = {number: np.flatnonzero(rows.file == number) for number in shards}
        within = rows.position - self._starts[rows.file]
        names = {number: shard.ids(within[indices[number]]) for number, shard in shards.items()}
        # the widest type, because strings of different shards differ in length
        result = np.empty(len(within), dtype=np.result_type(np.dtype("U1"), *names.values()))
        for number, found in names.items():
            result[indices[number]] = found
        return result

    def _labels(self, rows: Located) -> Array | None:
        if not self.manifest.has_label:
            return None
        return np.where(self._rows.present("label", rows), self._rows.values("label", rows), -1)

    def _size_factors(self, rows: Located) -> Array | None:
        if self.manifest.size_factor is None:
            return None
        return np.where(self._rows.present("size_factor", rows), self._rows.values("size_factor", rows), np.nan)

    def _shard(self, number: int) -> "Future[MappedShard]":
        with self._lock:
            known = self._shards.get(number)
            if known is None or (known.done() and known.exception() is not None):
                if self._opener is None:
                    self._opener = ThreadPoolExecutor(_OPENERS, thread_name_prefix="dmvae-open")
                self._shards[number] = self._opener.submit(self._open, number)
            return self._shards[number]

    def _keep_only(self, numbers: Container[int]) -> None:
        """Unmap the other shards if the dataset does not fit on this node, so that they can be evicted."""
        if not self._keeps_all:
            with self._lock:
                self._shards = {number: shard for number, shard in self._shards.items() if number in numbers}

    def _open(self, number: int) -> MappedShard:
        info = self._infos[number]
        file = self._location.fetch(info)
        if self._verify_on_use:
            self._sums[number] = verify_shard(file, info, self.manifest)
        shard = self._map(file, info)
        with self._lock:
            shard.enter(self._rows, number)
        return shard

    def _map(self, file: ShardFile, info: ShardInfo) -> MappedShard:
        shard = file.map()
        if shard.columns != self.manifest.columns:
            raise DatasetError(
                f"Columns of {shard.where} do not match the manifest: expected {self.manifest.columns}, got "
                f"{shard.columns}. Copy the shard again, or prepare the dataset again."
            )
        if (shard.rows, shard.record_batch_rows) != (info.rows, info.record_batch_rows):
            raise DatasetError(
                f"Rows of {shard.where} do not match the manifest: expected {info.rows} rows in record batches of "
                f"{info.record_batch_rows}, got {shard.rows} in record batches of {shard.record_batch_rows}. Copy the "
                f"shard again, or prepare the dataset again."
            )
        return shard


def _check_rows_not_empty(shard: MappedShard) -> None:
    for rows in row_blocks(shard):
        nothing = ~np.logical_or.reduce([shard.present(name, rows) for name in shard.columns.modalities])
        if nothing.any():
            first = rows[nothing]
            raise DatasetError(
                f"Row without any modality in {shard.where}, row {first[0]} (id {shard.ids(first[:1])[0]}). Remove it "
                f"from the source, and prepare the dataset again."
            )


def _take_cells(stored: Array, present: Array | None) -> Array:
    """Return which cells are observed, and set the others to zero."""
    gone = missing_cells(stored)
    stored[gone] = 0
    cells = np.logical_not(gone, out=gone)
    if present is not None:
        cells[np.flatnonzero(~present)] = False
    return cells


def _cut(values: Array, lengths: list[int]) -> Sequence[Tensor]:
    return torch.from_numpy(values).split_with_sizes(lengths)


class _Scale:
    """Converts the stored values of a modality for the model."""

    def __init__(self, info: ModalityInfo) -> None:
        self._scale = Scale(info)
        self._floats = info.classes is None

    def __call__(self, values: Tensor, present: Tensor | None, cells: Tensor | None, dtype: torch.dtype) -> Tensor:
        """Return the converted values, zero in rows and cells that are missing; their stored values must be zero too.

        The argument may be changed in place, or returned.
        """
        if not self._floats:
            return values
        scaled = self._scale.read(values, dtype)
        if not self._scale.moves_zero:
            return scaled
        if cells is not None:
            return scaled.masked_fill_(~cells, 0)
        if present is None:
            return scaled
        return scaled.index_fill_(0, torch.from_numpy(np.flatnonzero(~present.numpy())), 0)
