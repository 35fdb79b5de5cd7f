"""Findings about single columns of vectors and tables: codes for missing, mixed units, copies, and leaked labels."""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

from dmvae.config.likelihoods import UNSEEN
from dmvae.data.inspection.profile import DatasetProfile

Array = np.ndarray[Any, np.dtype[Any]]

_MAX_ROWS = 20_000
_MAX_COLUMNS = 512
"""Of one modality, and of all modalities that are compared with each other."""
_MIN_ROWS = 30
_CODES = (
    *(sign * float(digit * count) for digit in "987" for count in (1, 2, 3, 4, 5, 6) for sign in (-1, 1)),
    -1.0, -25567.0,
)  # fmt: skip
"""What people write for missing: -9, 99, -999, 8888, ..., -1, and 1900-01-01 in days since 1970-01-01."""
_MIN_CODED = 0.002
_UNIT_FACTOR = 5.0


@dataclass(frozen=True, eq=False)
class _Column:
    """One column: `values` of rows of the training split, NaN where missing."""

    modality: str
    name: str
    values: Array
    is_number: bool

    @property
    def varies(self) -> bool:
        """Whether enough rows have a value, and not all the same."""
        known = self.values[~np.isnan(self.values)]
        return len(known) >= _MIN_ROWS and bool(known.min() < known.max())

    def __str__(self) -> str:
        return f"{self.name} of {self.modality}"


def suspicious_columns(profile: DatasetProfile) -> Iterator[str]:
    """Yield what is suspicious in columns of numbers, judged by the first training rows."""
    columns, labels = _read(profile)
    yield from _codes(columns)
    for column in columns:
        if column.is_number:
            yield from _units(column)
    yield from _copies(columns)
    if labels is not None:
        yield from _leaks(columns, labels, profile)


def half_matching_ids(profile: DatasetProfile) -> Iterator[str]:
    """Yield which ids differ only by case, white space or leading zeros: probably the same rows, which did not join."""
    if profile.dataset.manifest.id_type == "int64":
        return
    written: dict[str, str] = {}
    pairs = []
    for name in profile.splits:
        for found in profile.dataset.split(name).ids().tolist():
            other = written.setdefault(_plain_id(found), found)
            if other != found:
                pairs.append((other, found))
    if pairs:
        one, two = pairs[0]
        yield (
            f"{len(pairs):,} ids differ from another one only by case, white space or leading zeros, such as {one!r} "
            f"and {two!r}. If they name the same rows, write them the same way in every file, and prepare again."
        )


def _plain_id(name: str) -> str:
    short = "".join(name.split()).lower()
    head = short.rstrip("0123456789")
    return head + short[len(head) :].lstrip("0")


def _read(profile: DatasetProfile) -> tuple[list[_Column], Array | None]:
    manifest = profile.dataset.manifest
    shapes = {
        name: info for name, info in manifest.modalities.items() if len(info.shape) == 1 and info.dtype != "uint8"
    }
    wanted = {name: info for name, info in shapes.items() if info.shape[0] <= _MAX_COLUMNS}
    parts: dict[str, list[Array]] = {name: [] for name in wanted}
    labels: list[Array] = []
    left = _MAX_ROWS
    for shard in profile.dataset.split(profile.train).shards():
        rows = np.arange(min(left, shard.rows))
        left -= len(rows)
        for name in wanted:
            values = shard.gather(name, rows).astype(np.float64)
            values[~shard.present(name, rows)] = np.nan
            if manifest.modalities[name].dtype == "int64":
                values[values < -1e18] = np.nan
            parts[name].append(values)
        if manifest.has_label:
            labels.append(np.where(shard.present("label", rows), shard.gather("label", rows), -1))
        if left <= 0:
            break
    columns = []
    for name, info in wanted.items():
        values = np.concatenate(parts[name])
        kinds = [column.kind for column in info.columns or ()] or ["real"] * values.shape[1]
        for place, kind in enumerate(kinds):
            is_number = kind in ("real", "positive", "count") and info.classes is None
            feature = f"column {place}" if info.features is None else info.features[place]
            columns.append(_Column(name, feature, values[:, place], is_number))
    return columns, np.concatenate(labels) if labels else None


def _codes(columns: list[_Column]) -> Iterator[str]:
    """Report codes for missing: repeated, outside of all other values, and further off than these are wide."""
    found: dict[tuple[str, float], list[tuple[str, float]]] = {}
    for column in columns:
        values = column.values[~np.isnan(column.values)]
        if len(values) < _MIN_ROWS or not column.is_number:
            continue
        # -999 must not hide -99, nor 999 the range of the others
        rest = values[~np.isin(values, _CODES)]
        if len(rest) < 0.3 * len(values):
            continue
        low, high = float(rest.min()), float(rest.max())
        for code in np.intersect1d(values, _CODES).tolist():
            share, gap = float((values == code).mean()), max(low - code, code - high)
            if share >= _MIN_CODED and (values == code).sum() >= 2 and gap > high - low > 0:
                found.setdefault((column.modality, code), []).append((column.name, share))
    for (modality, code), places in found.items():
        written = "1900-01-01" if code == -25567 else f"{code:g}"
        setting = f'"{written}"' if code == -25567 else written
        told = ", ".join(f"{name} ({share:.1%})" for name, share in places[:8]) + (", ..." if len(places) > 8 else "")
        yield (
            f"{modality}: {written} is far from all other values and repeated in {told}: probably a code for missing. "
            f"To read it as missing, set source.modalities.{modality}.missing = [{setting}], and prepare again."
        )


def _units(column: _Column) -> Iterator[str]:
    """Report two groups of positive values, each narrow, with an empty factor between them."""
    values = np.sort(column.values[column.values > 0])
    if len(values) < _MIN_ROWS or len(values) < 0.99 * (~np.isnan(column.values)).sum():
        return
    steps = np.diff(np.log(values))
    at = int(steps.argmax()) + 1
    below, above = values[:at], values[at:]
    factor = float(np.median(above) / np.median(below))
    spread = max(np.log(below[-1] / below[0]), np.log(above[-1] / above[0]))
    few = min(len(below), len(above)) < max(3, 0.01 * len(values))
    are_codes = len(np.unique(below)) < 3 or len(np.unique(above)) < 3
    if not few and not are_codes and factor > _UNIT_FACTOR and steps.max() > 0.5 * spread:
        yield (
            f"{column.modality}: {column.name} has two groups of values, {below[0]:.4g} to {below[-1]:.4g} in "
            f"{len(below) / len(values):.1%} and {above[0]:.4g} to {above[-1]:.4g} in the rest, about {factor:.3g} "
            f"times as large. Check that all rows have the same unit."
        )


def _copies(columns: list[_Column]) -> Iterator[str]:
    """Report columns that are equal, or linear functions of each other."""
    pairs = []
    kept = [column for column in columns if column.is_number and column.varies]
    if 1 < len(kept) <= _MAX_COLUMNS:
        table = np.stack([column.values for column in kept])
        known = ~np.isnan(table)
        centred = table - np.nanmean(table, axis=1, keepdims=True)
        unit = np.where(known, centred, 0) / np.sqrt(np.nansum(centred**2, axis=1, keepdims=True))
        for one, two in np.argwhere(np.triu(np.abs(unit @ unit.T) > 1 - 1e-6, 1)).tolist():
            if (known[one] == known[two]).all():
                equal = np.array_equal(table[one], table[two], equal_nan=True)
                pairs.append(f"{kept[one]} and {kept[two]} ({'equal' if equal else 'linear'})")
    if pairs:
        yield (
            f"{len(pairs)} pairs of columns are copies of each other: {'; '.join(pairs[:5])}"
            f"{'; ...' if len(pairs) > 5 else ''}. They count twice in the likelihood; leave one of each out."
        )


def _leaks(columns: list[_Column], labels: Array, profile: DatasetProfile) -> Iterator[str]:
    """Report columns from which the label can be read off."""
    for column in columns:
        known = ~np.isnan(column.values) & (labels >= 0)
        values, own = column.values[known], labels[known]
        num_labels = len(np.unique(own))
        if len(own) < _MIN_ROWS or num_labels < 2:
            continue
        distinct, codes = np.unique(values, return_inverse=True)
        label_codes = np.unique(own, return_inverse=True)[1]
        if len(distinct) <= max(20, len(own) // 20):
            table = np.zeros((len(distinct), num_labels))
            np.add.at(table, (codes, label_codes), 1)
            told = table.max(axis=1).sum() / len(own) >= 0.995
        else:
            # each label is one interval: the sorted rows change label as rarely as they can
            told = int((np.diff(own[np.argsort(values, kind="stable")]) != 0).sum()) == num_labels - 1
        if told:
            yield (
                f"{column.modality}: the label can be read off {column.name} alone, in {len(own):,} training rows. If "
                f"it was derived from the label, leave the column out: latents and metrics would only repeat it."
            )


def rare_modalities(profile: DatasetProfile) -> Iterator[str]:
    """Yield which modalities a split hardly has, though training rows have them."""
    shares: Mapping[str, dict[str, float]] = {
        name: {m: count / split.rows for m, count in split.observed.items()}
        for name, split in profile.dataset.manifest.splits.items()
        if split.rows
    }
    for name, split in profile.dataset.manifest.splits.items():
        for modality, share in shares.get(name, {}).items():
            typical = shares[profile.train][modality]
            count = split.observed[modality]
            if name != profile.train and split.rows >= _MIN_ROWS and share < 0.2 * typical:
                yield (
                    f"{modality}: only {count:,} of {split.rows:,} rows of {name} have it ({share:.1%}), but "
                    f"{typical:.1%} of {profile.train}. Metrics on {name} say little about it."
                )


def unseen_classes(profile: DatasetProfile) -> Iterator[str]:
    """Yield which columns of tables have classes in other splits that no training row has."""
    for name, info in profile.dataset.manifest.modalities.items():
        for place, column in enumerate(info.columns or ()):
            if column.kind != "category" or info.features is None:
                continue
            for split_name, split in profile.splits.items():
                values = split.values.get(name)
                if values is not None and split_name != profile.train and values.high[place] >= len(column.classes):
                    yield (
                        f"{name}: {info.features[place]} has classes in {split_name} that no row of {profile.train} "
                        f"has; they count as the class {UNSEEN!r}."
                    )
