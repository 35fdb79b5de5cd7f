"""From incomplete rows to posteriors: check inputs, encode the values that are present, combine the experts."""

from collections.abc import Mapping

import torch
from jaxtyping import Bool, Float
from torch import Tensor, nn

from dmvae.config.model import DMVAEConfig
from dmvae.data.batch import Batch
from dmvae.distributions.gaussian import DiagGaussian, at_least_float32, product_of_experts
from dmvae.distributions.likelihoods import Likelihood
from dmvae.model.loss import Observed
from dmvae.nn.batched import encode_each

ACTIVE_VARIANCE = 0.01
"""A unit is active if the variance of its posterior mean over rows exceeds this (Burda et al. 2016)."""


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
    return Batch(data, masks, getattr(inputs, "labels", None), getattr(inputs, "ids", None), size_factors)


def observe(
    batch: Batch, encoders: Mapping[str, nn.Module], likelihoods: Mapping[str, Likelihood]
) -> dict[str, Observed]:
    """Encode each modality of the rows that have it; modalities that no row has are left out."""
    here: dict[str, tuple[Tensor, Tensor | None, Tensor, Tensor | None]] = {}
    for name in encoders:
        if name not in batch.data or len(batch) == 0:
            continue
        values, mask, size_factors = batch.data[name], (batch.masks or {}).get(name), batch.size_factors
        if mask is None or bool(mask.all()):
            everywhere = torch.ones(len(batch), dtype=torch.bool, device=values.device)
            here[name] = everywhere, None, values, size_factors
            continue
        rows = mask.nonzero().squeeze(1)
        if len(rows) > 0:
            size_factors = None if size_factors is None else size_factors.index_select(0, rows)
            here[name] = mask, rows, values.index_select(0, rows), size_factors
    outputs = encode_each({name: (encoders[name], values) for name, (_, _, values, _) in here.items()})
    observed = {}
    for name, (present_rows, places, values, size_factors) in here.items():
        output = outputs[name]
        shared = _gaussian(output.embedding, output.log_covariance)
        private = _gaussian(output.style_embedding, output.style_log_covariance)
        seen = likelihoods[name].observe(values, size_factors)
        observed[name] = Observed(present_rows, places, seen, shared, private)
    return observed


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
        found = torch.where(present(batch, name), batch.data[name].flatten(1).sum(1).clamp(min=1), found)
    if batch.size_factors is not None:
        found = torch.where(batch.size_factors.isnan(), found, batch.size_factors)
    return found


def _gaussian(mean: Tensor, log_var: Tensor) -> DiagGaussian:
    return DiagGaussian(at_least_float32(mean), at_least_float32(log_var))
