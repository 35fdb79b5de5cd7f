"""Validation metrics: the terms of the objective, and the activity of the latent dimensions."""

from collections.abc import Callable, Iterable
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from jaxtyping import Bool, Float, Int64
from torch import Tensor

from dmvae.config.training import TrainConfig
from dmvae.data.batch import Batch
from dmvae.distributions.gaussian import product_of_experts
from dmvae.distributions.noise import chain, row_keys, standard_normal
from dmvae.model.dmvae import DMVAE
from dmvae.model.loss import Noise, Observed, TermSums, multimodal_elbo_loss, term_names

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
        `loss` and each named term in nats per row, `kl_shared_given/M`, what the modality alone tells of the shared
        latent (KL from the prior of its posterior given M); and per latent block (`shared`, each modality) the variance
        over rows of the posterior's mean in each dimension: its activity (Burda et al. 2016). What no row has is left
        out.
    """
    names = term_names(model.config)
    sums = TermSums(names, *torch.zeros(2, len(names), dtype=torch.float64, device=model.device))
    dims = {"shared": model.config.latent_dim, **model.config.private_dims}
    told = {name: torch.zeros(2, dtype=torch.float64, device=model.device) for name in model.config.modalities}
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
                alone = product_of_experts(part.shared.mean[None], part.shared.log_var[None], everywhere(part))
                told[name] += _moments(alone.kl_from_prior().unsqueeze(1))[:2, 0]
    model.train()
    total, count = all_reduce(torch.stack((sums.total, sums.count)))
    reduced = TermSums(names, total, count)
    every, means = reduced.means(), reduced.observed_means()
    means["loss"] = sum(float(every[source]) for source in model.config.source_names)
    given = {name: all_reduce(pair).tolist() for name, pair in told.items()}
    means |= {f"kl_shared_given/{name}": nats / rows for name, (rows, nats) in given.items() if rows}
    tables = {name: all_reduce(table) for name, table in moments.items()}
    seen = {"shared", *(name for name, (rows, _) in given.items() if rows)}
    return means, {name: _variance(table) for name, table in tables.items() if name in seen}


def everywhere(part: Observed) -> Bool[Tensor, "1 row"]:
    """Return a mask of the observed rows, which all have the modality."""
    return torch.ones(1, len(part.shared.mean), dtype=torch.bool, device=part.shared.mean.device)


def _moments(mean: Float[Tensor, "row dim"]) -> Float[Tensor, "3 dim"]:
    mean = mean.double()
    return torch.stack((torch.ones_like(mean).sum(0), mean.sum(0), mean.square().sum(0)))


def _variance(moments: Float[Tensor, "3 dim"]) -> Float[Tensor, " dim"]:
    count = moments[0].clamp(min=1)
    return moments[2] / count - (moments[1] / count).square()
