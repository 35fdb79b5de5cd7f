"""Findings about a dataset that matter before training, derived from its profile."""

from collections.abc import Iterator
from dataclasses import dataclass
from itertools import combinations
from typing import Any, Literal

import numpy as np

from dmvae.data.format.manifest import ModalityInfo
from dmvae.data.inspection.duplicates import repeated
from dmvae.data.inspection.profile import DISTINCTIVE_BITS, DatasetProfile, SharedRows
from dmvae.data.inspection.suspicions import (
    half_matching_ids,
    rare_modalities,
    suspicious_columns,
    unseen_classes,
)
from dmvae.data.inspection.value_stats import MAX_CLASSES, ValueStats

Array = np.ndarray[Any, np.dtype[Any]]

_MIN_ROWS = 50  # below this, statistics of spread and shape mean little
_FAR = 20.0  # standard deviations


@dataclass(frozen=True)
class Finding:
    """One finding, in words.

    Attributes:
        level: an `error` spoils training or its metrics, a `warning` may do so, a `note` is a fact.
        text: the finding with an example, and the fix.
    """

    level: Literal["error", "warning", "note"]
    text: str


def list_findings(profile: DatasetProfile) -> list[Finding]:
    """Return all findings, the most serious first."""
    found = [*_rows(profile), *_modalities(profile), *_labels(profile), *_missingness(profile), *_duplicates(profile)]
    for suspicions in (half_matching_ids, suspicious_columns, rare_modalities, unseen_classes):
        found += [Finding("warning", text) for text in suspicions(profile)]
    return sorted(found, key=lambda finding: ("error", "warning", "note").index(finding.level))


def _rows(profile: DatasetProfile) -> Iterator[Finding]:
    all_splits = profile.dataset.manifest.splits
    if profile.train != "train":
        yield Finding(
            "warning", f"There is no split 'train'; the largest split, {profile.train!r}, is used for training."
        )
    if len(profile.splits) == 1:
        yield Finding("warning", f"Only {profile.train!r} has rows: there are none left to validate or test on.")
    for name in sorted(all_splits.keys() - profile.splits.keys()):
        yield Finding("warning", f"{name}: split has no rows.")
    for name, split in profile.splits.items():
        if split.first_empty >= 0:
            empty = sum(count for kind, count in split.patterns.counts.items() if not any(kind))
            yield Finding(
                "error",
                f"{name}: {empty:,} rows have no modality, the first with id "
                f"{profile.id_of(name, split.first_empty)}. Remove them from the source.",
            )
        later = repeated(split.hashes.ids)
        if later.any():
            yield Finding(
                "error",
                f"{name}: {int(later.sum()):,} rows repeat the id of an earlier row, the first with id "
                f"{profile.id_of(name, int(later.argmax()))}. Make ids unique in the source.",
            )


def _modalities(profile: DatasetProfile) -> Iterator[Finding]:
    for name, info in profile.dataset.manifest.modalities.items():
        train = profile.splits[profile.train].values.get(name)
        if train is None:
            yield Finding(
                "error", f"{name}: no row of {profile.train} has this modality, so it cannot be learned. Remove it."
            )
        if info.classes == 1:
            yield Finding("error", f"{name}: categorical with a single class; all values are 0. Remove it.")
        if info.classes is not None and info.classes > MAX_CLASSES:
            yield Finding(
                "warning",
                f"{name}: integers are classes, and this makes {info.classes:,} classes. Convert measurements and "
                f"counts to float32 in the source, and remove identifiers.",
            )
        values = profile.values(name)
        if values is None:
            continue
        yield from _invalid_values(profile, name, info)
        if info.classes is not None:
            yield from _unseen_classes(profile, name)
            continue
        yield from _constant(name, info, values)
        yield from _zero_rows(name, values)
        yield from _outliers(profile, name, info, values)
        yield from _scale(name, info, values)
        yield from _shift(profile, name)


def _invalid_values(profile: DatasetProfile, name: str, info: ModalityInfo) -> Iterator[Finding]:
    for split_name, split in profile.splits.items():
        values = split.values.get(name)
        if values is None:
            continue
        if values.non_finite:
            yield Finding(
                "error",
                f"{name}: {values.non_finite:,} observed rows of {split_name} have NaN or infinity, the first with id "
                f"{profile.id_of(split_name, values.first_non_finite)}. Correct these rows, or set them to null.",
            )
        at = int(values.low_at[values.low.argmin()]), int(values.high_at[values.high.argmax()])
        ends = float(values.low.min()), float(values.high.max())
        for position, value, is_out in zip(at, ends, (ends[0] < 0, ends[1] >= (info.classes or np.inf)), strict=True):
            if info.classes is not None and is_out:
                yield Finding(
                    "error",
                    f"{name}: classes must be between 0 and {info.classes - 1}, but got {value:.0f} in {split_name}, "
                    f"id {profile.id_of(split_name, position)}. Correct the source.",
                )


def _unseen_classes(profile: DatasetProfile, name: str) -> Iterator[Finding]:
    train = profile.splits[profile.train].values.get(name)
    for split_name, split in profile.splits.items():
        values = split.values.get(name)
        if train is None or values is None or split_name == profile.train:
            continue
        unseen = np.flatnonzero((values.classes > 0) & (train.classes == 0))
        if len(unseen):
            text = f"{name}: {len(unseen)} classes of {split_name} never occur in {profile.train}: {_list(unseen)}."
            yield Finding("warning", text)


def _constant(name: str, info: ModalityInfo, values: ValueStats) -> Iterator[Finding]:
    constant = int(values.is_constant.sum())
    if constant and values.rows > 1:
        level: Literal["warning", "note"] = "note" if info.dtype == "uint8" else "warning"
        remedy = "" if info.dtype == "uint8" else " They carry no information; remove them from the source."
        names = "" if info.features is None else f": {_list(np.array(info.features)[values.is_constant])}"
        text = f"{name}: {constant:,} of {len(values.low):,} features are constant{names}.{remedy}"
        yield Finding(level, text)


def _zero_rows(name: str, values: ValueStats) -> Iterator[Finding]:
    if values.zero_rows and len(values.low) > 1:
        yield Finding(
            "note" if values.are_binary else "warning",
            f"{name}: {values.zero_rows:,} observed rows are all zero. If that means missing, set them to null.",
        )


def _outliers(profile: DatasetProfile, name: str, info: ModalityInfo, values: ValueStats) -> Iterator[Finding]:
    if values.rows < _MIN_ROWS or info.dtype == "uint8" or values.are_binary:
        return
    limit = min(_FAR, 0.9 * float(np.sqrt(values.rows - 1)))  # no value can be further off than sqrt(rows - 1)
    with np.errstate(all="ignore"):
        above, below = (values.high - values.mean) / values.std, (values.mean - values.low) / values.std
        far = np.fmax(above, below)
    features = int((far > limit).sum())
    if not features:
        return
    worst = int(np.nanargmax(far))
    is_high = above[worst] >= below[worst]
    value = float((values.high if is_high else values.low)[worst])
    split_name, position = next(
        (split_name, int((part.high_at if is_high else part.low_at)[worst]))
        for split_name, split in profile.splits.items()
        if (part := split.values.get(name)) and (part.high if is_high else part.low)[worst] == value
    )
    yield Finding(
        "warning",
        f"{name}: {features:,} of {len(far):,} features have outliers, {limit:.0f} or more standard deviations from "
        f"the mean. The furthest is {value:.4g}, {far[worst]:.0f} standard deviations from {values.mean[worst]:.4g}: "
        f"element {worst} of id {profile.id_of(split_name, position)} in {split_name}. Check the source.",
    )


def _scale(name: str, info: ModalityInfo, values: ValueStats) -> Iterator[Finding]:
    if info.scaling != "none" or values.are_binary or values.are_counts:
        return
    mean, std = values.overall
    if std and (abs(mean) > 10 * std or not 0.01 <= std <= 100):
        yield Finding(
            "warning",
            f"{name}: not scaled, with mean {mean:.4g} and standard deviation {std:.4g}; networks learn best from "
            f"values near 1. Prepare the dataset with scaling.{name} = 'standardise'.",
        )


def _shift(profile: DatasetProfile, name: str) -> Iterator[Finding]:
    train = profile.splits[profile.train].values.get(name)
    for split_name, split in profile.splits.items():
        values = split.values.get(name)
        if train is None or values is None or split_name == profile.train or min(train.rows, values.rows) < _MIN_ROWS:
            continue
        (mean, std), (other_mean, other_std) = train.overall, values.overall
        if abs(other_mean - mean) > std or not std <= 4 * other_std or not other_std <= 4 * std:
            yield Finding(
                "warning",
                f"{name}: the splits differ, with mean {other_mean:.4g} and standard deviation {other_std:.4g} in "
                f"{split_name}, but {mean:.4g} and {std:.4g} in {profile.train}. Check that both have the same units.",
            )


def _labels(profile: DatasetProfile) -> Iterator[Finding]:
    known = profile.splits[profile.train].labels
    for name, split in profile.splits.items():
        negative = [label for label in split.labels.counts if label < 0]
        if negative:
            yield Finding(
                "error",
                f"{name}: labels must be 0 or more, or null, but got {_list(np.array(negative))}. Set them to null.",
            )
        unseen = sorted(split.labels.counts.keys() - known.counts.keys())
        if unseen and known.counts and not known.others:
            names = np.array([profile.dataset.manifest.label_name(label) for label in unseen])
            text = f"{name}: {len(unseen)} labels never occur in {profile.train}: {_list(names)}."
            yield Finding("warning", text)


def _missingness(profile: DatasetProfile) -> Iterator[Finding]:
    modalities = list(profile.dataset.manifest.modalities)
    patterns = profile.splits[profile.train].patterns
    kinds = np.array([*patterns.counts], dtype=bool).reshape(-1, len(modalities))
    together = kinds.astype(np.float64).T @ (kinds * np.array([*patterns.counts.values()])[:, None])
    observed = np.diag(together)
    apart = [
        f"{modalities[one]} and {modalities[two]}"
        for one, two in combinations(range(len(modalities)), 2)
        if together[one, two] == 0 and observed[one] and observed[two] and not patterns.others
    ]
    if apart:
        yield Finding(
            "warning",
            f"{len(apart)} pairs of modalities are never observed together in {profile.train}: {', '.join(apart[:5])}"
            f"{', ...' if len(apart) > 5 else ''}. The model can only relate them through other modalities.",
        )
    if len(modalities) > 1 and not kinds.all(axis=1).any():
        yield Finding("note", f"{profile.train}: no row has all modalities.")


def _duplicates(profile: DatasetProfile) -> Iterator[Finding]:
    for name, split in profile.splits.items():
        later = repeated(split.hashes.contents)
        if later.any():
            yield Finding(
                "note",
                f"{name}: {int(later.sum()):,} rows duplicate an earlier row, the first with id "
                f"{profile.id_of(name, int(later.argmax()))}.",
            )
    for one, two in combinations(profile.splits, 2):
        yield from _shared_rows(profile, profile.shared_rows(one, two))


def _shared_rows(profile: DatasetProfile, shared: SharedRows) -> Iterator[Finding]:
    """Report the rows that two splits share: leakage if one is the training split, unless values repeat naturally."""
    split, other = shared.split, shared.other
    may_leak = profile.train in (split, other)
    alike = np.zeros_like(shared.ids)
    for name in profile.distinctive:
        alike |= shared.values[name]
    same = shared.ids & (shared.contents | alike)
    if same.any() and may_leak:
        yield _leak(profile, shared, same, "also occur, with the same id,")
    elif shared.ids.any():
        whole = "all" if shared.ids.all() else f"{int(shared.ids.sum()):,}"
        text = f"{whole} ids of {split} also occur in {other}{', with the same values' if same.any() else ''}."
        fix = " If these are different rows, give them new ids; otherwise the model is evaluated on training rows."
        yield Finding("warning" if may_leak else "note", text + (fix if may_leak else ""))
    copied = shared.contents & ~shared.ids
    if may_leak and (copied & alike).any():
        yield _leak(profile, shared, copied & alike, "also occur, with another id,")
    elif copied.any():
        yield Finding("note", f"{int(copied.sum()):,} rows of {split} duplicate rows of {other} under another id.")
    for name, hits in shared.values.items():
        count = int((hits & ~shared.ids & ~copied).sum())
        values = profile.values(name)
        if count and values is not None and values.bits >= DISTINCTIVE_BITS:
            observed = int((profile.splits[split].hashes.values[name] > 0).sum())
            yield Finding(
                "warning" if may_leak else "note",
                f"{name}: {count:,} of {observed:,} rows of {split} have the same values as rows of {other} with "
                f"another id.{' Unless values repeat naturally, this is leakage.' if may_leak else ''}",
            )


def _leak(profile: DatasetProfile, shared: SharedRows, rows: Array, how: str) -> Finding:
    first = profile.id_of(shared.split, int(rows.argmax()))
    return Finding(
        "error",
        f"Leakage: {int(rows.sum()):,} of {len(rows):,} rows of {shared.split} {how} in {shared.other}, the first with "
        f"id {first}. Keep copies of a row in one split.",
    )


def _list(numbers: Array) -> str:
    return ", ".join(map(str, numbers[:8].tolist())) + (", ..." if len(numbers) > 8 else "")
