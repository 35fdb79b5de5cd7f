"""The Arrow schema of a shard: `id`, a nullable tensor for each modality and, optionally, `label`, `size_factor`."""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import pyarrow as pa
from jaxtyping import Bool

from dmvae.config.section import check_modality_name
from dmvae.data.errors import DatasetError

Array = np.ndarray[Any, np.dtype[Any]]

ARROW_TYPES: dict[str, pa.DataType] = {
    "uint8": pa.uint8(),
    "int64": pa.int64(),
    "float16": pa.float16(),
    "float32": pa.float32(),
    "float64": pa.float64(),
}
"""The element types that a modality may have, by numpy name."""

RECORD_BATCH_BYTES = 1 << 20
MISSING_INTEGER = -(2**63)
"""Stands for a missing cell in a row of integers; in a row of floats NaN does."""


def missing_cells(values: Array) -> Bool[Array, "..."]:
    """Return which stored values are missing cells."""
    if values.dtype == np.int64:
        return np.asarray(values == MISSING_INTEGER)
    return np.isnan(values) if values.dtype.kind == "f" else np.zeros(values.shape, dtype=bool)


@dataclass(frozen=True)
class TensorColumn:
    """The shape of one row of a modality, and the numpy name of its element type."""

    shape: tuple[int, ...]
    dtype: str

    @property
    def size(self) -> int:
        """Elements per row."""
        return math.prod(self.shape)

    @property
    def row_bytes(self) -> int:
        """Bytes per row as stored."""
        return self.size * int(ARROW_TYPES[self.dtype].bit_width) // 8

    @property
    def arrow_type(self) -> pa.DataType:
        """The canonical Arrow extension type."""
        return pa.fixed_shape_tensor(ARROW_TYPES[self.dtype], self.shape)


@dataclass(frozen=True)
class Columns:
    """The columns of a shard.

    Attributes:
        id_type: the type of the ids, `int64` or `string`.
        has_label: whether there is a column of labels.
        modalities: the column of each modality.
        size_factor: the numpy name of the type of the size factors for counts; None without such a column.
    """

    id_type: str
    has_label: bool
    modalities: Mapping[str, TensorColumn]
    size_factor: str | None = None

    @property
    def row_bytes(self) -> int:
        """Bytes per row as stored, approximately."""
        return 16 + sum(column.row_bytes for column in self.modalities.values())

    @property
    def record_batch_rows(self) -> int:
        """The number of rows that make a record batch of about 1 MiB: a power of two from 64 to 4096."""
        return int(2 ** min(12, max(6, round(math.log2(RECORD_BATCH_BYTES / self.row_bytes)))))

    @property
    def fixed_size(self) -> dict[str, tuple[np.dtype[Any], tuple[int, ...]]]:
        """Element type and shape of one row of each column, except string ids."""
        plain = {"id": "int64"} if self.id_type == "int64" else {}
        plain |= {"label": "int64"} if self.has_label else {}
        plain |= {"size_factor": self.size_factor} if self.size_factor else {}
        found = {name: (np.dtype(column.dtype), column.shape) for name, column in self.modalities.items()}
        return found | {name: (np.dtype(dtype), ()) for name, dtype in plain.items()}

    def arrow_schema(self) -> pa.Schema:
        """Return the Arrow schema of a shard with these columns."""
        id_type = pa.int64() if self.id_type == "int64" else pa.string()
        fields = [pa.field("id", id_type, nullable=False)]
        fields += [pa.field(name, column.arrow_type) for name, column in self.modalities.items()]
        fields += [pa.field("label", pa.int64())] if self.has_label else []
        fields += [pa.field("size_factor", ARROW_TYPES[self.size_factor])] if self.size_factor else []
        return pa.schema(fields)


def read_columns(schema: pa.Schema, where: str) -> Columns:
    """Return the columns of an Arrow schema; `where` is the file, for messages.

    Raises:
        DatasetError: if a column is absent or has the wrong type.
    """
    if len(set(schema.names)) < len(schema.names):
        raise DatasetError(f"Duplicate column names in {where}: {schema.names}. Rename the columns.")
    if "id" not in schema.names:
        raise DatasetError(
            f"Column 'id' not found in {where}, which has {schema.names}. Add one of type int64 or string, without "
            f"duplicates."
        )
    id_type = {pa.int64(): "int64", pa.string(): "string"}.get(schema.field("id").type)
    if id_type is None:
        raise DatasetError(
            f"Column 'id' must be int64 or string, but is {schema.field('id').type} in {where}. Cast the column."
        )
    has_label = "label" in schema.names
    if has_label and schema.field("label").type != pa.int64():
        raise DatasetError(
            f"Column 'label' must be int64, but is {schema.field('label').type} in {where}. Cast the column."
        )
    size_factor = None
    if "size_factor" in schema.names:
        found = schema.field("size_factor").type
        size_factor = next((name for name, arrow in ARROW_TYPES.items() if arrow == found), None)
        if not pa.types.is_floating(found):
            raise DatasetError(
                f"Column 'size_factor' must be of a float type, but is {found} in {where}. Cast the column."
            )
    names = [name for name in schema.names if name not in ("id", "label", "size_factor")]
    if not names:
        raise DatasetError(f"No modality found in {where}: its columns are {schema.names}. Add a tensor column.")
    modalities = {name: _read_tensor(schema.field(name), where) for name in names}
    return Columns(id_type, has_label, modalities, size_factor)


def _read_tensor(field: pa.Field, where: str) -> TensorColumn:
    try:
        check_modality_name(field.name)
    except ValueError as error:
        raise DatasetError(f"Cannot read {where}: {error}") from error
    if not isinstance(field.type, pa.FixedShapeTensorType):
        raise DatasetError(
            f"Modality {field.name!r} must be of type arrow.fixed_shape_tensor, but is {field.type} in {where}. Build "
            f"it with pyarrow.ExtensionArray.from_storage(pyarrow.fixed_shape_tensor(dtype, shape), lists)."
        )
    dtype = next((name for name, arrow in ARROW_TYPES.items() if arrow == field.type.value_type), None)
    if dtype is None:
        raise DatasetError(
            f"Elements of modality {field.name!r} must be {', '.join(ARROW_TYPES)}, but are {field.type.value_type} in "
            f"{where}. Cast them."
        )
    permutation = field.type.permutation
    if permutation is not None and list(permutation) != sorted(permutation):
        raise DatasetError(
            f"Modality {field.name!r} must be row-major, but has permutation {permutation} in {where}. Remove it."
        )
    column = TensorColumn(tuple(field.type.shape), dtype)
    if not column.size:
        raise DatasetError(f"Modality {field.name!r} of shape {column.shape} has no elements in {where}. Remove it.")
    return column
