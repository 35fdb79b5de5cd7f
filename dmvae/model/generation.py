"""Draw latents from posteriors or the prior, and decode them."""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from jaxtyping import Bool, Float
from torch import Tensor, nn

from dmvae.config.model import DMVAEConfig
from dmvae.distributions.gaussian import DiagGaussian
from dmvae.distributions.gaussian_mixture import FittedPrior
from dmvae.model.loss import Decode
from dmvae.model.outputs import ModelOutput


@contextmanager
def inference_mode(model: nn.Module) -> Iterator[None]:
    """Evaluate in eval mode without gradients, then restore the mode of every module."""
    modes = [(module, module.training) for module in model.modules()]
    model.eval()
    try:
        with torch.no_grad():
            yield
    finally:
        for module, training in modes:
            module.training = training


def draw_latents(
    shared: DiagGaussian,
    private: Mapping[str, DiagGaussian],
    present: Mapping[str, Bool[Tensor, " row"]],
    num_draws: int,
    return_mean: bool = False,
    flatten: bool = False,
    generator: torch.Generator | None = None,
    density: FittedPrior | None = None,
) -> ModelOutput:
    """Sample the posteriors of each row, or return their means; see `DMVAE.encode`.

    Args:
        shared: posterior of z_s.
        private: posterior of z_p per modality; the prior where a row lacks the modality.
        present: which rows have each of the modalities that are given.
        num_draws: draws per row.
        return_mean: return means in place of draws.
        flatten: merge draws and rows into one dimension.
        generator: of the draws; None: torch's global one.
        density: replaces the prior.
    """

    def draw(gaussian: DiagGaussian) -> Tensor:
        many = gaussian.mean.expand(num_draws, *gaussian.mean.shape)
        if not return_mean:
            many = gaussian.sample(_randn_like(many, generator))
        return many

    z, modalities_z = draw(shared), {name: draw(gaussian) for name, gaussian in private.items()}
    if density is not None:
        z, modalities_z = _fill_in(density, z, modalities_z, present, return_mean, _on_cpu(generator))

    def shape(many: Tensor) -> Tensor:
        return many.flatten(0, 1) if flatten else many.squeeze(0) if num_draws == 1 else many

    private_z = {name: shape(many) for name, many in modalities_z.items()}
    return ModelOutput(z=shape(z), modalities_z=private_z, one_latent_space=False)


def sample_latents(
    config: DMVAEConfig,
    num: int,
    dtype: torch.dtype,
    device: torch.device,
    generator: torch.Generator | None = None,
    density: FittedPrior | None = None,
) -> ModelOutput:
    """Sample all latents `(num, dim)` from the prior, or from `density` in its place."""
    if density is not None:
        shared, drawn = density.sample(num, _on_cpu(generator))
        latents = {name: latent.to(device, dtype) for name, latent in drawn.items()}
        return ModelOutput(z=shared.to(device, dtype), modalities_z=latents, one_latent_space=False)
    z = torch.empty(num, config.latent_dim, dtype=dtype, device=device)
    private = {name: z.new_empty(num, dim) for name, dim in config.private_dims.items()}
    modalities_z = {name: _randn_like(latent, generator) for name, latent in private.items()}
    return ModelOutput(z=_randn_like(z, generator), modalities_z=modalities_z, one_latent_space=False)


def decode_latents(functions: Mapping[str, Decode], embedding: Mapping[str, Any]) -> ModelOutput:
    """Decode latents; outputs keep their leading dimensions."""
    z, private = embedding["z"], embedding["modalities_z"]
    outputs = ModelOutput()
    for name, decode in functions.items():
        latent = torch.cat((z, private[name]), dim=-1)
        output = decode(latent.reshape(-1, latent.shape[-1]))
        outputs[name] = output.reshape(*latent.shape[:-1], *output.shape[1:])
    return outputs


def draw_seed(generator: torch.Generator | None) -> int:
    """Draw a seed from a generator; None is torch's global one."""
    device = generator.device if generator is not None else torch.device("cpu")
    return int(torch.randint(2**62, (), dtype=torch.int64, generator=generator, device=device))


def _fill_in(
    density: FittedPrior,
    z: Float[Tensor, "draw row shared"],
    private: Mapping[str, Float[Tensor, "draw row _"]],
    present: Mapping[str, Bool[Tensor, " row"]],
    return_mean: bool,
    generator: torch.Generator | None,
) -> tuple[Tensor, dict[str, Tensor]]:
    """Put a density's latents in the place of the prior's: of a row with nothing z_s, of a modality not given z_p."""
    nowhere = torch.zeros(z.shape[1], dtype=torch.bool, device=z.device)
    anything = torch.stack([nowhere, *present.values()]).any(0)
    if not bool(anything.all()):
        shape = z[:, ~anything].shape
        drawn = (
            density.shared.mean.expand(shape)
            if return_mean
            else density.shared.sample(shape[0] * shape[1], generator).reshape(shape)
        )
        z = z.clone()
        z[:, ~anything] = drawn.to(z)
    filled = {}
    for name, values in private.items():
        absent = ~present.get(name, nowhere)
        filled[name] = values
        if bool(absent.any()):
            filled[name] = values.clone()
            filled[name][:, absent] = density.private(name, z[:, absent], return_mean, generator)
    return z, filled


def _randn_like(tensor: Tensor, generator: torch.Generator | None) -> Tensor:
    return torch.randn(tensor.shape, dtype=tensor.dtype, device=tensor.device, generator=generator)


def _on_cpu(generator: torch.Generator | None) -> torch.Generator | None:
    if generator is None or generator.device.type == "cpu":
        return generator
    return torch.Generator().manual_seed(draw_seed(generator))
