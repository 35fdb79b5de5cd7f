"""Compute a manifest from shards, whoever wrote them: the only way that manifests are made."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from dmvae.config.data import Scaling
from dmvae.config.likelihoods import values_of
from dmvae.data.errors import DatasetError
from dmvae.data.files import sha256_of
from dmvae.data.format.manifest import Manifest, ModalityInfo, ShardInfo, SplitInfo
from dmvae.data.format.schema import Columns, TensorColumn
from dmvae.data.format.shard import MappedShard
from dmvae.data.preparation.running_stats import Summary
from dmvae.data.storage.verify import check_values, row_blocks

Array = np.ndarray[Any, np.dtype[Any]]

_FIGURES = {"standardise": ("mean", "std"), "unit": ("low", "high")}
"""What reading takes from the training rows, by scaling; uint8 needs nothing."""


def survey(
    folder: Path,
    *,
    scaling: Mapping[str, Scaling] | None = None,
    likelihood: Mapping[str, str] | None = None,
    classes: Mapping[str, int] | None = None,
    origin: Mapping[str, Any] | None = None,
) -> Manifest:
    """Read every `folder/SPLIT/*.arrow`, shards in the order of their names, and say what is there.

    With `save_manifest` it turns a folder of shards that someone made with pyarrow alone into a dataset.

    Args:
        folder: the dataset.
        scaling: of float modalities, how they are read (see `ModalityInfo`); figures are taken over the rows of the
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
    check_settings(first.columns, scaling, likelihood, classes)
    summaries = {name: Summary(first.columns.modalities[name].size) for name, how in scaling.items() if how in _FIGURES}
    logarithmic = [name for name, how in scaling.items() if how == "log1p"]
    sizes = {name: Summary(2) for name, hint in likelihood.items() if values_of(hint) == "counts"}
    largest = {
        name: 0
        for name, column in first.columns.modalities.items()
        if column.dtype == "int64" and values_of(likelihood.get(name)) != "counts"
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
            for name in logarithmic:
                _refuse_negative(shard, name, rows)
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
                scaling.get(name, "unit" if column.dtype == "uint8" else "none"),
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


def _refuse_negative(shard: MappedShard, name: str, rows: Array) -> None:
    here = rows[shard.present(name, rows)]
    values = shard.gather(name, here).reshape(len(here), -1)
    wrong = np.flatnonzero((values < 0).any(axis=1))
    if len(wrong):
        raise DatasetError(
            f"log1p takes values of 0 or more; got {values[wrong[0]].min()} in {shard.path}, column {name!r}, row "
            f"{here[wrong[0]]} (id {shard.ids(here[wrong[:1]])[0]}). Choose another scaling, or correct it."
        )


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


def check_settings(
    columns: Columns, scaling: Mapping[str, str], likelihood: Mapping[str, str], classes: Mapping[str, int]
) -> None:
    """Refuse settings that do not fit the columns.

    Raises:
        DatasetError: naming the modality and the setting.
    """
    unknown = sorted({*scaling, *likelihood, *classes} - set(columns.modalities))
    if unknown:
        known = ", ".join(columns.modalities)
        raise DatasetError(
            f"a setting belongs to a modality; got {unknown}. The dataset has {known}: correct the name."
        )
    for name, column in columns.modalities.items():
        how = scaling.get(name, "unit" if column.dtype == "uint8" else "none")
        _check_hints(name, column.dtype, how, likelihood.get(name), classes.get(name))


def _check_hints(name: str, dtype: str, scaling: str, likelihood: str | None, classes: int | None) -> None:
    if scaling != {"uint8": "unit", "int64": "none"}.get(dtype, scaling):
        raise DatasetError(
            f"floats can be scaled, uint8 is read in [0, 1] and int64 as it is; got scaling={scaling!r} for {name!r} "
            f"of {dtype}. Leave its scaling out, or make it float32 in the source."
        )
    values = values_of(likelihood)
    hinted, counts = classes is not None or values == "classes", values == "counts"
    if counts and (dtype == "uint8" or scaling != "none" or classes is not None):
        raise DatasetError(
            f"counts are floats or int64, not scaled, without classes; got likelihood={likelihood!r}, "
            f"scaling={scaling!r}, classes={classes} for {name!r} of {dtype}. Make them float32 in the source, "
            f"and leave scaling and classes out."
        )
    is_other = likelihood is not None and not counts and values != "classes"
    if (dtype == "int64" and is_other) or (dtype != "int64" and hinted):
        raise DatasetError(
            f"int64 modalities are categorical or counts, others are not categorical; got likelihood={likelihood!r}, "
            f"classes={classes} for {name!r} of {dtype}. Leave the hint out, or change the type in the source."
        )


def _describe(
    name: str,
    column: TensorColumn,
    likelihood: str | None,
    classes: int | None,
    scaling: str,
    summary: Summary | None,
    sizes: Summary | None,
) -> ModalityInfo:
    if summary is not None and not summary.rows and column.dtype != "uint8":
        raise DatasetError(
            f"scaling={scaling!r} needs a training row that has the modality; got none for {name!r} in the split "
            f"'train'. Leave its scaling out."
        )
    figures = _FIGURES.get(scaling, ()) if column.dtype != "uint8" else ()
    size_factor, total = sizes.mean if sizes else (0.0, 0.0)
    return ModalityInfo.model_validate(
        {
            "shape": column.shape,
            "dtype": column.dtype,
            "likelihood": likelihood or ("categorical" if column.dtype == "int64" else "normal"),
            "classes": classes,
            "scaling": scaling,
            **{figure: tuple(getattr(summary, figure).tolist()) for figure in figures},
            "size_factor": float(size_factor) or None,
            "rate": float(total / size_factor / column.size) if total else None,
        }
    )
