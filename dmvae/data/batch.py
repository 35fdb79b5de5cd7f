"""Rows of incomplete multimodal data: one tensor per modality, and who is present."""

import operator
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any, Protocol, SupportsIndex, runtime_checkable

import numpy as np
import torch
from jaxtyping import Bool
from torch import Tensor

Ids = Tensor | np.ndarray[Any, np.dtype[Any]]
"""Row names: an int64 tensor, or a numpy array of strings."""


@runtime_checkable
class MultimodalRows(Protocol):
    """Anything with `.data` and, optionally, `.masks`, as the model's methods accept it."""

    @property
    def data(self) -> Mapping[str, Tensor]:
        """One tensor `(rows, *shape)` per modality."""


@dataclass(frozen=True, eq=False)
class Batch:
    """Rows of several modalities, any of which may be missing in any row.

    Attributes:
        data: one tensor `(rows, *shape)` per modality. A modality left out is missing in every row. The value
            of a missing slot is never read: it may be zero, NaN or garbage.
        masks: boolean or 0/1, `(rows,)` or `(rows, 1)`, true where the row has the modality. None, or a
            modality left out of it: present in every row.
        labels: int64 `(rows,)`, a class per row; negative where there is none.
        ids: the rows' names, an int64 tensor or a numpy array of strings.
        size_factors: float `(rows,)`, positive: what a row's expected counts are proportional to, such as the depth
            of its sequencing. Read in rows that have a modality of counts; None, or NaN: its total in the row.

    Raises:
        ValueError: if tensors disagree on the number of rows, or a mask belongs to no modality or is not 0/1.
    """

    data: Mapping[str, Tensor]
    masks: Mapping[str, Tensor] | None = None
    labels: Tensor | None = None
    ids: Ids | None = None
    size_factors: Tensor | None = None

    def __post_init__(self) -> None:
        masks = {} if self.masks is None else dict(self.masks)
        stray = sorted(masks.keys() - self.data.keys())
        if stray:
            raise ValueError(
                f"a mask belongs to a modality of data; got masks for {stray}. Known: {sorted(self.data)}."
            )
        lengths = {name: values.shape[0] for name, values in self.data.items()}  # len() takes ten times as long
        lengths |= {f"mask of {name}": mask.shape[0] for name, mask in masks.items()}
        others = {"labels": self.labels, "ids": self.ids, "size_factors": self.size_factors}
        lengths |= {name: len(part) for name, part in others.items() if part is not None}
        if len(set(lengths.values())) > 1:
            raise ValueError(f"all parts of a batch have the same number of rows; got {lengths}.")
        if self.masks is not None:
            object.__setattr__(self, "masks", {name: _as_boolean(name, mask) for name, mask in masks.items()})

    def __len__(self) -> int:
        for part in (*self.data.values(), self.labels, self.ids, self.size_factors):
            if part is not None:
                return len(part)
        return 0

    def __getitem__(self, rows: SupportsIndex | slice | Tensor) -> "Batch":
        """Select rows by number (a batch of one row), slice, index tensor or boolean tensor."""
        if isinstance(rows, SupportsIndex) and getattr(rows, "ndim", 0) == 0:
            place = operator.index(rows)  # numpy's integers and tensors of one number too
            if not -len(self) <= place < len(self):
                raise IndexError(f"row {place} of a batch of {len(self)}")
            rows = slice(place, place + 1 or None)

        def select(part: Tensor) -> Tensor:
            return part[rows.to(part.device) if isinstance(rows, Tensor) else rows]

        ids = self.ids
        if isinstance(ids, np.ndarray):
            ids = ids[rows.cpu().numpy() if isinstance(rows, Tensor) else rows]
        return Batch(
            data={name: select(values) for name, values in self.data.items()},
            masks=None if self.masks is None else {name: select(mask) for name, mask in self.masks.items()},
            labels=None if self.labels is None else select(self.labels),
            ids=select(ids) if isinstance(ids, Tensor) else ids,
            size_factors=None if self.size_factors is None else select(self.size_factors),
        )

    def __iter__(self) -> Iterator["Batch"]:
        return (self[row] for row in range(len(self)))

    def to(self, device: torch.device | str, non_blocking: bool = False) -> "Batch":
        """Return the batch with its tensors on `device`."""
        return self._each(lambda part: part.to(device, non_blocking=non_blocking))

    def pin_memory(self) -> "Batch":
        """Return the batch in memory from which a GPU copies while it computes."""
        return self._each(Tensor.pin_memory)

    def _each(self, change: Callable[[Tensor], Tensor]) -> "Batch":
        return Batch(
            data={name: change(values) for name, values in self.data.items()},
            masks=None if self.masks is None else {name: change(mask) for name, mask in self.masks.items()},
            labels=None if self.labels is None else change(self.labels),
            ids=change(self.ids) if isinstance(self.ids, Tensor) else self.ids,
            size_factors=None if self.size_factors is None else change(self.size_factors),
        )


def _as_boolean(name: str, mask: Tensor) -> Tensor:
    if mask.dim() not in (1, 2) or (mask.dim() == 2 and mask.shape[1] != 1):
        raise ValueError(f"a mask is (rows,) or (rows, 1); got {tuple(mask.shape)} for {name!r}.")
    flat = mask.reshape(-1)
    if flat.dtype == torch.bool:
        return flat
    if bool(((flat != 0) & (flat != 1)).any()):
        raise ValueError(f"a mask is boolean or 0/1; got other values for {name!r}.")
    return flat != 0


def has(batch: Batch, name: str) -> Bool[Tensor, " row"]:
    """Tell which rows have a modality."""
    mask = (batch.masks or {}).get(name)
    return torch.full((len(batch),), name in batch.data) if mask is None else mask.cpu()
