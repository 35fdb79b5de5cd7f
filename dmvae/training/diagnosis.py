"""What training says when it goes wrong: the likely cause of a non-finite loss, and latents that nothing uses."""

import math
from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import Tensor

from dmvae.config.model import DMVAEConfig
from dmvae.data.batch import Batch, has
from dmvae.model.dmvae import DMVAE
from dmvae.model.outputs import DMVAEOutput

_LARGE_SCALE = 10.0
"""Values whose root mean square exceeds this are the likely cause; standardised ones have 1."""
_NOTHING = 0.05
"""Nats of a posterior that is the prior, but for noise."""


def name_culprits(model: DMVAE, batch: Batch, output: DMVAEOutput) -> str:
    """Return the terms, rows and modalities whose loss is not finite, and the scale of these modalities' values."""
    rows = (~torch.isfinite(output.row_loss.detach())).nonzero().squeeze(1).cpu()
    totals = zip(output.terms.names, output.terms.total.tolist(), strict=True)
    terms = [name for name, value in totals if not math.isfinite(value)]
    ids = [] if batch.ids is None else batch[rows[:5]].ids.tolist()  # type: ignore[union-attr]
    found = f"terms: {', '.join(terms)}; {len(rows)} rows, ids {ids}{' and more' if len(rows) > 5 else ''}"
    # the shared latent takes the fault of one modality to the terms of all: the one with the largest values began it
    modalities = {term.rpartition("/")[2] for term in terms if term.startswith(("log_likelihood/", "kl_private/"))}
    scales = {name: _scale(batch, name) for name in model.config.modalities if name in modalities}
    return f"({found}){_cause(model, scales)}"


def _cause(model: DMVAE, scales: Mapping[str, float]) -> str:
    if not scales:
        return ""
    # of counts and classes, encoders do not see the scale
    real = {n: s for n, s in scales.items() if not (model.likelihoods[n].are_counts or model.likelihoods[n].classes)}
    name = max(real, key=lambda name: real[name], default="")
    if not name or real[name] <= _LARGE_SCALE:
        return f". Modality: {', '.join(scales)}"
    return (
        f". Modality {name!r} is the likely cause: its values have a root mean square of {real[name]:,.3g} in this "
        f'batch. Prepare the dataset with scaling.{name} = "standardise"'
    )


def _scale(batch: Batch, name: str) -> float:
    """Return the root mean square of a modality's observed values."""
    values = batch.data[name][has(batch, name).to(batch.data[name].device)] if name in batch.data else torch.zeros(0)
    if not values.numel():
        return 0.0
    values = values.double().abs()
    largest = values.max().clamp(min=1e-300)  # its square may be beyond float64
    return float(largest * (values / largest).square().mean().sqrt())


def largest_gradients(model: DMVAE, norms: Tensor | None) -> str:
    """Return the parts of a model with the largest gradients.

    Args:
        model: whose parameters the norms are of.
        norms: of the gradient of each parameter; None: not known.
    """
    if norms is None:
        return ""
    squares: dict[str, float] = {}
    names = [name for name, parameter in model.named_parameters() if parameter.requires_grad]
    for name, norm in zip(names, norms.tolist(), strict=True):
        kind, modality = name.split(".")[:2]
        part = f"{kind.lstrip('_')}.{modality.removeprefix('modality_')}"
        squares[part] = squares.get(part, 0.0) + norm**2
    largest = sorted(squares, key=lambda part: squares[part], reverse=True)[:3]
    return ", ".join(f"{part} {math.sqrt(squares[part]):.2g}" for part in largest)


def describe_latents(config: DMVAEConfig, metrics: Mapping[str, Any]) -> Iterator[str]:
    """Say how much the latents are used after the last epoch, and warn of those that are not.

    Args:
        config: of the model.
        metrics: of a validation, as `val/NAME`.
    """
    blocks = {"shared": (config.latent_dim, metrics.get("val/kl_shared/joint"))}
    blocks |= {name: (dim, metrics.get(f"val/kl_private/{name}")) for name, dim in config.private_dims.items() if dim}
    known = {name: (metrics[f"val/active_units/{name}"], *block) for name, block in blocks.items()
             if block[1] is not None and f"val/active_units/{name}" in metrics}  # fmt: skip
    if not known:
        return
    shown = [
        f"{name if name == 'shared' else f'private {name}'} {active} of {dim} (KL {divergence:.2f})"
        for name, (active, dim, divergence) in known.items()
    ]
    yield f"active units: {', '.join(shown)}"
    for name, (active, dim, _) in known.items():
        if active == 0 and name == "shared":
            yield (
                f"warning: The shared latent is not used (posterior collapse: 0 of {dim} units are active), so no "
                "modality predicts another. Lower model.beta, or set training.divergence_warmup_steps."
            )
        elif active == 0:
            yield (
                f"warning: The private latent of {name!r} is not used (posterior collapse: 0 of {dim} units are "
                f"active). Lower model.modalities_specific_betas.{name}, or set model.modalities_specific_dim.{name} "
                "to 0."
            )
    told = {name: metrics.get(f"val/kl_shared_given/{name}", math.inf) for name in config.modalities}
    silent = [name for name, nats in told.items() if nats < _NOTHING]
    if silent and len(config.modalities) > 1 and known.get("shared", (0,))[0]:
        yield (
            f"warning: The shared latent knows nothing of {', '.join(map(repr, silent))}: its posterior given that "
            f"modality alone is the prior (KL below {_NOTHING} nats), so that modality predicts no other."
        )
