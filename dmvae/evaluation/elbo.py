"""The negative ELBO of the joint posterior per row: an upper bound of the NLL in expectation."""

import torch
from jaxtyping import Float
from torch import Tensor

from dmvae.data.batch import Batch
from dmvae.distributions.gaussian import DiagGaussian
from dmvae.distributions.likelihoods import log_prob_each
from dmvae.distributions.noise import chain, row_keys, standard_normal
from dmvae.model.dmvae import DMVAE

_BOUND = 3  # part of the noise key


def negative_elbo(model: DMVAE, batch: Batch, num_draws: int = 16, seed: int = 0) -> Float[Tensor, " row"]:
    """Estimate the negative ELBO of each row in nats, with all weights 1; 0 for a row without any modality.

        KL(q(z_s | x_A) || p) + sum_{i in A} ( KL(q(z_i | x_i) || p) - E log p(x_i | z_s, z_i) )

    Its expectation is at least the NLL. The draws of a row depend only on the seed and its id.
    """
    batch = batch.to(model.device)
    with torch.no_grad():
        observed = model.observe(batch)
        shared, private = model.combine(observed, len(batch))
        ids = torch.arange(len(batch)) if batch.ids is None else batch.ids
        dims = [shared.mean.shape[1], *(gaussian.mean.shape[1] for gaussian in private.values())]
        keys = chain(seed, _BOUND, row_keys(ids)).to(model.device)
        noise = standard_normal(keys, num_draws * sum(dims), dtype=model.dtype).view(len(batch), num_draws, -1)
        shared_noise, *private_noise = torch.split(noise, dims, dim=-1)
        z_shared, total = _sample(shared, shared_noise), shared.kl_from_prior().double()
        for (name, gaussian), part_noise in zip(private.items(), private_noise, strict=True):
            if name not in observed:
                continue
            part, likelihood = observed[name], model.likelihoods[name]
            here = part.present
            z = torch.cat((z_shared, _sample(gaussian, part_noise)), dim=-1)[here]
            output = model.decode_functions[name](z.flatten(0, 1))
            output = output.reshape(*z.shape[:2], *output.shape[1:])
            cells = None if part.cells is None else part.cells.unsqueeze(1)
            (log_p,) = log_prob_each([likelihood], output.unsqueeze(0), [part.values.unsqueeze(1)], [cells])
            total[here] += part.private.kl_from_prior().double() - log_p.double().mean(1)
    return total


def _sample(gaussian: DiagGaussian, noise: Float[Tensor, "row draw dim"]) -> Float[Tensor, "row draw dim"]:
    return DiagGaussian(gaussian.mean.unsqueeze(1), gaussian.log_var.unsqueeze(1)).sample(noise)
