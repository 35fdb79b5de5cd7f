"""What a model is worth: how well it predicts, what its latents hold, and baselines on the same rows."""

import math
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from functools import cached_property
from itertools import chain, combinations, islice

import numpy as np
import torch

from dmvae.data.batch import Batch, has
from dmvae.data.reading.loader import read_rows
from dmvae.data.reading.split import Split
from dmvae.distributions.gaussian_mixture import FittedPrior
from dmvae.evaluation.baselines import Ridge, fit_baselines
from dmvae.evaluation.cells import held_out_cells
from dmvae.evaluation.clustering import cluster_agreement
from dmvae.evaluation.factor_analysis import FactorAnalysis, fit_factor_analysis
from dmvae.evaluation.frechet import classifier_features, frechet_distance, sample_distance
from dmvae.evaluation.imputation import INTERVALS, baseline_errors, held_out_errors, join
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
"""Training rows that baselines, classifiers, probes and densities are fitted to, at most; the first ones, which
`jobs.prepare` has mixed."""
_BLOCK_ROWS = 1024
_ALL_SUBSETS = 4  # modalities, above which coherence is from single ones and from all others


@dataclass(frozen=True, eq=False)
class EvaluationSuite:
    """Evaluates one model on one split.

    Attributes:
        model: in eval mode.
        train: the rows that baselines and classifiers are fitted to.
        split: the rows that it is evaluated on.
        density: of the latents; metrics with it stand beside those with the model's own prior, under `density/`. Those
            of a model whose own prior is fitted stand beside those with the standard normal, under `standard_prior/`.
        num_draws: per row, of imputations.
        progress: called with a line for each baseline that is skipped.
    """

    model: DMVAE
    train: Split
    split: Split
    density: FittedPrior | None = None
    num_draws: int = 100
    progress: Callable[[str], None] = lambda text: None

    def baselines(self, nll: np.ndarray) -> dict[str, float]:
        """Compare the density with linear models of the training rows, on the same rows.

        `pca` is probabilistic PCA with as many dimensions as the model has latents, `factor_analysis` has the number of
        factors that cross-validation chooses.

        Args:
            nll: the model's, of each row of the split, or of its first rows.

        Returns:
            For each of them `NAME/nll`, its mean exact NLL in nats per row, `NAME/nll_minus_ours`, how much higher that
            is than the model's, and `NAME/nll_minus_ours_se`, the standard error of that over rows; and
            `factor_analysis/num_factors`.

        Raises:
            ValueError: if `density_fault` has a reason.
        """
        if self.density_fault:
            raise ValueError(self.density_fault)
        linear, metrics = {"factor_analysis": self.factor_analysis}, {}
        if self._latent_dim < self._num_features:
            linear["pca"] = FactorAnalysis.fit(
                _blocks(self.train), self._latent_dim, "one", shrinkage=0.0, max_steps=1000, tolerance=1e-4
            )
        else:
            self.progress(f"pca skipped: it needs fewer dimensions than the data, but the model has {self._latent_dim}")
        for name, fit in linear.items():
            if fit is not None:
                batches = islice(_blocks(self.split), math.ceil(len(nll) / _BLOCK_ROWS))
                theirs = -np.concatenate([fit.log_prob(batch).numpy() for batch in batches])[: len(nll)]
                difference = theirs - nll
                metrics[f"{name}/nll"] = float(theirs.mean())
                metrics[f"{name}/nll_minus_ours"] = float(difference.mean())
                metrics[f"{name}/nll_minus_ours_se"] = float(difference.std(ddof=1) / math.sqrt(len(difference)))
        if self.factor_analysis is not None:
            metrics["factor_analysis/num_factors"] = float(self.factor_analysis.weight.shape[1])
        return metrics

    def coherence(self) -> dict[str, float]:
        """Count how often predictions show the row's label, and samples from the prior one label in all modalities.

        Returns:
            `coherence/FROM/TO` for a draw and `coherence_mean/FROM/TO` for the posteriors' means, FROM being a
            modality or several (`a.b`); `joint_coherence`; each classifier's accuracy on real rows, the ceiling, as
            `classifier/M`, and their product, about the ceiling of the joint, as `classifier/all`. Of images also
            `frechet/M`, the Fréchet distance of samples to the rows in the margins of the classifier, and
            `frechet_real/M`, that of training rows, the floor.

        Raises:
            ValueError: if the rows have no labels.
        """
        metrics = {
            f"classifier/{name}": classifier_accuracy(classifier, self._rows(), name).rate
            for name, classifier in self.classifiers.items()
        }
        metrics["classifier/all"] = math.prod(metrics.values())
        for prefix, density in self._densities:
            for target, classifier in self.classifiers.items():
                for source in self._sources(target):
                    for key, means in (("coherence", False), ("coherence_mean", True)):
                        share = conditional_coherence(
                            self.model, self._rows(), classifier, source, target, means, density=density
                        )
                        metrics[f"{prefix}{key}/{'.'.join(source)}/{target}"] = share.rate
            metrics[f"{prefix}joint_coherence"] = joint_coherence(self.model, self.classifiers, density=density).rate
        return metrics | self._frechet()

    def _frechet(self) -> dict[str, float]:
        metrics, rows = {}, first_rows(self.split)
        for name in self._float_modalities:
            if len(self.model.config.shapes[name]) < 2:
                continue
            classifier, real = self.classifiers[name], rows.data[name][has(rows, name)]
            train = self.fit_rows.data[name][has(self.fit_rows, name)]
            features = (classifier_features(classifier, values) for values in (train, real))
            metrics[f"frechet_real/{name}"] = frechet_distance(*features)
            for prefix, density in self._densities:
                distance = sample_distance(self.model, name, classifier, real, density=density)
                metrics[f"{prefix}frechet/{name}"] = distance
        return metrics

    def probes(self) -> dict[str, float]:
        """Return how much the latents tell of the label.

        Returns:
            `probe/BLOCK`, the share of rows whose label a linear classifier reads off a block of latents, and the
            agreement of clusters of the shared latents with the labels: `clustering/adjusted_rand_index` and
            `clustering/normalized_mutual_information`.

        Raises:
            ValueError: if the rows have no labels.
        """
        check_labels(self.train, self.split)
        train, test = collect(self.model, [self.fit_rows], True), collect(self.model, self._rows(), True)
        metrics = {f"probe/{name}": share.rate for name, share in probe_labels(train, test).items()}
        return metrics | {f"clustering/{name}": value for name, value in cluster_agreement(train, test).items()}

    def imputation(self) -> dict[str, float]:
        """Predict held-out values from the others.

        Returns:
            `imputation/M/rmse`, the model's error, and `imputation/M/coverage50` and `.../coverage90` of its intervals;
            for each baseline `imputation/M/NAME`, its error, `imputation/M/NAME_minus_ours`, how much higher that is
            than the model's, and `imputation/M/NAME_minus_ours_se`, the standard error of that over rows.
        """
        metrics = {}
        baselines, left_out = fit_baselines(self.fit_rows, self._latent_dim, self.factor_analysis)
        for baseline, reason in left_out.items():
            self.progress(f"{baseline} skipped: {reason}")
        for name in self._float_modalities:
            ours = {}
            for prefix, density in self._densities:
                ours[prefix] = held_out_errors(self.model, self._rows(), name, self.num_draws, density)
                metrics[f"{prefix}imputation/{name}/rmse"] = ours[prefix].rmse
                for share, inside in zip(INTERVALS, ours[prefix].coverage, strict=True):
                    if not math.isnan(inside):
                        metrics[f"{prefix}imputation/{name}/coverage{share:.0%}".removesuffix("%")] = inside
            for baseline, imputer in baselines.items():
                errors = baseline_errors(imputer, self._rows(), name)
                place = f"imputation/{name}/{baseline}"
                metrics[place] = errors.rmse
                metrics[f"{place}_minus_ours"], metrics[f"{place}_minus_ours_se"] = errors.minus(ours[""])
        return metrics

    def cells(self) -> dict[str, float]:
        """Predict held-out cells from the others, their modality's own among them; see `held_out_cells`.

        Of tables whose columns differ in kind, cells of real and positive columns are held out.
        """
        infos, columns = self.train.manifest.modalities, {}
        for name in self._float_modalities:
            if name in self.model.config.missing_cells:
                kinds = [column.kind for column in infos[name].columns or ()]
                places = [place for place, kind in enumerate(kinds) if kind in ("real", "positive")]
                columns[name] = torch.tensor(places if kinds else range(math.prod(infos[name].shape)))
        columns = {name: places for name, places in columns.items() if len(places)}
        if not columns:
            self.progress("cells skipped: the model was trained without missing cells of floating-point modalities")
            return {}
        return held_out_cells(self.model, columns, self.fit_rows, self._rows, self.num_draws, self.progress)

    def robustness(self, removal: Removal) -> dict[str, float]:
        """Measure imputation, coherence and probes from what is left when modalities are removed.

        Returns:
            `missing/HOW/RATE/rmse/M`, `.../coverage90/M`, `.../rmse_ridge/M` (without missing cells) and, with labels,
            `.../coherence/M` and `.../probe/BLOCK`; HOW is `random` or `label` (the larger the label, the more is
            removed), RATE is in percent. A row that has lost everything counts: it is predicted without any knowledge
            of it. For the NLL see `dmvae.platform.evaluate.nll_table`.
        """
        metrics = {}
        ridge = None if self.fit_rows.cells else Ridge(self.fit_rows)
        probes = fit_probes(collect(self.model, [self.fit_rows], True)) if self.has_labels else {}
        for place, hide in removal.each():
            for name in self._float_modalities:
                errors = held_out_errors(self.model, self._rows(), name, 20, self.fitted, hide=hide)
                metrics[f"{place}/rmse/{name}"] = errors.rmse
                if not math.isnan(errors.coverage[-1]):
                    metrics[f"{place}/coverage90/{name}"] = errors.coverage[-1]
                if ridge is not None:
                    metrics[f"{place}/rmse_ridge/{name}"] = baseline_errors(ridge, self._rows(), name, hide).rmse
            for name, classifier in self.classifiers.items() if self.has_labels else ():
                shares = (
                    predicted_class_share(
                        self.model, batch, mask_modalities(hide(batch), name), classifier, name, self.fitted
                    )
                    for batch in self._rows()
                )
                metrics[f"{place}/coherence/{name}"] = sum(shares, Proportion()).rate
            left = collect(self.model, map(hide, self._rows()), True) if probes else None
            for name, probe in probes.items() if left else ():
                assert left is not None
                metrics[f"{place}/probe/{name}"] = probe_share(probe, left, name, count_all=True).rate
        return metrics

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
    def fitted(self) -> FittedPrior | None:
        """What predictions are made with: `density`, or the model's own prior; None for a standard normal."""
        return self.density or self.model.fitted_prior

    @property
    def _densities(self) -> tuple[tuple[str, FittedPrior | None], ...]:
        own = self.model.fitted_prior
        standard = () if own is None else (("standard_prior/", None),)
        return (("", own), *standard, *(() if self.density is None else (("density/", self.density),)))

    @property
    def _latent_dim(self) -> int:
        return self.model.config.latent_dim + sum(self.model.config.private_dims.values())

    @property
    def _float_modalities(self) -> tuple[str, ...]:
        infos = self.train.manifest.modalities
        return tuple(name for name in self.model.config.modalities if infos[name].dtype != "int64")

    @property
    def density_fault(self) -> str:
        """Why linear densities cannot be compared with the model's; empty if they can."""
        config, likelihoods = self.model.config, self.model.likelihoods
        others = sorted({d for name, d in config.distributions.items() if not likelihoods[name].is_continuous})
        if others or self._float_modalities != config.modalities:
            return f"they are densities of floating-point values, but the model has {others or ['integers']}"
        if self.train.manifest.missing_cells:
            return f"they are of rows without missing cells, which {list(self.train.manifest.missing_cells)} have"
        return ""

    @cached_property
    def factor_analysis(self) -> FactorAnalysis | None:
        """Factor analysis of the floating-point modalities of the training rows.

        None below two features, or with missing cells.
        """
        num_features = sum(math.prod(self.model.config.shapes[name]) for name in self._float_modalities)
        if num_features < 2 or self.train.manifest.missing_cells:
            return None
        others = set(self.model.config.modalities) - set(self._float_modalities)
        rows = (mask_modalities(batch, *others) for batch in _blocks(self.train))
        return fit_factor_analysis(rows, mask_modalities(self.fit_rows, *others))

    @property
    def _num_features(self) -> int:
        return sum(map(math.prod, self.model.config.shapes.values()))

    def _sources(self, target: str) -> Iterator[tuple[str, ...]]:
        others = [name for name in self.model.config.modalities if name != target]
        sizes = range(1, len(others) + 1) if len(others) < _ALL_SUBSETS else sorted({1, len(others)})
        return chain.from_iterable(combinations(others, size) for size in sizes)

    def _rows(self) -> Iterator[Batch]:
        return _blocks(self.split)


def first_rows(split: Split, num: int = MAX_FIT_ROWS) -> Batch:
    """Read a split's first rows, `num` at most, as one batch."""
    return join([split.read(np.arange(min(num, len(split))))])


def first_blocks(split: Split, num: int = MAX_FIT_ROWS) -> Iterator[Batch]:
    """Read a split's first rows, at least `num` if it has them, in batches."""
    return islice(_blocks(split), math.ceil(num / _BLOCK_ROWS))


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
            f"Cannot compute coherence or probes: splits {without_any} of {splits[0].where} have no labels. "
            "Remove these measures."
        )
