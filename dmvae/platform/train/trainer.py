"""A training configuration to a trained, judged and recorded model."""

import json
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from ray.train import (
    CheckpointConfig,
    FailureConfig,
    Result,
    RunConfig,
    ScalingConfig,
    TrainingFailedError,
    UserCallback,
)
from ray.train.torch import TorchTrainer
from torch import nn

from dmvae.config.likelihoods import values_of
from dmvae.config.training import TrainConfig
from dmvae.data.format.manifest import Manifest
from dmvae.data.reading.dataset import Dataset, open_dataset
from dmvae.data.storage import location as place
from dmvae.model.dmvae import DMVAE
from dmvae.platform.cluster import limits, local_cluster, messages, resources
from dmvae.platform.errors import RunError
from dmvae.platform.evaluate.checks import check_data
from dmvae.platform.evaluate.evaluate import Extras, evaluate_split
from dmvae.platform.resume import ResumeRules
from dmvae.platform.tracking.outbox import TrackedRun, scrub
from dmvae.platform.tracking.runs import DatasetRecord, open_run, tracking_uri
from dmvae.platform.train.run_store import BEST, CHECKPOINTS, LAST, NUM_KEPT, RESULT, SCORE, RunStore
from dmvae.platform.train.worker import WorkerTask, work
from dmvae.training import checkpoint

_RULES = ResumeRules(
    "run",
    TrainConfig,
    may_change=(
        "training.patience",
        "training.log_steps",
        "training.checkpoint_*",
        "training.skip_nonfinite",
        "training.compile",
        "workers.*",
        "tracking.*",
        "runs_dir",
        "data.dataset",  # a dataset is identified by its fingerprint, wherever it is stored
    ),
    may_grow=("training.epochs",),
)


@dataclass(frozen=True)
class TrainSummary:
    """Where a finished run is and what it reached.

    Attributes:
        run_dir: its folder on this machine, with `best/` and `last/`.
        where: the same for a person: that folder, or the URI where they are for every machine.
        metrics: the best validation figure and the test figures.
        run_id: of the MLflow run.
        tracking_uri: where that is.
        was_finished: whether there was nothing left to do.
    """

    run_dir: Path
    where: str
    metrics: dict[str, float]
    run_id: str
    tracking_uri: str
    was_finished: bool


def train_run(config: TrainConfig, progress: Callable[[str], None]) -> TrainSummary:
    """Train, or go on training, the run that `config` describes; judge its best model; record both.

    Raises:
        RunError: if the run's folder belongs to another configuration or dataset, the workers cannot be had, or
            the loss became non-finite.
        ValueError: if dataset and model do not fit.
        TrackingError: if MLflow cannot be reached.
    """
    dataset = open_dataset(config.data.dataset)
    resolved = resolve(config, dataset)
    store = RunStore.open(config.runs_dir, config.name)
    store.download()
    record = run_record(resolved, dataset.manifest)
    _check_same_run(store, record)
    finished = _read_result(store, resolved)
    if finished is not None:
        return finished
    check_data(resolved, dataset)
    store.run_dir.mkdir(parents=True, exist_ok=True)
    params = {key: value for key, value in record.items() if key != "dataset"}
    with open_run(
        resolved.tracking, resolved.name, store.run_dir / "tracking", params, dataset=dataset_record(resolved, dataset)
    ) as tracked:
        store.write_record(checkpoint.RUN_CONFIG, record)
        with local_cluster(math.ceil(resolved.workers.num * resolved.workers.cpus)):
            _announce(resolved, progress)
            with messages(progress) as queue:
                store.repair(progress)
                fit(resolved, WorkerTask(absolute(resolved), record, store, tracked, queue))
                best = store.publish(progress)
            _record(tracked, store.run_dir)
            figures = evaluate_split(
                (store.folder / BEST).where,
                dataset,
                resolved.evaluation,
                resolved.data.train_split,
                resolved.workers.num,
                progress,
                Extras(device=resolved.workers.device),
            )
        metrics = {f"best/val/{resolved.training.monitor}": best[SCORE], **figures}
        with tracked.spool() as spool:
            spool.log(metrics, int(best["step"]))
        store.write_record(RESULT, _result(resolved, metrics, tracked))
    return TrainSummary(store.run_dir, store.where, metrics, tracked.run_id, scrub(tracked.uri), was_finished=False)


def resolve(config: TrainConfig, dataset: Dataset) -> TrainConfig:
    """Fill in what the dataset knows (shapes, likelihoods nobody named); check that the model can be built and trained.

    Raises:
        ValueError: if the config names a modality that the dataset has not, a shape that differs, a modality that
            no training row has, or `init_from` is another model's.
    """
    manifest = dataset.manifest
    model = config.model.model_dump(exclude_defaults=True)
    given = model.get("input_dims")
    if given is not None and {k: tuple(v) for k, v in given.items()} != dict(manifest.input_dims):
        raise ValueError(
            f"model.input_dims are the dataset's shapes {dict(manifest.input_dims)}; got {given}. Leave input_dims out."
        )
    model["input_dims"] = dict(manifest.input_dims)
    proposed = {name: info.likelihood for name, info in manifest.modalities.items()}
    model["decoders_dist"] = proposed | (model.get("decoders_dist") or {})
    params = dict(model.get("decoder_dist_params") or {})
    for name, info in manifest.modalities.items():
        if values_of(model["decoders_dist"][name]) == "counts" and info.size_factor and info.rate:
            params[name] = {"size_factor": info.size_factor, "rate": info.rate} | params.get(name, {})
        if values_of(model["decoders_dist"][name]) != "classes":
            continue
        if info.classes is None:
            raise ValueError(
                f"a categorical modality is a column of integers; {name!r} is {info.dtype}. "
                f"Choose another likelihood for it, or prepare it as integers."
            )
        params[name] = {"classes": info.classes} | params.get(name, {})
    model["decoder_dist_params"] = params or None
    resolved = TrainConfig.model_validate({**config.model_dump(), "model": model})
    observed = dataset.split(config.data.train_split).observed
    never = [name for name in manifest.modalities if observed[name] == 0]
    if never:
        raise ValueError(
            f"every modality is observed in some training row; {never} are in none of split "
            f"{config.data.train_split!r} of {config.data.dataset}. Prepare the data again without them."
        )
    taken = sorted({"loss", "gradient_norm", "learning_rate", "skipped_steps"} & set(resolved.model.modalities))
    if taken:
        raise ValueError(
            f"a run records figures of the names {taken}, so no modality of it has one. Rename the column."
        )
    figures = ("loss", *resolved.model.source_names)
    if config.training.monitor not in figures:
        raise ValueError(
            f"training.monitor names a validation figure; got {config.training.monitor!r}. Known: {', '.join(figures)}."
        )
    try:
        with torch.device("meta"):
            built = DMVAE(resolved.model)
    except (TypeError, RuntimeError) as error:  # torch's words for sizes beyond 64 bits
        raise ValueError(
            f"a model's sizes can be had; got {str(error).splitlines()[0]}. Lower its dimensions."
        ) from None
    if config.init_from is not None:
        _check_weights(built, config.init_from)
    return resolved


def absolute(config: TrainConfig) -> TrainConfig:
    """Make paths hold in processes that start elsewhere."""
    data = config.data.model_copy(update={"dataset": place.absolute(config.data.dataset)})
    init_from = None if config.init_from is None else str(Path(config.init_from).absolute())
    return config.model_copy(update={"data": data, "init_from": init_from})


def _check_weights(model: DMVAE, folder: str) -> None:
    own = {name: tuple(tensor.shape) for name, tensor in model.state_dict().items()}
    loaded = DMVAE.load(folder)
    found = {name: tuple(tensor.shape) for name, tensor in loaded.state_dict().items()}
    differing = sorted(name for name in own.keys() | found.keys() if own.get(name) != found.get(name))
    if not differing and loaded.config.distributions != model.config.distributions:
        differing = ["decoders_dist"]
    if differing:
        raise ValueError(f"init_from is a folder with weights of the same model; {folder} differs in {differing[:5]}.")


def run_record(config: TrainConfig, manifest: Manifest) -> dict[str, Any]:
    """Return what `run.json` says of a run: the resolved configuration and the dataset's fingerprint."""
    return {**config.model_dump(mode="json"), "dataset": {"fingerprint": manifest.fingerprint}}


def _check_same_run(store: RunStore, record: Mapping[str, Any]) -> None:
    """Check that the run in `store`, if there is one, may resume with the settings in `record`."""
    is_scored = (store.run_dir / RESULT).is_file()
    rules = _RULES if is_scored else replace(_RULES, may_change=(*_RULES.may_change, "evaluation.*"))
    remedy = f"remove {store.where}, which has no checkpoint yet" if store.is_empty else "choose another name"
    rules.check(store.run_dir / checkpoint.RUN_CONFIG, record, store.where, remedy)


def _result(config: TrainConfig, metrics: dict[str, float], tracked: TrackedRun) -> dict[str, Any]:
    training = config.training
    return {"epochs": training.epochs, "patience": training.patience, "metrics": metrics, "run_id": tracked.run_id}


def _read_result(store: RunStore, config: TrainConfig) -> TrainSummary | None:
    file = store.run_dir / RESULT
    if not file.is_file():
        return None
    result = json.loads(file.read_text())
    if (result["epochs"], result["patience"]) != (config.training.epochs, config.training.patience):
        return None
    uri = scrub(tracking_uri(config.tracking))
    return TrainSummary(store.run_dir, store.where, result["metrics"], result["run_id"], uri, was_finished=True)


def dataset_record(config: TrainConfig, dataset: Dataset) -> DatasetRecord:
    """Return what MLflow shows of the dataset behind a run."""
    manifest = dataset.manifest
    profile = {name: {"rows": split.rows, "observed": split.observed} for name, split in manifest.splits.items()}
    return DatasetRecord(dataset.name, manifest.fingerprint, dataset.where, profile)


def _announce(config: TrainConfig, progress: Callable[[str], None]) -> None:
    workers = config.workers
    device = "GPU" if _use_gpu(config) else "CPU"
    number = f"{workers.num}" if workers.min_num is None else f"{workers.min_num} to {workers.num}"
    progress(f"run {config.name}: {number} {device} worker{'s' if workers.num > 1 else ''} starting")
    wanted, there = (workers.min_num or workers.num) * workers.cpus, resources().get("CPU", 0)
    if there < wanted <= limits().get("CPU", 0):
        progress(f"note: the cluster has {there:g} CPUs of the {wanted:g} wanted; its autoscaler is asked for more")
    elif there < wanted:
        progress(f"warning: the cluster has {there:g} CPUs of the {wanted:g} that this run waits for")
    with torch.device("meta"):
        layers = DMVAE(config.model).modules()
    if any(isinstance(layer, nn.Dropout | nn.modules.batchnorm._BatchNorm) for layer in layers):
        progress("note: with dropout or batch normalisation the result depends on the number of workers")
    if device == "CPU" and config.training.precision == "bfloat16":
        progress("note: bfloat16 is for GPUs; on CPUs it saves no time")


def fit(
    config: TrainConfig,
    task: WorkerTask,
    callbacks: Sequence[UserCallback] = (),
) -> Result:
    """Train with Ray's workers, from the run's last checkpoint on.

    Args:
        config: resolved.
        task: for the workers.
        callbacks: of Ray's controller.

    Raises:
        RunError: if it stops for good.
        KeyboardInterrupt: if a person stopped it.
    """
    trainer = TorchTrainer(
        work,  # type: ignore[arg-type]  # Ray returns what it returns, its annotation says None
        train_loop_config={"task": task},
        scaling_config=_scaling(config),
        run_config=RunConfig(
            name=CHECKPOINTS,
            storage_path=task.store.folder.path,
            storage_filesystem=task.store.folder.filesystem,
            failure_config=FailureConfig(max_failures=config.workers.max_failures),
            checkpoint_config=CheckpointConfig(num_to_keep=NUM_KEPT),
            callbacks=list(callbacks),  # type: ignore[arg-type]  # typed as Ray's former class
        ),
    )
    try:
        result = trainer.fit()
    except SystemExit:  # how Ray ends a driver that was interrupted
        raise KeyboardInterrupt from None
    except TrainingFailedError as error:
        reason = str(error).strip().splitlines()[-1]
        raise RunError(
            f"training stopped for good: {reason} The same command goes on from the last checkpoint."
        ) from error
    ending: dict[str, Any] = getattr(result, "return_value", None) or {}
    if "failure" in ending:
        raise RunError(ending["failure"])
    return result


def _scaling(config: TrainConfig) -> ScalingConfig:
    workers = config.workers
    return ScalingConfig(  # type: ignore[call-arg]  # typed as Ray's former class
        num_workers=workers.num if workers.min_num is None else (workers.min_num, workers.num),  # type: ignore[arg-type]
        use_gpu=_use_gpu(config),
        resources_per_worker={"CPU": workers.cpus},
        elastic_resize_monitor_interval_s=workers.resize_seconds,
    )


def _use_gpu(config: TrainConfig) -> bool:
    is_asked, wanted = config.workers.device == "gpu", config.workers.min_num or config.workers.num
    # nodes with GPUs are started for a run that names them, and for no other
    gpus = (limits() if is_asked else resources()).get("GPU", 0)
    if is_asked and gpus < wanted:
        raise RunError(
            f'workers.device="gpu" needs a GPU per worker; got {gpus:.0f} for {wanted} workers. '
            'Use fewer workers, or workers.device="auto".'
        )
    return config.workers.device != "cpu" and gpus >= wanted


def _record(tracked: TrackedRun, run_dir: Path) -> None:
    with tracked.spool() as spool:
        for name in (BEST, LAST):
            spool.artifact(run_dir / name, "checkpoints")
