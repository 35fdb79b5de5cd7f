"""From a source to a dataset: check, split, shuffle, write."""

import tempfile
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

from dmvae.config.data import CsvSource, ImagesSource, NpzSource, ParquetSource, PrepareConfig, Source
from dmvae.data.error import DatasetError
from dmvae.data.place import check_free, is_uri, upload
from dmvae.data.rows import Rows
from dmvae.data.sources.csv import read_csv
from dmvae.data.sources.digits import read_digits
from dmvae.data.sources.images import read_images
from dmvae.data.sources.npz import read_npz
from dmvae.data.sources.parquet import read_parquet
from dmvae.data.writer import check_target, write_dataset

Array = np.ndarray[Any, np.dtype[Any]]

DEFAULT_SHARES = {"train": 0.8, "val": 0.1, "test": 0.1}


def prepare(config: PrepareConfig, progress: Callable[[str], None] = print) -> Path:
    """Make the dataset that `config` describes and return its folder.

    The same configuration and source give the same bytes.

    Args:
        config: what to make.
        progress: told, in a line of text each, what is being done and what was found.

    Raises:
        DatasetError: if the folder is taken, the source is not there or breaks a law, or there is no room.
    """
    target = Path(config.dataset)
    check_target(target, config.replace)
    progress(f"reading {config.source.kind}")
    rows = read_source(config.source, config.seed)
    _check_settings(config, rows)
    _refuse_infinity(rows)
    parts = _without_empty_rows(_fill_partial(_divide(rows, config), config.partial, progress), progress)
    generator = np.random.default_rng([config.seed, 2])
    parts = {name: part.take(generator.permutation(len(part))) for name, part in parts.items()}
    for name, part in parts.items():
        _check_unique(f"split {name!r}", part.ids)
        shares = ", ".join(f"{modality} in {mask.mean():.1%}" for modality, mask in part.present.items() if len(mask))
        progress(f"{name}: {len(part)} rows, {shares or 'empty'}")
    write_dataset(
        target,
        parts,
        scaling=config.scaling,
        likelihood=config.likelihood,
        origin=config.model_dump(mode="json", exclude={"dataset", "replace"}),
        shard_bytes=config.shard_megabytes << 20,
        replace=config.replace,
    )
    progress(f"wrote {target}")
    return target


def prepare_and_upload(config: PrepareConfig, progress: Callable[[str], None] = print) -> str:
    """Make the dataset where `config` says, a folder or a URI of an object store, and return that.

    For an object store it is made in a temporary folder and uploaded, the manifest last.

    Raises:
        DatasetError: as `prepare`, or if the store does not take it.
    """
    if not is_uri(config.dataset):
        return str(prepare(config, progress))
    check_free(config.dataset, config.replace)
    with tempfile.TemporaryDirectory(prefix="dmvae-") as scratch:
        folder = prepare(config.model_copy(update={"dataset": f"{scratch}/dataset"}), progress)
        upload(folder, config.dataset, config.replace)
    progress(f"wrote {config.dataset}")
    return config.dataset


def read_source(source: Source, seed: int) -> Rows:
    """Read all rows of a source."""
    if isinstance(source, NpzSource):
        return read_npz(source)
    if isinstance(source, ParquetSource):
        return read_parquet(source)
    if isinstance(source, CsvSource):
        return read_csv(source)
    if isinstance(source, ImagesSource):
        return read_images(source)
    return read_digits(source, seed)


def _check_settings(config: PrepareConfig, rows: Rows) -> None:
    known = ", ".join(rows.data)
    for setting, names in (("scaling", config.scaling), ("likelihood", config.likelihood)):
        unknown = sorted(names.keys() - rows.data.keys())
        if unknown:
            raise DatasetError(
                f"{setting} is set for modalities of the source, {known}; got {unknown}. Correct the name."
            )
    for name, scaling in config.scaling.items():
        if scaling == "standardise" and rows.data[name].dtype.kind != "f":
            raise DatasetError(
                f"floats can be standardised; got scaling.{name} for {rows.data[name].dtype}. Leave it out."
            )
    if rows.splits is not None and config.splits is not None:
        raise DatasetError(
            f"shares make splits where the source has none; this one has {sorted(set(rows.splits.tolist()))}, and "
            f"got splits={config.splits}. Leave splits out."
        )


def _divide(rows: Rows, config: PrepareConfig) -> dict[str, Rows]:
    """Divide the rows by the source's splits, or at random by shares."""
    if rows.splits is not None:
        names = list(dict.fromkeys(rows.splits.tolist()))
        return {name: rows.take(rows.splits == name) for name in names}
    _check_unique("the source", rows.ids)
    shares = config.splits or DEFAULT_SHARES
    order = np.random.default_rng([config.seed, 3]).permutation(len(rows))
    cuts = np.rint(np.cumsum(list(shares.values()))[:-1] * len(rows)).astype(int)
    return {name: rows.take(part) for name, part in zip(shares, np.split(order, cuts), strict=True)}


def _fill_partial(parts: dict[str, Rows], partial: str, progress: Callable[[str], None]) -> dict[str, Rows]:
    """Apply the policy for observed rows with some NaN features."""
    for name in next(iter(parts.values())).data:
        found = {split: _partial_rows(rows, name) for split, rows in parts.items()}
        count = int(sum(mask.sum() for mask in found.values()))
        if not count:
            continue
        if partial == "refuse":
            split, mask = next((split, mask) for split, mask in found.items() if mask.any())
            raise DatasetError(
                f"a modality is present or missing as a whole; got {count} rows in which some features of {name!r} "
                f"are NaN, the first with id {parts[split].ids[mask][0]}. Set partial to 'drop' (the modality is "
                f"missing in those rows) or 'mean' (they get the feature's training mean)."
            )
        if partial == "drop":
            progress(f"{name}: taken for missing in {count} rows that have some features NaN")
            parts = {split: _drop(rows, name, found[split]) for split, rows in parts.items()}
        else:
            progress(f"{name}: training means filled into {count} rows that have some features NaN")
            mean = _training_mean(parts, name)
            parts = {split: _fill(rows, name, found[split], mean) for split, rows in parts.items()}
    return parts


def _refuse_infinity(rows: Rows) -> None:
    for name, values in rows.data.items():
        if values.dtype.kind != "f":
            continue
        infinite = rows.present[name] & np.isinf(values).reshape(len(rows), -1).any(axis=1)
        if infinite.any():
            raise DatasetError(
                f"an observed value is finite; got infinity in {int(infinite.sum())} rows of {name!r}, the first with "
                f"id {rows.ids[infinite][0]}. Correct the source, or mask those rows."
            )


def _partial_rows(rows: Rows, name: str) -> Array:
    values, present = rows.data[name].reshape(len(rows), -1), rows.present[name]
    if values.dtype.kind != "f":
        return np.zeros(len(rows), dtype=bool)
    return np.asarray(present & np.isnan(values).any(axis=1))


def _drop(rows: Rows, name: str, partial: Array) -> Rows:
    return replace(rows, present={**rows.present, name: rows.present[name] & ~partial})


def _training_mean(parts: dict[str, Rows], name: str) -> Array:
    if "train" not in parts:
        raise DatasetError(f"a training mean needs a split 'train'; got {sorted(parts)}. Set partial to 'drop'.")
    values = parts["train"].data[name][parts["train"].present[name]].astype(np.float64)
    count = (~np.isnan(values)).sum(axis=0)
    if not count.all():
        raise DatasetError(
            f"a training mean needs a training value; got none for {int((count == 0).sum())} features of {name!r}. "
            f"Leave those features out, or set partial to 'drop'."
        )
    return np.asarray(np.nansum(values, axis=0) / count)


def _fill(rows: Rows, name: str, partial: Array, mean: Array) -> Rows:
    values = rows.data[name].copy()
    values[partial] = np.where(np.isnan(values[partial]), mean, values[partial])
    return replace(rows, data={**rows.data, name: values})


def _without_empty_rows(parts: dict[str, Rows], progress: Callable[[str], None]) -> dict[str, Rows]:
    kept = {split: np.logical_or.reduce(list(rows.present.values())) for split, rows in parts.items()}
    empty = int(sum((~mask).sum() for mask in kept.values()))
    if empty:
        progress(f"left out {empty} rows that have no modality at all")
    return {split: rows.take(kept[split]) for split, rows in parts.items()}


def _check_unique(where: str, ids: Array) -> None:
    names, counts = np.unique(ids, return_counts=True)
    if (counts > 1).any():
        raise DatasetError(
            f"an id occurs once in a split; got {names[counts > 1][0]} {counts[counts > 1][0]} times in {where}, and "
            f"{int((counts > 1).sum())} such ids. Make them unique in the source."
        )
