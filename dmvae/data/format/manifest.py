"""The manifest of a dataset: what its shards hold, as one JSON file that is written last."""

import hashlib
import json
import math
from pathlib import Path, PurePosixPath
from typing import Any, Literal

from pydantic import Field, ValidationError, field_validator, model_validator

from dmvae.config.data import Scaling
from dmvae.config.likelihoods import values_of
from dmvae.config.section import ModalityName, Name, Section
from dmvae.data.errors import DatasetError
from dmvae.data.files import write_atomically
from dmvae.data.format.schema import Columns, TensorColumn

MANIFEST_NAME = "dataset.json"
VERSION = 1


class ModalityInfo(Section):
    """What is known of one modality.

    Attributes:
        shape: of one row.
        dtype: of the stored elements, as numpy calls it.
        likelihood: a hint for whoever trains: `normal` for floats and uint8, `categorical` for int64; `poisson` or
            `negative_binomial` for counts in floats or int64, which are read as they are, in floats.
        classes: of a categorical modality; its values are 0..classes-1.
        scaling: what reading does to the stored values x, element by element: nothing (`none`), to [0, 1] by x / 255
            for uint8 and (x - low) / (high - low) for floats (`unit`, always for uint8), (x - mean) / std
            (`standardise`) or log(1 + x) (`log1p`, of values of 0 or more); see `dmvae.data.scaling.Scale`.
        mean: of the observed training rows, one number per element in row-major order; for `standardise`.
        std: likewise; a feature that is constant in training has 1.
        low: the least value of the observed training rows, likewise; for `unit` of floats.
        high: the largest.
        size_factor: of counts, the mean over the observed training rows: of the column of size factors, else of the
            rows' totals. Rows that lack the modality are shown at it.
        rate: of counts, the mean of an observed element at size factor 1, over the training rows.
    """

    shape: tuple[int, ...]
    dtype: Literal["uint8", "int64", "float16", "float32", "float64"]
    likelihood: str = Field(min_length=1)
    classes: int | None = Field(default=None, ge=1)
    scaling: Scaling = "none"
    mean: tuple[float, ...] | None = None
    std: tuple[float, ...] | None = None
    low: tuple[float, ...] | None = None
    high: tuple[float, ...] | None = None
    size_factor: float | None = Field(default=None, gt=0)
    rate: float | None = Field(default=None, gt=0)

    @model_validator(mode="after")
    def _check(self) -> "ModalityInfo":
        if min(self.shape, default=1) < 1:
            raise ValueError(f"a dimension is at least 1; got shape={self.shape}.")
        categorical, counts = (values_of(self.likelihood) == kind for kind in ("classes", "counts"))
        if categorical != bool(self.classes) or (not counts and categorical != (self.dtype == "int64")):
            raise ValueError(
                f"int64 modalities are categorical and have classes, or are counts; others are neither categorical nor "
                f"have classes; got dtype={self.dtype}, likelihood={self.likelihood!r}, classes={self.classes}. Store "
                f"measurements as floats."
            )
        if counts and (self.scaling != "none" or self.dtype == "uint8"):
            raise ValueError(
                f"counts are floats or int64 and are not scaled; got dtype={self.dtype}, scaling={self.scaling!r}, "
                f"likelihood={self.likelihood!r}. Store them as float32, and leave their scaling out."
            )
        only = {"uint8": "unit", "int64": "none"}.get(self.dtype, self.scaling)
        if self.scaling != only:
            raise ValueError(
                f"uint8 is scaled to [0, 1], int64 is left alone, floats may be scaled; got dtype={self.dtype}, "
                f"scaling={self.scaling!r}."
            )
        is_unit = self.scaling == "unit" and self.dtype != "uint8"
        for names, parts, wanted in (
            ("mean and std", (self.mean, self.std), self.scaling == "standardise"),
            ("low and high", (self.low, self.high), is_unit),
        ):
            lengths = {None if part is None else len(part) for part in parts}
            if lengths != ({math.prod(self.shape)} if wanted else {None}):
                raise ValueError(
                    f"{names} have a number for each element where the scaling takes them, and are absent elsewhere; "
                    f"got {lengths} of them for scaling={self.scaling!r}, dtype={self.dtype}."
                )
        if any(high < low for low, high in zip(self.low or (), self.high or (), strict=True)):
            raise ValueError("low is at most high; got others.")
        if self.std is not None and min(self.std) <= 0:
            raise ValueError(f"a standard deviation is positive; got {min(self.std)}.")
        return self

    @property
    def log_jacobian(self) -> float | None:
        """Log |d raw / d scaled| of one row that has this modality, in nats; None for `log1p`.

        Added to -log p of the values as read, it gives -log p of the values as stored: p(raw) = p(scaled) /
        |d raw / d scaled|. A row's sum runs over the modalities that the row has. For `log1p` it differs between
        rows: it is the sum of a row's values as read.
        """
        if self.scaling == "log1p":
            return None
        if self.dtype == "uint8":
            return math.prod(self.shape) * math.log(255)
        spread = [high - low or 1.0 for low, high in zip(self.low or (), self.high or (), strict=True)]
        return math.fsum(map(math.log, self.std or spread))

    @property
    def column(self) -> TensorColumn:
        """The Arrow column that it is stored in."""
        return TensorColumn(self.shape, self.dtype)


class ShardInfo(Section):
    """One Arrow file: its path in the dataset with forward slashes, and what must be found there.

    Its record batches have `record_batch_rows` rows each, the last one perhaps fewer. `observed` counts the rows that
    have each modality.
    """

    path: str
    rows: int = Field(ge=0)
    record_batch_rows: int = Field(ge=1)
    bytes: int = Field(ge=0)
    sha256: str = Field(pattern="^[0-9a-f]{64}$")
    observed: dict[ModalityName, int]

    @field_validator("path")
    @classmethod
    def _check_path(cls, path: str) -> str:
        pure = PurePosixPath(path)
        if pure.is_absolute() or ".." in pure.parts or "\\" in path or ":" in path or "\0" in path or not pure.parts:
            raise ValueError(f"a shard lies in the dataset's folder; got path={path!r}. Do not use this dataset.")
        return path


class SplitInfo(Section):
    """One split: its shards in order. A row's position in a split counts through them."""

    shards: tuple[ShardInfo, ...]

    @property
    def rows(self) -> int:
        """Rows of all shards."""
        return sum(shard.rows for shard in self.shards)

    @property
    def observed(self) -> dict[str, int]:
        """Rows that have each modality."""
        names = self.shards[0].observed if self.shards else {}
        return {name: sum(shard.observed[name] for shard in self.shards) for name in names}


class Manifest(Section):
    """The whole of a dataset in one record.

    Attributes:
        id_type: type of the row names.
        has_label: whether there is a column of labels.
        size_factor: type of the column of size factors; None without one.
        modalities: by name, in the order of the columns.
        splits: by name.
        origin: how the dataset was made; says nothing about its content and does not enter the fingerprint.
    """

    format: Literal["dmvae-dataset"] = "dmvae-dataset"
    version: Literal[1] = 1
    id_type: Literal["int64", "string"]
    has_label: bool
    size_factor: Literal["float16", "float32", "float64"] | None = None
    modalities: dict[ModalityName, ModalityInfo] = Field(min_length=1)
    splits: dict[Name, SplitInfo] = Field(min_length=1)
    origin: dict[str, Any] = Field(default_factory=dict)

    @model_validator(mode="after")
    def _check_shards(self) -> "Manifest":
        shards = [shard for split in self.splits.values() for shard in split.shards]
        paths = [shard.path for shard in shards]
        if len(set(paths)) < len(paths):
            raise ValueError(f"a shard is listed once; got {sorted({p for p in paths if paths.count(p) > 1})} twice.")
        for shard in shards:
            if shard.observed.keys() != self.modalities.keys() or not all(
                0 <= count <= shard.rows for count in shard.observed.values()
            ):
                raise ValueError(f"{shard.path}: every modality is observed in 0 to all rows; got {shard.observed}.")
        return self

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
        """Of all shards."""
        return sum(shard.bytes for split in self.splits.values() for shard in split.shards)

    @property
    def fingerprint(self) -> str:
        """SHA-256, in hexadecimal, of what decides the values that are read and their place; not of `origin`."""
        # a manifest from before there were these fields keeps its fingerprint
        content = self.model_dump(mode="json", exclude={"origin"})
        for part in (content, *content["modalities"].values()):
            for field in ("size_factor", "rate", "low", "high"):
                if part.get(field, 0) is None:
                    del part[field]
        return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()


def save_manifest(manifest: Manifest, folder: Path) -> None:
    """Write `manifest` as `folder/dataset.json`, whole or not at all."""
    content = {"fingerprint": manifest.fingerprint, **manifest.model_dump(mode="json")}
    write_atomically(folder / MANIFEST_NAME, json.dumps(content, indent=1))


def load_manifest(folder: Path) -> Manifest:
    """Read `folder/dataset.json`.

    Raises:
        DatasetError: if there is none, or it is not a manifest of this version, or was edited.
    """
    path = folder / MANIFEST_NAME
    if not path.is_file():
        raise DatasetError(
            f"a dataset is a folder with a {MANIFEST_NAME}; got {str(folder)!r}, which has none. "
            f"Make one with jobs.prepare, or compute it from shards with dmvae.data.preparation.build_manifest."
            if folder.is_dir()
            else f"a dataset is a folder; got {str(folder)!r}, which does not exist. Make it with jobs.prepare."
        )
    return parse_manifest(path.read_bytes(), str(path))


def parse_manifest(text: bytes, path: str) -> Manifest:
    """Return the manifest that was read from `path`.

    Raises:
        DatasetError: if it is not a manifest of this version, or was edited.
    """
    try:
        content = json.loads(text)
    except ValueError as error:
        raise DatasetError(f"{path}: a manifest is JSON; got {error}. Make the dataset again.") from error
    if not isinstance(content, dict) or content.get("format") != "dmvae-dataset":
        raise DatasetError(
            f"{path}: a manifest says format = 'dmvae-dataset'; this file does not. Choose another folder."
        )
    if content.get("version") != VERSION:
        raise DatasetError(
            f"{path}: this program reads version {VERSION}; got version={content.get('version')!r}. "
            f"Make the dataset again, or use the release that wrote it."
        )
    recorded = content.pop("fingerprint", None)
    try:
        manifest = Manifest.model_validate(content)
    except ValidationError as error:
        first = error.errors()[0]
        where = ".".join(map(str, first["loc"])) or "manifest"
        raise DatasetError(f"{path}: {where}: {first['msg']} Make the dataset again.") from error
    if recorded != manifest.fingerprint:
        raise DatasetError(
            f"{path}: the recorded fingerprint is that of the content; got {recorded!r}. The file was edited: "
            f"make the dataset again, or compute the manifest anew from the shards."
        )
    return manifest
