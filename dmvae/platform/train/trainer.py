"""Train a run with Ray, evaluate its best model and record both."""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

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

from dmvae.config.section import scrub
from dmvae.config.training import TrainConfig
from dmvae.data.reading.dataset import Dataset, open_dataset
from dmvae.evaluation.latents import fit_density
from dmvae.evaluation.suite import first_blocks
from dmvae.model.dmvae import DMVAE
from dmvae.model.serialization import write_prior
from dmvae.platform.cluster import limits, local_cluster, messages, resources
from dmvae.platform.errors import RunError
from dmvae.platform.evaluate.checks import check_data
from dmvae.platform.evaluate.evaluate import Extras, evaluate_split
from dmvae.platform.logs import log_file
from dmvae.platform.records import read_result, read_run
from dmvae.platform.resume import ResumeRules
from dmvae.platform.stopping import stop_in_order
from dmvae.platform.tracking.outbox import Outbox
from dmvae.platform.tracking.runs import RESUME_SECONDS, DatasetRecord, Waiting, open_run, tracking_uri
from dmvae.platform.tracking.tracked_run import TrackedRun
from dmvae.platform.train.notes import notes
from dmvae.platform.train.run_store import BEST, CHECKPOINTS, LAST, NUM_KEPT, RESULT, SCORE, RunStore
from dmvae.platform.train.worker import WorkerTask, work
from dmvae.training import checkpoint
from dmvae.training.settings import absolute, resolve, run_record, trusted

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
        "time_budget",
        "model.packages.*",  # a warning says so
        "data.dataset",  # a dataset is identified by its fingerprint, wherever it is stored
    ),
    may_grow=("training.epochs",),
)


@dataclass(frozen=True)
class TrainSummary:
    """Where a finished run is, and its metrics.

    Attributes:
        run_dir: its folder on this machine, with `best/` and `last/`.
        where: its folder, or the URI where every machine finds it.
        metrics: the best value of the monitored validation metric, and the test metrics.
        run_id: of the MLflow run.
        tracking_uri: of MLflow.
        was_finished: whether the run was finished already.
    """

    run_dir: Path
    where: str
    metrics: dict[str, float]
    run_id: str
    tracking_uri: str
    was_finished: bool


def train_run(config: TrainConfig, progress: Callable[[str], None]) -> TrainSummary:
    """Train or resume the run that `config` describes, evaluate its best model and record both.

    Args:
        config: of the run.
        progress: called with each line for the user.

    Raises:
        RunError: if the run was started with other settings or another dataset, the cluster lacks the resources, or
            the loss became NaN or infinite.
        ValueError: if the model does not fit the dataset.
        TrackingError: if MLflow cannot be reached.
    """
    dataset = open_dataset(config.data.dataset)
    resolved = resolve(config, dataset)
    store = RunStore.open(config.runs_dir, config.name)
    store.download()
    record = run_record(resolved, dataset.manifest)
    _check_same_run(store, record)
    _warn_of_versions(store, resolved, progress)
    finished = _read_result(store, resolved)
    if finished is not None:
        return finished
    check_data(resolved, dataset)
    store.run_dir.mkdir(parents=True, exist_ok=True)
    params = {key: value for key, value in record.items() if key != "dataset"}
    with (
        open_run(
            resolved.tracking,
            resolved.name,
            store.run_dir / "tracking",
            params,
            {f"version.{package}": version for package, version in resolved.model.packages.items()},
            dataset_record(resolved, dataset),
            None if store.is_empty else Waiting(RESUME_SECONDS, progress),
        ) as tracked,
        log_file(store.run_dir, progress) as log,
    ):
        store.write_record(checkpoint.RUN_CONFIG, record)
        with local_cluster(math.ceil(resolved.workers.num * resolved.workers.cpus)):
            best = _train(resolved, dataset, record, store, tracked, log)
            test_metrics = evaluate_split(
                (store.folder / BEST).where,
                dataset,
                resolved.evaluation,
                resolved.data.train_split,
                resolved.workers.num,
                log,
                Extras(device=resolved.workers.device, trust=trusted(resolved.model)),
            )
        metrics = {f"best/val/{resolved.training.monitor}": best[SCORE], **test_metrics}
        with Outbox(tracked) as outbox:
            outbox.log_metrics(metrics, int(best["step"]))
        store.write_record(RESULT, _result(resolved, metrics, tracked))
    return TrainSummary(store.run_dir, store.where, metrics, tracked.run_id, scrub(tracked.uri), was_finished=False)


def _train(
    config: TrainConfig,
    dataset: Dataset,
    record: dict[str, Any],
    store: RunStore,
    tracked: TrackedRun,
    progress: Callable[[str], None],
) -> dict[str, Any]:
    """Train to the end, and publish the best and the last checkpoint; return what the best was reported with."""
    _announce(config, dataset, progress)
    with messages(progress) as queue, stop_in_order(config.time_budget, progress) as stop:
        store.repair(progress)
        fit(config, WorkerTask(absolute(config), record, store, tracked, queue, stop))
        best = store.publish(progress, lambda folder: _add_prior(folder, config, dataset, progress))
    with Outbox(tracked) as outbox:
        for name in (BEST, LAST):
            outbox.log_artifact(store.run_dir / name, "checkpoints")
    return best


def dataset_record(config: TrainConfig, dataset: Dataset) -> DatasetRecord:
    """Return what MLflow shows of a run's dataset."""
    manifest = dataset.manifest
    profile: dict[str, Any] = {
        name: {"rows": split.rows, "observed": split.observed} for name, split in manifest.splits.items()
    }
    features = {name: info.features for name, info in manifest.modalities.items() if info.features is not None}
    profile |= {"feature_names": features} if features else {}
    profile |= {"label_names": manifest.label_names} if manifest.label_names else {}
    return DatasetRecord(dataset.name, manifest.fingerprint, dataset.where, profile)


def _add_prior(folder: Path, config: TrainConfig, dataset: Dataset, progress: Callable[[str], None]) -> None:
    """Fit the prior that the configuration asks for, to the first training rows, and write it beside the model."""
    if not config.training.prior_components:
        return
    progress("fitting a prior to the latents of the training rows")
    rows = first_blocks(dataset.split(config.data.train_split))
    try:
        write_prior(folder, fit_density(DMVAE.load(folder), rows, config.training.prior_components, config.seed))
    except (ImportError, ValueError) as error:  # without scikit-learn, or with a modality of fewer than two rows
        progress(f"warning: No prior was fitted, so that predictions and samples have the standard normal: {error}")


def _check_same_run(store: RunStore, record: Mapping[str, Any]) -> None:
    """Check that the run in `store`, if there is one, may resume with the settings in `record`."""
    is_scored = (store.run_dir / RESULT).is_file()
    rules = _RULES if is_scored else replace(_RULES, may_change=(*_RULES.may_change, "evaluation.*"))
    remedy = f"remove {store.where}, which has no checkpoint yet" if store.is_empty else "choose another name"
    rules.check(store.run_dir / checkpoint.RUN_CONFIG, record, store.where, remedy)


def _warn_of_versions(store: RunStore, config: TrainConfig, progress: Callable[[str], None]) -> None:
    """Tell which packages of own code have another version than when the run began."""
    file = store.run_dir / checkpoint.RUN_CONFIG
    before = (read_run(file) or {"model": {}})["model"].get("packages") or {}
    for package, version in config.model.packages.items():
        if before.get(package, version) != version:
            progress(f"warning: The run began with {package} {before[package]} and resumes with {version}")


def _result(config: TrainConfig, metrics: dict[str, float], tracked: TrackedRun) -> dict[str, Any]:
    training = config.training
    return {"epochs": training.epochs, "patience": training.patience, "metrics": metrics, "run_id": tracked.run_id}


def _read_result(store: RunStore, config: TrainConfig) -> TrainSummary | None:
    result = read_result(store.run_dir / RESULT)
    if result is None or (result.epochs, result.patience) != (config.training.epochs, config.training.patience):
        return None
    metrics = {name: math.nan if value is None else value for name, value in result.metrics.items()}
    uri = scrub(tracking_uri(config.tracking))
    return TrainSummary(store.run_dir, store.where, metrics, result.run_id, uri, was_finished=True)


def _announce(config: TrainConfig, dataset: Dataset, progress: Callable[[str], None]) -> None:
    workers = config.workers
    device = "GPU" if _use_gpu(config) else "CPU"
    number = f"{workers.num}" if workers.min_num is None else f"{workers.min_num} to {workers.num}"
    progress(f"run {config.name}: {number} {device} worker{'s' if workers.num > 1 else ''} starting")
    wanted, free = (workers.min_num or workers.num) * workers.cpus, resources().get("CPU", 0)
    if free < wanted <= limits().get("CPU", 0):
        progress(f"note: The cluster has {free:g} of {wanted:g} CPUs; its autoscaler is asked for more")
    elif free < wanted:
        progress(f"warning: The run waits for {wanted:g} CPUs, but the cluster has {free:g}. Lower workers.num")
    for line in notes(config, dataset, device):
        progress(line)


def fit(
    config: TrainConfig,
    task: WorkerTask,
    callbacks: Sequence[UserCallback] = (),
) -> Result:
    """Train with Ray's workers, from the run's last checkpoint on.

    Args:
        config: resolved.
        task: for the workers.
        callbacks: for Ray's controller.

    Raises:
        RunError: if training failed more often than `workers.max_failures` allows, or cannot succeed.
        KeyboardInterrupt: if the user interrupted it.
    """
    trainer = TorchTrainer(
        work,  # type: ignore[arg-type]  # Ray returns the value, but its annotation says None
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
            f"Training failed: {reason} Run the same command again to resume from the last checkpoint."
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
    # an autoscaler starts nodes with GPUs only for a run that asks for them
    gpus = (limits() if is_asked else resources()).get("GPU", 0)
    if is_asked and gpus < wanted:
        raise RunError(
            f'workers.device="gpu" needs one GPU per worker, but the cluster has {gpus:.0f} for {wanted} workers. '
            'Lower workers.num, or set workers.device="auto".'
        )
    return config.workers.device != "cpu" and gpus >= wanted
