"""What one model is worth on one split: the NLL of its rows, and the measures beside it."""

import json
import math
import time
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
from dmvae.evaluation.suite import EvaluationSuite
from dmvae.model.dmvae import DMVAE, MODEL_CONFIG, MODEL_WEIGHTS
from dmvae.platform.cluster import local_cluster
from dmvae.platform.evaluate.checks import check_fit, check_measures, check_support
from dmvae.platform.evaluate.nll_table import Task, evaluate_nll
from dmvae.platform.evaluate.row_store import RowStore
from dmvae.platform.remote_fs import local
from dmvae.training.checkpoint import RUN_CONFIG


@dataclass(frozen=True)
class Extras:
    """What `jobs.evaluate` adds to the judgement at the end of a run.

    Attributes:
        output: a folder for per-row results, which the same command goes on with.
        density_components: Gaussians of a density fitted to the training rows' latents; 0: the prior alone.
        missing_rates: of the measure `robustness`.
        device: where the NLL is computed.
    """

    output: Path | None = None
    density_components: int = 0
    missing_rates: tuple[float, ...] = (0.0, 0.25, 0.5, 0.75)
    device: Device = "auto"


def judge(
    model: str,
    dataset: Dataset,
    config: EvaluationConfig,
    train_split: str,
    workers: int,
    progress: Callable[[str], None],
    extras: Extras | None = None,
) -> dict[str, float]:
    """Return the NLL of a split and the measures that were asked for; every name begins with the split's.

    Args:
        model: a model's or a checkpoint's folder, or its URI.
        dataset: with the model's modalities.
        config: split, draws, proposal, seed, measures.
        train_split: what rivals, classifiers and densities are fitted to.
        workers: as in `evaluate_nll`.
        progress: gets lines for a person.
        extras: what `jobs.evaluate` asks for beyond that.

    Raises:
        ValueError: if labels are needed and not there, or a modality is unknown.
    """
    with local(model) as folder:
        return _judge(model, folder, dataset, config, train_split, workers, progress, extras or Extras())


def _judge(
    place: str,
    folder: Path,
    dataset: Dataset,
    config: EvaluationConfig,
    train_split: str,
    workers: int,
    progress: Callable[[str], None],
    extras: Extras,
) -> dict[str, float]:
    model, split = DMVAE.load(folder), dataset.split(config.split)
    check_measures(model.config, config, dataset, train_split)
    quality = EvaluationSuite(model, dataset.split(train_split), split)
    progress(f"NLL of {config.split}: {len(split):,} rows, {config.num_draws} draws each")
    show = Progress(progress, f"NLL of {config.split}")
    removal = quality.removal(extras.missing_rates) if "robustness" in config.measures else None
    task = Task(place, dataset.where, config, extras.device, removal)
    store = None if extras.output is None else RowStore(extras.output, _key(folder, task, dataset))
    table = evaluate_nll(task, workers, show, store)
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
            assert removal is not None
            figures |= quality.robustness(removal)
        else:
            figures |= getattr(quality, measure)()
    return {f"{config.split}/{name}": value for name, value in figures.items()}


def evaluate(config: EvaluateConfig, progress: Callable[[str], None]) -> dict[str, float]:
    """Run `jobs.evaluate`: the summary of the split's NLL under a model, and the measures that were asked for.

    Raises:
        ValueError: if model and dataset do not fit, the split does not exist, or labels are needed and not there.
    """
    dataset = open_dataset(config.dataset)
    if is_uri(config.model) and config.output is None:
        raise ValueError(
            f"results of a model at a URI are written to a folder that is named; got model={config.model!r} alone. "
            "Set output."
        )
    with local(config.model) as folder:
        model = DMVAE.load(folder)
        _note_other_dataset(folder, dataset, progress)
    check_fit(model, dataset)
    check_support(model.config, dataset.split(config.evaluation.split), model.dtype)
    for name, info in dataset.manifest.modalities.items():
        if info.log_jacobian is None:
            progress(f"{name}: add the sum of a row's values as read for the NLL of the stored values (log1p)")
        elif info.log_jacobian:
            progress(f"{name}: add {info.log_jacobian:.3f} nats a row that has it for the NLL of the stored values")
    output = Path(config.output or _output(Path(config.model), config.evaluation.split))
    extras = Extras(output, config.density_components, config.missing_rates, config.device)
    with local_cluster(config.workers) if config.workers > 1 else nullcontext():
        figures = judge(config.model, dataset, config.evaluation, config.train_split, config.workers, progress, extras)
    # JSON has no NaN: a figure of no rows is null
    known = {name: value if math.isfinite(value) else None for name, value in figures.items()}
    summary = {"figures": known, "settings": config.model_dump(mode="json")}
    write_atomically(output / "summary.json", json.dumps(summary, indent=2, allow_nan=False) + "\n")
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


def _key(folder: Path, task: Task, dataset: Dataset) -> str:
    """Name all that per-row figures depend on: the model's files, the dataset and the estimate's settings."""
    weights = [sha256_of(Path(folder, name))
               for name in (MODEL_CONFIG, MODEL_WEIGHTS)]  # fmt: skip
    # the chunk changes no draw, only the last bits of sums
    settings = task.config.model_dump(mode="json", exclude={"chunk", "measures"})
    removal = [asdict(task.removal)] if task.removal else []
    return json.dumps([*weights, dataset.manifest.fingerprint, noise.VERSION, settings, *removal], sort_keys=True)


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
