"""Compute a manifest from shards, whoever wrote them: the only way that manifests are made."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal

import numpy as np

from dmvae.config.model import COUNT_DISTS
from dmvae.data.error import DatasetError
from dmvae.data.manifest import Manifest, ModalityInfo, ShardInfo, SplitInfo
from dmvae.data.schema import Columns, TensorColumn
from dmvae.data.shard import MappedShard, sha256_of
from dmvae.data.summary import Summary
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
    files = _find_shards(folder)
    first = MappedShard(next(iter(files.values()))[0])
    scaling, likelihood, classes = dict(scaling or {}), dict(likelihood or {}), dict(classes or {})
    _check_settings(first.columns, scaling, likelihood, classes)
    summaries = {name: Summary(first.columns.modalities[name].size) for name, how in scaling.items() if how != "none"}
    sizes = {name: Summary(2) for name, hint in likelihood.items() if hint in COUNT_DISTS}
    largest = {
        name: 0
        for name, column in first.columns.modalities.items()
        if column.dtype == "int64" and likelihood.get(name) not in COUNT_DISTS
    }
    splits: dict[str, list[ShardInfo]] = {name: [] for name in files}
    for split, path in ((split, path) for split, paths in files.items() for path in paths):
        shard = MappedShard(path)  # one at a time: what is mapped counts as memory
        if shard.columns != first.columns:
            raise DatasetError(
                f"all shards have the same columns; got {shard.columns} in {shard.path}, "
                f"{first.columns} in {first.path}. Write one of them again."
            )
        check_values(shard, classes, likelihood)
        splits[split].append(_describe_shard(folder, shard))
        for rows in row_blocks(shard):
            for name in largest:
                largest[name] = max(largest[name], int(_observed(shard, name, rows).max(initial=0)))
            for name in summaries if split == "train" else ():
                summaries[name].add(_observed(shard, name, rows))
            for name in sizes if split == "train" else ():
                sizes[name].add(_sizes(shard, name, rows))
    return Manifest(
        id_type="int64" if first.columns.id_type == "int64" else "string",
        has_label=first.columns.has_label,
        size_factor=first.columns.size_factor,
        modalities={
            name: _describe(
                name,
                column,
                likelihood.get(name),
                classes.get(name) or (largest[name] + 1 if name in largest else None),
                summaries.get(name),
                sizes.get(name),
            )
            for name, column in first.columns.modalities.items()
        },
        splits={name: SplitInfo(shards=tuple(shards)) for name, shards in splits.items()},
        origin=dict(origin or {}),
    )


def _find_shards(folder: Path) -> dict[str, list[Path]]:
    splits = sorted(path for path in folder.iterdir() if path.is_dir() and not path.name.startswith("."))
    shards = {split.name: found for split in splits if (found := sorted(split.glob("*.arrow")))}
    if not shards:
        raise DatasetError(
            f"a dataset has a folder per split with *.arrow files; got none in {str(folder)!r}. "
            f"Write, say, train/part-00000.arrow."
        )
    return shards


def _observed(shard: MappedShard, name: str, rows: Array) -> Array:
    """Return the values of those of `rows` that have the modality."""
    return shard.gather(name, rows[shard.present(name, rows)])


def _sizes(shard: MappedShard, name: str, rows: Array) -> Array:
    """Return `(rows, 2)`: the size factor, or else the total, and the total of each of `rows` that has the counts."""
    counts = _observed(shard, name, rows)
    totals = counts.reshape(len(counts), -1).sum(axis=1, dtype=np.float64)
    if not shard.columns.size_factor:
        return np.stack((totals, totals), axis=1)
    return np.stack((shard.gather("size_factor", rows[shard.present(name, rows)]), totals), axis=1)


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


def _check_settings(
    columns: Columns, scaling: Mapping[str, str], likelihood: Mapping[str, str], classes: Mapping[str, int]
) -> None:
    unknown = sorted({*scaling, *likelihood, *classes} - set(columns.modalities))
    if unknown:
        known = ", ".join(columns.modalities)
        raise DatasetError(
            f"a setting belongs to a modality; got {unknown}. The dataset has {known}: correct the name."
        )
    for name, column in columns.modalities.items():
        _check_hints(name, column.dtype, scaling.get(name, "none"), likelihood.get(name), classes.get(name))


def _check_hints(name: str, dtype: str, scaling: str, likelihood: str | None, classes: int | None) -> None:
    if scaling == "standardise" and dtype in ("uint8", "int64"):
        raise DatasetError(f"floats can be standardised; got {name!r} of {dtype}. Leave its scaling out.")
    hinted = classes is not None or likelihood == "categorical"
    counts = likelihood in COUNT_DISTS
    if counts and (dtype == "uint8" or scaling != "none" or classes is not None):
        raise DatasetError(
            f"counts are floats or int64, not scaled, without classes; got likelihood={likelihood!r}, "
            f"scaling={scaling!r}, classes={classes} for {name!r} of {dtype}. Make them float32 in the source, "
            f"and leave scaling and classes out."
        )
    if (dtype == "int64" and not counts and likelihood not in (None, "categorical")) or (dtype != "int64" and hinted):
        raise DatasetError(
            f"int64 modalities are categorical or counts, others are not categorical; got likelihood={likelihood!r}, "
            f"classes={classes} for {name!r} of {dtype}. Leave the hint out, or change the type in the source."
        )


def _describe(
    name: str,
    column: TensorColumn,
    likelihood: str | None,
    classes: int | None,
    summary: Summary | None,
    sizes: Summary | None,
) -> ModalityInfo:
    if summary is not None and not summary.rows:
        raise DatasetError(
            f"standardising needs a training row that has the modality; got none for {name!r} in the split 'train'. "
            f"Leave its scaling out."
        )
    size_factor, total = sizes.mean if sizes else (0.0, 0.0)
    return ModalityInfo.model_validate(
        {
            "shape": column.shape,
            "dtype": column.dtype,
            "likelihood": likelihood or ("categorical" if column.dtype == "int64" else "normal"),
            "classes": classes,
            "scaling": "standardise" if summary else "unit" if column.dtype == "uint8" else "none",
            "mean": None if summary is None else tuple(summary.mean.tolist()),
            "std": None if summary is None else tuple(summary.std.tolist()),
            "size_factor": float(size_factor) or None,
            "rate": float(total / size_factor / column.size) if total else None,
        }
    )
