"""A batch of incomplete multimodal rows: one tensor for each modality, and masks of the rows and cells that have it."""

import operator
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol, SupportsIndex, runtime_checkable

import numpy as np
import torch
from jaxtyping import Bool
from torch import Tensor

Array = Tensor | np.ndarray[Any, np.dtype[Any]]
Ids = Array
"""Ids of rows: an int64 tensor, or a numpy array of strings."""


@runtime_checkable
class MultimodalRows(Protocol):
    """Any object with `.data` and, optionally, `.masks`; the model accepts all of them."""

    @property
    def data(self) -> Mapping[str, Tensor]:
        """One tensor `(rows, *shape)` for each modality."""


@dataclass(frozen=True, eq=False, init=False)
class Batch:
    """Rows of several modalities, any of which may be missing in any row.

    Attributes:
        data: one tensor `(rows, *shape)` for each modality. An absent modality is missing in every row. Values of
            missing rows are never read: they may be zero, NaN or anything else.
        masks: boolean or 0/1, `(rows,)` or `(rows, 1)`, true where the row has the modality, or `(rows, *shape)`, true
            where it has the cell. A row without any cell of a modality lacks the modality. One without a mask is
            present in every row; None means no modality has one. What is read back is boolean and `(rows,)`.
        labels: int64 `(rows,)`, the class of each row; negative for a row without one.
        ids: the ids of the rows, an int64 tensor or a numpy array of strings.
        size_factors: float `(rows,)`, positive. The expected counts of a row are proportional to it; an example is
            sequencing depth. Used for modalities of counts only. NaN, or None for all rows, means the total count of
            the row.
        cells: boolean `(rows, *shape)` for each modality whose mask is of cells, true where the row has the cell.

    All parts may be given as numpy arrays; they become tensors that share their memory where they can.

    Raises:
        ValueError: if the tensors have different numbers of rows, or a mask is not 0/1, has another shape or names no
            modality.
        TypeError: if a part is no array of numbers.
    """

    data: Mapping[str, Tensor]
    masks: Mapping[str, Tensor] | None = None
    labels: Tensor | None = None
    ids: Ids | None = None
    size_factors: Tensor | None = None
    cells: Mapping[str, Tensor] | None = None

    def __init__(
        self,
        data: Mapping[str, Array],
        masks: Mapping[str, Array] | None = None,
        labels: Array | None = None,
        ids: Ids | Sequence[int | str] | None = None,
        size_factors: Array | None = None,
        cells: Mapping[str, Array] | None = None,
    ) -> None:
        if not isinstance(data, Mapping):
            raise TypeError(f"data must be a dict with an array for each modality, but got {type(data).__name__}.")
        keep = object.__setattr__  # the dataclass is frozen
        keep(self, "data", _as_tensors("data", data))
        keep(self, "masks", None if masks is None else _as_tensors("masks", masks))
        keep(self, "labels", None if labels is None else as_tensor("labels", labels))
        keep(self, "ids", None if ids is None else _as_ids(ids))
        keep(self, "size_factors", None if size_factors is None else as_tensor("size_factors", size_factors))
        keep(self, "cells", None if cells is None else _as_tensors("cells", cells))
        self._check()

    def _check(self) -> None:
        masks = {} if self.masks is None else dict(self.masks)
        cells = {} if self.cells is None else dict(self.cells)
        stray = sorted((masks.keys() | cells.keys()) - self.data.keys())
        if stray:
            raise ValueError(f"Unknown modalities {stray} in masks. The batch has {sorted(self.data)}.")
        lengths = {name: values.shape[0] for name, values in self.data.items()}  # len() takes ten times as long
        lengths |= {f"mask of {name}": mask.shape[0] for name, mask in masks.items()}
        others = {"labels": self.labels, "ids": self.ids, "size_factors": self.size_factors}
        lengths |= {name: len(part) for name, part in others.items() if part is not None}
        if len(set(lengths.values())) > 1:
            raise ValueError(f"All parts of a batch must have the same number of rows, but got {lengths}.")
        if self.masks is not None:
            for name, mask in masks.items():
                masks[name] = _as_boolean(name, mask)
                if mask.dim() == 2 and mask.shape[1] == 1:
                    masks[name] = masks[name].reshape(-1)
                elif mask.dim() > 1:
                    cells[name] = masks[name]
            of_rows = {name: mask for name, mask in masks.items() if mask.dim() == 1}
            object.__setattr__(self, "masks", of_rows)
        if cells:
            self._split_masks(cells)

    def _split_masks(self, cells: Mapping[str, Tensor]) -> None:
        """Make the masks of rows and of cells agree: a row has a modality if it has a cell of it."""
        rows, known = dict(self.masks or {}), dict[str, Tensor]()
        for name, given in cells.items():
            if given.shape != self.data[name].shape:
                raise ValueError(
                    f"Mask of modality {name!r} must be (rows,) or (rows, 1), or have the shape "
                    f"{tuple(self.data[name].shape)} of the values, but got {tuple(given.shape)}."
                )
            mask = _as_boolean(name, given)
            if name in rows:
                mask = mask & rows[name].view(-1, *(1 for _ in mask.shape[1:]))
            rows[name], known[name] = mask.flatten(1).any(1), mask
        object.__setattr__(self, "masks", rows)
        object.__setattr__(self, "cells", known)

    def __len__(self) -> int:
        for part in (*self.data.values(), self.labels, self.ids, self.size_factors):
            if part is not None:
                return len(part)
        return 0

    def __getitem__(self, rows: SupportsIndex | slice | Tensor) -> "Batch":
        """Select rows by position (a batch of one row), slice, index tensor or boolean tensor."""
        if isinstance(rows, SupportsIndex) and getattr(rows, "ndim", 0) == 0:
            position = operator.index(rows)  # also numpy integers and tensors of one number
            if not -len(self) <= position < len(self):
                raise IndexError(f"Row {position} is out of range: the batch has {len(self)} rows.")
            rows = slice(position, position + 1 or None)

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
            cells=None if self.cells is None else {name: select(mask) for name, mask in self.cells.items()},
        )

    def __iter__(self) -> Iterator["Batch"]:
        return (self[row] for row in range(len(self)))

    def to(self, device: torch.device | str, non_blocking: bool = False) -> "Batch":
        """Return the batch with its tensors on `device`."""
        return self._each(lambda part: part.to(device, non_blocking=non_blocking))

    def pin_memory(self) -> "Batch":
        """Return the batch in pinned memory, from which a GPU can copy asynchronously."""
        return self._each(Tensor.pin_memory)

    def _each(self, change: Callable[[Tensor], Tensor]) -> "Batch":
        return Batch(
            data={name: change(values) for name, values in self.data.items()},
            masks=None if self.masks is None else {name: change(mask) for name, mask in self.masks.items()},
            labels=None if self.labels is None else change(self.labels),
            ids=change(self.ids) if isinstance(self.ids, Tensor) else self.ids,
            size_factors=None if self.size_factors is None else change(self.size_factors),
            cells=None if self.cells is None else {name: change(mask) for name, mask in self.cells.items()},
        )


def as_tensor(argument: str, array: Any) -> Tensor:
    """Return a tensor, or an array or a list of numbers, as a tensor that shares its memory where it can.

    Raises:
        TypeError: naming the argument, if it has anything but numbers.
    """
    if isinstance(array, Tensor):
        return array
    values = np.asarray(array)
    if values.dtype.kind not in "biuf":
        raise TypeError(
            f"{argument} must be an array of numbers, but got {type(array).__name__} of type {values.dtype}. "
            "Convert it to numbers, and mark what is missing in masks."
        )
    if not values.flags.writeable or any(stride < 0 for stride in values.strides):
        values = values.copy()  # torch has no tensors of these kinds
    return torch.from_numpy(values)


def _as_tensors(argument: str, arrays: Mapping[str, Array]) -> Mapping[str, Tensor]:
    if all(isinstance(array, Tensor) for array in arrays.values()):
        return arrays  # type: ignore[return-value]
    return {name: as_tensor(f"{argument}[{name!r}]", array) for name, array in arrays.items()}


def _as_ids(ids: Ids | Sequence[int | str]) -> Ids:
    if isinstance(ids, Tensor):
        return ids
    names = np.asarray(ids)
    return torch.from_numpy(names) if names.dtype == np.int64 else names


def _as_boolean(name: str, mask: Tensor) -> Tensor:
    if mask.dtype == torch.bool:
        return mask
    if bool(((mask != 0) & (mask != 1)).any()):
        raise ValueError(f"Mask of modality {name!r} must be boolean or 0/1, but has other values.")
    return mask != 0


def has_cells(batch: Batch, name: str) -> Bool[Tensor, "row ..."]:
    """Return which cells of a modality, which the batch has, rows have: `(rows, *shape)`."""
    cells = (batch.cells or {}).get(name)
    if cells is not None:
        return cells.cpu()
    shape = batch.data[name].shape
    return has(batch, name).view(-1, *(1 for _ in shape[1:])).expand(shape)


def has(batch: Batch, name: str) -> Bool[Tensor, " row"]:
    """Return which rows have a modality."""
    mask = (batch.masks or {}).get(name)
    return torch.full((len(batch),), name in batch.data) if mask is None else mask.cpu()
