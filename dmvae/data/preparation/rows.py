"""Rows in memory as numpy arrays, as sources yield and the writer takes them."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import pyarrow as pa

from dmvae.config.section import check_modality_name
from dmvae.data.errors import DatasetError
from dmvae.data.format.schema import ARROW_TYPES, Columns, TensorColumn

Array = np.ndarray[Any, np.dtype[Any]]


@dataclass(frozen=True, eq=False)
class Rows:
    """Rows of several modalities.

    Attributes:
        ids: `(rows,)`, int64 or strings.
        data: `(rows, *shape)` by modality, of a type that shards store. Values of missing rows are never read.
        present: boolean `(rows,)` by modality, true where the row has it.
        labels: int64 `(rows,)`, negative for a row without a label; None without labels.
        splits: `(rows,)` strings, the split of each row; None if the source has no splits of its own.
        groups: `(rows,)`, int64 or strings; all rows of a group (such as a patient) go to one split. None without
            groups.
        size_factors: float64 `(rows,)`, positive; NaN for a row without one (see `Batch`). None without size factors.

    Raises:
        DatasetError: if the arrays do not fit together, or have a type that shards do not store.
    """

    ids: Array
    data: Mapping[str, Array]
    present: Mapping[str, Array]
    labels: Array | None = None
    splits: Array | None = None
    groups: Array | None = None
    size_factors: Array | None = None

    def __post_init__(self) -> None:
        if self.ids.dtype != np.int64 and self.ids.dtype.kind != "U":
            raise DatasetError(f"Ids must be int64 or strings, but got {self.ids.dtype}. Cast them.")
        if not self.data:
            raise DatasetError("Rows must have at least one modality, but got none. Add an array.")
        if self.present.keys() != self.data.keys():
            raise DatasetError(
                f"Every modality must have a mask: expected {list(self.data)}, got {list(self.present)}. Correct them."
            )
        lengths = {name: len(values) for name, values in self.data.items()}
        lengths |= {f"mask.{name}": len(mask) for name, mask in self.present.items()}
        special = {"label": self.labels, "split": self.splits, "group": self.groups, "size_factor": self.size_factors}
        lengths |= {name: len(values) for name, values in special.items() if values is not None}
        if set(lengths.values()) != {len(self.ids)}:
            raise DatasetError(f"Arrays must have the same number of rows, but got id: {len(self.ids)}, {lengths}.")
        for name, values in self.data.items():
            _check_values(name, values)
        if self.size_factors is not None and self.size_factors.dtype != np.float64:
            raise DatasetError(f"Size factors must be float64, but got {self.size_factors.dtype}. Cast them.")

    def __len__(self) -> int:
        return len(self.ids)

    def take(self, index: Array | slice) -> "Rows":
        """Return the rows that `index` selects: positions, a slice or booleans."""
        return Rows(
            ids=self.ids[index],
            data={name: values[index] for name, values in self.data.items()},
            present={name: mask[index] for name, mask in self.present.items()},
            labels=None if self.labels is None else self.labels[index],
            splits=None if self.splits is None else self.splits[index],
            size_factors=None if self.size_factors is None else self.size_factors[index],
            groups=None if self.groups is None else self.groups[index],
        )

    @classmethod
    def join(cls, parts: "Sequence[Rows]") -> "Rows":
        """Concatenate rows with the same columns."""
        if len(parts) == 1:
            return parts[0]
        return cls(
            ids=np.concatenate([part.ids for part in parts]),
            data={name: np.concatenate([part.data[name] for part in parts]) for name in parts[0].data},
            present={name: np.concatenate([part.present[name] for part in parts]) for name in parts[0].present},
            labels=_join([part.labels for part in parts]),
            splits=_join([part.splits for part in parts]),
            groups=_join([part.groups for part in parts]),
            size_factors=_join([part.size_factors for part in parts]),
        )

    @classmethod
    def of_batch(cls, batch: pa.RecordBatch, columns: Columns) -> "Rows":
        """Invert `record_batch` for rows with these columns; other columns of the batch are ignored."""
        ids = batch.column("id")
        tensors = {name: batch.column(name) for name in columns.modalities}
        return cls(
            ids=ids.to_numpy() if columns.id_type == "int64" else np.array(ids.to_pylist(), dtype=np.str_),
            data={
                name: tensor.storage.values.to_numpy(zero_copy_only=False).reshape(
                    len(batch), *columns.modalities[name].shape
                )
                for name, tensor in tensors.items()
            },
            present={name: tensor.is_valid().to_numpy(zero_copy_only=False) for name, tensor in tensors.items()},
            labels=batch.column("label").fill_null(-1).to_numpy() if columns.has_label else None,
            size_factors=batch.column("size_factor").fill_null(np.nan).to_numpy() if columns.size_factor else None,
        )

    @property
    def columns(self) -> Columns:
        """The columns of a shard with these rows."""
        modalities = {name: TensorColumn(values.shape[1:], values.dtype.name) for name, values in self.data.items()}
        id_type = "int64" if self.ids.dtype == np.int64 else "string"
        size_factor = None if self.size_factors is None else self.size_factors.dtype.name
        return Columns(id_type, self.labels is not None, modalities, size_factor)

    def record_batch(self, schema: pa.Schema) -> pa.RecordBatch:
        """Return the rows as Arrow; missing is null, with zeros underneath so that files are reproducible."""
        arrays = [pa.array(self.ids.tolist() if self.ids.dtype.kind == "U" else self.ids, schema.field("id").type)]
        for name, column in self.columns.modalities.items():
            mask = self.present[name]
            values = self.data[name].reshape(len(self), column.size)
            if not mask.all():
                values = np.where(mask[:, None], values, np.zeros((), values.dtype))
            flat = pa.array(np.ascontiguousarray(values).reshape(-1))
            missing = None if mask.all() else pa.array(~mask)
            lists = pa.FixedSizeListArray.from_arrays(flat, column.size, mask=missing)
            arrays.append(pa.ExtensionArray.from_storage(column.arrow_type, lists))
        if self.labels is not None:
            arrays.append(pa.array(self.labels, pa.int64(), mask=self.labels < 0))
        if self.size_factors is not None:
            arrays.append(pa.array(self.size_factors, mask=np.isnan(self.size_factors)))
        return pa.record_batch(arrays, schema=schema)


def _join(parts: list[Array | None]) -> Array | None:
    given = [part for part in parts if part is not None]
    assert len(given) in (0, len(parts))
    return np.concatenate(given) if given else None


def _check_values(name: str, values: Array) -> None:
    try:
        check_modality_name(name)
    except ValueError as error:
        raise DatasetError(str(error)) from error
    if values.dtype.name not in ARROW_TYPES:
        raise DatasetError(
            f"Modality {name!r} must be of type {', '.join(ARROW_TYPES)}, but got {values.dtype}. Cast it."
        )
    if values.ndim < 2 or 0 in values.shape[1:]:
        raise DatasetError(
            f"Modality {name!r} must have shape (rows, *shape) with no size 0, but got {values.shape}. Reshape it; one "
            f"number per row is (rows, 1)."
        )
