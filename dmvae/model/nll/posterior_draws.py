"""Draws from each row's posterior: from its Gauss-Newton fit, weighted and drawn again.

Encoders are trained once for all rows and all patterns of missing cells, so their posteriors are off for most of them.
The fit is to the row at hand. Draws u_k of it with weights

    w_k = p(x_A, u_k) / q(u_k)

are drawn again in proportion to their weights (sampling-importance-resampling), systematically, so that a draw of
weight w among n comes n w times, rounded up or down.

Source: Rubin 1988; Kitagawa 1996 for systematic resampling.
"""

import torch
from jaxtyping import Float, Int64
from torch import Tensor

from dmvae.data.batch import Batch
from dmvae.distributions.noise import chain, row_keys, standard_normal
from dmvae.model.nll.estimate import LatentModel, rows_by_pattern
from dmvae.model.nll.gauss_newton import GaussNewtonProposal, encoder_means, gauss_newton
from dmvae.model.outputs import ModelOutput

_STEPS = 6
_OVERSAMPLING = 4  # draws of the fit for each one that is returned
_PRIOR, _FIT, _CHOICE = range(100, 103)  # names of independent noise; those of the NLL are below


def posterior_draws(model: LatentModel, batch: Batch, num_draws: int, seed: int) -> ModelOutput:
    """Return draws of the latents given everything that each row has, as `DMVAE.encode` does.

    Private latents of modalities that a row lacks, and all of a row with nothing, are drawn from the prior. A row's
    draws depend on (seed, its id) alone; without ids its place in the batch stands for it.

    Args:
        model: in eval mode.
        batch: rows on the model's device.
        num_draws: for each row.
        seed: of the draws.
    """
    names, dims = model.config.modalities, {"": model.config.latent_dim, **model.config.private_dims}
    keys = chain(seed, row_keys(torch.arange(len(batch)) if batch.ids is None else batch.ids)).to(model.device)
    latents = {
        name: standard_normal(chain(keys, _PRIOR, place), num_draws * dim, dtype=model.dtype)
        .view(len(batch), num_draws, dim)
        .transpose(0, 1)
        .clone()
        for place, (name, dim) in enumerate(dims.items())
    }
    drawn = max(_OVERSAMPLING * num_draws, 64)
    for here, chosen, rows in rows_by_pattern(model, batch, keys, names, drawn):
        fit = gauss_newton(rows, encoder_means(rows), _STEPS)
        proposal = GaussNewtonProposal(rows, fit, drawn)
        u, log_q = proposal.draw(chain(rows.keys, _FIT), 0, drawn)
        best = _resample(rows.log_joint(u) - log_q, chain(rows.keys, _CHOICE), num_draws)
        u = u.gather(1, best.unsqueeze(-1).expand(-1, -1, u.shape[-1])).transpose(0, 1).to(model.dtype)
        for name, block in zip(("", *here), rows.blocks, strict=True):
            latents[name][:, chosen] = u[..., block]
    return ModelOutput(z=latents.pop(""), modalities_z=latents, one_latent_space=False)


def _resample(log_w: Float[Tensor, "row draw"], keys: Int64[Tensor, " row"], num: int) -> Int64[Tensor, "row {num}"]:
    """Return the numbers of `num` draws of every row in proportion to their weights."""
    shares = torch.softmax(log_w.nan_to_num(nan=-torch.inf).double(), dim=1).nan_to_num(nan=1 / log_w.shape[1])
    start = torch.special.ndtr(standard_normal(keys, 1, dtype=torch.float64))
    places = (torch.arange(num, device=log_w.device) + start) / num
    numbers = torch.searchsorted(shares.cumsum(1).contiguous(), places.contiguous())
    # in an order of its own, so that the first few are a sample too
    order = standard_normal(chain(keys, 1), num).argsort(dim=1)
    return numbers.clamp(max=log_w.shape[1] - 1).gather(1, order)
