"""Which split each row comes into: by shares, of every label alike or of groups kept together where asked for."""

from collections.abc import Mapping
from typing import Any

import numpy as np

from dmvae.data.errors import DatasetError

Array = np.ndarray[Any, np.dtype[Any]]


def divide(keys: Array, shares: Mapping[str, float], *, labels: Array | None = None) -> Array:
    """Return the number of each row's split among `shares`.

    Rows in the order of their keys are cut by the shares; with labels, those of each label (and those with none). Of a
    label it is drawn, by its rows' keys, whether a cut is rounded up or down, so that the shares hold of all rows
    however rare labels are.

    Args:
        keys: `(rows,)` uint64, random.
        shares: by split, adding up to 1.
        labels: `(rows,)`; None: not to be looked at.
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
    """Return the rows of each label."""
    rows = np.argsort(labels, kind="stable")
    return np.split(rows, np.flatnonzero(np.diff(labels[rows])) + 1)


def divide_groups(groups: Array, shares: Mapping[str, float]) -> Array:
    """Return the number of each row's split among `shares`, the same for all rows of a group.

    Groups in the order of their keys are laid in a line, each as long as it has rows, which is cut by the shares; a
    group belongs where its middle lies. If that leaves a split without a group, as a giant among them does, they are
    taken from the largest on, each to the split that lacks most rows.

    Args:
        groups: `(rows,)` uint64, a random key of each row's group.
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
            f"a split has at least one group; got {len(sizes)} groups of up to {sizes.max()} rows, and none for "
            f"{empty}. Give it a larger share, or name the splits in a column."
        )
    return np.asarray(of_group[group])
