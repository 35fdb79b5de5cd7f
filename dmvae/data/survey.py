"""Compute a manifest from shards, whoever wrote them: the only way that manifests are made."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal

import numpy as np

from dmvae.config.model import COUNT_DISTS
from dmvae.data.error import DatasetError
from dmvae.data.manifest import Manifest, ModalityInfo, ShardInfo, SplitInfo
from dmvae.data.schema import Columns
from dmvae.data.shard import MappedShard, sha256_of
from dmvae.data.verify import check_values, row_blocks

Array = np.ndarray[Any, np.dtype[Any]]


def survey(
    folder: Path,
    *,
    scaling: Mapping[str, Literal["none", "standardise"]] | None = None,
    likelihood: Mapping[str, str] | None = None,
    classes: Mapping[str, int] | None = None,
    origin: Mapping[str, Any] | None = None,
) -> Manifest:
    """Read every `folder/SPLIT/*.arrow`, shards in the order of their names, and say what is there.

    With `save_manifest` it turns a folder of shards that someone made with pyarrow alone into a dataset.

    Args:
        folder: the dataset.
        scaling: `standardise` for float modalities that are read as (x - mean) / std, both taken over the rows of the
            split `train` that have the modality.
        likelihood: hints by modality; default `categorical` for int64, else `normal`.
        classes: number of classes of a categorical modality; default: one more than the largest value in any split.
        origin: how the dataset was made, to be recorded.

    Raises:
        DatasetError: if a file is no shard, shards disagree, a value is NaN, infinite or a negative class, or a setting
            belongs to no modality or to one of another type.
    """
    shards = _map_shards(folder)
    first = next(iter(next(iter(shards.values()))))
    for shard in (shard for split in shards.values() for shard in split):
        if shard.columns != first.columns:
            raise DatasetError(
                f"all shards have the same columns; got {shard.columns} in {shard.path}, "
                f"{first.columns} in {first.path}. Write one of them again."
            )
        check_values(shard, dict(classes or {}), dict(likelihood or {}))
    scaling, likelihood, classes = dict(scaling or {}), dict(likelihood or {}), dict(classes or {})
    unknown = sorted({*scaling, *likelihood, *classes} - set(first.columns.modalities))
    if unknown:
        known = ", ".join(first.columns.modalities)
        raise DatasetError(
            f"a setting belongs to a modality; got {unknown}. The dataset has {known}: correct the name."
        )
    modalities = {
        name: _describe(name, first.columns, shards, scaling.get(name, "none"), likelihood.get(name), classes.get(name))
        for name in first.columns.modalities
    }
    return Manifest(
        id_type="int64" if first.columns.id_type == "int64" else "string",
        has_label=first.columns.has_label,
        size_factor=first.columns.size_factor,
        modalities=modalities,
        splits={
            name: SplitInfo(shards=tuple(_describe_shard(folder, shard) for shard in split))
            for name, split in shards.items()
        },
        origin=dict(origin or {}),
    )


def _map_shards(folder: Path) -> dict[str, list[MappedShard]]:
    splits = sorted(path for path in folder.iterdir() if path.is_dir() and not path.name.startswith("."))
    shards = {split.name: [MappedShard(path) for path in sorted(split.glob("*.arrow"))] for split in splits}
    shards = {name: split for name, split in shards.items() if split}
    if not shards:
        raise DatasetError(
            f"a dataset has a folder per split with *.arrow files; got none in {str(folder)!r}. "
            f"Write, say, train/part-00000.arrow."
        )
    return shards


def _describe_shard(folder: Path, shard: MappedShard) -> ShardInfo:
    observed = dict.fromkeys(shard.columns.modalities, 0)
    for rows in row_blocks(shard):
        for name in observed:
            observed[name] += int(shard.present(name, rows).sum())
    return ShardInfo(
        path=shard.path.relative_to(folder).as_posix(),
        rows=shard.rows,
        record_batch_rows=shard.record_batch_rows,
        bytes=shard.path.stat().st_size,
        sha256=sha256_of(shard.path),
        observed=observed,
    )


def _describe(
    name: str,
    columns: Columns,
    shards: Mapping[str, list[MappedShard]],
    scaling: Literal["none", "standardise"],
    likelihood: str | None,
    classes: int | None,
) -> ModalityInfo:
    column = columns.modalities[name]
    kind = {"uint8": "uint8", "int64": "int64"}.get(column.dtype, "float")
    if scaling == "standardise" and kind != "float":
        raise DatasetError(f"floats can be standardised; got {name!r} of {column.dtype}. Leave its scaling out.")
    hinted = classes is not None or likelihood == "categorical"
    counts = likelihood in COUNT_DISTS
    if counts and (kind == "uint8" or scaling != "none" or classes is not None):
        raise DatasetError(
            f"counts are floats or int64, not scaled, without classes; got likelihood={likelihood!r}, "
            f"scaling={scaling!r}, classes={classes} for {name!r} of {column.dtype}. Make them float32 in the source, "
            f"and leave scaling and classes out."
        )
    if (kind == "int64" and not counts and likelihood not in (None, "categorical")) or (kind != "int64" and hinted):
        raise DatasetError(
            f"int64 modalities are categorical or counts, others are not categorical; got likelihood={likelihood!r}, "
            f"classes={classes} for {name!r} of {column.dtype}. Leave the hint out, or change the type in the source."
        )
    if kind == "int64" and not counts:
        found = [_largest(shard, name) for split in shards.values() for shard in split]
        classes = classes or max(found) + 1
    mean = std = None
    if scaling == "standardise":
        mean, std = _moments(name, shards.get("train", []))
    return ModalityInfo(
        shape=column.shape,
        dtype=column.dtype,
        likelihood=likelihood or ("categorical" if kind == "int64" else "normal"),
        classes=classes,
        scaling="unit" if kind == "uint8" else scaling,
        mean=mean,
        std=std,
        size_factor=_mean_size(name, shards.get("train", [])) if counts else None,
    )


def _largest(shard: MappedShard, name: str) -> int:
    blocks = (shard.gather(name, rows)[shard.present(name, rows)] for rows in row_blocks(shard))
    return max((int(values.max()) for values in blocks if len(values)), default=0)


def _mean_size(name: str, shards: list[MappedShard]) -> float | None:
    """Return the mean size factor, or else total, over the rows that have the counts; None where that is no row's."""
    total, count = 0.0, 0
    for shard in shards:
        for rows in row_blocks(shard):
            rows = rows[shard.present(name, rows)]
            column = "size_factor" if shard.columns.size_factor else name
            total += float(shard.gather(column, rows).sum(dtype=np.float64))
            count += len(rows)
    return total / count if total > 0 else None


def _moments(name: str, shards: list[MappedShard]) -> tuple[tuple[float, ...], tuple[float, ...]]:
    """Return mean and standard deviation per element over the rows that have the modality (Chan et al. 1979)."""
    count, mean, squares = 0, np.zeros(1), np.zeros(1)
    for shard in shards:
        for rows in row_blocks(shard):
            values = shard.gather(name, rows)[shard.present(name, rows)].reshape(
                -1, shard.columns.modalities[name].size
            )
            if not len(values):
                continue
            values = values.astype(np.float64)
            block_mean = values.mean(axis=0)
            shift = block_mean - mean
            total = count + len(values)
            squares = squares + ((values - block_mean) ** 2).sum(axis=0) + shift**2 * (count * len(values) / total)
            mean = mean + shift * (len(values) / total)
            count = total
    if not count:
        raise DatasetError(
            f"standardising needs a training row that has the modality; got none for {name!r} in the split 'train'. "
            f"Leave its scaling out."
        )
    std = np.sqrt(squares / count)
    constant = std <= 1e-12 * np.maximum(np.abs(mean), 1e-300)
    return tuple(mean.tolist()), tuple(np.where(constant, 1.0, std).tolist())
