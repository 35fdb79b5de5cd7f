"""The one time that a source is read: what is wrong with it, what decides where its rows go, and the rows put aside."""

from bisect import bisect_right
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from dmvae.config.data import PrepareConfig
from dmvae.config.likelihoods import values_of
from dmvae.config.section import check_name
from dmvae.data.errors import DatasetError
from dmvae.data.format.schema import Columns
from dmvae.data.preparation.build_manifest import check_settings
from dmvae.data.preparation.external_shuffle import Shuffle, hash_keys
from dmvae.data.preparation.rows import Rows
from dmvae.data.preparation.splitting import divide, divide_groups
from dmvae.data.preparation.stream import Chunk, SourceLocation, Stream
from dmvae.data.progress import Progress

Array = np.ndarray[Any, np.dtype[Any]]

_MAX_SPLITS = 100
DEFAULT_SHARES = {"train": 0.8, "val": 0.1, "test": 0.1}


@dataclass
class _Held:
    """What is held of each row of a chunk: its key, and whatever decides its split."""

    spot: SourceLocation
    keys: Array
    kept: Array
    labels: Array | None
    groups: Array | None
    own: Array | None


class Scan:
    """Reads a source, and holds a few numbers of each of its rows.

    Args:
        config: what is made of it.
        stream: the source.
        folder: for the files of the shuffle.
        progress: told, in a line of text each, how far it is and what was found.

    Attributes:
        columns: of the shards.
        shuffle: the rows.
        names: of the splits.
        codes: `(rows,)`, the number of each row's split; -1 for a row that has no modality and is left out.
        filled: modalities with features that are NaN in some rows, where the training mean is to be filled in.

    Raises:
        DatasetError: if the source breaks a law, or the configuration does not fit it.
    """

    def __init__(self, config: PrepareConfig, stream: Stream, folder: Path, progress: Callable[[str], None]) -> None:
        self._config = config
        self._held: list[_Held] = []
        self._starts: list[int] = []
        self._own_names: dict[str, int] = {}
        self._partial: dict[str, tuple[int, str]] = {}
        reading = Progress(progress, "read", stream.num_rows)
        num = 0
        for chunk in stream.chunks:
            if not self._held:
                self.columns: Columns = chunk.rows.columns
                self.shuffle = Shuffle(self.columns, folder)
                _check_settings(config, chunk.rows)
            self._starts.append(num)
            self._add(chunk, num)
            num += len(chunk.rows)
            reading.update(num)
        if not num:
            raise DatasetError(f"a source has rows; got none from {config.source.kind}. Correct the source.")
        self.keys = np.concatenate([held.keys for held in self._held])
        self._judge_partial(progress)
        self.filled = list(self._partial) if config.partial == "mean" else []
        self.names, self.codes = self._divide()
        if (self.codes < 0).all():
            raise DatasetError(
                f"a source has values; got {num} rows of {config.source.kind} without any modality. Correct the source."
            )
        if (self.codes < 0).any():
            progress(f"left out {int((self.codes < 0).sum())} rows that have no modality at all")

    def check_unique(self, rows: Rows, numbers: Array) -> None:
        """Refuse an id that occurs twice in a split, or in a source without splits, in a piece of the shuffle.

        Raises:
            DatasetError: naming the places.
        """
        keys = self.keys[numbers]
        tied = np.flatnonzero(np.concatenate(([False], keys[1:] == keys[:-1])))
        seen: dict[tuple[Any, int], int] = {}
        for index in sorted({*tied.tolist(), *(tied - 1).tolist()}):
            number = int(numbers[index])
            name = (rows.ids[index].item(), self._own_code(number))
            if name in seen:
                raise DatasetError(
                    f"{self._spot(number)}: an id occurs once{' in a split' if self._own_names else ''}; got "
                    f"{name[0]!r} in {self._spot(seen[name])} too. Make ids unique in the source."
                )
            seen[name] = number

    def _add(self, chunk: Chunk, start: int) -> None:
        rows, first = chunk.rows, self._held[0] if self._held else None
        if rows.columns != self.columns:
            raise DatasetError(
                f"{chunk.spot.of(0)}: all rows have the same columns; got {rows.columns}, {self.columns} before. "
                f"Correct the source."
            )
        assert first is None or ((first.own is None) == (rows.splits is None))
        rows = self._check_values(rows, chunk.spot)
        keys = hash_keys(rows.ids, self._config.seed)
        self._held.append(
            _Held(
                spot=chunk.spot,
                keys=keys,
                kept=np.logical_or.reduce(list(rows.present.values())),
                labels=rows.labels if self._config.stratify else None,
                groups=None if rows.groups is None else hash_keys(rows.groups, self._config.seed),
                own=None if rows.splits is None else self._code(rows.splits, chunk.spot),
            )
        )
        self.shuffle.add(replace(rows, splits=None, groups=None), keys, np.arange(start, start + len(rows)))

    def _check_values(self, rows: Rows, spot: SourceLocation) -> Rows:
        """Refuse infinity; count the rows with some features NaN, and take the modality from them if told to."""
        for name, values in rows.data.items():
            self._refuse_out_of_range(rows, name, spot)
            if values.dtype.kind != "f":
                continue
            odd = rows.present[name] & ~np.isfinite(values).reshape(len(rows), -1).all(axis=1)
            if not odd.any():
                continue
            infinite = np.flatnonzero(odd)[np.isinf(values[odd]).reshape(int(odd.sum()), -1).any(axis=1)]
            if len(infinite):
                raise DatasetError(
                    f"{spot.of(int(infinite[0]))}: an observed value is finite; got infinity in {name!r} "
                    f"(id {rows.ids[infinite[0]]}). Correct the source, or mask those rows."
                )
            count, first = self._partial.get(name, (0, ""))
            row = int(np.flatnonzero(odd)[0])
            self._partial[name] = (count + int(odd.sum()), first or f"{spot.of(row)} (id {rows.ids[row]})")
            if self._config.partial == "drop":
                rows = replace(rows, present={**rows.present, name: rows.present[name] & ~odd})
        return rows

    def _refuse_out_of_range(self, rows: Rows, name: str, spot: SourceLocation) -> None:
        values, counts = (
            rows.data[name].reshape(len(rows), -1),
            values_of(self._config.likelihood.get(name)) == "counts",
        )
        if counts:
            _refuse_absent_factor(rows, name, spot)
            law = "a count is a whole number of 0 or more"
        elif values.dtype == np.int64:
            law = "a categorical value lies in 0.., as integers are classes"
        elif self._config.scaling.get(name) == "log1p":
            law = "log1p takes values of 0 or more"
        else:
            return
        wrong = values < 0
        if counts:
            wrong |= np.isfinite(values) & (values != np.floor(values))
        found = np.flatnonzero(rows.present[name] & wrong.any(axis=1))
        if len(found):
            row = int(found[0])
            raise DatasetError(
                f"{spot.of(row)}: {law}; got {values[row][wrong[row]][0]} in {name!r} (id {rows.ids[row]}). Correct "
                f"it, mask that row, or choose another likelihood, scaling or type."
            )

    def _judge_partial(self, progress: Callable[[str], None]) -> None:
        for name, (count, first) in self._partial.items():
            if self._config.partial == "refuse":
                raise DatasetError(
                    f"a modality is present or missing as a whole; got {count} rows in which some features of {name!r} "
                    f"are NaN, the first in {first}. Set partial to 'drop' (the modality is missing in those rows) "
                    f"or 'mean' (they get the feature's training mean)."
                )
            if self._config.partial == "mean" and values_of(self._config.likelihood.get(name)) == "counts":
                raise DatasetError(
                    f"a training mean is no count; got partial='mean' and {count} rows in which some counts of "
                    f"{name!r} are NaN, the first in {first}. Set partial to 'drop'."
                )
            what = "taken for missing in" if self._config.partial == "drop" else "training means filled into"
            progress(f"{name}: {what} {count} rows that have some features NaN")

    def _code(self, splits: Array, spot: SourceLocation) -> Array:
        """Number the names of splits."""
        found, first, inverse = np.unique(splits, return_index=True, return_inverse=True)
        codes = np.empty(len(found), dtype=np.int16)
        for index in np.argsort(first).tolist():
            name = str(found[index])
            try:
                codes[index] = self._own_names.setdefault(check_name(name), len(self._own_names))
            except ValueError as error:
                raise DatasetError(f"{spot.of(int(first[index]))}, split: {error}") from error
            if len(self._own_names) > _MAX_SPLITS:
                raise DatasetError(
                    f"{spot.of(int(first[index]))}, split: a dataset has at most {_MAX_SPLITS} splits; got {name!r} "
                    f"beyond them. Name the right column, or groups with source.group."
                )
        return np.asarray(codes[inverse])

    def _divide(self) -> tuple[list[str], Array]:
        config, kept = self._config, np.concatenate([held.kept for held in self._held])
        own = _column([held.own for held in self._held])
        if own is not None:
            return list(self._own_names), np.where(kept, own, np.int16(-1))
        shares = config.splits or DEFAULT_SHARES
        codes = np.full(len(kept), -1, dtype=np.int16)
        groups, labels = (_column([getattr(held, name) for held in self._held]) for name in ("groups", "labels"))
        if groups is not None:
            codes[kept] = divide_groups(groups[kept], shares)
        else:
            codes[kept] = divide(self.keys[kept], shares, labels=None if labels is None else labels[kept])
        return list(shares), codes

    def _own_code(self, number: int) -> int:
        held, index = self._at(number)
        return -1 if held.own is None else int(held.own[index])

    def _spot(self, number: int) -> str:
        held, index = self._at(number)
        return held.spot.of(index)

    def _at(self, number: int) -> tuple[_Held, int]:
        chunk = bisect_right(self._starts, number) - 1
        return self._held[chunk], number - self._starts[chunk]


def _column(parts: list[Array | None]) -> Array | None:
    given = [part for part in parts if part is not None]
    return np.concatenate(given) if given else None


def _refuse_absent_factor(rows: Rows, name: str, spot: SourceLocation) -> None:
    if rows.size_factors is None:
        return
    absent = rows.present[name] & np.isnan(rows.size_factors)
    if absent.any():
        row = int(absent.argmax())
        raise DatasetError(
            f"{spot.of(row)}: a row that has counts has a size factor where there is a column of them; got none beside "
            f"{name!r} (id {rows.ids[row]}). Give the row one, or leave the column out."
        )


def _check_settings(config: PrepareConfig, rows: Rows) -> None:
    check_settings(rows.columns, config.scaling, config.likelihood, {})
    if rows.splits is not None and (config.splits is not None or config.stratify):
        raise DatasetError(
            f"shares make splits where the source has none; this one has a column of splits ({rows.splits[0]!s}, ...), "
            f"and got splits={config.splits}, stratify={config.stratify}. Leave them out, or the column."
        )
    if config.stratify and rows.labels is None:
        raise DatasetError("stratifying takes labels; the source has none. Name their column, or leave stratify out.")
    if config.stratify and rows.groups is not None:
        raise DatasetError("rows are divided by groups or by labels; got both. Leave stratify or source.group out.")
