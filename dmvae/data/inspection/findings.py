"""What a person should know of a dataset before training on it, from its census."""

from collections.abc import Iterator
from dataclasses import dataclass
from itertools import combinations
from typing import Any, Literal

import numpy as np

from dmvae.data.format.manifest import ModalityInfo
from dmvae.data.inspection.duplicates import repeated
from dmvae.data.inspection.profile import TELLING_BITS, Census, Common
from dmvae.data.inspection.value_stats import MAX_CLASSES, Values

Array = np.ndarray[Any, np.dtype[Any]]

_MIN_ROWS = 50  # for a figure of spread or shape to mean anything
_FAR = 20.0  # standard deviations


@dataclass(frozen=True)
class Finding:
    """One thing that was found, in words.

    Attributes:
        level: `wrong` spoils training or its figures; `check` may; a `note` is a fact.
        text: what is so, with an example, and the remedy.
    """

    level: Literal["wrong", "check", "note"]
    text: str


def find(census: Census) -> list[Finding]:
    """Return all findings, the worst first."""
    found = [*_rows(census), *_modalities(census), *_labels(census), *_missingness(census), *_copies(census)]
    return sorted(found, key=lambda finding: ("wrong", "check", "note").index(finding.level))


def _rows(census: Census) -> Iterator[Finding]:
    known = census.dataset.manifest.splits
    if census.train != "train":
        yield Finding("check", f"no split is called 'train'; {census.train!r}, the largest, is taken for it.")
    if len(census.splits) == 1:
        yield Finding(
            "check", f"only {census.train!r} has rows: there are none to choose the best epoch by, or to judge."
        )
    for name in sorted(known.keys() - census.splits.keys()):
        yield Finding("check", f"{name} has no rows.")
    for name, split in census.splits.items():
        if split.first_empty >= 0:
            empty = sum(count for kind, count in split.patterns.counts.items() if not any(kind))
            yield Finding(
                "wrong",
                f"{name}: {empty:,} rows have no modality at all, the first with id "
                f"{census.id_of(name, split.first_empty)}. Leave them out in the source.",
            )
        later = repeated(split.hashes.ids)
        if later.any():
            yield Finding(
                "wrong",
                f"{name}: {int(later.sum()):,} rows have the id of an earlier row, the first id "
                f"{census.id_of(name, int(later.argmax()))}. Make ids unique in the source.",
            )


def _modalities(census: Census) -> Iterator[Finding]:
    for name, info in census.dataset.manifest.modalities.items():
        train = census.splits[census.train].values.get(name)
        if train is None:
            yield Finding("wrong", f"{name}: no row of {census.train} has it, so nothing can be learned of it.")
        if info.classes == 1:
            yield Finding("wrong", f"{name}: a categorical modality needs two classes; all values are 0. Leave it out.")
        if info.classes is not None and info.classes > MAX_CLASSES:
            yield Finding(
                "check",
                f"{name}: integers are classes, and these are {info.classes:,}. Make measurements and counts float32 "
                f"in the source, and leave out what only tells rows apart.",
            )
        values = census.values(name)
        if values is None:
            continue
        yield from _broken(census, name, info)
        if info.classes is not None:
            yield from _unlearned_classes(census, name)
            continue
        yield from _constant(name, info, values)
        yield from _zero_rows(name, values)
        yield from _outliers(census, name, info, values)
        yield from _scale(name, info, values)
        yield from _shift(census, name)


def _broken(census: Census, name: str, info: ModalityInfo) -> Iterator[Finding]:
    for split_name, split in census.splits.items():
        values = split.values.get(name)
        if values is None:
            continue
        if values.broken:
            yield Finding(
                "wrong",
                f"{name}: {values.broken:,} observed rows of {split_name} hold NaN or infinity, the first with id "
                f"{census.id_of(split_name, values.first_broken)}. Make these rows null, or correct them.",
            )
        at = int(values.low_at[values.low.argmin()]), int(values.high_at[values.high.argmax()])
        ends = float(values.low.min()), float(values.high.max())
        for place, value, is_out in zip(at, ends, (ends[0] < 0, ends[1] >= (info.classes or np.inf)), strict=True):
            if info.classes is not None and is_out:
                yield Finding(
                    "wrong",
                    f"{name}: a class lies in 0..{info.classes - 1}; got {value:.0f} in {split_name}, id "
                    f"{census.id_of(split_name, place)}. Correct the source.",
                )


def _unlearned_classes(census: Census, name: str) -> Iterator[Finding]:
    train = census.splits[census.train].values.get(name)
    for split_name, split in census.splits.items():
        values = split.values.get(name)
        if train is None or values is None or split_name == census.train:
            continue
        fresh = np.flatnonzero((values.classes > 0) & (train.classes == 0))
        if len(fresh):
            yield Finding(
                "check", f"{name}: {len(fresh)} classes of {split_name} never occur in {census.train}: {_list(fresh)}."
            )


def _constant(name: str, info: ModalityInfo, values: Values) -> Iterator[Finding]:
    constant = int(values.is_constant.sum())
    if constant and values.rows > 1:
        level: Literal["check", "note"] = "note" if info.dtype == "uint8" else "check"
        remedy = "" if info.dtype == "uint8" else " They say nothing; leave them out if they should not."
        yield Finding(level, f"{name}: {constant:,} of {len(values.low):,} features are constant.{remedy}")


def _zero_rows(name: str, values: Values) -> Iterator[Finding]:
    if values.zero_rows and len(values.low) > 1:
        yield Finding(
            "note" if values.are_binary else "check",
            f"{name}: {values.zero_rows:,} observed rows are all zero. If that means missing, make them null.",
        )


def _outliers(census: Census, name: str, info: ModalityInfo, values: Values) -> Iterator[Finding]:
    if values.rows < _MIN_ROWS or info.dtype == "uint8" or values.are_binary:
        return
    limit = min(_FAR, 0.9 * float(np.sqrt(values.rows - 1)))  # no value is further off than sqrt(rows - 1)
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
        for split_name, split in census.splits.items()
        if (part := split.values.get(name)) and (part.high if is_high else part.low)[worst] == value
    )
    yield Finding(
        "check",
        f"{name}: {features:,} of {len(far):,} features have values {limit:.0f} or more standard deviations off their "
        f"mean; the furthest is {value:.4g}, {far[worst]:.0f} off {values.mean[worst]:.4g}, element {worst} of id "
        f"{census.id_of(split_name, position)} in {split_name}.",
    )


def _scale(name: str, info: ModalityInfo, values: Values) -> Iterator[Finding]:
    if info.scaling != "none" or values.are_binary or values.are_counts:
        return
    mean, std = values.overall
    if std and (abs(mean) > 10 * std or not 0.01 <= std <= 100):
        yield Finding(
            "check",
            f"{name}: is read as it is, with mean {mean:.4g} and deviation {std:.4g}; networks learn best from values "
            f"of about 1. Prepare it with scaling.{name} = 'standardise'.",
        )


def _shift(census: Census, name: str) -> Iterator[Finding]:
    train = census.splits[census.train].values.get(name)
    for split_name, split in census.splits.items():
        values = split.values.get(name)
        if train is None or values is None or split_name == census.train or min(train.rows, values.rows) < _MIN_ROWS:
            continue
        (mean, std), (other_mean, other_std) = train.overall, values.overall
        if abs(other_mean - mean) > std or not std <= 4 * other_std or not other_std <= 4 * std:
            yield Finding(
                "check",
                f"{name}: the splits differ; mean {other_mean:.4g} and deviation {other_std:.4g} in {split_name}, "
                f"{mean:.4g} and {std:.4g} in {census.train}. Were they scaled alike?",
            )


def _labels(census: Census) -> Iterator[Finding]:
    known = census.splits[census.train].labels
    for name, split in census.splits.items():
        negative = [label for label in split.labels.counts if label < 0]
        if negative:
            yield Finding("wrong", f"{name}: a label is null or at least 0; got {_list(np.array(negative))}.")
        fresh = sorted(split.labels.counts.keys() - known.counts.keys())
        if fresh and known.counts and not known.others:
            yield Finding("check", f"{name}: labels that never occur in {census.train}: {_list(np.array(fresh))}.")


def _missingness(census: Census) -> Iterator[Finding]:
    modalities = list(census.dataset.manifest.modalities)
    patterns = census.splits[census.train].patterns
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
            "check",
            f"{len(apart)} pairs of modalities are never observed together in {census.train}: {', '.join(apart[:5])}"
            f"{', ...' if len(apart) > 5 else ''}. What they share can only be learned through others.",
        )
    if len(modalities) > 1 and not kinds.all(axis=1).any():
        yield Finding("note", f"no row of {census.train} is complete.")


def _copies(census: Census) -> Iterator[Finding]:
    for name, split in census.splits.items():
        later = repeated(split.hashes.contents)
        if later.any():
            yield Finding(
                "note",
                f"{name}: {int(later.sum()):,} rows hold exactly what an earlier row does, the first is id "
                f"{census.id_of(name, int(later.argmax()))}.",
            )
    for one, two in combinations(census.splits, 2):
        yield from _in_common(census, census.in_common(one, two))


def _in_common(census: Census, common: Common) -> Iterator[Finding]:
    """Tell what two splits share. With the training split that is leakage, unless the values repeat by nature."""
    of, other = common.of, common.other
    is_judged = census.train in (of, other)
    alike = np.zeros_like(common.ids)
    for name in census.telling:
        alike |= common.values[name]
    same = common.ids & (common.contents | alike)
    if same.any() and is_judged:
        yield _leak(census, common, same, "are by id and content also")
    elif common.ids.any():
        whole = "all" if common.ids.all() else f"{int(common.ids.sum()):,}"
        text = f"{whole} ids of {of} are in {other} too{', with the same values' if same.any() else ''}."
        ask = " If they are other rows, number them on; if not, the model is judged on what it learned."
        yield Finding("check" if is_judged else "note", text + (ask if is_judged else ""))
    copied = common.contents & ~common.ids
    if is_judged and (copied & alike).any():
        yield _leak(census, common, copied & alike, "hold exactly what rows with other ids hold")
    elif copied.any():
        yield Finding("note", f"{int(copied.sum()):,} rows of {of} hold exactly what other rows hold in {other}.")
    for name, hits in common.values.items():
        count = int((hits & ~common.ids & ~copied).sum())
        values = census.values(name)
        if count and values is not None and values.bits >= TELLING_BITS:
            have = int((census.splits[of].hashes.values[name] > 0).sum())
            yield Finding(
                "check" if is_judged else "note",
                f"{name} of {count:,} of {have:,} rows of {of} is that of rows with other ids in {other}."
                f"{' Unless values repeat by nature, this is leakage.' if is_judged else ''}",
            )


def _leak(census: Census, common: Common, rows: Array, how: str) -> Finding:
    first = census.id_of(common.of, int(rows.argmax()))
    return Finding(
        "wrong",
        f"leakage: {int(rows.sum()):,} of {len(rows):,} rows of {common.of} {how} in {common.other}, the first with id "
        f"{first}. Keep copies in one split.",
    )


def _list(numbers: Array) -> str:
    return ", ".join(map(str, numbers[:8].tolist())) + (", ..." if len(numbers) > 8 else "")
