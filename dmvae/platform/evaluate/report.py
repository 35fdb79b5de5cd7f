"""A run's report: everything that its pictures need is computed here, written and recorded."""

import json
from collections.abc import Callable
from pathlib import Path

import torch

from dmvae.config.report import ReportConfig
from dmvae.data.reading.dataset import open_dataset
from dmvae.data.scaling import Scale
from dmvae.evaluation.latents import collect, fit_density
from dmvae.evaluation.suite import EvaluationSuite, first_rows
from dmvae.model.dmvae import DMVAE, MODEL_CONFIG
from dmvae.platform.evaluate.checks import check_fit
from dmvae.platform.tracking.outbox import RUN_FILE, TrackedRun

_MISSING_RATES = (0.0, 0.25, 0.5, 0.75)
_NLL_ROWS = 128
_MAP_ROWS = 1000


def report(config: ReportConfig, progress: Callable[[str], None]) -> Path:
    """Write `report.html` and its PNGs for a run or a model, and queue them for the run's MLflow record.

    Returns:
        The HTML file.

    Raises:
        ValueError: if model and dataset do not fit, or the split does not exist.
    """
    from dmvae.report import charts
    from dmvae.report import images as pictures
    from dmvae.report.html_report import Picture, write_report

    given = Path(config.model)
    model_dir = given if (given / MODEL_CONFIG).is_file() or not (given / "best").is_dir() else given / "best"
    run_dir = model_dir if model_dir == given and not (given.parent / "tracking").is_dir() else model_dir.parent
    model, dataset = DMVAE.load(model_dir), open_dataset(config.dataset)
    check_fit(model, dataset)
    train, split = dataset.split(config.train_split), dataset.split(config.split)
    rows, folder = first_rows(split, _MAP_ROWS), Path(config.output or run_dir / "report")
    quality = EvaluationSuite(model, train, split, num_draws=20)
    drawn: list[Picture] = []
    curves = run_dir / "tracking" / "metrics.jsonl"
    if curves.is_file():
        drawn.append(charts.training_curves(curves))
    progress("fitting a density to the latents")
    density = fit_density(model, quality.fit_rows, config.density_components) if config.density_components else None
    quality = EvaluationSuite(model, train, split, density, num_draws=20)
    progress("decoding")
    scales = {name: Scale(info) for name, info in dataset.manifest.modalities.items()}
    drawn += pictures.reconstructions(model, rows, scales)
    drawn += pictures.cross_modal(model, rows, density, scales)
    drawn += charts.imputed_scatter(model, rows, density)
    drawn += pictures.prior_samples(model, rows, density, scales)
    drawn += pictures.traversals(model, rows, scales)
    drawn.append(charts.latent_map(collect(model, rows, return_mean=True)))
    progress(f"NLL of {min(len(rows), _NLL_ROWS)} rows")
    drawn.append(charts.weight_diagnostics(model.joint_nll(rows[:_NLL_ROWS], config.num_draws)))
    if quality.has_labels:
        progress("coherence")
        drawn.append(charts.coherence_matrix(quality.coherence()))
    progress("removing modalities")
    drawn.append(charts.missing_curves(quality.robustness(quality.removal(_MISSING_RATES))))
    facts = {
        "model": str(model_dir),
        "dataset": f"{config.dataset}, split {config.split}: {len(split):,} rows",
        "modalities": ", ".join(f"{name} ({_by(shape)})" for name, shape in model.config.shapes.items()),
        "latents": f"{model.config.latent_dim} shared; private: "
        + ", ".join(f"{name} {dim}" for name, dim in model.config.private_dims.items()),
        "parameters": f"{sum(p.numel() for p in model.parameters()):,}; torch {torch.__version__}",
    }
    file = write_report(folder, f"dmvae: {run_dir.name}", facts, drawn)
    _record(run_dir / "tracking", folder, progress)
    return file


def _by(shape: tuple[int, ...]) -> str:
    return " x ".join(map(str, shape))


def _record(spool_dir: Path, folder: Path, progress: Callable[[str], None]) -> None:
    """Queue the report for the run's MLflow record, if it has one; what cannot be delivered now, `jobs.sync` brings."""
    if not (spool_dir / RUN_FILE).is_file():
        return
    recorded = json.loads((spool_dir / RUN_FILE).read_text())
    with TrackedRun(recorded["uri"], recorded["run_id"], spool_dir).spool() as spool:
        ending = spool.status
        spool.artifact(folder)
        if ending == "FINISHED":
            spool.end("FINISHED")
    progress(f"recorded in MLflow run {recorded['run_id']}")
