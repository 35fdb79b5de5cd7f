"""Draw the report of a run: compute what its pictures show, write them as one page, and record it in MLflow."""

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import torch

from dmvae.config.report import ReportConfig
from dmvae.data.batch import Batch
from dmvae.data.reading.dataset import Dataset, open_dataset
from dmvae.data.reading.split import Split
from dmvae.data.scaling import Scale
from dmvae.evaluation.latents import collect, fit_density
from dmvae.evaluation.standings import standings
from dmvae.evaluation.suite import EvaluationSuite, first_rows
from dmvae.model.dmvae import DMVAE, MODEL_CONFIG
from dmvae.platform.evaluate.checks import check_fit
from dmvae.platform.tracking.outbox import Outbox
from dmvae.platform.tracking.runs import is_configured, sync_command, with_credentials
from dmvae.platform.tracking.tracked_run import TrackedRun, read_run_record
from dmvae.report import charts, images
from dmvae.report.html_report import Picture, write_report

_MISSING_RATES = (0.0, 0.25, 0.5, 0.75)
_NLL_ROWS = 128
_MAP_ROWS = 1000


def report(config: ReportConfig, progress: Callable[[str], None]) -> Path:
    """Write `report.html` and its PNGs for a run or a model, and queue them for the run's MLflow record.

    Returns:
        The HTML file.

    Raises:
        ValueError: if the model does not fit the dataset, or the split does not exist.
    """
    model_dir, run_dir = _folders(Path(config.model))
    model, dataset = DMVAE.load(model_dir, trust=config.trust), open_dataset(config.dataset)
    check_fit(model, dataset)
    split = dataset.split(config.split)
    pictures: list[Picture] = []
    curves = run_dir / "tracking" / "metrics.jsonl"
    if curves.is_file():
        pictures.append(charts.training_curves(curves))
    suite = EvaluationSuite(model, dataset.split(config.train_split), split, num_draws=20, progress=progress)
    if config.density_components and model.fitted_prior is None:
        progress("fitting a density to the latents of the training rows")
        suite = replace(suite, density=fit_density(model, suite.fit_rows, config.density_components))
    rows = first_rows(split, _MAP_ROWS)
    progress("drawing predictions and samples")
    pictures += _predictions(suite, rows, dataset)
    pictures += _metrics(suite, rows, config.num_draws, progress)
    output = Path(config.output or run_dir / "report")
    file = write_report(output, f"dmvae: {run_dir.name}", _facts(model, model_dir, config, split), pictures)
    progress(f"pictures  {len(pictures)} PNG files in {output}")
    _record(run_dir / "tracking", output, progress)
    return file


def _folders(given: Path) -> tuple[Path, Path]:
    """Return the folder of the model, and that of its run (or the model's own, if it belongs to none)."""
    is_run = not (given / MODEL_CONFIG).is_file() and (given / "best").is_dir()
    if is_run:
        return given / "best", given
    return given, given.parent if (given.parent / "tracking").is_dir() else given


def _predictions(suite: EvaluationSuite, rows: Batch, dataset: Dataset) -> list[Picture]:
    """Draw what the model makes of rows: reconstructions, imputations, samples and latents."""
    model, density = suite.model, suite.fitted
    scales = {name: Scale(info) for name, info in dataset.manifest.modalities.items()}
    return [
        *images.reconstructions(model, rows, scales),
        *images.cross_modal(model, rows, density, scales),
        *charts.imputed_scatter(model, rows, density),
        *images.prior_samples(model, rows, density, scales),
        *images.traversals(model, rows, scales),
        charts.latent_map(collect(model, rows, return_mean=True), label_name=dataset.manifest.label_name),
    ]


def _metrics(suite: EvaluationSuite, rows: Batch, num_draws: int, progress: Callable[[str], None]) -> list[Picture]:
    """Draw the quality of the NLL estimate, the baselines, coherence if there are labels, and robustness."""
    progress(f"NLL of {min(len(rows), _NLL_ROWS)} rows, {num_draws} draws each")
    estimate = suite.model.joint_nll(rows[:_NLL_ROWS], num_draws)
    pictures = [charts.weight_diagnostics(estimate)]
    progress("fitting baselines")
    metrics = {} if suite.density_fault else suite.baselines(estimate.nll.cpu().double().numpy())
    metrics |= suite.imputation()
    if standings(metrics):
        pictures.append(charts.baseline_comparison(metrics))
    if suite.has_labels:
        progress("computing coherence")
        pictures.append(charts.coherence_matrix(suite.coherence()))
    progress("computing robustness")
    pictures.append(charts.missing_curves(suite.robustness(suite.removal(_MISSING_RATES))))
    return pictures


def _facts(model: DMVAE, model_dir: Path, config: ReportConfig, split: Split) -> dict[str, str]:
    """Return the table at the head of the page."""
    shapes = {name: " x ".join(map(str, shape)) for name, shape in model.config.shapes.items()}
    private = ", ".join(f"{name} {dim}" for name, dim in model.config.private_dims.items())
    return {
        "model": str(model_dir),
        "dataset": f"{config.dataset}, split {config.split}: {len(split):,} rows",
        "modalities": ", ".join(f"{name} ({shape})" for name, shape in shapes.items()),
        "latent dimensions": f"{model.config.latent_dim} shared; private: {private}",
        "parameters": f"{sum(p.numel() for p in model.parameters()):,}; torch {torch.__version__}",
    }


def _record(tracking_dir: Path, output: Path, progress: Callable[[str], None]) -> None:
    """Queue the report for the run's MLflow record, if it has one; `jobs.sync` delivers it if MLflow is down now."""
    recorded = read_run_record(tracking_dir)
    if recorded is None:
        return
    is_trusted = is_configured(recorded.uri)  # a stranger's folder may name any server
    with Outbox(
        TrackedRun(with_credentials(recorded.uri), recorded.run_id, tracking_dir), background=is_trusted
    ) as outbox:
        status = outbox.status
        outbox.log_artifact(output)
        if status == "FINISHED":
            outbox.end("FINISHED")
    if is_trusted:
        progress(f"recorded in MLflow run {recorded.run_id}")
    else:
        command = sync_command(tracking_dir, recorded.uri)
        progress(f"note: The run was recorded on another MLflow server. To record the report there: {command}")
