"""Evaluate a model on one split: the NLL of every row, and the other measures that are asked for."""

import json
import math
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import asdict, dataclass, replace
from pathlib import Path

from dmvae.config.evaluation import Device, EvaluateConfig, EvaluationConfig
from dmvae.data.files import sha256_of, write_atomically
from dmvae.data.reading.dataset import Dataset, open_dataset
from dmvae.data.storage.location import is_uri
from dmvae.distributions import noise
from dmvae.evaluation.latents import fit_density
from dmvae.evaluation.measures import MEASURES, EvaluatedSplit
from dmvae.evaluation.standings import standings
from dmvae.evaluation.suite import EvaluationSuite
from dmvae.model.dmvae import DMVAE, MODEL_CONFIG, MODEL_WEIGHTS
from dmvae.platform.cluster import local_cluster
from dmvae.platform.evaluate.checks import check_fit, check_measures, check_support
from dmvae.platform.evaluate.nll_table import NLLTable, Task, evaluate_nll
from dmvae.platform.evaluate.row_store import RowStore
from dmvae.platform.records import read_run
from dmvae.platform.remote_fs import local
from dmvae.training.checkpoint import RUN_CONFIG


@dataclass(frozen=True)
class Extras:
    """Options of `jobs.evaluate` that the evaluation at the end of a run does not have.

    Attributes:
        output: a folder for per-row results, from which the same command resumes.
        density_components: Gaussians in a density fitted to the latents of the training rows; 0: the prior alone.
        missing_rates: shares of the modalities that `robustness` removes.
        device: where the NLL is computed.
        trust: packages whose code the model may import.
    """

    output: Path | None = None
    density_components: int = 0
    missing_rates: tuple[float, ...] = (0.0, 0.25, 0.5, 0.75)
    device: Device = "auto"
    trust: tuple[str, ...] = ()


def evaluate_split(
    model: str,
    dataset: Dataset,
    config: EvaluationConfig,
    train_split: str,
    workers: int,
    progress: Callable[[str], None],
    extras: Extras | None = None,
) -> dict[str, float]:
    """Return the NLL of a split and the measures that are asked for, each under `SPLIT/NAME`.

    Args:
        model: the folder of a model or a checkpoint, or its URI.
        dataset: with the modalities of the model.
        config: split, draws, proposal, seed, measures.
        train_split: what baselines, classifiers and densities are fitted to.
        workers: as in `evaluate_nll`.
        progress: called with lines about the progress.
        extras: options of `jobs.evaluate`.

    Raises:
        ValueError: if a measure needs labels that the dataset lacks, or a modality is unknown.
    """
    extras = extras or Extras()
    with local(model) as folder:
        loaded, split = DMVAE.load(folder, trust=extras.trust), dataset.split(config.split)
        check_measures(loaded.config, config, dataset, train_split)
        suite = EvaluationSuite(loaded, dataset.split(train_split), split, progress=progress)
        removal = suite.removal(extras.missing_rates) if "robustness" in config.measures else None
        task = Task(model, dataset.where, config, extras.device, removal, extras.trust)
        store = None if extras.output is None else RowStore(extras.output, _key(folder, task, dataset))
    progress(f"NLL of {config.split}: {len(split):,} rows, {config.num_draws} draws each")
    table = evaluate_nll(task, workers, progress, store)
    if extras.density_components:
        progress("fitting a density to the latents of the training rows")
        density = fit_density(loaded, suite.fit_rows, extras.density_components, config.seed)
        if extras.output is not None:
            density.save(extras.output)
        suite = replace(suite, density=density)
    metrics = table.summary() | _measure(suite, table, task, progress)
    for standing in standings(metrics):
        progress(str(standing))
    return {f"{config.split}/{name}": value for name, value in metrics.items()}


def _measure(suite: EvaluationSuite, table: NLLTable, task: Task, progress: Callable[[str], None]) -> dict[str, float]:
    """Return the metrics of every measure beside the NLL."""
    evaluated = EvaluatedSplit(suite, table.columns["nll"], task.config.modalities is None, task.removal)
    metrics: dict[str, float] = {}
    for name in task.config.measures:
        progress(f"computing {name}")
        metrics |= MEASURES[name].compute(evaluated)
    return metrics


def evaluate(config: EvaluateConfig, progress: Callable[[str], None]) -> dict[str, float]:
    """Run `jobs.evaluate`: write the NLL of every row, and a summary with all metrics; return the metrics.

    Raises:
        ValueError: if the model does not fit the dataset, the split does not exist, or labels are needed and missing.
    """
    dataset = open_dataset(config.dataset)
    if is_uri(config.model) and config.output is None:
        raise ValueError(
            f"output must be set for a model at a URI, but got model={config.model!r} alone. Set output to a folder."
        )
    with local(config.model) as folder:
        model = DMVAE.load(folder, trust=config.trust)
        _warn_of_other_dataset(folder, dataset, progress)
    check_fit(model, dataset)
    check_support(model.config, dataset.split(config.evaluation.split), model.dtype)
    output = Path(config.output or _default_output(Path(config.model), config.evaluation.split))
    extras = Extras(output, config.density_components, config.missing_rates, config.device, config.trust)
    with local_cluster(config.workers) if config.workers > 1 else nullcontext():
        metrics = evaluate_split(
            config.model, dataset, config.evaluation, config.train_split, config.workers, progress, extras
        )
    # JSON has no NaN: a metric of no rows is null
    known = {name: value if math.isfinite(value) else None for name, value in metrics.items()}
    summary = {"figures": known, "settings": config.model_dump(mode="json")}
    write_atomically(output / "summary.json", json.dumps(summary, indent=2, allow_nan=False) + "\n")
    for line in [*metric_lines(metrics), *_lines_about_scaling(dataset)]:
        progress(line)
    progress(f"per row   {output / 'rows.parquet'}")
    progress(f"summary   {output / 'summary.json'}")
    return metrics


def metric_lines(metrics: dict[str, float]) -> list[str]:
    """Return one line per metric, with names and values aligned."""
    width = max(map(len, metrics), default=0)
    values = {name: f"{value:,.4f}" for name, value in metrics.items()}
    value_width = max(map(len, values.values()), default=0)
    return [f"{name:<{width}}  {value:>{value_width}}" for name, value in values.items()]


def _lines_about_scaling(dataset: Dataset) -> list[str]:
    """Tell how to get from the NLL of the values as read to that of the stored values."""
    lines = []
    for name, info in dataset.manifest.modalities.items():
        if name in dataset.manifest.missing_cells and info.log_jacobian != 0:
            lines.append(
                f"{name}: for the NLL of the stored values, add the log-Jacobian of a row's observed cells "
                f"({info.scaling})"
            )
        elif info.log_jacobian is None:  # it differs from row to row
            lines.append(f"{name}: for the NLL of the stored values, add the log-Jacobian of a row ({info.scaling})")
        elif info.log_jacobian:
            lines.append(f"{name}: for the NLL of the stored values, add {info.log_jacobian:.3f} nats per observed row")
    return lines


def _default_output(model_dir: Path, split: str) -> Path:
    """Return a folder for results: beside the checkpoint of a run, which may be replaced, else in the model's."""
    is_run = (model_dir.absolute().parent / RUN_CONFIG).is_file()
    return model_dir.parent / f"evaluation-{model_dir.name}-{split}" if is_run else model_dir / f"evaluation-{split}"


def _warn_of_other_dataset(model_dir: Path, dataset: Dataset, progress: Callable[[str], None]) -> None:
    file = model_dir / RUN_CONFIG
    run = read_run(file)
    trained = None if run is None else run["dataset"]["fingerprint"]
    if trained not in (None, dataset.manifest.fingerprint):
        progress("warning: the model was trained on another dataset, whose values may be scaled differently")


def _key(folder: Path, task: Task, dataset: Dataset) -> str:
    """Identify everything that per-row results depend on: the model's files, the dataset, the settings."""
    weights = [sha256_of(folder / name) for name in (MODEL_CONFIG, MODEL_WEIGHTS)]
    # the chunk changes no draw, only the last bits of sums
    settings = task.config.model_dump(mode="json", exclude={"chunk", "measures"})
    removal = [asdict(task.removal)] if task.removal else []
    return json.dumps([*weights, dataset.manifest.fingerprint, noise.VERSION, settings, *removal], sort_keys=True)
