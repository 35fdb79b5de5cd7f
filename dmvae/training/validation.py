"""Validation metrics: the terms of the objective, and the activity of the latent dimensions."""

from collections.abc import Callable, Iterable
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from jaxtyping import Float, Int64
from torch import Tensor

from dmvae.config.training import TrainConfig
from dmvae.data.batch import Batch
from dmvae.distributions.noise import chain, row_keys, standard_normal
from dmvae.model.dmvae import DMVAE
from dmvae.model.loss import Noise, TermSums, multimodal_elbo_loss, term_names

_VALIDATE = 2  # second part of a noise key; training has another


def draw_noise(model: DMVAE, keys: Int64[Tensor, " row"]) -> Noise:
    """Draw the objective's noise of each row from its key."""
    normals = standard_normal(keys.to(model.device), Noise.width(model.config), dtype=model.dtype)
    return Noise.from_normals(normals, model.config)


def autocast(model: DMVAE, config: TrainConfig) -> AbstractContextManager[Any]:
    """Return the context in which the model computes in `training.precision`."""
    enabled = config.training.precision == "bfloat16"
    return torch.autocast(model.device.type, torch.bfloat16) if enabled else nullcontext()


def validate(
    model: DMVAE, blocks: Iterable[Batch], config: TrainConfig, all_reduce: Callable[[Tensor], Tensor]
) -> tuple[dict[str, float], dict[str, Float[Tensor, " dim"]]]:
    """Evaluate the objective's terms on a split; a row's noise is the same in every epoch.

    Args:
        model: is put into eval mode, and left in training mode.
        blocks: this worker's rows; without ids, a row's noise depends on its position.
        config: gives the seed of the noise and the precision.
        all_reduce: sums a float64 tensor over the workers.

    Returns:
        `loss` and each named term in nats per row; and per latent block (`shared`, each modality) the variance over
        rows of the posterior's mean in each dimension: its activity (Burda et al. 2016).
    """
    names = term_names(model.config)
    sums = TermSums(names, *torch.zeros(2, len(names), dtype=torch.float64, device=model.device))
    dims = {"shared": model.config.latent_dim, **model.config.private_dims}
    moments = {name: torch.zeros(3, dim, dtype=torch.float64, device=model.device) for name, dim in dims.items()}
    model.eval()
    with torch.no_grad(), autocast(model, config):
        first = 0
        for batch in blocks:
            ids = torch.arange(first, first + len(batch)) if batch.ids is None else batch.ids
            first += len(batch)
            observed = model.observe(batch)
            noise = draw_noise(model, chain(config.seed, _VALIDATE, row_keys(ids)))
            sums = (
                sums
                + multimodal_elbo_loss(model.config, observed, model.decode_functions, model.likelihoods, noise).terms
            )
            moments["shared"] += _moments(model.combine(observed, len(batch))[0].mean)
            for name, part in observed.items():
                moments[name] += _moments(part.private.mean)
    model.train()
    total, count = all_reduce(torch.stack((sums.total, sums.count)))
    means = {name: float(value) for name, value in TermSums(names, total, count).means().items()}
    loss = sum(means[source] for source in model.config.source_names)
    return {**means, "loss": loss}, {name: _variance(all_reduce(table)) for name, table in moments.items()}


def _moments(mean: Float[Tensor, "row dim"]) -> Float[Tensor, "3 dim"]:
    mean = mean.double()
    return torch.stack((torch.ones_like(mean).sum(0), mean.sum(0), mean.square().sum(0)))


def _variance(moments: Float[Tensor, "3 dim"]) -> Float[Tensor, " dim"]:
    count = moments[0].clamp(min=1)
    return moments[2] / count - (moments[1] / count).square()
