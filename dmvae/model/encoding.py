"""From incomplete rows to posteriors: check inputs, encode the values that are present, combine the experts."""

from collections.abc import Container, Iterable, Mapping
from dataclasses import dataclass

import torch
from jaxtyping import Bool, Float
from torch import Tensor, nn

from dmvae.config.model import DMVAEConfig
from dmvae.data.batch import Batch
from dmvae.distributions.gaussian import DiagGaussian, at_least_float32, product_of_experts
from dmvae.distributions.likelihoods import Likelihood
from dmvae.model.loss import Observed
from dmvae.nn.batched import EncoderInput, encode_each

Modalities = str | Iterable[str]
"""`"all"`, one modality's name, or several names."""
ACTIVE_VARIANCE = 0.01
"""A unit is active if the variance of its posterior mean over rows exceeds this (Burda et al. 2016)."""


def select(known: tuple[str, ...], modalities: Modalities, argument: str) -> tuple[str, ...]:
    """Return the modalities that an argument names, in the model's order.

    Raises:
        ValueError: if it names none, or one that the model does not have.
    """
    if modalities == "all":
        return known
    names = (modalities,) if isinstance(modalities, str) else tuple(modalities)
    unknown = [name for name in names if name not in known]
    if unknown or not names:
        raise ValueError(
            f"{argument} must be 'all' or name at least one modality of the model, but got {list(names)}. "
            f"Available: {list(known)}."
        )
    return tuple(name for name in known if name in names)


def conform(
    inputs: Batch,
    config: DMVAEConfig,
    likelihoods: Mapping[str, Likelihood],
    dtype: torch.dtype,
    device: torch.device,
) -> Batch:
    """Check names and shapes, and move values to the floating-point type and device of a model.

    Raises:
        ValueError: if a modality, a shape or a dtype does not fit the model.
    """
    stray = sorted(set(inputs.data) - set(config.modalities))
    if stray:
        raise ValueError(f"Unknown modalities in data: {stray}. Available: {list(config.modalities)}.")
    is_gpu = device.type == "cuda"
    data = {}
    for name, values in inputs.data.items():
        if tuple(values.shape[1:]) != config.shapes[name]:
            raise ValueError(
                f"Rows of {name!r} must have shape {config.shapes[name]}, but got values {tuple(values.shape)}."
            )
        categorical = likelihoods[name].classes is not None
        if categorical and values.is_floating_point():
            raise ValueError(f"Values of the categorical modality {name!r} must be int64, but got {values.dtype}.")
        data[name] = values.to(device, torch.int64 if categorical else dtype, non_blocking=is_gpu)
    masks = getattr(inputs, "masks", None)
    if masks is not None:
        masks = {name: mask.to(device, non_blocking=is_gpu) for name, mask in masks.items()}
    size_factors = getattr(inputs, "size_factors", None)
    if size_factors is not None:
        size_factors = size_factors.to(device, dtype, non_blocking=is_gpu)
    cells = getattr(inputs, "cells", None)
    if cells is not None:
        cells = {name: mask.to(device, non_blocking=is_gpu) for name, mask in cells.items()}
    batch = Batch(data, masks, getattr(inputs, "labels", None), getattr(inputs, "ids", None), size_factors, cells)
    stray = sorted(set(batch.cells or {}) - set(config.missing_cells))
    if stray:
        raise ValueError(
            f"Masks of cells given for {stray}, but the model is for rows that have all cells of a modality or none. "
            f"Build it with missing_cells={tuple(stray)}, or mask whole rows."
        )
    return batch


def check_observed(batch: Batch) -> None:
    """Check that no observed value is NaN.

    Raises:
        ValueError: naming the modality, the row and the element.
    """
    for name, values in batch.data.items():
        if not values.is_floating_point() or not bool(values.isnan().any()):
            continue
        wrong = values.isnan()
        if name in (batch.cells or {}):
            wrong = wrong & (batch.cells or {})[name]
        elif name in (batch.masks or {}):
            wrong = wrong & (batch.masks or {})[name].view(-1, *(1 for _ in values.shape[1:]))
        if bool(wrong.any()):
            row, *element = wrong.nonzero()[0].tolist()
            at = f"row {row}" if batch.ids is None else f"row {row} (id {batch.ids[row]})"
            raise ValueError(
                f"Modality {name!r} is NaN in {at}, element {element if len(element) > 1 else element[0]}. Mark the "
                f"cell as missing in masks[{name!r}], of shape {tuple(values.shape)}, or correct the value."
            )


def observe(
    batch: Batch,
    encoders: Mapping[str, nn.Module],
    likelihoods: Mapping[str, Likelihood],
    shapes: Mapping[str, Mapping[str, tuple[int, ...]]],
    with_cells: Container[str] = (),
) -> dict[str, Observed]:
    """Encode each modality of the rows that have it; modalities that no row has are left out.

    The encoders of `with_cells` read which cells are observed, besides the values, which are 0 where they are missing.

    Raises:
        ValueError: if an encoder's outputs have other names or shapes than `shapes` says, by modality and output.
    """
    here: dict[str, _Rows] = {}
    for name in encoders:
        if name not in batch.data or len(batch) == 0:
            continue
        values, mask, cells = batch.data[name], (batch.masks or {}).get(name), (batch.cells or {}).get(name)
        if cells is not None:
            values = values.masked_fill(~cells, 0)
        rows = _Rows(torch.ones(len(batch), dtype=torch.bool, device=values.device), None, values, batch.size_factors)
        if mask is not None and not bool(mask.all()):
            places = mask.nonzero().squeeze(1)
            if len(places) == 0:
                continue
            size_factors = None if batch.size_factors is None else batch.size_factors.index_select(0, places)
            rows = _Rows(mask, places, values.index_select(0, places), size_factors)
            cells = None if cells is None else cells.index_select(0, places)
        if name in with_cells:
            rows.cells = torch.ones_like(rows.values, dtype=torch.bool) if cells is None else cells
        here[name] = rows
    outputs = encode_each(
        {name: EncoderInput(encoders[name], shapes[name], rows.values, rows.cells) for name, rows in here.items()}
    )
    observed = {}
    for name, rows in here.items():
        output = outputs[name]
        shared = _gaussian(output.embedding, output.log_covariance)
        private = _gaussian(output.style_embedding, output.style_log_covariance)
        seen = likelihoods[name].observe(rows.values, rows.size_factors)
        observed[name] = Observed(rows.present, rows.places, seen, shared, private, rows.cells)
    return observed


@dataclass(eq=False)
class _Rows:
    """The rows that have a modality: which, their places (None: all), values, size factors and observed cells."""

    present: Tensor
    places: Tensor | None
    values: Tensor
    size_factors: Tensor | None
    cells: Tensor | None = None


def combine(
    observed: Mapping[str, Observed], zeros: Float[Tensor, "row shared"], private_dims: Mapping[str, int]
) -> tuple[DiagGaussian, dict[str, DiagGaussian]]:
    """Return the shared and the private posteriors of all rows; `zeros` gives their number, dtype and device."""
    nowhere = torch.zeros(1, len(zeros), dtype=torch.bool, device=zeros.device)
    parts = observed.values()
    shared = product_of_experts(
        torch.stack([zeros, *(part.scatter(part.shared.mean) for part in parts)]),
        torch.stack([zeros, *(part.scatter(part.shared.log_var) for part in parts)]),
        torch.cat([nowhere, *(part.present[None] for part in parts)]),
    )
    private = {}
    for name, dim in private_dims.items():
        if name in observed:
            part = observed[name]
            private[name] = DiagGaussian(part.scatter(part.private.mean), part.scatter(part.private.log_var))
        else:
            private[name] = DiagGaussian(zeros.new_zeros(len(zeros), dim), zeros.new_zeros(len(zeros), dim))
    return shared, private


def present(batch: Batch, name: str) -> Bool[Tensor, " row"]:
    """Return which rows have a modality, on the device of its values."""
    if name not in batch.data:
        return torch.zeros(len(batch), dtype=torch.bool)
    mask = (batch.masks or {}).get(name)
    return torch.ones(len(batch), dtype=torch.bool, device=batch.data[name].device) if mask is None else mask


def size_factors(batch: Batch, name: str, unknown: float, like: Tensor) -> Float[Tensor, " row"]:
    """Return the size factor of each row: as given, else the total of its counts, else `unknown`.

    Args:
        batch: rows.
        name: a modality of counts.
        unknown: for rows that have neither.
        like: gives dtype and device of the result.
    """
    found = like.new_full((len(batch),), unknown)
    if name in batch.data:
        counts, cells = batch.data[name], (batch.cells or {}).get(name)
        counts = counts if cells is None else counts.masked_fill(~cells, 0)
        found = torch.where(present(batch, name), counts.flatten(1).sum(1).clamp(min=1), found)
    if batch.size_factors is not None:
        found = torch.where(batch.size_factors.isnan(), found, batch.size_factors)
    return found


def _gaussian(mean: Tensor, log_var: Tensor) -> DiagGaussian:
    return DiagGaussian(at_least_float32(mean), at_least_float32(log_var))
