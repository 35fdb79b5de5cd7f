"""Compute the manifest of a dataset from its shards, however they were written; every manifest is made here."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from dmvae.config.data import Scaling, StoredScaling
from dmvae.config.likelihoods import values_of
from dmvae.data.errors import DatasetError
from dmvae.data.files import sha256_of
from dmvae.data.format.manifest import ColumnInfo, Manifest, ModalityInfo, ShardInfo, SplitInfo
from dmvae.data.format.schema import Columns, TensorColumn, missing_cells
from dmvae.data.format.shard import MappedShard
from dmvae.data.preparation.running_stats import RunningStats
from dmvae.data.storage.verify import check_values, count_cells, row_blocks

Array = np.ndarray[Any, np.dtype[Any]]

_STATISTICS = {"standardise": ("mean", "std"), "columns": ("mean", "std"), "unit": ("low", "high")}
"""The statistics of the training rows that each scaling needs; for uint8, `unit` needs none."""


def build_manifest(
    folder: Path,
    *,
    scaling: Mapping[str, Scaling] | None = None,
    likelihood: Mapping[str, str] | None = None,
    classes: Mapping[str, int] | None = None,
    features: Mapping[str, Sequence[str]] | None = None,
    units: Mapping[str, Mapping[str, str]] | None = None,
    columns: Mapping[str, Sequence[ColumnInfo]] | None = None,
    vocabularies: Mapping[str, Sequence[str]] | None = None,
    pads: Mapping[str, int] | None = None,
    label_names: Sequence[str] | None = None,
    origin: Mapping[str, Any] | None = None,
) -> Manifest:
    """Read every `folder/SPLIT/*.arrow`, shards in the order of their names, and describe them in a manifest.

    Together with `save_manifest` it turns a folder of shards that were written with pyarrow alone into a dataset.

    Args:
        folder: the dataset.
        scaling: how float modalities are scaled when read (see `ModalityInfo`). Statistics are taken over the observed
            rows of the split `train`.
        likelihood: the likelihood to suggest for a modality; default `categorical` for int64, else `normal`.
        classes: the number of classes of a categorical modality; default: one more than the largest value in any split.
        features: the names of the features of modalities that are vectors.
        units: the units of some of these features, by name.
        columns: the columns of modalities that are tables, whose likelihood and scaling are `columns`.
        vocabularies: the name of each class of texts.
        pads: the class that fills up shorter rows of sequences.
        label_names: the name of each label 0, 1, ...; None if labels are numbers.
        origin: how the dataset was made, to be recorded.

    Raises:
        DatasetError: if a file is not a shard, shards have different columns, a value is infinite or a negative
            class, a present row has no cell, or a setting names an unknown modality or does not fit its type.
    """
    files = _find_shards(folder)
    first = MappedShard(next(iter(files.values()))[0])
    given, likelihood, classes = dict(scaling or {}), dict(likelihood or {}), dict(classes or {})
    check_settings(first.columns, given, likelihood, classes)
    vocabularies = dict(vocabularies or {})
    classes |= {name: len(names) for name, names in vocabularies.items()}
    columns, features, units = dict(columns or {}), dict(features or {}), dict(units or {})
    how: dict[str, StoredScaling] = {**given, **dict.fromkeys(columns, "columns")}
    likelihood |= dict.fromkeys(columns, "columns")
    statistics = _Statistics(first.columns, how, likelihood, columns)
    splits: dict[str, list[ShardInfo]] = {name: [] for name in files}
    for split, path in ((split, path) for split, paths in files.items() for path in paths):
        shard = MappedShard(path)  # one at a time, since mapped files count as memory
        if shard.columns != first.columns:
            raise DatasetError(
                f"Shards must have the same columns, but got {shard.columns} in {shard.path} and {first.columns} in "
                f"{first.path}. Write one of them again."
            )
        check_values(shard, classes, likelihood)
        splits[split].append(_describe_shard(folder, shard))
        for rows in row_blocks(shard):
            statistics.add(shard, rows, split == "train")
    missing = _missing_cells(first.columns, [shard for shards in splits.values() for shard in shards])
    return Manifest(
        version=3 if missing else 2 if features or label_names or pads else 1,
        id_type="int64" if first.columns.id_type == "int64" else "string",
        has_label=first.columns.has_label,
        size_factor=first.columns.size_factor,
        modalities={
            name: _describe_modality(
                name,
                column,
                likelihood.get(name),
                classes.get(name) or statistics.num_classes(name),
                how.get(name, "unit" if column.dtype == "uint8" else "none"),
                statistics.scaled.get(name),
                statistics.counts.get(name),
                {
                    "features": features.get(name),
                    "units": units.get(name) or None,
                    "columns": columns.get(name),
                    "vocabulary": vocabularies.get(name),
                    "pad": (pads or {}).get(name),
                },
            )
            for name, column in first.columns.modalities.items()
        },
        splits={
            name: SplitInfo(shards=tuple(_with_cells_of(shard, missing) for shard in shards))
            for name, shards in splits.items()
        },
        label_names=tuple(label_names) if label_names else None,
        origin=dict(origin or {}),
    )


class _Statistics:
    """What a manifest says of the values: statistics of the training rows, and the largest class in any split.

    Attributes:
        scaled: statistics of each modality whose scaling needs them.
        counts: statistics of `_size_factors_and_totals` of each modality of counts.
    """

    def __init__(
        self,
        columns: Columns,
        scaling: Mapping[str, str],
        likelihood: Mapping[str, str],
        tables: Mapping[str, Sequence[ColumnInfo]],
    ) -> None:
        modalities = columns.modalities
        self.scaled = {n: RunningStats(modalities[n].size) for n, how in scaling.items() if how in _STATISTICS}
        self.counts = {n: RunningStats(3) for n, hint in likelihood.items() if values_of(hint) == "counts"}
        self._positive = {n: [i for i, c in enumerate(t) if c.kind == "positive"] for n, t in tables.items()}
        self._log1p = [n for n, how in scaling.items() if how == "log1p"]
        self._largest = {n: 0 for n, c in modalities.items() if c.dtype == "int64" and n not in self.counts}

    def add(self, shard: MappedShard, rows: Array, is_train: bool) -> None:
        """Add rows of a shard, given by position."""
        for name in self._largest:
            self._largest[name] = max(self._largest[name], int(_observed(shard, name, rows).max(initial=0)))
        for name in self._log1p:
            _check_not_negative(shard, name, rows)
        if is_train:
            for name, statistics in self.scaled.items():
                values = _observed(shard, name, rows)
                positive = self._positive.get(name)
                if positive:
                    values[:, positive] = np.log(values[:, positive])
                statistics.add(values)
            for name, statistics in self.counts.items():
                statistics.add(_size_factors_and_totals(shard, name, rows))

    def num_classes(self, name: str) -> int | None:
        """Return one more than the largest class of a categorical modality; None for other modalities."""
        return self._largest[name] + 1 if name in self._largest else None


def _find_shards(folder: Path) -> dict[str, list[Path]]:
    splits = sorted(path for path in folder.iterdir() if path.is_dir() and not path.name.startswith("."))
    shards = {split.name: found for split in splits if (found := sorted(split.glob("*.arrow")))}
    if not shards:
        raise DatasetError(
            f"No shards found in {folder}. Write *.arrow files to a folder for each split, such as "
            f"train/part-00000.arrow."
        )
    return shards


def _observed(shard: MappedShard, name: str, rows: Array) -> Array:
    """Return the values of those of `rows` that have the modality."""
    return shard.gather(name, rows[shard.present(name, rows)])


def _check_not_negative(shard: MappedShard, name: str, rows: Array) -> None:
    here = rows[shard.present(name, rows)]
    values = shard.gather(name, here).reshape(len(here), -1)
    wrong = np.flatnonzero((values < 0).any(axis=1))
    if len(wrong):
        raise DatasetError(
            f"Modality {name!r} is scaled with log1p, so values must be 0 or more, but got {values[wrong[0]].min()} in "
            f"{shard.path}, row {here[wrong[0]]} (id {shard.ids(here[wrong[:1]])[0]}). Correct the value, or choose "
            f"another scaling.{name}."
        )


def _size_factors_and_totals(shard: MappedShard, name: str, rows: Array) -> Array:
    """Return `(rows, 3)` for the observed `rows`: the size factor, the total, and the size factor of observed cells.

    The total is that of the observed cells, and the size factor the total if there is none. The last is the size factor
    times the share of cells that are observed.
    """
    counts = _observed(shard, name, rows)
    counts = counts.reshape(len(counts), -1)
    known = ~missing_cells(counts)
    totals = np.where(known, counts, 0).sum(axis=1, dtype=np.float64)
    factors = totals
    if shard.columns.size_factor:
        factors = shard.gather("size_factor", rows[shard.present(name, rows)]).astype(np.float64)
    return np.stack((factors, totals, factors * known.mean(axis=1)), axis=1)


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
        observed_cells={
            name: observed[name] * column.size if column.dtype == "uint8" else count_cells(shard, name)
            for name, column in shard.columns.modalities.items()
        },
    )


def _missing_cells(columns: Columns, shards: Sequence[ShardInfo]) -> tuple[str, ...]:
    """Return the modalities of which some row has some cells and lacks others."""
    return tuple(
        name
        for name, column in columns.modalities.items()
        if any(shard.observed_cells[name] < shard.observed[name] * column.size for shard in shards)
    )


def _with_cells_of(shard: ShardInfo, names: Sequence[str]) -> ShardInfo:
    """Return a shard with the numbers of cells of some modalities only."""
    return shard.model_copy(update={"observed_cells": {name: shard.observed_cells[name] for name in names}})


def check_settings(
    columns: Columns, scaling: Mapping[str, str], likelihood: Mapping[str, str], classes: Mapping[str, int]
) -> None:
    """Check that settings fit the columns.

    Raises:
        DatasetError: if a setting names an unknown modality, or does not fit its type.
    """
    unknown = sorted({*scaling, *likelihood, *classes} - set(columns.modalities))
    if unknown:
        raise DatasetError(
            f"Unknown modalities {unknown} in the settings. Correct the names; the dataset has "
            f"{', '.join(columns.modalities)}."
        )
    for name, column in columns.modalities.items():
        how = scaling.get(name, "unit" if column.dtype == "uint8" else "none")
        _check_hints(name, column.dtype, how, likelihood.get(name), classes.get(name))


def _check_hints(name: str, dtype: str, scaling: str, likelihood: str | None, classes: int | None) -> None:
    if scaling != {"uint8": "unit", "int64": "none"}.get(dtype, scaling):
        raise DatasetError(
            f"Cannot apply scaling {scaling!r} to modality {name!r} of type {dtype}: only floats can be scaled (uint8 "
            f"is always read as [0, 1]). Remove scaling.{name}, or convert the source to float32."
        )
    values = values_of(likelihood)
    hinted, counts = classes is not None or values == "classes", values == "counts"
    if counts and (dtype == "uint8" or scaling != "none" or classes is not None):
        raise DatasetError(
            f"Modality {name!r} holds counts (likelihood {likelihood!r}), which must be floats or int64 without "
            f"scaling or classes, but got type {dtype}, scaling {scaling!r}, classes {classes}. Convert the source to "
            f"float32, and remove scaling.{name} and its classes."
        )
    is_other = likelihood is not None and not counts and values != "classes"
    if (dtype == "int64" and is_other) or (dtype != "int64" and hinted):
        raise DatasetError(
            f"Likelihood {likelihood!r} with classes {classes} does not fit modality {name!r} of type {dtype}: int64 "
            f"must be categorical or counts, and other types cannot be categorical. Remove likelihood.{name}, or "
            f"change the type in the source."
        )


def _describe_modality(
    name: str,
    column: TensorColumn,
    likelihood: str | None,
    classes: int | None,
    scaling: str,
    statistics: RunningStats | None,
    counts: RunningStats | None,
    names: Mapping[str, Any],
) -> ModalityInfo:
    if statistics is not None and not statistics.rows and column.dtype != "uint8":
        raise DatasetError(
            f"Cannot compute scaling {scaling!r}: no row of the split 'train' has modality {name!r}. "
            + ("Name a split 'train'." if scaling == "columns" else f"Remove scaling.{name}.")
        )
    needed = _STATISTICS.get(scaling, ()) if column.dtype != "uint8" else ()
    if needed and statistics is not None and not statistics.cells.all():
        place = int(np.flatnonzero(statistics.cells == 0)[0])
        feature = names["features"][place] if names["features"] else place
        raise DatasetError(
            f"Cannot compute scaling {scaling!r}: no row of the split 'train' has feature {feature!r} of modality "
            f"{name!r}. Remove the feature from the source."
        )
    found = {statistic: getattr(statistics, statistic).tolist() for statistic in needed}
    table = [column.model_dump() for column in names["columns"] or ()]
    for place, column_info in enumerate(table):
        if column_info["kind"] == "count":
            column_info["rate"] = found["mean"][place]
        if column_info["kind"] not in ("real", "positive"):
            found["mean"][place], found["std"][place] = 0.0, 1.0
    size_factor, total, of_cells = counts.mean if counts else (0.0, 0.0, 0.0)
    return ModalityInfo.model_validate(
        {
            "shape": column.shape,
            "dtype": column.dtype,
            "likelihood": likelihood or ("categorical" if column.dtype == "int64" else "normal"),
            "classes": classes,
            "scaling": scaling,
            **found,
            "size_factor": float(size_factor) or None,
            "rate": float(total / of_cells / column.size) if total else None,
            **names,
            "columns": table or None,
        }
    )
