"""The manifest of a dataset: a JSON file that describes its shards, and is written last."""

import hashlib
import json
import math
from pathlib import Path, PurePosixPath
from typing import Any, Literal

from pydantic import Field, ValidationError, field_validator, model_validator

from dmvae.config.data import StoredScaling
from dmvae.config.likelihoods import ColumnKind, values_of
from dmvae.config.section import ModalityName, Name, Section
from dmvae.data.errors import DatasetError
from dmvae.data.files import write_atomically
from dmvae.data.format.schema import Columns, TensorColumn

MANIFEST_NAME = "dataset.json"
VERSIONS = (1, 2, 3)
"""The second added names of features and labels, the third missing cells. A dataset that does not need the newer ones
is still written as the older."""


class ColumnInfo(Section):
    """One column of a table whose columns differ in kind.

    Attributes:
        kind: what it holds. Counts are whole numbers; `binary` is 0 or 1; a category is 0, 1, ..., and the number of
            its classes stands for all classes that no training row has.
        classes: the names of the classes of a binary column or a category, by number.
        reason: why it has this kind.
        since: of dates, the day from which days are counted.
        rate: of counts, the mean over the observed training rows.
    """

    kind: ColumnKind
    classes: tuple[str, ...] = ()
    reason: str = ""
    since: str | None = None
    rate: float | None = Field(default=None, ge=0)

    @model_validator(mode="after")
    def _check(self) -> "ColumnInfo":
        if bool(self.classes) != (self.kind in ("binary", "category")):
            raise ValueError(f"A column has classes if it is binary or a category, but got {self}.")
        return self


_OPTIONAL = ("size_factor", "rate", "low", "high", "features", "units", "vocabulary", "pad", "columns")
"""Fields of a modality that are not written if it has none."""


class ModalityInfo(Section):
    """One modality of a dataset.

    Attributes:
        shape: the shape of one row.
        dtype: the numpy name of the stored element type.
        likelihood: the likelihood to suggest: `normal` for floats and uint8, `categorical` for int64, `poisson` or
            `negative_binomial` for counts in floats or int64, which are read unscaled, as floats.
        classes: the number of classes of a categorical modality; its values are 0..classes-1.
        scaling: how stored values x are scaled when read, element by element: not at all (`none`), to [0, 1] by
            x / 255 for uint8 and (x - low) / (high - low) for floats (`unit`, always for uint8), to (x - mean) / std
            (`standardise`), or to log(1 + x) (`log1p`, for values of 0 or more); see `dmvae.data.scaling.Scale`.
        mean: the mean over the observed training rows, one number for each element in row-major order; for
            `standardise`.
        std: the standard deviation, likewise; 1 for a feature that is constant in training.
        low: the minimum over the observed training rows, likewise; for `unit` of floats.
        high: the maximum, likewise.
        size_factor: for counts, the mean over the observed training rows of the size factor (of the row's total, if
            there is no column of size factors). Rows that lack the modality are decoded with it.
        rate: for counts, the mean of an element at size factor 1 over the observed training rows.
        features: the name of each feature of a modality that is a vector.
        units: the unit of some features, by name.
        vocabulary: the name of each class of a text.
        pad: the class that fills up shorter sequences.
        columns: of a table, its columns in the order of `features`. It is read with the scaling `columns`: real columns
            are standardised, and so are the logarithms of positive ones; the others are read as they are.
    """

    shape: tuple[int, ...]
    dtype: Literal["uint8", "int64", "float16", "float32", "float64"]
    likelihood: str = Field(min_length=1)
    classes: int | None = Field(default=None, ge=1)
    scaling: StoredScaling = "none"
    mean: tuple[float, ...] | None = None
    std: tuple[float, ...] | None = None
    low: tuple[float, ...] | None = None
    high: tuple[float, ...] | None = None
    size_factor: float | None = Field(default=None, gt=0)
    rate: float | None = Field(default=None, gt=0)
    features: tuple[str, ...] | None = None
    units: dict[str, str] | None = None
    vocabulary: tuple[str, ...] | None = None
    pad: int | None = Field(default=None, ge=0)
    columns: tuple[ColumnInfo, ...] | None = None

    @model_validator(mode="after")
    def _check(self) -> "ModalityInfo":
        if min(self.shape, default=1) < 1:
            raise ValueError(f"Dimensions must be at least 1, but got shape={self.shape}.")
        categorical, counts = (values_of(self.likelihood) == kind for kind in ("classes", "counts"))
        if categorical != bool(self.classes) or (not counts and categorical != (self.dtype == "int64")):
            raise ValueError(
                f"int64 must be categorical with classes, or counts, and other types must be neither categorical nor "
                f"have classes, but got dtype={self.dtype}, likelihood={self.likelihood!r}, classes={self.classes}. "
                f"Store measurements as floats."
            )
        if counts and (self.scaling != "none" or self.dtype == "uint8"):
            raise ValueError(
                f"Counts must be floats or int64 without scaling, but got dtype={self.dtype}, "
                f"scaling={self.scaling!r}, likelihood={self.likelihood!r}. Store them as float32, and remove the "
                f"scaling."
            )
        only = {"uint8": "unit", "int64": "none"}.get(self.dtype, self.scaling)
        if self.scaling != only:
            raise ValueError(
                f"Scaling of {self.dtype} must be {only!r}, but got {self.scaling!r}. Store values as float32 to scale "
                f"them otherwise."
            )
        is_unit = self.scaling == "unit" and self.dtype != "uint8"
        for names, parts, wanted in (
            ("mean and std", (self.mean, self.std), self.scaling in ("standardise", "columns")),
            ("low and high", (self.low, self.high), is_unit),
        ):
            lengths = {None if part is None else len(part) for part in parts}
            if lengths != ({math.prod(self.shape)} if wanted else {None}):
                raise ValueError(
                    f"{names} must have one number for each element if the scaling needs them, else be absent, but got "
                    f"{lengths} numbers for scaling={self.scaling!r}, dtype={self.dtype}."
                )
        if any(high < low for low, high in zip(self.low or (), self.high or (), strict=True)):
            raise ValueError("low must be at most high for every element.")
        is_table = self.columns is not None
        if {is_table, values_of(self.likelihood) == "columns", self.scaling == "columns"} != {is_table}:
            raise ValueError(
                f"A table must have columns, the likelihood 'columns' and the scaling 'columns', but got likelihood="
                f"{self.likelihood!r}, scaling={self.scaling!r}, and {'some' if is_table else 'no'} columns."
            )
        if self.columns is not None and (self.features is None or len(self.columns) != len(self.features)):
            raise ValueError(f"A table must have one column for each feature, but got {len(self.columns)}.")
        if self.features is not None and self.shape != (len(self.features),):
            raise ValueError(
                f"features must have one name for each feature, but got {len(self.features)} for shape {self.shape}."
            )
        if self.std is not None and min(self.std) <= 0:
            raise ValueError(f"Standard deviations must be positive, but got {min(self.std)}.")
        for name, numbers in (("mean", self.mean), ("std", self.std), ("low", self.low), ("high", self.high)):
            wrong = [x for x in numbers or () if abs(x) > 1e30 or (name == "std" and x < 1e-30)]
            if wrong:
                raise ValueError(f"Values of {name} must lie in the range of float32, but got {wrong[0]:g}.")
        return self

    @property
    def log_jacobian(self) -> float | None:
        """Log |d raw / d scaled| of one row that has this modality, in nats; None for `log1p` and positive columns.

        Add it to -log p of the scaled values to get -log p of the stored ones, since p(raw) = p(scaled) /
        |d raw / d scaled|; sum over the modalities that a row has. For `log1p` it differs between rows: it is the sum
        of a row's scaled values.
        """
        if self.scaling == "log1p" or any(column.kind == "positive" for column in self.columns or ()):
            return None
        if self.dtype == "uint8":
            return math.prod(self.shape) * math.log(255)
        spread = [high - low or 1.0 for low, high in zip(self.low or (), self.high or (), strict=True)]
        return math.fsum(map(math.log, self.std or spread))

    @property
    def column(self) -> TensorColumn:
        """The Arrow column that stores it."""
        return TensorColumn(self.shape, self.dtype)


class ShardInfo(Section):
    """One shard: its path in the dataset with forward slashes, and what the file must hold.

    Its record batches have `record_batch_rows` rows each; the last one may have fewer. `observed` counts the rows that
    have each modality. `observed_cells` counts the cells that these rows have, for the modalities with missing cells
    somewhere in the dataset.
    """

    path: str
    rows: int = Field(ge=0)
    record_batch_rows: int = Field(ge=1)
    bytes: int = Field(ge=0)
    sha256: str = Field(pattern="^[0-9a-f]{64}$")
    observed: dict[ModalityName, int]
    observed_cells: dict[ModalityName, int] = Field(default_factory=dict)

    @field_validator("path")
    @classmethod
    def _check_path(cls, path: str) -> str:
        pure = PurePosixPath(path)
        if pure.is_absolute() or ".." in pure.parts or "\\" in path or ":" in path or "\0" in path or not pure.parts:
            raise ValueError(
                f"Shards must lie inside the dataset's folder, but got path={path!r}. Do not trust this dataset."
            )
        return path


class SplitInfo(Section):
    """One split: its shards in order. A row's position in a split counts through them."""

    shards: tuple[ShardInfo, ...]

    @property
    def rows(self) -> int:
        """The number of rows in all shards."""
        return sum(shard.rows for shard in self.shards)

    @property
    def observed(self) -> dict[str, int]:
        """The number of rows that have each modality."""
        names = self.shards[0].observed if self.shards else {}
        return {name: sum(shard.observed[name] for shard in self.shards) for name in names}

    @property
    def observed_cells(self) -> dict[str, int]:
        """The number of cells that rows have, of each modality with missing cells."""
        names = self.shards[0].observed_cells if self.shards else {}
        return {name: sum(shard.observed_cells[name] for shard in self.shards) for name in names}


class Manifest(Section):
    """The description of a whole dataset.

    Attributes:
        id_type: the type of the ids.
        has_label: whether there is a column of labels.
        size_factor: the type of the column of size factors; None without one.
        modalities: by name, in the order of the columns.
        splits: by name.
        label_names: the name of each label 0, 1, ...; None if labels are numbers.
        origin: how the dataset was made. It does not describe the content, and is not part of the fingerprint.
    """

    format: Literal["dmvae-dataset"] = "dmvae-dataset"
    version: Literal[1, 2, 3] = 1
    id_type: Literal["int64", "string"]
    has_label: bool
    size_factor: Literal["float16", "float32", "float64"] | None = None
    modalities: dict[ModalityName, ModalityInfo] = Field(min_length=1)
    splits: dict[Name, SplitInfo] = Field(min_length=1)
    label_names: tuple[str, ...] | None = None
    origin: dict[str, Any] = Field(default_factory=dict)

    @model_validator(mode="after")
    def _check_shards(self) -> "Manifest":
        shards = [shard for split in self.splits.values() for shard in split.shards]
        paths = [shard.path for shard in shards]
        if len(set(paths)) < len(paths):
            raise ValueError(f"Shards listed more than once: {sorted({p for p in paths if paths.count(p) > 1})}.")
        for shard in shards:
            if shard.observed.keys() != self.modalities.keys() or not all(
                0 <= count <= shard.rows for count in shard.observed.values()
            ):
                raise ValueError(
                    f"Observed rows of {shard.path} must be between 0 and {shard.rows} for every modality, but got "
                    f"{shard.observed}."
                )
            cells = {name: shard.observed[name] * info.column.size for name, info in self.modalities.items()}
            if shard.observed_cells.keys() != shards[0].observed_cells.keys() or not all(
                0 <= count <= cells.get(name, -1) for name, count in shard.observed_cells.items()
            ):
                raise ValueError(
                    f"Observed cells of {shard.path} must be at most {cells}, of the same modalities in every shard, "
                    f"but got {shard.observed_cells}."
                )
        return self

    @property
    def missing_cells(self) -> tuple[str, ...]:
        """The modalities of which some row has some cells and lacks others."""
        shards = (shard for split in self.splits.values() for shard in split.shards)
        listed = next((shard.observed_cells for shard in shards), {})
        return tuple(name for name in self.modalities if name in listed)

    def label_name(self, label: int) -> str:
        """Return how a label is written for people."""
        names = self.label_names or ()
        return names[label] if 0 <= label < len(names) else str(label)

    @property
    def input_dims(self) -> dict[str, tuple[int, ...]]:
        """Shape of one row by modality, as `DMVAEConfig.input_dims` takes it."""
        return {name: info.shape for name, info in self.modalities.items()}

    @property
    def columns(self) -> Columns:
        """The columns that every shard has."""
        modalities = {name: info.column for name, info in self.modalities.items()}
        return Columns(self.id_type, self.has_label, modalities, self.size_factor)

    @property
    def bytes(self) -> int:
        """The size of all shards."""
        return sum(shard.bytes for split in self.splits.values() for shard in split.shards)

    @property
    def fingerprint(self) -> str:
        """SHA-256, in hexadecimal, of everything that determines the values read and their order; not of `origin`."""
        content = self.content()
        del content["origin"]
        return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()

    def content(self) -> dict[str, Any]:
        """Return everything as JSON, without the fields that older versions do not have and this dataset not need."""
        # manifests from before these fields existed keep their fingerprint, and older releases read what they can
        content = self.model_dump(mode="json")
        for split in content["splits"].values():
            for shard in split["shards"]:
                if not shard["observed_cells"]:
                    del shard["observed_cells"]
        for part in (content, *content["modalities"].values()):
            for field in (*_OPTIONAL, "label_names"):
                if part.get(field, 0) is None:
                    del part[field]
        return content


def save_manifest(manifest: Manifest, folder: Path) -> None:
    """Write `manifest` atomically to `folder/dataset.json`."""
    content = {"fingerprint": manifest.fingerprint, **manifest.content()}
    write_atomically(folder / MANIFEST_NAME, json.dumps(content, indent=1))


def load_manifest(folder: Path) -> Manifest:
    """Read `folder/dataset.json`.

    Raises:
        DatasetError: if it is absent, is not a manifest of this version, or was edited.
    """
    path = folder / MANIFEST_NAME
    if not path.is_file():
        raise DatasetError(
            f"No {MANIFEST_NAME} found in {folder}. Prepare a dataset with jobs.prepare, or compute the manifest of "
            f"existing shards with dmvae.data.preparation.build_manifest."
            if folder.is_dir()
            else f"Dataset not found: {folder} does not exist. Correct the path, or prepare it with jobs.prepare."
        )
    return parse_manifest(path.read_bytes(), str(path))


def parse_manifest(text: bytes, path: str) -> Manifest:
    """Parse a manifest; `path` is where it was read, for messages.

    Raises:
        DatasetError: if it is not a manifest of this version, or was edited.
    """
    try:
        content = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise DatasetError(f"Cannot read manifest {path} as JSON: {error}. Prepare the dataset again.") from error
    if not isinstance(content, dict) or content.get("format") != "dmvae-dataset":
        raise DatasetError(f"{path} is not a manifest: it lacks format = 'dmvae-dataset'. Choose another folder.")
    if content.get("version") not in VERSIONS:
        raise DatasetError(
            f"Cannot read manifest {path}: expected version {' or '.join(map(str, VERSIONS))}, got "
            f"{content.get('version')!r}. Prepare the dataset again, or use the release that wrote it."
        )
    recorded = content.pop("fingerprint", None)
    try:
        manifest = Manifest.model_validate(content)
    except ValidationError as error:
        first = error.errors()[0]
        where = ".".join(map(str, first["loc"])) or "manifest"
        raise DatasetError(
            f"Invalid manifest {path}, {where}: {first['msg'].removeprefix('Value error, ')} Prepare the dataset again."
        ) from error
    if recorded != manifest.fingerprint:
        raise DatasetError(
            f"Manifest {path} was edited: its fingerprint {recorded!r} does not match its content. Prepare the dataset "
            f"again, or compute the manifest from the shards with dmvae.data.preparation.build_manifest."
        )
    return manifest
