"""Which Arrow columns a shard has: `id`, a nullable fixed-shape tensor per modality, perhaps `label`, `size_factor`."""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import pyarrow as pa

from dmvae.config.section import check_modality_name
from dmvae.data.errors import DatasetError

ARROW_TYPES: dict[str, pa.DataType] = {
    "uint8": pa.uint8(),
    "int64": pa.int64(),
    "float16": pa.float16(),
    "float32": pa.float32(),
    "float64": pa.float64(),
}
"""The element types that a modality may have, by numpy's name."""

RECORD_BATCH_BYTES = 1 << 20


@dataclass(frozen=True)
class TensorColumn:
    """The shape of one row of a modality, and numpy's name of its element type."""

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
        """The canonical extension type."""
        return pa.fixed_shape_tensor(ARROW_TYPES[self.dtype], self.shape)


@dataclass(frozen=True)
class Columns:
    """What a shard's schema says: the type of its ids, whether it has labels, and its modalities by name.

    `size_factor` is the type of the rows' size factors (for counts), by numpy's name; None without such a column.
    """

    id_type: str
    has_label: bool
    modalities: Mapping[str, TensorColumn]
    size_factor: str | None = None

    @property
    def row_bytes(self) -> int:
        """Bytes per row as stored, about."""
        return 16 + sum(column.row_bytes for column in self.modalities.values())

    @property
    def record_batch_rows(self) -> int:
        """Rows of a record batch of about 1 MiB: a power of two from 64 to 4096."""
        return int(2 ** min(12, max(6, round(math.log2(RECORD_BATCH_BYTES / self.row_bytes)))))

    @property
    def fixed_size(self) -> dict[str, tuple[np.dtype[Any], tuple[int, ...]]]:
        """Element type and shape of one row, of every column but ids that are strings."""
        plain = {"id": "int64"} if self.id_type == "int64" else {}
        plain |= {"label": "int64"} if self.has_label else {}
        plain |= {"size_factor": self.size_factor} if self.size_factor else {}
        found = {name: (np.dtype(column.dtype), column.shape) for name, column in self.modalities.items()}
        return found | {name: (np.dtype(dtype), ()) for name, dtype in plain.items()}

    def arrow_schema(self) -> pa.Schema:
        """Return the schema that a writer uses."""
        id_type = pa.int64() if self.id_type == "int64" else pa.string()
        fields = [pa.field("id", id_type, nullable=False)]
        fields += [pa.field(name, column.arrow_type) for name, column in self.modalities.items()]
        fields += [pa.field("label", pa.int64())] if self.has_label else []
        fields += [pa.field("size_factor", ARROW_TYPES[self.size_factor])] if self.size_factor else []
        return pa.schema(fields)


def read_columns(schema: pa.Schema, where: str) -> Columns:
    """Return what `schema` says; `where` is the file that errors name.

    Raises:
        DatasetError: if a column breaks the law.
    """
    if len(set(schema.names)) < len(schema.names):
        raise DatasetError(f"{where}: column names are unique; got {schema.names}. Rename the columns.")
    if "id" not in schema.names:
        raise DatasetError(f"{where}: a shard has a column 'id'; got {schema.names}. Add one: int64 or string, unique.")
    id_type = {pa.int64(): "int64", pa.string(): "string"}.get(schema.field("id").type)
    if id_type is None:
        raise DatasetError(f"{where}: ids are int64 or string; got {schema.field('id').type}. Cast the column 'id'.")
    has_label = "label" in schema.names
    if has_label and schema.field("label").type != pa.int64():
        raise DatasetError(f"{where}: labels are int64; got {schema.field('label').type}. Cast the column 'label'.")
    size_factor = None
    if "size_factor" in schema.names:
        found = schema.field("size_factor").type
        size_factor = next((name for name, arrow in ARROW_TYPES.items() if arrow == found), None)
        if not pa.types.is_floating(found):
            raise DatasetError(f"{where}: size factors are floats; got {found}. Cast the column 'size_factor'.")
    names = [name for name in schema.names if name not in ("id", "label", "size_factor")]
    if not names:
        raise DatasetError(f"{where}: a shard has at least one modality; got {schema.names}. Add a tensor column.")
    modalities = {name: _read_tensor(schema.field(name), where) for name in names}
    return Columns(id_type, has_label, modalities, size_factor)


def _read_tensor(field: pa.Field, where: str) -> TensorColumn:
    try:
        check_modality_name(field.name)
    except ValueError as error:
        raise DatasetError(f"{where}: {error}") from error
    if not isinstance(field.type, pa.FixedShapeTensorType):
        raise DatasetError(
            f"{where}: a modality is a column of type arrow.fixed_shape_tensor; got {field.type} for {field.name!r}. "
            f"Build it with pyarrow.ExtensionArray.from_storage(pyarrow.fixed_shape_tensor(dtype, shape), lists)."
        )
    dtype = next((name for name, arrow in ARROW_TYPES.items() if arrow == field.type.value_type), None)
    if dtype is None:
        raise DatasetError(
            f"{where}: a modality's elements are {', '.join(ARROW_TYPES)}; got {field.type.value_type} for "
            f"{field.name!r}. Cast them."
        )
    permutation = field.type.permutation
    if permutation is not None and list(permutation) != sorted(permutation):
        raise DatasetError(f"{where}: tensors are row-major; got permutation={permutation} for {field.name!r}.")
    column = TensorColumn(tuple(field.type.shape), dtype)
    if not column.size:
        raise DatasetError(
            f"{where}: a modality has at least one element; got shape={column.shape} for {field.name!r}."
        )
    return column
