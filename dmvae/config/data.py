"""Settings that say how a dataset is prepared, and how training reads it."""

import math
from typing import Any, Literal

from pydantic import Field, field_validator, model_validator

from dmvae.config.section import ModalityName, Name, Section, Seed, Size
from dmvae.config.sources import AnySource, JoinedSource, Source


class DataConfig(Section):
    """How training reads a dataset.

    Attributes:
        dataset: a folder that `jobs.prepare` wrote, or a URI such as `s3://BUCKET/NAME`. Credentials come from the
            environment; shards are cached in the folder `DMVAE_CACHE`, up to `DMVAE_CACHE_GB` gigabytes.
        train_split: the split to train on.
        val_split: the split to validate on; it decides which epoch is the best.
        streams: the number of streams of rows. Every global batch takes an equal part of each. Changing it changes the
            order of rows, so it is fixed for the life of a run. Choose a multiple of every number of workers you
            plan to use. None means 64, or the batch size if that is smaller.
        window_rows: the number of rows of a stream that are shuffled together. None chooses enough to mix rows that
            were written sorted.
        unit: what is shuffled first. `batch` mixes the record batches of all shards. `shard` is for a dataset in an
            object store that is larger than the cache of a node: each stream reads one shard after another, so that
            about `streams` shards (at most twice as many) are in use at a time, and each is downloaded about once an
            epoch.
    """

    dataset: str = Field(min_length=1)
    train_split: Name = "train"
    val_split: Name = "val"
    streams: Size | None = None
    window_rows: Size | None = None
    unit: Literal["batch", "shard"] = "batch"


Scaling = Literal["none", "unit", "standardise", "log1p"]
StoredScaling = Literal["none", "unit", "standardise", "log1p", "columns"]
"""`columns`: by the kind of each column of a table; it is set by itself."""


class PrepareConfig(Section):
    """What one `jobs.prepare` run reads and writes.

    Attributes:
        dataset: the folder to write, or a URI such as `s3://BUCKET/NAME`.
        source: where the rows come from.
        sources: in place of `source`, several of them, joined on their ids.
        seed: decides the splits, the order of rows and anything random in the source.
        scaling: how a float modality is scaled, element by element, each time it is read. `standardise` subtracts the
            mean and divides by the standard deviation; `unit` maps the minimum to 0 and the maximum to 1 (both use
            statistics of the observed training rows); `log1p` takes log(1 + x) of values of 0 or more. Shards keep
            the original values, and imputations come back in the units of the data.
        partial: what to do with a row that has some cells of a modality and lacks others. `keep` keeps the cells it
            has, `refuse` stops and counts these rows, `drop` treats the whole modality as missing in that row.
        splits: the share of rows in each split. None means 0.8 `train`, 0.1 `val` and 0.1 `test`. It cannot be set for
            a source with splits of its own. If the source names groups, all rows of a group go to one split.
        stratify: give every split the same share of each label.
        likelihood: the likelihood to suggest for a modality, stored with the dataset. Default: `categorical` for
            integers, else `normal`.
        shard_megabytes: the size at which a shard is closed.
        replace: overwrite an existing dataset of the same name.
    """

    dataset: str = Field(min_length=1)
    source: AnySource | None = Field(default=None, discriminator="kind")
    sources: tuple[Source, ...] = ()
    seed: Seed = 0
    scaling: dict[ModalityName, Scaling] = Field(default_factory=dict)
    partial: Literal["keep", "refuse", "drop"] = "keep"
    splits: dict[Name, float] | None = None
    stratify: bool = False
    likelihood: dict[ModalityName, str] = Field(default_factory=dict)
    shard_megabytes: int = Field(default=256, ge=1)
    replace: bool = False

    @field_validator("partial", mode="before")
    @classmethod
    def _check_partial(cls, partial: Any) -> Any:
        if partial == "mean":
            raise ValueError(
                "partial='mean' no longer exists, since it counted invented values as observed. Set partial='keep' "
                "(missing cells stay missing) or partial='drop' (the row lacks the modality)."
            )
        return partial

    @property
    def reads(self) -> Source | JoinedSource:
        """The source that is read."""
        return JoinedSource(sources=self.sources) if self.source is None else self.source

    @model_validator(mode="after")
    def _check_source(self) -> "PrepareConfig":
        if (self.source is None) != bool(self.sources) or len(self.sources) == 1:
            raise ValueError(
                f"There must be one [source], or two or more [[sources]], but got {int(self.source is not None)} and "
                f"{len(self.sources)}. Write one of the two."
            )
        return self

    @field_validator("splits")
    @classmethod
    def _check_splits(cls, splits: dict[str, float] | None) -> dict[str, float] | None:
        if splits is not None and (
            not splits or min(splits.values()) <= 0 or not math.isclose(sum(splits.values()), 1, abs_tol=1e-6)
        ):
            raise ValueError(
                f"Split shares must be positive and add up to 1, but got {splits}. "
                f"Write, for example, train = 0.8, val = 0.2."
            )
        return splits

    @model_validator(mode="after")
    def _check_scaling(self) -> "PrepareConfig":
        fitted = [name for name, scaling in self.scaling.items() if scaling in ("standardise", "unit")]
        if fitted and self.splits is not None and "train" not in self.splits:
            raise ValueError(
                f"Cannot scale {fitted}: standardise and unit use statistics of the split 'train', but splits has only "
                f"{sorted(self.splits)}. Name one split 'train', or remove the scaling."
            )
        return self


class ObjectsSource(Section):
    """Rows that were given to `dmvae.fit` as Python objects; only that process can read them."""

    kind: Literal["objects"] = "objects"


class ObjectsConfig(PrepareConfig):
    """How `dmvae.fit` prepares Python objects."""

    source: ObjectsSource = ObjectsSource()  # type: ignore[assignment]  # no source of files

    @property
    def reads(self) -> ObjectsSource:  # type: ignore[override]
        """The objects, which the caller has at hand."""
        return self.source
