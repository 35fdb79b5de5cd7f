"""Read a source once: check its values, assign its rows to splits, and put them aside to be shuffled."""

from bisect import bisect_right
from collections.abc import Callable, Collection
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from dmvae.config.data import PrepareConfig
from dmvae.config.likelihoods import values_of
from dmvae.config.section import check_name
from dmvae.data.errors import DatasetError
from dmvae.data.format.schema import Columns, missing_cells
from dmvae.data.preparation.build_manifest import check_settings
from dmvae.data.preparation.external_shuffle import ExternalShuffle, hash_keys
from dmvae.data.preparation.rows import Rows
from dmvae.data.preparation.splitting import assign_groups, assign_rows
from dmvae.data.preparation.stream import Chunk, SourceLocation, Stream
from dmvae.data.progress import Progress

Array = np.ndarray[Any, np.dtype[Any]]

_MAX_SPLITS = 100
DEFAULT_SHARES = {"train": 0.8, "val": 0.1, "test": 0.1}


@dataclass
class _ChunkRecord:
    """What stays in memory of a chunk: for each row its key, whether it is kept, and what decides its split."""

    location: SourceLocation
    keys: Array
    kept: Array
    labels: Array | None
    groups: Array | None
    splits: Array | None


@dataclass
class _Partial:
    """The rows that have some cells of a modality and lack others: where the first is, and the numbers lacking."""

    first: str
    rows: int = 0
    cells: int = 0


class Scan:
    """Reads a source, and keeps a few numbers of each row in memory.

    Args:
        config: how the dataset is prepared.
        stream: the source.
        folder: for the files of the shuffle.
        log: called with progress lines and remarks.

    Attributes:
        columns: the columns of the shards.
        shuffle: the rows.
        names: the names of the splits.
        codes: `(rows,)`, the index of each row's split in `names`; -1 for a row without any modality, which is dropped.

    Raises:
        DatasetError: if the source has invalid values, or the settings do not fit it.
    """

    def __init__(self, config: PrepareConfig, stream: Stream, folder: Path, log: Callable[[str], None]) -> None:
        self._config = config
        self._records: list[_ChunkRecord] = []
        self._starts: list[int] = []
        self._split_codes: dict[str, int] = {}
        self._partial: dict[str, _Partial] = {}
        num_rows = self._read(stream, folder, log)
        if not num_rows:
            raise DatasetError(f"The {config.reads.kind} source has no rows. Correct the source.")
        self.keys = np.concatenate([record.keys for record in self._records])
        self._check_partial(log)
        self.names, self.codes = self._assign_splits()
        num_dropped = int((self.codes < 0).sum())
        if num_dropped == num_rows:
            raise DatasetError(
                f"None of the {num_rows} rows of the {config.reads.kind} source has a modality. Correct the source."
            )
        if num_dropped:
            log(f"dropped {num_dropped} rows without any modality")

    def check_unique(self, rows: Rows, numbers: Array) -> None:
        """Refuse an id that occurs twice in a split (in the whole source, if it has no splits).

        Args:
            rows: a piece of the shuffle.
            numbers: the numbers of these rows in the source.

        Raises:
            DatasetError: with the location of both rows.
        """
        keys = self.keys[numbers]
        tied = np.flatnonzero(np.concatenate(([False], keys[1:] == keys[:-1])))
        seen: dict[tuple[Any, int], int] = {}
        for index in sorted({*tied.tolist(), *(tied - 1).tolist()}):
            number = int(numbers[index])
            name = (rows.ids[index].item(), self._split_code(number))
            if name in seen:
                raise DatasetError(
                    f"Duplicate id {name[0]!r}{' in a split' if self._split_codes else ''}: {self._location(number)} "
                    f"and {self._location(seen[name])}. Make ids unique in the source."
                )
            seen[name] = number

    def _read(self, stream: Stream, folder: Path, log: Callable[[str], None]) -> int:
        """Read all chunks, and return the number of rows."""
        progress, num_rows = Progress(log, "read", stream.num_rows), 0
        for chunk in stream.chunks:
            if not self._records:
                self.columns: Columns = chunk.rows.columns
                self.shuffle = ExternalShuffle(self.columns, folder)
                _check_settings(self._config, chunk.rows, stream.tables)
            self._starts.append(num_rows)
            self._add(chunk, num_rows)
            num_rows += len(chunk.rows)
            progress.update(num_rows)
        return num_rows

    def _add(self, chunk: Chunk, start: int) -> None:
        rows, location, first = chunk.rows, chunk.location, self._records[0] if self._records else None
        if rows.columns != self.columns:
            raise DatasetError(
                f"Columns changed at {location.of(0)}: expected {self.columns}, got {rows.columns}. Correct the source."
            )
        assert first is None or ((first.splits is None) == (rows.splits is None))
        rows = self._check_values(rows, location)
        keys = hash_keys(rows.ids, self._config.seed)
        self._records.append(
            _ChunkRecord(
                location=location,
                keys=keys,
                kept=np.logical_or.reduce(list(rows.present.values())),
                labels=rows.labels if self._config.stratify else None,
                groups=None if rows.groups is None else hash_keys(rows.groups, self._config.seed),
                splits=None if rows.splits is None else self._encode_splits(rows.splits, location),
            )
        )
        self.shuffle.add(replace(rows, splits=None, groups=None), keys, np.arange(start, start + len(rows)))

    def _check_values(self, rows: Rows, location: SourceLocation) -> Rows:
        """Refuse invalid values and count rows with missing cells; a row without any cell lacks the modality."""
        for name, values in rows.data.items():
            self._check_range(rows, name, location)
            if values.dtype == np.uint8:
                continue
            flat = values.reshape(len(rows), -1)
            odd = rows.present[name] & ~(np.isfinite(flat) if flat.dtype.kind == "f" else flat >= 0).all(axis=1)
            if not odd.any():
                continue
            numbers = np.flatnonzero(odd)
            infinite = numbers[np.isinf(flat[odd]).any(axis=1)]
            if len(infinite):
                row = int(infinite[0])
                raise DatasetError(
                    f"Modality {name!r} must be finite, but got infinity in {location.of(row)} (id {rows.ids[row]}). "
                    f"Correct the value, or make it missing."
                )
            gone = missing_cells(flat[odd])
            some = ~gone.all(axis=1)
            dropped = numbers if self._config.partial == "drop" else numbers[~some]
            if some.any():
                row = int(numbers[some][0])
                count = self._partial.setdefault(name, _Partial(f"{location.of(row)} (id {rows.ids[row]})"))
                count.rows, count.cells = count.rows + int(some.sum()), count.cells + int(gone[some].sum())
            if len(dropped):
                present = rows.present[name].copy()
                present[dropped] = False
                rows = replace(rows, present={**rows.present, name: present})
        return rows

    def _check_range(self, rows: Rows, name: str, location: SourceLocation) -> None:
        values, counts = rows.data[name].reshape(len(rows), -1), self._is_counts(name)
        if counts:
            _check_size_factors(rows, name, location)
            law = "holds counts, so values must be whole numbers of 0 or more"
        elif values.dtype == np.int64:
            law = "holds integers, which are classes, so values must be 0 or more"
        elif self._config.scaling.get(name) == "log1p":
            law = "is scaled with log1p, so values must be 0 or more"
        else:
            return
        wrong = values < 0
        if values.dtype == np.int64:
            wrong &= ~missing_cells(values)
        if counts:
            wrong |= np.isfinite(values) & (values != np.floor(values))
        found = np.flatnonzero(rows.present[name] & wrong.any(axis=1))
        if len(found):
            row = int(found[0])
            raise DatasetError(
                f"Modality {name!r} {law}, but got {values[row][wrong[row]][0]} in {location.of(row)} "
                f"(id {rows.ids[row]}). Correct the value, make the modality missing in that row, or change its "
                f"likelihood, scaling or type."
            )

    def _is_counts(self, name: str) -> bool:
        return values_of(self._config.likelihood.get(name)) == "counts"

    def _check_partial(self, log: Callable[[str], None]) -> None:
        for name, count in self._partial.items():
            if self._config.partial == "refuse":
                raise DatasetError(
                    f"Some cells of modality {name!r} are missing in {count.rows} rows, the first in {count.first}. "
                    f"Set partial = 'keep' (keep the cells that these rows have) or partial = 'drop' (treat the "
                    f"modality as missing in them)."
                )
            if self._config.partial == "drop":
                log(f"{name}: dropped the modality from {count.rows} rows with missing cells")
            else:
                log(f"{name}: {count.cells} cells are missing in {count.rows} rows that have others")

    def _encode_splits(self, splits: Array, location: SourceLocation) -> Array:
        """Return the index of each row's split in the names seen so far."""
        found, first, inverse = np.unique(splits, return_index=True, return_inverse=True)
        codes = np.empty(len(found), dtype=np.int16)
        for index in np.argsort(first).tolist():
            name, where = str(found[index]), location.of(int(first[index]))
            try:
                codes[index] = self._split_codes.setdefault(check_name(name), len(self._split_codes))
            except ValueError as error:
                raise DatasetError(f"Cannot use the split in {where}: {error}") from error
            if len(self._split_codes) > _MAX_SPLITS:
                raise DatasetError(
                    f"Too many splits: a dataset can have {_MAX_SPLITS}, and {name!r} in {where} is one more. "
                    f"Correct source.split; to keep rows of a group together, set source.group."
                )
        return np.asarray(codes[inverse])

    def _assign_splits(self) -> tuple[list[str], Array]:
        """Return the names of the splits, and the index of each row's split; see `codes`."""
        kept = np.concatenate([record.kept for record in self._records])
        splits = _concatenate([record.splits for record in self._records])
        if splits is not None:
            return list(self._split_codes), np.where(kept, splits, np.int16(-1))
        shares = self._config.splits or DEFAULT_SHARES
        codes = np.full(len(kept), -1, dtype=np.int16)
        groups = _concatenate([record.groups for record in self._records])
        labels = _concatenate([record.labels for record in self._records])
        if groups is not None:
            codes[kept] = assign_groups(groups[kept], shares)
        else:
            codes[kept] = assign_rows(self.keys[kept], shares, labels=None if labels is None else labels[kept])
        return list(shares), codes

    def _split_code(self, number: int) -> int:
        record, index = self._find(number)
        return -1 if record.splits is None else int(record.splits[index])

    def _location(self, number: int) -> str:
        record, index = self._find(number)
        return record.location.of(index)

    def _find(self, number: int) -> tuple[_ChunkRecord, int]:
        """Return the chunk of a row, and the row's index in it."""
        chunk = bisect_right(self._starts, number) - 1
        return self._records[chunk], number - self._starts[chunk]


def _concatenate(parts: list[Array | None]) -> Array | None:
    given = [part for part in parts if part is not None]
    return np.concatenate(given) if given else None


def _check_size_factors(rows: Rows, name: str, location: SourceLocation) -> None:
    if rows.size_factors is None:
        return
    absent = rows.present[name] & np.isnan(rows.size_factors)
    if absent.any():
        row = int(absent.argmax())
        raise DatasetError(
            f"Missing size factor for the counts of modality {name!r} in {location.of(row)} (id {rows.ids[row]}). "
            f"Fill it in, or remove the column of size factors."
        )


def _check_settings(config: PrepareConfig, rows: Rows, tables: Collection[str]) -> None:
    for setting in ("scaling", "likelihood"):
        for name in sorted(getattr(config, setting).keys() & set(tables)):
            raise DatasetError(
                f"Cannot apply {setting}.{name}: columns of the table {name!r} differ in kind, and each has the "
                f"{setting} of its kind. Remove {setting}.{name}, and set source.modalities.{name}.kinds instead."
            )
    check_settings(rows.columns, config.scaling, config.likelihood, {})
    if rows.splits is not None and (config.splits is not None or config.stratify):
        raise DatasetError(
            f"Cannot apply splits={config.splits}, stratify={config.stratify}: the source has splits of its own "
            f"({rows.splits[0]!s}, ...). Remove these settings, or remove the column of splits from the source."
        )
    if config.stratify and rows.labels is None:
        raise DatasetError("Cannot stratify: the source has no labels. Set source.label, or remove stratify.")
    if config.stratify and rows.groups is not None:
        raise DatasetError("Cannot both stratify and keep groups together. Remove stratify or source.group.")
