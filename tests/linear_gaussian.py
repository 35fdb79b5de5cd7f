"""The oracle: with linear networks and normal likelihoods x is jointly Gaussian, so log p(x_A) is closed form.

x_i = W_i [z_s, z_i] + b_i + s_i eps, hence x_A ~ N(b, W W' + diag(s^2)) for any set A of modalities.
"""

import math
from collections.abc import Mapping, Sequence

import torch
from torch import Tensor, nn

from dmvae import DMVAE, Batch, DMVAEConfig


def linear_model(
    shapes: Mapping[str, tuple[int, ...]],
    latent_dim: int = 2,
    private_dims: Mapping[str, int] | int = 1,
    scales: Mapping[str, float] | float = 0.7,
    seed: int = 0,
    missing_cells: tuple[str, ...] = (),
) -> DMVAE:
    """Build a float64 model whose encoders and decoders are linear, in eval mode.

    Decoders are random. The encoder of a modality gives the marginals of the exact p(z | x_i), variances doubled and
    slightly dependent on x, so that importance sampling from it works but is not exact.
    """
    generator = torch.Generator().manual_seed(seed)
    config = DMVAEConfig(
        input_dims=dict(shapes),
        latent_dim=latent_dim,
        modalities_specific_dim=dict(private_dims) if isinstance(private_dims, Mapping) else private_dims,
        decoder_dist_params={m: {"scale": scales[m] if isinstance(scales, Mapping) else scales} for m in shapes},
        architectures={m: {"hidden_dims": ()} for m in shapes},
        missing_cells=missing_cells,
    )
    model = DMVAE(config).double().eval()
    with torch.no_grad():
        for name in config.modalities:
            encoder, decoder = linear_layer(model.encoders[name]), linear_layer(model.decoders[name])
            size, dim = decoder.weight.shape
            decoder.weight.copy_(torch.randn(size, dim, generator=generator, dtype=torch.float64) / math.sqrt(dim))
            decoder.bias.copy_(torch.randn(size, generator=generator, dtype=torch.float64))
            weight, bias = _posterior(decoder, _scale(model, name), latent_dim)
            encoder.weight[:, :size].copy_(weight)
            encoder.bias.copy_(bias)
            encoder.weight += 0.02 * torch.randn(encoder.weight.shape, generator=generator, dtype=torch.float64)
    return model


def sample_rows(
    model: DMVAE, rows: int, seed: int = 0, missing: float = 0.0, missing_cells: float | None = None
) -> Batch:
    """Draw rows from the model; each slot is missing with probability `missing`, and then holds NaN.

    With `missing_cells`, each cell is missing with that probability too.
    """
    generator = torch.Generator().manual_seed(seed)
    private_dims = model.config.private_dims
    shared = torch.randn(rows, model.config.latent_dim, generator=generator, dtype=torch.float64)
    data, masks = {}, {}
    for name, shape in model.config.shapes.items():
        private = torch.randn(rows, private_dims[name], generator=generator, dtype=torch.float64)
        decoder = linear_layer(model.decoders[name])
        noise = torch.randn(rows, math.prod(shape), generator=generator, dtype=torch.float64)
        flat = torch.cat((shared, private), dim=1) @ decoder.weight.T + decoder.bias + _scale(model, name) * noise
        masks[name] = torch.rand(rows, generator=generator) >= missing
        if missing_cells is not None:
            masks[name] = masks[name][:, None] & (torch.rand(flat.shape, generator=generator) >= missing_cells)
            masks[name] = masks[name].view(rows, *shape)
        data[name] = flat.detach().view(rows, *shape)
        data[name][~masks[name]] = math.nan
    return Batch(data, masks)


def exact_log_prob(model: DMVAE, batch: Batch) -> Tensor:
    """Return log p(x_A) of every row in nats, `(rows,)`, A being the cells of the row; 0 for a row with nothing."""
    names = [name for name in model.config.modalities if name in batch.data]
    present = observed_cells(batch, names)
    values = torch.cat([batch.data[name].flatten(1) for name in names], dim=1)
    mean, covariance = joint_gaussian(model, names)
    result = torch.zeros(len(batch), dtype=torch.float64)
    for here in present.unique(dim=0):
        rows = (present == here).all(1)
        if bool(here.any()):
            gaussian = torch.distributions.MultivariateNormal(mean[here], covariance[here][:, here])
            result[rows] = gaussian.log_prob(values[rows][:, here])
    return result


def exact_conditional(model: DMVAE, batch: Batch) -> tuple[Tensor, Tensor]:
    """Return mean and standard deviation, `(rows, cells)`, of all cells side by side, given those that each row has."""
    names = list(model.config.modalities)
    mean, covariance = joint_gaussian(model, names)
    values = torch.cat([batch.data[name].flatten(1) for name in names], dim=1)
    means, deviations = torch.zeros_like(values), torch.zeros_like(values)
    for row, known in enumerate(observed_cells(batch, names)):
        gain = torch.linalg.solve(covariance[known][:, known], covariance[known]).T
        means[row] = mean + gain @ (values[row] - mean)[known]
        deviations[row] = (covariance - gain @ covariance[known]).diagonal().clamp(min=0).sqrt()
    return means, deviations


def observed_cells(batch: Batch, names: Sequence[str]) -> Tensor:
    """Return which cells of some modalities every row has, side by side."""
    parts = []
    for name in names:
        flat = torch.ones_like(batch.data[name].flatten(1), dtype=torch.bool)
        if name in (batch.masks or {}):
            flat = flat & batch.masks[name][:, None]
        parts.append(flat & batch.cells[name].flatten(1) if name in (batch.cells or {}) else flat)
    return torch.cat(parts, dim=1)


def joint_gaussian(model: DMVAE, names: Sequence[str]) -> tuple[Tensor, Tensor]:
    """Return the mean and the covariance of x of the given modalities, one after the other."""
    dim, private_dims = model.config.latent_dim, model.config.private_dims
    decoders = [linear_layer(model.decoders[name]) for name in names]
    shared = torch.cat([decoder.weight[:, :dim] for decoder in decoders])
    private = torch.block_diag(*(decoder.weight[:, dim:] for decoder in decoders))
    assert private.shape[1] == sum(private_dims[name] for name in names)
    variance = torch.cat(
        [torch.full_like(decoder.bias, _scale(model, name) ** 2) for name, decoder in zip(names, decoders, strict=True)]
    )
    covariance = shared @ shared.T + private @ private.T + torch.diag(variance)
    return torch.cat([decoder.bias for decoder in decoders]).detach(), covariance.detach()


def _posterior(decoder: nn.Linear, scale: float, latent_dim: int) -> tuple[Tensor, Tensor]:
    """Return weight and bias of the linear encoder [mean_s, log_var_s, mean_p, log_var_p] of p(z | x_i)."""
    loading = decoder.weight
    covariance = torch.linalg.inv(torch.eye(loading.shape[1], dtype=loading.dtype) + loading.T @ loading / scale**2)
    gain = covariance @ loading.T / scale**2
    offset, log_var = -gain @ decoder.bias, torch.log(2 * covariance.diagonal())
    zeros = torch.zeros_like(gain)
    weight = torch.cat((gain[:latent_dim], zeros[:latent_dim], gain[latent_dim:], zeros[latent_dim:]))
    bias = torch.cat((offset[:latent_dim], log_var[:latent_dim], offset[latent_dim:], log_var[latent_dim:]))
    return weight, bias


def linear_layer(network: nn.Module) -> nn.Linear:
    """Return the one linear layer of a network without hidden layers."""
    (layer,) = (module for module in network.modules() if isinstance(module, nn.Linear))
    return layer


def _scale(model: DMVAE, name: str) -> float:
    log_scale = model.likelihoods[name].log_scale
    return math.exp(log_scale if isinstance(log_scale, float) else log_scale.item())
