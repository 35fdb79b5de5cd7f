"""What the model's methods take as rows: a batch, any object with `data`, or a dict of arrays by modality."""

from collections.abc import Mapping
from typing import Any

from torch import Tensor

from dmvae.data.batch import Batch, MultimodalRows, as_tensor

Inputs = MultimodalRows | Mapping[str, Any]
"""A `Batch`, any object with `.data` and perhaps `.masks`, or a dict with an array for each modality."""


def as_batch(inputs: Inputs, shapes: Mapping[str, tuple[int, ...]]) -> Batch:
    """Return rows as a batch of tensors; a single row without a batch dimension is a batch of one row.

    Args:
        inputs: rows, as tensors or numpy arrays.
        shapes: shape of one row of each modality of the model.

    Raises:
        TypeError: if `inputs` is nothing of the kind, or a part of it has no numbers.
        ValueError: if its parts differ in their number of rows.
    """
    if isinstance(inputs, Batch):
        return inputs
    data = getattr(inputs, "data", None)
    if not isinstance(data, Mapping):
        if not isinstance(inputs, Mapping):
            raise TypeError(
                "inputs must be a Batch, an object whose `data` is a dict, or a dict with an array for each modality, "
                f"but got {type(inputs).__name__}."
            )
        data = inputs
    tensors = {name: as_tensor(f"data[{name!r}]", values) for name, values in data.items()}
    masks = getattr(inputs, "masks", None)
    masks = None if masks is None else {name: as_tensor(f"masks[{name!r}]", mask) for name, mask in masks.items()}
    others = {name: getattr(inputs, name, None) for name in ("labels", "ids", "size_factors")}
    if tensors and all(values.shape == shapes.get(name) for name, values in tensors.items()):
        tensors = {name: values.unsqueeze(0) for name, values in tensors.items()}
        masks = None if masks is None else {name: _of_one_row(mask, shapes.get(name)) for name, mask in masks.items()}
        others = {name: None if part is None else as_tensor(name, part).reshape(1) for name, part in others.items()}
    return Batch(tensors, masks, **others)


def _of_one_row(mask: Tensor, shape: tuple[int, ...] | None) -> Tensor:
    return mask.reshape(1) if mask.numel() == 1 else mask.reshape(1, *(shape or ()))
