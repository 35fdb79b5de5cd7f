"""What a model is worth: how well it predicts, what its latents hold, and rivals judged on the same rows."""

import math
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from functools import cached_property
from itertools import chain, combinations

import numpy as np

from dmvae.data.batch import Batch
from dmvae.data.reading.loader import read_rows
from dmvae.data.reading.split import Split
from dmvae.distributions.gaussian_mixture import FittedPrior
from dmvae.evaluation.baselines import ProbabilisticPCA
from dmvae.evaluation.imputation import INTERVALS, held_out_errors, join, rival_errors, rivals
from dmvae.evaluation.latents import collect, fit_probes, probe_labels, probe_share
from dmvae.evaluation.masking import Mechanism, Removal, mask_modalities
from dmvae.evaluation.metrics import (
    Classifier,
    Proportion,
    classifier_accuracy,
    conditional_coherence,
    fit_classifier,
    joint_coherence,
    predicted_class_share,
)
from dmvae.model.dmvae import DMVAE

MAX_FIT_ROWS = 8192
"""Training rows that rivals, classifiers, probes and densities are fitted to, at most; the first ones, which
`jobs.prepare` has mixed."""
_BLOCK_ROWS = 1024
_ALL_SUBSETS = 4  # modalities, above which coherence is from single ones and from all others


@dataclass(frozen=True, eq=False)
class EvaluationSuite:
    """Judges one model on one split.

    Attributes:
        model: in eval mode.
        train: the rows that rivals and classifiers are fitted to.
        split: the rows that are judged.
        density: of the latents; figures with it stand beside those with the prior, under `density/`.
        num_draws: per row, of imputations.
    """

    model: DMVAE
    train: Split
    split: Split
    density: FittedPrior | None = None
    num_draws: int = 100

    def rivals(self, nll: np.ndarray) -> dict[str, float]:
        """Fit probabilistic PCA with as many latent dimensions to the training rows and pair it with `nll` by row.

        Returns:
            PCA's mean exact NLL in nats per row, how much higher it is than the model's, and that difference's
            standard error over rows.

        Raises:
            ValueError: if `rivals_fault` has a reason.
        """
        if self.rivals_fault:
            raise ValueError(self.rivals_fault)
        pca = ProbabilisticPCA.fit(_blocks(self.train), self._latent_dim)
        theirs = -np.concatenate([pca.log_prob(batch).numpy() for batch in _blocks(self.split)])
        difference = theirs - nll
        return {
            "pca/nll": float(theirs.mean()),
            "pca/nll_minus_ours": float(difference.mean()),
            "pca/nll_minus_ours_se": float(difference.std(ddof=1) / math.sqrt(len(difference))),
        }

    def coherence(self) -> dict[str, float]:
        """Count how often predictions show the row's label, and samples from the prior one label in all modalities.

        Returns:
            `coherence/FROM/TO` for a draw and `coherence_mean/FROM/TO` for the posteriors' means, FROM being a
            modality or several (`a.b`); `joint_coherence`; each classifier's accuracy on real rows, the ceiling, as
            `classifier/M`, and their product, about the ceiling of the joint, as `classifier/all`.

        Raises:
            ValueError: if the rows have no labels.
        """
        figures = {
            f"classifier/{name}": classifier_accuracy(classifier, self._rows(), name).rate
            for name, classifier in self.classifiers.items()
        }
        figures["classifier/all"] = math.prod(figures.values())
        for prefix, density in self._densities:
            for target, classifier in self.classifiers.items():
                for source in self._sources(target):
                    for key, means in (("coherence", False), ("coherence_mean", True)):
                        share = conditional_coherence(
                            self.model, self._rows(), classifier, source, target, means, density=density
                        )
                        figures[f"{prefix}{key}/{'.'.join(source)}/{target}"] = share.rate
            figures[f"{prefix}joint_coherence"] = joint_coherence(self.model, self.classifiers, density=density).rate
        return figures

    def probes(self) -> dict[str, float]:
        """Return the share of rows whose label a linear classifier reads off each block of latents, `probe/BLOCK`.

        Raises:
            ValueError: if the rows have no labels.
        """
        check_labels(self.train, self.split)
        train, test = collect(self.model, [self.fit_rows], True), collect(self.model, self._rows(), True)
        return {f"probe/{name}": share.rate for name, share in probe_labels(train, test).items()}

    def imputation(self) -> dict[str, float]:
        """Return `imputation/M/rmse` of held-out values from the others, its coverage, and the rivals'."""
        figures = {}
        competitors = rivals(self.fit_rows, self._latent_dim)
        for name in self._float_modalities:
            for prefix, density in self._densities:
                errors = held_out_errors(self.model, self._rows(), name, self.num_draws, density)
                figures[f"{prefix}imputation/{name}/rmse"] = errors.rmse
                for share, inside in zip(INTERVALS, errors.coverage, strict=True):
                    if not math.isnan(inside):
                        figures[f"{prefix}imputation/{name}/coverage{share:.0%}".removesuffix("%")] = inside
            for rival, imputer in competitors.items():
                figures[f"imputation/{name}/{rival}"] = rival_errors(imputer, self._rows(), name).rmse
        return figures

    def robustness(self, removal: Removal) -> dict[str, float]:
        """Judge imputation, coherence and probes from what is left when modalities are removed.

        Returns:
            `missing/HOW/RATE/rmse/M`, `.../coverage90/M`, `.../rmse_ridge/M` and, with labels, `.../coherence/M` and
            `.../probe/BLOCK`; HOW is `random` or `label` (the larger the label, the more is removed), RATE is in
            percent. A row that has lost everything counts: it is predicted without any knowledge of it. For the NLL
            see `dmvae.platform.evaluate.nll_table`.
        """
        figures = {}
        ridge = rivals(self.fit_rows, self._latent_dim)["ridge"]
        probes = fit_probes(collect(self.model, [self.fit_rows], True)) if self.has_labels else {}
        for place, hide in removal.each():
            for name in self._float_modalities:
                errors = held_out_errors(self.model, self._rows(), name, 20, self.density, hide=hide)
                figures[f"{place}/rmse/{name}"] = errors.rmse
                if not math.isnan(errors.coverage[-1]):
                    figures[f"{place}/coverage90/{name}"] = errors.coverage[-1]
                figures[f"{place}/rmse_ridge/{name}"] = rival_errors(ridge, self._rows(), name, hide).rmse
            for name, classifier in self.classifiers.items() if self.has_labels else ():
                shares = (
                    predicted_class_share(
                        self.model, batch, mask_modalities(hide(batch), name), classifier, name, self.density
                    )
                    for batch in self._rows()
                )
                figures[f"{place}/coherence/{name}"] = sum(shares, Proportion()).rate
            left = collect(self.model, map(hide, self._rows()), True) if probes else None
            for name, probe in probes.items() if left else ():
                assert left is not None
                figures[f"{place}/probe/{name}"] = probe_share(probe, left, name, count_all=True).rate
        return figures

    def removal(self, rates: Iterable[float]) -> Removal:
        """Return how modalities are removed at each rate: at random, and by label where there are labels."""
        labels = self.train.labels() if self.has_labels else None
        mechanisms: tuple[Mechanism, ...] = ("random",) if labels is None else ("random", "label")
        return Removal(mechanisms, tuple(rates), 0 if labels is None else int(labels.max()) + 1)

    @cached_property
    def fit_rows(self) -> Batch:
        """The training rows that things are fitted to."""
        return first_rows(self.train)

    @cached_property
    def classifiers(self) -> dict[str, Classifier]:
        """One per modality, fitted to real training rows.

        Raises:
            ValueError: if the rows have no labels.
        """
        check_labels(self.train, self.split)
        return {name: fit_classifier(self.fit_rows, name) for name in self.model.config.modalities}

    @cached_property
    def has_labels(self) -> bool:
        """Whether both splits have labels."""
        return has_labels(self.train) and has_labels(self.split)

    @property
    def _densities(self) -> tuple[tuple[str, FittedPrior | None], ...]:
        return (("", None),) if self.density is None else (("", None), ("density/", self.density))

    @property
    def _latent_dim(self) -> int:
        return self.model.config.latent_dim + sum(self.model.config.private_dims.values())

    @property
    def _float_modalities(self) -> tuple[str, ...]:
        infos = self.train.manifest.modalities
        return tuple(name for name in self.model.config.modalities if infos[name].dtype != "int64")

    @property
    def rivals_fault(self) -> str:
        """Why PCA's density cannot be compared with the model's; empty if it can."""
        config = self.model.config
        others = sorted({dist for dist in config.distributions.values() if dist not in ("normal", "laplace")})
        if others or self._float_modalities != config.modalities:
            return f"probabilistic PCA is a density of floats, and cannot be compared with {others or ['integers']}"
        if self._latent_dim >= sum(map(math.prod, config.shapes.values())):
            return f"probabilistic PCA has fewer latent dimensions than the data; the model has {self._latent_dim}"
        return ""

    def _sources(self, target: str) -> Iterator[tuple[str, ...]]:
        others = [name for name in self.model.config.modalities if name != target]
        sizes = range(1, len(others) + 1) if len(others) < _ALL_SUBSETS else sorted({1, len(others)})
        return chain.from_iterable(combinations(others, size) for size in sizes)

    def _rows(self) -> Iterator[Batch]:
        return _blocks(self.split)


def first_rows(split: Split, num: int = MAX_FIT_ROWS) -> Batch:
    """Read a split's first rows, `num` at most, as one batch."""
    return join([split.read(np.arange(min(num, len(split))))])


def _blocks(split: Split) -> Iterator[Batch]:
    return (batch for _, batch in read_rows(split, _BLOCK_ROWS))


def has_labels(split: Split) -> bool:
    """Tell whether any row of a split has a label."""
    labels = split.labels()
    return labels is not None and bool((labels >= 0).any())


def check_labels(*splits: Split) -> None:
    """Check that each split has labels.

    Raises:
        ValueError: if one has none.
    """
    without_any = [split.name for split in splits if not has_labels(split)]
    if without_any:
        raise ValueError(
            f"coherence and probes compare classes, so the splits have labels; {without_any} of {splits[0].where} "
            "has none. Leave these measures out."
        )
