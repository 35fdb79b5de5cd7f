"""Fit a model to data in this process: prepare, propose, train, and return the best model."""

import shutil
import sys
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn

from dmvae.config.data import ObjectsConfig, Scaling
from dmvae.config.likelihoods import suggest
from dmvae.config.training import TrainConfig
from dmvae.data.errors import DatasetError
from dmvae.data.inspection.profile import profile_dataset
from dmvae.data.inspection.suggestions import suggest_likelihoods, suggest_run, traits_of
from dmvae.data.inspection.value_stats import ValueStats
from dmvae.data.preparation.object_rows import ObjectRows
from dmvae.data.preparation.objects import read_objects
from dmvae.data.preparation.prepare import prepare
from dmvae.data.reading.dataset import Dataset, open_dataset
from dmvae.fitting.fitted import Fitted
from dmvae.fitting.history import History
from dmvae.training.loop import CheckpointDue, EpochEnded, MetricsLogged, StepSkipped, train
from dmvae.training.settings import resolve, trusted
from dmvae.training.setup import WorkerData, build_state
from dmvae.training.step import Collectives

Event = MetricsLogged | EpochEnded | StepSkipped | CheckpointDue
Settings = Mapping[str, Any]


def fit(
    data: Any,
    *,
    labels: Any = None,
    ids: Any = None,
    likelihood: Mapping[str, str] | None = None,
    scaling: Mapping[str, Scaling] | None = None,
    partial: str = "keep",
    validation: float = 0.1,
    model: Settings | None = None,
    optim: Settings | None = None,
    training: Settings | None = None,
    encoders: Mapping[str, nn.Module] | None = None,
    decoders: Mapping[str, nn.Module] | None = None,
    seed: int = 0,
    folder: str | Path | None = None,
    workers: int | None = None,
    track: bool | str = False,
    callbacks: Sequence[Callable[[Event], object]] = (),
    progress: bool | Callable[[str], None] = True,
) -> Fitted:
    """Fit a DMVAE to incomplete multimodal data, and return it with what is needed to use it.

    The data is prepared as `jobs.prepare` does, the settings that are left out are those that `jobs.inspect` suggests,
    and the training loop is that of `jobs.train`: the same settings give the same run. Ctrl-C ends training and keeps
    the best model so far.

    Args:
        data: a dict with an array, a tensor, a data frame or an AnnData for each modality, an AnnData, a MuData, a
            `Batch`, or the folder of a prepared dataset. Modalities are joined on ids: the index of data frames and the
            names of observations. A row that is absent, or all NaN or None, lacks the modality. Integers are read as
            counts or other numbers, unless the likelihood is one of classes.
        labels: one for each row, of any type, or the name of a column of `obs`; for pictures and evaluation only.
        ids: one for each row, for arrays.
        likelihood: by modality; default: suggested by the values.
        scaling: by modality; default: real values are standardised.
        partial: what becomes of a row that has some values of a modality and lacks others, as in `PrepareConfig`.
        validation: share of the rows that select the best epoch and end training early.
        model: settings of the model, as in the section `[model]` of a run's TOML file; likewise `optim`, `training`.
        optim: settings of the optimiser.
        training: settings of the loop, such as `{"epochs": 20, "batch_size": 64}`.
        encoders: networks of your own by modality, as in `DMVAE`. Other processes need import paths instead: name them
            in `model["architectures"]`.
        decoders: likewise.
        seed: of the split, the weights, the order of rows and all noise.
        folder: keeps the prepared dataset and the run; None: a temporary folder.
        workers: train in this number of processes with Ray Train; None: in this process.
        track: record the run in MLflow: a URI, or True for the one that jobs use.
        callbacks: called with each event of the loop: metrics, the end of an epoch, a skipped step.
        progress: False: print nothing; a function: called with each line.

    Raises:
        DatasetError: if the data cannot be read; the message names the part.
        ValueError: if a setting is unknown or does not fit the data.
        NonFiniteLossError: if the loss is NaN or infinite.
    """
    say = progress if callable(progress) else _print if progress else _ignore
    if workers is not None and (encoders or decoders):
        raise ValueError(
            "encoders and decoders cannot be sent to the workers. Name your networks by import path in "
            'model={"architectures": {...}}, or leave out workers.'
        )
    if workers is not None and callbacks:
        raise ValueError("callbacks are called in this process only. Leave out callbacks or workers.")
    if folder is not None:
        root, scratch = Path(folder).absolute(), None
    else:
        root = scratch = Path(tempfile.mkdtemp(prefix="dmvae-"))
    try:
        dataset = _open(data, labels, ids, likelihood, scaling, partial, validation, seed, root)
        config = _configure(dataset, root, seed, {"model": model, "optim": optim, "training": training}, track, workers)
        if workers is not None:
            return _fit_on_workers(config, dataset, say, scratch)
        with _tracked(config, dataset, root) if track else nullcontext() as record:
            hooks = callbacks if record is None else (record, *callbacks)
            return _fit_here(config, dataset, encoders, decoders, hooks, say, scratch)
    except BaseException:
        if scratch is not None:
            shutil.rmtree(scratch, ignore_errors=True)
        raise


def _open(
    data: Any,
    labels: Any,
    ids: Any,
    likelihood: Mapping[str, str] | None,
    scaling: Mapping[str, Scaling] | None,
    partial: str,
    validation: float,
    seed: int,
    root: Path,
) -> Dataset:
    """Prepare the data, unless it is a prepared dataset."""
    if not isinstance(data, str | Path):
        rows = read_objects(data, labels, ids, likelihood)
        return _prepared(rows, root / "data", dict(likelihood or {}), dict(scaling or {}), partial, validation, seed)
    given = {"labels": labels, "ids": ids, "likelihood": likelihood, "scaling": scaling}
    odd = [name for name, value in given.items() if value is not None]
    if odd:
        raise ValueError(f"{', '.join(odd)} cannot be set for a prepared dataset. Prepare it again with jobs.prepare.")
    return open_dataset(data)


def _prepared(
    rows: ObjectRows,
    target: Path,
    likelihood: dict[str, str],
    scaling: dict[str, Scaling],
    partial: str,
    validation: float,
    seed: int,
) -> Dataset:
    """Write the rows as a dataset, with a scaling and, for counts, a likelihood where none is set."""
    if not 0 < validation < 1:
        raise ValueError(f"validation must be a share between 0 and 1, but got {validation}.")
    for argument, names in (("likelihood", likelihood), ("scaling", scaling)):
        unknown = sorted(names.keys() - rows.rows.data.keys())
        if unknown:
            raise ValueError(f"Unknown modalities {unknown} in {argument}. Available: {', '.join(rows.rows.data)}.")
    for name, values in rows.rows.data.items():
        if name in rows.tables or values.dtype.kind != "f" or name in likelihood or name in scaling:
            continue
        found = _stats(values[rows.rows.present[name]])
        kind = traits_of(found)
        if kind.kind == "counts":
            likelihood[name] = suggest(kind)[0]
        elif kind.kind == "real":
            scaling[name] = "standardise"
    config = ObjectsConfig.model_validate(
        {
            "dataset": str(target),
            "seed": seed,
            "likelihood": likelihood,
            "scaling": scaling,
            "partial": partial,
            "splits": {"train": 1 - validation, "val": validation},
        }
    )
    return open_dataset(prepare(config, _ignore, rows))


def _stats(values: np.ndarray) -> ValueStats:
    flat = values.reshape(len(values), -1)
    stats = ValueStats(flat)
    stats.add(flat, np.arange(len(flat)))
    return stats


def _configure(
    dataset: Dataset,
    root: Path,
    seed: int,
    sections: Mapping[str, Settings | None],
    track: bool | str,
    workers: int | None,
) -> TrainConfig:
    """Return the settings of the run: the suggested ones, and over them those that are given."""
    profile = profile_dataset(dataset, _ignore)
    for split in ("train", "val"):
        if split in dataset.manifest.splits and not dataset.manifest.splits[split].rows:
            raise DatasetError(f"Too few rows: the split {split!r} has none. Add rows, or change validation.")
    suggested = suggest_run(profile, dataset.where, suggest_likelihoods(profile))
    tree = suggested.model_dump(exclude_unset=True)
    tree = _overlay(tree, {name: section for name, section in sections.items() if section is not None})
    tree |= {"name": "fit", "seed": seed}
    if workers is not None:
        tree |= {"workers": {"num": workers}, "runs_dir": str(root / "runs")}
    if isinstance(track, str) or (workers is not None and not track):
        tree["tracking"] = {"uri": track or f"sqlite:///{root}/mlflow.db"}
    return resolve(TrainConfig.model_validate(tree), dataset)


def _overlay(tree: Mapping[str, Any], over: Mapping[str, Any]) -> dict[str, Any]:
    """Lay settings over others; sections are merged, other values replaced."""
    merged = dict(tree)
    for key, value in over.items():
        is_section = isinstance(value, Mapping) and isinstance(merged.get(key), Mapping)
        merged[key] = _overlay(merged[key], value) if is_section else value
    return merged


def _fit_here(
    config: TrainConfig,
    dataset: Dataset,
    encoders: Mapping[str, nn.Module] | None,
    decoders: Mapping[str, nn.Module] | None,
    callbacks: Sequence[Callable[[Event], object]],
    say: Callable[[str], None],
    scratch: Path | None,
) -> Fitted:
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    state = build_state(config, device, encoders, decoders)
    data = WorkerData(config, 0, 1, state.model.dtype, device)
    history, best = History(), None
    try:
        for event in train(state, data, config, Collectives(state.model)):
            if isinstance(event, MetricsLogged):
                history.add(event.global_step, event.metrics)
            if isinstance(event, StepSkipped):
                say(f"warning: Skipped a step: {event.fault}")
            if isinstance(event, EpochEnded):
                if event.improved:
                    best = {name: tensor.clone() for name, tensor in state.model.state_dict().items()}
                value = event.metrics[f"val/{config.training.monitor}"]
                mark = "*" if event.improved else " "
                say(
                    f"epoch {event.epoch + 1}/{config.training.epochs}  val/{config.training.monitor} {value:.4f}{mark}"
                )
            for callback in callbacks:
                callback(event)
    except KeyboardInterrupt:
        kept = "the best model so far" if best is not None else "the weights as they are: no epoch has ended"
        say(f"interrupted in epoch {state.position.epoch + 1}; keeping {kept}")
    if best is not None:
        state.model.load_state_dict(best)
    return Fitted(state.model.eval(), config, dataset.manifest, history.table, dataset, scratch)


def _fit_on_workers(config: TrainConfig, dataset: Dataset, say: Callable[[str], None], scratch: Path | None) -> Fitted:
    from dmvae.model.dmvae import DMVAE
    from dmvae.platform.train.trainer import train_run

    summary = train_run(config, say)
    history = History.read(summary.run_dir / "tracking" / "metrics.jsonl")
    return Fitted(
        DMVAE.load(summary.run_dir / "best", trust=trusted(config.model)),
        config,
        dataset.manifest,
        history.table,
        dataset,
        scratch,
    )


@contextmanager
def _tracked(config: TrainConfig, dataset: Dataset, root: Path) -> Iterator[Callable[[Event], object]]:
    """Yield a callback that records metrics in MLflow."""
    from dmvae.platform.tracking.outbox import Outbox
    from dmvae.platform.tracking.runs import open_run
    from dmvae.platform.train.trainer import dataset_record
    from dmvae.training.settings import run_record

    params = {key: value for key, value in run_record(config, dataset.manifest).items() if key != "dataset"}
    run_dir = root / "runs" / config.name / "tracking"
    with (
        open_run(config.tracking, config.name, run_dir, params, dataset=dataset_record(config, dataset)) as tracked,
        Outbox(tracked) as outbox,
    ):

        def record(event: Event) -> None:
            if isinstance(event, MetricsLogged):
                outbox.log_metrics(event.metrics, event.global_step)

        yield record


def _print(line: str) -> None:
    """Show a line in place of the last one, as a notebook and a terminal do."""
    print(f"\r{line:<78}", end="", file=sys.stderr, flush=True)


def _ignore(line: str) -> None:
    pass
