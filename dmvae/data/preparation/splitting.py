"""Assign rows to splits by shares: at random, stratified by label, or keeping groups together."""

from collections.abc import Mapping
from typing import Any

import numpy as np

from dmvae.data.errors import DatasetError

Array = np.ndarray[Any, np.dtype[Any]]


def assign_rows(keys: Array, shares: Mapping[str, float], *, labels: Array | None = None) -> Array:
    """Return the index of each row's split in `shares`.

    Rows are sorted by key and cut according to the shares; with labels, this is done for each label (and for rows
    without one). Whether a label's cut is rounded up or down depends on its rows' keys, so that over all rows the
    shares hold, however rare the labels are.

    Args:
        keys: `(rows,)` uint64, random.
        shares: by split, adding up to 1.
        labels: `(rows,)`; None to ignore labels.
    """
    codes = np.empty(len(keys), dtype=np.int16)
    for rows in [np.arange(len(keys))] if labels is None else _strata(labels):
        order = rows[np.argsort(keys[rows], kind="stable")]
        drawn = 0.0 if labels is None else float(keys[rows].sum(dtype=np.uint64)) / 2.0**64 - 0.5
        cuts = np.rint(np.cumsum(list(shares.values()))[:-1] * len(rows) + drawn).astype(int)
        for code, part in enumerate(np.split(order, cuts)):
            codes[part] = code
    return codes


def _strata(labels: Array) -> list[Array]:
    """Return the positions of the rows of each label."""
    rows = np.argsort(labels, kind="stable")
    return np.split(rows, np.flatnonzero(np.diff(labels[rows])) + 1)


def assign_groups(groups: Array, shares: Mapping[str, float]) -> Array:
    """Return the index of each row's split in `shares`; all rows of a group go to the same split.

    Groups are laid end to end in the order of their keys, each as long as it has rows. This line is cut according to
    the shares, and a group goes to the split in which its middle lies. If that leaves a split empty, as a very large
    group may, groups are assigned again, the largest first, each to the split that lacks the most rows.

    Args:
        groups: `(rows,)` uint64, a random key for each row's group.
        shares: by split, adding up to 1.

    Raises:
        DatasetError: if a split would have no group.
    """
    _, group, sizes = np.unique(groups, return_inverse=True, return_counts=True)
    middles = (np.cumsum(sizes) - sizes / 2) / len(groups)
    of_group = np.searchsorted(np.cumsum(list(shares.values()))[:-1], middles, side="right").astype(np.int16)
    if len(np.unique(of_group)) < len(shares):
        lacks = np.array(list(shares.values())) * len(groups)
        for number in np.argsort(-sizes, kind="stable").tolist():
            of_group[number] = lacks.argmax()
            lacks[of_group[number]] -= sizes[number]
    empty = sorted(set(shares) - {list(shares)[code] for code in of_group})
    if empty:
        raise DatasetError(
            f"Cannot fill splits {empty}: there are only {len(sizes)} groups, of up to {sizes.max()} rows. Give these "
            f"splits larger shares, or name the split of each row in source.split."
        )
    return np.asarray(of_group[group])
