"""The rows of one split: any of them, in any order, as batches."""

import threading
from collections.abc import Container, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from jaxtyping import Int64
from torch import Tensor

from dmvae.batch import Batch
from dmvae.data.error import DatasetError
from dmvae.data.manifest import Manifest, ModalityInfo, ShardInfo
from dmvae.data.place import Place
from dmvae.data.shard import MappedShard, ShardFile
from dmvae.data.verify import row_blocks, verify_shard

Array = np.ndarray[Any, np.dtype[Any]]

_OPENERS = 4
"""Shards that are fetched and verified at the same time."""


class Split:
    """The rows of one split; a row's position counts through the shards in the manifest's order.

    A shard is fetched, verified and mapped, in a thread, when a row of it is first read or read ahead of. It stays
    mapped, unless this node cannot hold the whole dataset.

    Attributes:
        where: the dataset's folder or URI.
    """

    def __init__(self, place: Place, manifest: Manifest, name: str, verify_on_use: bool) -> None:
        self.where = place.where
        self.manifest = manifest
        self.name = name
        self._place = place
        self._infos = [info for info in self.manifest.splits[name].shards if info.rows]
        self._starts = np.cumsum([0] + [info.rows for info in self._infos])
        self._shards: dict[int, Future[MappedShard]] = {}
        self._opener: ThreadPoolExecutor | None = None
        self._keeps_all = place.holds(manifest.bytes)
        self._scales = {name: _Scale(info) for name, info in self.manifest.modalities.items()}
        self._incomplete = [name for name, count in self.observed.items() if count < len(self)]
        self._verify_on_use = verify_on_use
        self._lock = threading.Lock()

    def __len__(self) -> int:
        return int(self._starts[-1])

    @property
    def observed(self) -> dict[str, int]:
        """Rows that have each modality; 0 for one that training cannot learn from this split."""
        return self.manifest.splits[self.name].observed

    @property
    def record_batch_rows(self) -> Int64[np.ndarray, " group"]:
        """Rows of every record batch in order, as `EpochOrder` takes them."""
        sizes = []
        for info in self._infos:
            full, rest = divmod(info.rows, info.record_batch_rows)
            sizes += [info.record_batch_rows] * full + [rest] * (rest > 0)
        return np.array(sizes, dtype=np.int64)

    def read(self, positions: Int64[np.ndarray, " row"], dtype: torch.dtype = torch.float32) -> Batch:
        """Read the rows at `positions`, in that order.

        Floats and uint8 are scaled as the manifest says and given as `dtype`, counts are given as `dtype`, and classes
        stay int64. Missing slots are zero.
        A modality that this split has in every row has no mask, and without any other `masks` is None. Labels are -1
        where there is none, size factors NaN.

        Raises:
            DatasetError: if a position is out of range, or a shard fails its check on first use.
        """
        return next(self.read_batches(positions, [len(positions)], dtype))

    def read_batches(
        self, positions: Int64[np.ndarray, " row"], lengths: Sequence[int], dtype: torch.dtype = torch.float32
    ) -> Iterator[Batch]:
        """Read the rows at `positions` at once, and yield them in batches of the given lengths; see `read`.

        Faster than a call per batch, and than cutting up one large batch: a batch is converted when it is asked for,
        and so fits the cache.
        """
        self._check_positions(positions)
        parts = self._parts(positions)
        stored = {name: _join([part.shard.gather(name, part.rows) for part in parts], parts) for name in self._scales}
        present = {
            name: _join([part.shard.present(name, part.rows) for part in parts], parts) for name in self._incomplete
        }
        ids = _join([part.shard.ids(part.rows) for part in parts], parts)
        labels, size_factors = self._labels(parts), self._size_factors(parts, dtype)
        stop = 0
        for length in lengths:
            start, stop = stop, stop + length
            yield self._convert(slice(start, stop), stored, present, ids, labels, size_factors, dtype)

    def _convert(
        self,
        rows: slice,
        stored: Mapping[str, Array],
        present: Mapping[str, Array],
        ids: Array,
        labels: Tensor | None,
        size_factors: Tensor | None,
        dtype: torch.dtype,
    ) -> Batch:
        missing = {name: np.flatnonzero(~mask[rows]) for name, mask in present.items()}
        return Batch(
            data={name: scale(stored[name][rows], missing.get(name), dtype) for name, scale in self._scales.items()},
            masks={name: torch.from_numpy(mask[rows]) for name, mask in present.items()} or None,
            labels=None if labels is None else labels[rows],
            ids=torch.from_numpy(ids[rows]) if ids.dtype == np.int64 else ids[rows],
            size_factors=None if size_factors is None else size_factors[rows],
        )

    def open_ahead(self, positions: Int64[np.ndarray, " row"]) -> None:
        """Begin to fetch, verify and map the shards of rows that will be read; without effect if not all fit here."""
        if self._keeps_all and len(self._shards) < len(self._infos):
            for number in np.unique(self._numbers(positions)):
                self._shard(int(number))

    def ids(self) -> Array:
        """Return the names of all rows, int64 or strings."""
        parts = self._parts(np.arange(len(self)))
        return _join([part.shard.ids(part.rows) for part in parts], parts)

    def labels(self) -> Tensor | None:
        """Return the labels of all rows, -1 where there is none; None if the dataset has no labels."""
        return self._labels(self._parts(np.arange(len(self))))

    def shards(self) -> Iterator[MappedShard]:
        """Yield the shards in order, fetched and mapped in their turn, without a check of their sums or values."""
        for info in self._infos:
            yield self._map(self._place.fetch(info), info)

    def verify(self, full: bool = False) -> None:
        """Check the checksum and the observed values of every shard.

        Args:
            full: do so even if the unchanged file was checked before, and look for ids that occur twice and for rows
                with nothing observed.

        Raises:
            DatasetError: if a check fails; it names the shard, the column and the first row.
        """
        for info in self._infos:
            file = self._place.fetch(info)
            verify_shard(file, info, self.manifest, remember=not full)
            if full:
                _check_rows_have_something(self._map(file, info))
        if full:
            self.check_ids()

    def check_ids(self) -> None:
        """Check that no two rows have the same id.

        Raises:
            DatasetError: naming one that occurs more than once.
        """
        names, counts = np.unique(self.ids(), return_counts=True)
        if (counts > 1).any():
            raise DatasetError(
                f"{self.where}, split {self.name!r}: an id occurs once in a split; got {names[counts > 1][0]} "
                f"{counts[counts > 1][0]} times, and {int((counts > 1).sum())} such ids. Make them unique in the "
                f"source, and prepare the dataset again."
            )

    def _check_positions(self, positions: Array) -> None:
        if len(positions) and not 0 <= positions.min() <= positions.max() < len(self):
            raise DatasetError(
                f"{self.where}, split {self.name!r}: positions lie in 0..{len(self) - 1}; got {positions.min()} to "
                f"{positions.max()}."
            )

    def _parts(self, positions: Array) -> "list[_Part]":
        """Divide positions by shard; no position at all is a part of the first shard, which gives empty arrays."""
        if len(self._infos) == 1 or not len(positions):
            return [_Part(self._shard(0).result(), positions, slice(None))]
        number = self._numbers(positions)
        picked = {int(shard): np.flatnonzero(number == shard) for shard in np.unique(number)}
        self._keep_only(picked)
        opening = {shard: self._shard(shard) for shard in picked}
        return [
            _Part(opening[shard].result(), positions[places] - self._starts[shard], places)
            for shard, places in picked.items()
        ]

    def _numbers(self, positions: Array) -> Array:
        return np.searchsorted(self._starts, positions, side="right") - 1

    def _labels(self, parts: "list[_Part]") -> Tensor | None:
        if not self.manifest.has_label:
            return None
        labels = [
            np.where(part.shard.present("label", part.rows), part.shard.gather("label", part.rows), -1)
            for part in parts
        ]
        return torch.from_numpy(_join(labels, parts))

    def _size_factors(self, parts: "list[_Part]", dtype: torch.dtype) -> Tensor | None:
        if self.manifest.size_factor is None:
            return None
        factors = [
            np.where(part.shard.present("size_factor", part.rows), part.shard.gather("size_factor", part.rows), np.nan)
            for part in parts
        ]
        return torch.from_numpy(_join(factors, parts)).to(dtype)

    def _shard(self, number: int) -> "Future[MappedShard]":
        with self._lock:
            known = self._shards.get(number)
            if known is None or (known.done() and known.exception() is not None):
                if self._opener is None:
                    self._opener = ThreadPoolExecutor(_OPENERS, thread_name_prefix="dmvae-open")
                self._shards[number] = self._opener.submit(self._open, number)
            return self._shards[number]

    def _keep_only(self, numbers: Container[int]) -> None:
        """Unmap the other shards where not all fit on this node, so that they can make room."""
        if not self._keeps_all:
            with self._lock:
                self._shards = {number: shard for number, shard in self._shards.items() if number in numbers}

    def _open(self, number: int) -> MappedShard:
        info = self._infos[number]
        file = self._place.fetch(info)
        if self._verify_on_use:
            verify_shard(file, info, self.manifest)
        return self._map(file, info)

    def _map(self, file: ShardFile, info: ShardInfo) -> MappedShard:
        shard = file.map()
        if shard.columns != self.manifest.columns:
            raise DatasetError(
                f"{shard.where}: the manifest says {self.manifest.columns}; got {shard.columns}. Copy it again, or "
                f"prepare again."
            )
        if (shard.rows, shard.record_batch_rows) != (info.rows, info.record_batch_rows):
            raise DatasetError(
                f"{shard.where}: the manifest says {info.rows} rows in record batches of {info.record_batch_rows}; got "
                f"{shard.rows} in record batches of {shard.record_batch_rows}. Copy it again."
            )
        return shard


def _check_rows_have_something(shard: MappedShard) -> None:
    for rows in row_blocks(shard):
        nothing = ~np.logical_or.reduce([shard.present(name, rows) for name in shard.columns.modalities])
        if nothing.any():
            first = rows[nothing]
            raise DatasetError(
                f"a row has at least one modality; got none in {shard.where}, row {first[0]} "
                f"(id {shard.ids(first[:1])[0]}). Leave it out in the source, and prepare the dataset again."
            )


@dataclass(frozen=True)
class _Part:
    """The rows of one shard among those that are read, and their places there."""

    shard: MappedShard
    rows: Array
    places: Array | slice


def _join(arrays: list[Array], parts: list[_Part]) -> Array:
    """Put what the parts gave in the order that was asked for."""
    if len(parts) == 1:
        return arrays[0]
    # the widest type: strings of different shards differ in length
    result = np.empty((sum(map(len, arrays)), *arrays[0].shape[1:]), dtype=np.result_type(*arrays))
    for part, array in zip(parts, arrays, strict=True):
        result[part.places] = array
    return result


class _Scale:
    """From stored values to those that training reads."""

    def __init__(self, info: ModalityInfo) -> None:
        self._scaling = info.scaling
        self._floats = info.likelihood != "categorical"
        if info.scaling == "standardise":
            self._mean = torch.tensor(info.mean, dtype=torch.float64).reshape(info.shape)
            self._std = torch.tensor(info.std, dtype=torch.float64).reshape(info.shape)

    def __call__(self, values: Array, missing: Array | None, dtype: torch.dtype) -> Tensor:
        """Return the values with zeros in the rows `missing`; the array is changed."""
        if missing is not None:
            # by numpy and before the conversion: torch takes fifty times as long to fill the rows of a mask
            values[missing] = 0
        tensor = torch.from_numpy(values)
        if not self._floats:
            return tensor
        if self._scaling == "unit":
            return tensor.to(dtype).div_(255)
        if self._scaling == "none":
            return tensor.to(dtype)
        # in the wider of both types: float64 measurements with a large mean would otherwise cancel
        wide = torch.promote_types(tensor.dtype, dtype)
        scaled = ((tensor.to(wide) - self._mean.to(wide)) / self._std.to(wide)).to(dtype)
        return scaled if missing is None else scaled.index_fill_(0, torch.from_numpy(missing), 0)
