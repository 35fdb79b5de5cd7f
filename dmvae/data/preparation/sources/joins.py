"""Compare the ids of sources that are joined: ids that are written in two ways, and how many each source shares."""

from collections.abc import Mapping

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from dmvae.data.errors import DatasetError


def check_written_alike(ids: Mapping[str, pa.Array]) -> None:
    """Refuse ids of two sources that differ only in case, white space, leading zeros or a final `.0`.

    A row would become two, which could land in different splits. A source that has both ids itself means two rows.

    Args:
        ids: the ids of each source, as strings.

    Raises:
        DatasetError: naming both ids and their sources.
    """
    if len(ids) < 2:
        return
    union = pc.unique(pa.concat_arrays([found.cast(pa.string()) for found in ids.values()]))
    plain = _plain(union)
    counts = pc.value_counts(plain)
    twice = counts.field("values").filter(pc.greater(counts.field("counts"), 1))
    if not len(twice):
        return
    inside = [
        pc.is_in(union, value_set=found.cast(pa.string())).to_numpy(zero_copy_only=False) for found in ids.values()
    ]
    has = np.stack(inside)
    rows_of: dict[str, list[int]] = {}
    chosen = np.flatnonzero(pc.is_in(plain, value_set=twice).to_numpy(zero_copy_only=False))
    for row, key in zip(chosen.tolist(), plain.take(pa.array(chosen)).to_pylist(), strict=True):
        rows_of.setdefault(key, []).append(row)
    apart = [rows for rows in rows_of.values() if not has[:, rows].all(axis=1).any()]
    if apart:
        (one, other), names = apart[0][:2], list(ids)
        raise DatasetError(
            f"{len(apart)} ids are written in two ways, such as {union[one].as_py()!r} in "
            f"{names[int(has[:, one].argmax())]} and {union[other].as_py()!r} in {names[int(has[:, other].argmax())]}. "
            f"Write ids the same way in every source."
        )


def _plain(ids: pa.Array) -> pa.Array:
    """Return ids without what people and programs change by accident."""
    plain = pc.utf8_lower(pc.utf8_trim_whitespace(ids))
    plain = pc.replace_substring_regex(plain, r"^(\d+)\.0+$", r"\1")
    plain = pc.replace_substring_regex(plain, r"[\s_-]+", "-")
    return pc.replace_substring_regex(plain, r"(^|[^0-9.])0+([0-9])", r"\1\2")


def join_report(ids: Mapping[str, pa.Array], union: pa.Array) -> list[str]:
    """Return lines that say how many rows all sources share, and how many only one has."""
    has = {name: pc.is_in(union, value_set=found.cast(pa.string())).to_numpy(False) for name, found in ids.items()}
    number = np.sum(list(has.values()), axis=0)
    only = ", ".join(f"{int((mask & (number == 1)).sum())} only in {name}" for name, mask in has.items())
    return [f"joined {len(union)} rows: {int((number == len(ids)).sum())} in every source, {only}"]
