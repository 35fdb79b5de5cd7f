"""Latents of a trained model: collect them, fit a prior to them, and probe them for the label."""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass

import numpy as np
import torch
from jaxtyping import Bool, Float, Int64
from torch import Tensor

from dmvae.data.batch import Batch, has
from dmvae.distributions.gaussian_mixture import FittedPrior, GaussianMixture
from dmvae.evaluation.metrics import Classifier, Proportion, batches, generator_of
from dmvae.model.dmvae import DMVAE


@dataclass(frozen=True, eq=False)
class Latents:
    """Latents of many rows, in float64 on the CPU.

    Attributes:
        shared: z_s given all modalities of a row.
        private: z_p per modality; from the prior where a row lacks the modality.
        present: which rows have each modality.
        labels: -1 for rows without one; None if no row has one.
    """

    shared: Float[Tensor, "row shared"]
    private: Mapping[str, Float[Tensor, "row _"]]
    present: Mapping[str, Bool[Tensor, " row"]]
    labels: Int64[Tensor, " row"] | None

    def block(self, name: str) -> tuple[Float[Tensor, "chosen dim"], Bool[Tensor, " row"]]:
        """Return the shared or a modality's private latents of the rows that have them, and which rows these are."""
        here = torch.stack(list(self.present.values())).any(0) if name == "shared" else self.present[name]
        return (self.shared if name == "shared" else self.private[name])[here], here


def collect(model: DMVAE, rows: Batch | Iterable[Batch], return_mean: bool = False, seed: int = 0) -> Latents:
    """Encode rows: one draw per row, or the posterior means."""
    parts = []
    for batch in batches(rows):
        encoded = model.encode(batch, return_mean=return_mean, generator=generator_of(model, batch, seed))
        private = {name: z.cpu().double() for name, z in encoded.modalities_z.items()}
        present = {name: has(batch, name) for name in model.config.modalities}
        parts.append(Latents(encoded.z.cpu().double(), private, present, batch.labels))
    names, labels = model.config.modalities, [part.labels for part in parts if part.labels is not None]
    return Latents(
        torch.cat([part.shared for part in parts]),
        {name: torch.cat([part.private[name] for part in parts]) for name in names},
        {name: torch.cat([part.present[name] for part in parts]) for name in names},
        torch.cat(labels).cpu() if labels else None,
    )


def fit_density(model: DMVAE, rows: Batch | Iterable[Batch], num_components: int = 20, seed: int = 0) -> FittedPrior:
    """Fit Gaussian mixtures to the aggregated posterior, with one draw of z_s and of each z_p per row.

    With `cross = "prior"` only p(z_s) is fitted: decoders have learned to predict with z_p from the standard normal.

    Raises:
        ValueError: if fewer than two rows have a modality.
        ImportError: if scikit-learn is not installed.
    """
    latents = collect(model, rows, seed=seed)
    shared = GaussianMixture.fit(latents.block("shared")[0], num_components, seed)
    joint = {name: shared.beside_standard_normal(dim) for name, dim in model.config.private_dims.items()}
    for name, dim in model.config.private_dims.items():
        if dim and model.config.cross == "posterior":
            private, here = latents.block(name)
            joint[name] = GaussianMixture.fit(torch.cat((latents.shared[here], private), dim=1), num_components, seed)
    return FittedPrior(shared, joint)


def probe_labels(train: Latents, test: Latents) -> dict[str, Proportion]:
    """Count the test rows whose label linear probes of the shared and of each private latent predict.

    If labels are what modalities have in common, a disentangled model has a high share for `shared` and low ones for
    the private latents.

    Raises:
        ValueError: if the rows have no labels.
        ImportError: if scikit-learn is not installed.
    """
    return {name: probe_share(probe, test, name) for name, probe in fit_probes(train).items()}


def fit_probes(train: Latents) -> dict[str, Classifier]:
    """Fit a logistic regression of the label on standardised latents, for `shared` and each modality.

    A modality without a private latent has no probe.

    Raises:
        ValueError: if the rows have no labels.
        ImportError: if scikit-learn is not installed.
    """
    try:
        from sklearn.linear_model import LogisticRegression
        from sklearn.pipeline import make_pipeline
        from sklearn.preprocessing import StandardScaler
    except ImportError as error:
        raise ImportError("scikit-learn not found. Run pip install 'dmvae[report]'.") from error
    probes = {}
    for name in ("shared", *(name for name, z in train.private.items() if z.shape[1])):
        x, y = _labelled(train, name)
        probes[name] = make_pipeline(StandardScaler(), LogisticRegression(max_iter=2000)).fit(x, y)
    return probes


def probe_share(probe: Classifier, test: Latents, name: str, count_all: bool = False) -> Proportion:
    """Count the rows whose label a probe predicts, out of those that have the latents or of all labelled rows."""
    x, y = _labelled(test, name, count_all)
    return Proportion(int((probe.predict(x) == y).sum()), len(y)) if len(y) else Proportion()


def _labelled(latents: Latents, name: str, count_all: bool = False) -> tuple[np.ndarray, np.ndarray]:
    if latents.labels is None:
        raise ValueError("Cannot fit or score probes: the rows have no labels.")
    if count_all:
        values, labels = latents.shared if name == "shared" else latents.private[name], latents.labels
    else:
        values, here = latents.block(name)
        labels = latents.labels[here]
    return values[labels >= 0].numpy(), labels[labels >= 0].numpy()
