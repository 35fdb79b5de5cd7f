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

from dmvae.config.training import TrainConfig
from dmvae.data.reading.dataset import open_dataset
from dmvae.model.dmvae import DMVAE
from dmvae.platform.cluster import limits, local_cluster, messages, resources
from dmvae.platform.errors import RunError
from dmvae.platform.evaluate.checks import check_data
from dmvae.platform.evaluate.evaluate import Extras, evaluate_split
from dmvae.platform.resume import ResumeRules
from dmvae.platform.tracking.outbox import Outbox
from dmvae.platform.tracking.runs import open_run, tracking_uri
from dmvae.platform.tracking.tracked_run import TrackedRun, scrub
from dmvae.platform.train.run_store import BEST, CHECKPOINTS, LAST, NUM_KEPT, RESULT, SCORE, RunStore
from dmvae.platform.train.settings import absolute, dataset_record, resolve, run_record
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
        with Outbox(tracked) as outbox:
            outbox.log_metrics(metrics, int(best["step"]))
        store.write_record(RESULT, _result(resolved, metrics, tracked))
    return TrainSummary(store.run_dir, store.where, metrics, tracked.run_id, scrub(tracked.uri), was_finished=False)


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
    with Outbox(tracked) as outbox:
        for name in (BEST, LAST):
            outbox.log_artifact(run_dir / name, "checkpoints")
