"""The negative log-likelihood of a split under a model, in one process or spread over a cluster's."""

import hashlib
import json
import math
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch

from dmvae.batch import Batch
from dmvae.bound import negative_bound
from dmvae.checkpoint import RUN_CONFIG
from dmvae.comparison import Quality
from dmvae.config.evaluation import EvaluateConfig, EvaluationConfig
from dmvae.data.dataset import Dataset, open_dataset
from dmvae.latents import fit_density
from dmvae.metrics import has
from dmvae.missing import without
from dmvae.model import DMVAE, MODEL_CONFIG, MODEL_WEIGHTS
from dmvae.nll import NLLEstimate
from dmvae.platform.checks import check_fit, check_measures, check_support
from dmvae.platform.cluster import local_cluster, resources
from dmvae.platform.lane import write_atomically
from dmvae.platform.rows import BLOCK_ROWS, Columns, RowStore

_COLUMNS = ("nll", "se", "ess", "khat", "trusted")


@dataclass(frozen=True, eq=False)
class NLLTable:
    """Per-row estimates of a split, in its order.

    Attributes:
        columns: `id`, and of each row `nll` and its Monte Carlo error `se` in nats, `ess`, `khat`, `trusted`,
            `proposal`, `bound` (the negative joint bound) and `is_density`; with `each_modality` also `marginal/M`,
            `conditional/M` and their errors `marginal_se/M`, `conditional_se/M`, NaN where the row lacks M or, for
            the conditional, has nothing else.
        is_density: whether every observed value has a density under the model; false for grey Bernoulli values.
        proposal: where latents were drawn from.
    """

    columns: Columns

    @property
    def is_density(self) -> bool:
        """Whether every observed value has a density under the model; false for grey Bernoulli values."""
        return bool(self.columns["is_density"].all())

    @property
    def proposal(self) -> str:
        """Where latents were drawn from."""
        return str(self.columns["proposal"][0])

    @property
    def name(self) -> str:
        """`nll`, or `bce` where the figure is a binary cross entropy and no likelihood."""
        return "nll" if self.is_density else "bce"

    def summary(self) -> dict[str, float]:
        """Return the mean per row in nats, its errors (over rows; Monte Carlo alone), and the draws' quality.

        `_ess_p05` and `_khat_p95` are percentiles over rows, `_untrusted` is the share and `_untrusted_rows` the count
        of rows whose error is not to be believed, `bound_gap` is how far the joint bound lies above.
        """
        nll, name = self.columns["nll"], self.name
        gap = self.columns["bound"] - nll
        figures = _mean(name, nll, self.columns["se"])
        figures |= {f"{name}_ess": float(np.median(self.columns["ess"]))}
        figures |= {f"{name}_ess_p{q:02d}": float(np.percentile(self.columns["ess"], q)) for q in (5, 25)}
        khat = self.columns["khat"][np.isfinite(self.columns["khat"])]
        figures |= {f"{name}_khat_p{q}": float(np.percentile(khat, q)) for q in (50, 95) if len(khat)}
        untrusted = ~self.columns["trusted"].astype(bool)
        figures |= {f"{name}_untrusted": float(untrusted.mean()), f"{name}_untrusted_rows": float(untrusted.sum())}
        figures |= {f"{name}_bound_gap": float(gap.mean()), f"{name}_rows": float(len(nll))}
        for key in sorted(self.columns):
            kind, _, modality = key.partition("/")
            if kind in ("marginal", "conditional"):
                here = np.isfinite(self.columns[key])
                errors = self.columns[f"{kind}_se/{modality}"]
                figures |= _mean(f"{name}_{kind}/{modality}", self.columns[key][here], errors[here])
        return figures


def _mean(name: str, nll: np.ndarray, se: np.ndarray) -> dict[str, float]:
    stem, _, modality = name.partition("/")
    end = f"/{modality}" if modality else ""
    rows = len(nll)
    return {
        f"{stem}{end}": float(nll.mean()) if rows else math.nan,
        f"{stem}_se{end}": float(nll.std(ddof=1) / math.sqrt(rows)) if rows > 1 else math.nan,
        f"{stem}_mc_se{end}": float(np.sqrt(np.square(se).sum()) / rows) if rows else math.nan,
    }


def evaluate_nll(
    model_dir: Path,
    dataset: str,
    config: EvaluationConfig,
    workers: int = 1,
    progress: Callable[[int, int], None] = lambda done, total: None,
    store: RowStore | None = None,
) -> NLLTable:
    """Estimate the joint NLL of every row of a split over what the row has.

    A row's estimate depends on the model, the seed and its id alone.

    Args:
        model_dir: a model's or a checkpoint's folder.
        dataset: a dataset's folder.
        config: split, draws, proposal, seed.
        workers: with more than one, Ray actors on the cluster that is already connected.
        progress: called with (blocks done, blocks in all).
        store: keeps blocks as they are done; what it has is not computed again.
    """
    total = -(-len(open_dataset(dataset).split(config.split)) // BLOCK_ROWS)
    blocks: dict[int, Columns] = {} if store is None else store.blocks()
    todo = [number for number in range(total) if number not in blocks]
    args = (str(model_dir), str(Path(dataset).absolute()), config)
    try:
        for number, block in _estimates(args, min(workers, len(todo)), todo):
            blocks[number] = block
            if store is not None:
                store.add(number, block)
            progress(len(blocks), total)
    finally:
        if store is not None:
            store.flush()
    columns = {name: np.concatenate([blocks[number][name] for number in range(total)]) for name in blocks[0]}
    if store is not None and todo:
        store.finish(columns)
    return NLLTable(columns)


@dataclass(frozen=True)
class Extras:
    """What `jobs.evaluate` adds to the judgement at the end of a run.

    Attributes:
        output: a folder for per-row results, which the same command goes on with.
        density_components: Gaussians of a density fitted to the training rows' latents; 0: the prior alone.
        missing_rates: of the measure `robustness`.
    """

    output: Path | None = None
    density_components: int = 0
    missing_rates: tuple[float, ...] = (0.0, 0.25, 0.5, 0.75)


class _Evaluator:
    """A process's model and rows; the unit of work is a block of rows."""

    def __init__(self, model_dir: str, dataset: str, config: EvaluationConfig) -> None:
        self._model = DMVAE.load(model_dir)
        self._model.to("cuda" if torch.cuda.is_available() else "cpu")
        self._split, self._config = open_dataset(dataset).split(config.split), config

    def estimate(self, number: int) -> tuple[int, Columns]:
        """Return the figures of block `number`."""
        model, config = self._model, self._config
        rows = np.arange(number * BLOCK_ROWS, min((number + 1) * BLOCK_ROWS, len(self._split)))
        batch = self._split.read(rows, model.dtype)
        counted = config.modalities or model.config.modalities
        estimate = self._estimate(batch, counted)
        columns: Columns = {name: getattr(estimate, name).cpu().numpy() for name in _COLUMNS}
        columns["bound"] = negative_bound(model, _only(batch, counted), seed=config.seed).cpu().numpy()
        columns["proposal"] = np.full(len(batch), estimate.proposal)
        columns["is_density"] = np.full(len(batch), self._is_density(batch, counted))
        if config.each_modality:
            columns |= self._each(batch, counted, columns["nll"], columns["se"])
        return number, {"id": np.asarray(batch.ids), **columns}

    def _estimate(self, batch: Batch, modalities: Sequence[str]) -> NLLEstimate:
        config = self._config
        return self._model.joint_nll(
            batch, config.num_draws, config.chunk, config.seed, tuple(modalities), config.proposal
        )

    def _is_density(self, batch: Batch, counted: Sequence[str]) -> bool:
        masks = batch.masks or {}
        return all(
            self._model.likelihoods[name].is_density(values[masks[name]] if name in masks else values)
            for name, values in batch.data.items()
            if name in counted
        )

    def _each(self, batch: Batch, counted: Sequence[str], nll: np.ndarray, se: np.ndarray) -> Columns:
        """Return of each modality m the marginal NLL, and the conditional one where the row has anything else."""
        columns: Columns = {}
        present = {name: has(batch, name).numpy() for name in counted}
        others = np.sum(list(present.values()), axis=0) > 1
        for name in counted:
            here, both = present[name], present[name] & others
            for kind in ("marginal", "marginal_se", "conditional", "conditional_se"):
                columns[f"{kind}/{name}"] = np.full(len(batch), math.nan)
            # a row that has nothing else has its marginal already
            columns[f"marginal/{name}"][here], columns[f"marginal_se/{name}"][here] = nll[here], se[here]
            if not both.any():
                continue
            rows = batch[torch.from_numpy(both)]
            alone = self._estimate(rows, (name,))
            rest = self._estimate(rows, [other for other in counted if other != name])
            rest_nll, rest_se = rest.nll.cpu().numpy(), rest.se.cpu().numpy()
            columns[f"marginal/{name}"][both] = alone.nll.cpu().numpy()
            columns[f"marginal_se/{name}"][both] = alone.se.cpu().numpy()
            columns[f"conditional/{name}"][both] = nll[both] - rest_nll
            columns[f"conditional_se/{name}"][both] = np.hypot(se[both], rest_se)
        return columns


def _only(batch: Batch, names: Sequence[str]) -> Batch:
    return without(batch, *(name for name in batch.data if name not in names))


def _estimates(
    args: tuple[str, str, EvaluationConfig], workers: int, todo: Sequence[int]
) -> Iterator[tuple[int, Columns]]:
    # an actor that the cluster has no CPU for would be given a block and never answer
    workers = min(workers, int(resources().get("CPU", 1))) if workers > 1 else workers
    if workers <= 1:
        if todo:
            yield from map(_Evaluator(*args).estimate, todo)
        return
    import ray
    from ray.util import ActorPool

    has_gpus = resources().get("GPU", 0) >= workers
    actor: Any = ray.remote(num_cpus=1, num_gpus=int(has_gpus))(_Evaluator)
    pool = ActorPool([actor.remote(*args) for _ in range(workers)])
    yield from pool.map_unordered(lambda evaluator, number: evaluator.estimate.remote(number), list(todo))


def judge(
    model_dir: Path,
    dataset: Dataset,
    config: EvaluationConfig,
    train_split: str,
    workers: int,
    progress: Callable[[str], None],
    extras: Extras | None = None,
) -> dict[str, float]:
    """Return the NLL of a split and the measures that were asked for; every name begins with the split's.

    Args:
        model_dir: a model's or a checkpoint's folder.
        dataset: with the model's modalities.
        config: split, draws, proposal, seed, measures.
        train_split: what rivals, classifiers and densities are fitted to.
        workers: as in `evaluate_nll`.
        progress: gets lines for a person.
        extras: what `jobs.evaluate` asks for beyond that.

    Raises:
        ValueError: if labels are needed and not there, or a modality is unknown.
    """
    extras = extras or Extras()
    model, split = DMVAE.load(model_dir), dataset.split(config.split)
    check_measures(model.config, config, dataset, train_split)
    quality = Quality(model, dataset.split(train_split), split)
    progress(f"NLL of {config.split}: {len(split):,} rows, {config.num_draws} draws each")
    show = Progress(progress, f"NLL of {config.split}")
    store = None if extras.output is None else RowStore(extras.output, _key(model_dir, config, dataset))
    table = evaluate_nll(model_dir, str(dataset.path), config, workers, show, store)
    figures = table.summary()
    if extras.density_components:
        progress("fitting a density to the training rows' latents")
        density = fit_density(model, quality.fit_rows, extras.density_components, config.seed)
        if extras.output is not None:
            density.save(extras.output)
        quality = replace(quality, density=density)
    for measure in config.measures:
        progress(f"judging {measure}")
        if measure == "rivals":
            fault = quality.rivals_fault or (
                "" if config.modalities is None else "evaluation.modalities leaves some out"
            )
            figures |= {} if fault else quality.rivals(table.columns["nll"])
            if fault:
                progress(f"rivals are left out: {fault}")
        elif measure == "robustness":
            figures |= quality.robustness(extras.missing_rates)
        else:
            figures |= getattr(quality, measure)()
    return {f"{config.split}/{name}": value for name, value in figures.items()}


def evaluate(config: EvaluateConfig, progress: Callable[[str], None]) -> dict[str, float]:
    """Run `jobs.evaluate`: the summary of the split's NLL under a model, and the measures that were asked for.

    Raises:
        ValueError: if model and dataset do not fit, the split does not exist, or labels are needed and not there.
    """
    dataset = open_dataset(config.dataset)
    model_dir = Path(config.model)
    model = DMVAE.load(model_dir)
    check_fit(model, dataset)
    check_support(model.config, dataset.split(config.evaluation.split), model.dtype)
    _note_other_dataset(model_dir, dataset, progress)
    for name, info in dataset.manifest.modalities.items():
        if info.log_jacobian:
            progress(f"{name}: add {info.log_jacobian:.3f} nats a row that has it for the NLL of the stored values")
    output = Path(config.output or _output(model_dir, config.evaluation.split))
    extras = Extras(output, config.density_components, config.missing_rates)
    with local_cluster(config.workers) if config.workers > 1 else nullcontext():
        figures = judge(model_dir, dataset, config.evaluation, config.train_split, config.workers, progress, extras)
    summary = {"figures": figures, "settings": config.model_dump(mode="json")}
    write_atomically(output / "summary.json", json.dumps(summary, indent=2) + "\n")
    progress(f"per row   {output / 'rows.parquet'}")
    progress(f"summary   {output / 'summary.json'}")
    return figures


def _output(model_dir: Path, split: str) -> Path:
    """Return a folder for results: beside a run's checkpoint, which may be replaced, else in the model's."""
    is_run = (model_dir.absolute().parent / RUN_CONFIG).is_file()
    return model_dir.parent / f"evaluation-{model_dir.name}-{split}" if is_run else model_dir / f"evaluation-{split}"


def _note_other_dataset(model_dir: Path, dataset: Dataset, progress: Callable[[str], None]) -> None:
    file = model_dir / RUN_CONFIG
    trained = json.loads(file.read_text()).get("dataset", {}).get("fingerprint") if file.is_file() else None
    if trained not in (None, dataset.manifest.fingerprint):
        progress("note: this is not the dataset that the model was trained on; values may be scaled otherwise")


def _key(model_dir: Path, config: EvaluationConfig, dataset: Dataset) -> str:
    """Name all that per-row figures depend on: the model's files, the dataset and the estimate's settings."""
    weights = [hashlib.sha256((model_dir / name).read_bytes()).hexdigest()
               for name in (MODEL_CONFIG, MODEL_WEIGHTS)]  # fmt: skip
    # the chunk changes no draw, only the last bits of sums
    settings = config.model_dump(mode="json", exclude={"chunk", "measures"})
    return json.dumps([*weights, dataset.manifest.fingerprint, settings], sort_keys=True)


class Progress:
    """Tell a person how far a loop has come, every few seconds, with the time left."""

    def __init__(self, say: Callable[[str], None], what: str) -> None:
        self._say, self._what = say, what
        self._start = self._said = time.monotonic()

    def __call__(self, done: int, total: int) -> None:
        """Note that `done` of `total` units are done."""
        now = time.monotonic()
        if now - self._said > 5 and done < total:
            left = int((now - self._start) / done * (total - done))
            self._say(f"{self._what}  {done / total:4.0%}  {left // 60}:{left % 60:02d} left")
            self._said = now
