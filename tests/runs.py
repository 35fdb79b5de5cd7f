"""Small datasets and configurations of real runs."""

import atexit
import json
import shutil
import tempfile
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import torch
from mlflow import MlflowClient

from dmvae.config.data import PrepareConfig
from dmvae.config.training import TrainConfig
from dmvae.data.preparation.prepare import prepare
from dmvae.data.reading.dataset import open_dataset
from dmvae.model.dmvae import DMVAE
from dmvae.platform.evaluate.evaluate import Extras, evaluate_split
from dmvae.platform.tracking.outbox import Outbox
from dmvae.platform.tracking.runs import open_run
from dmvae.platform.train.trainer import dataset_record
from dmvae.training import checkpoint
from dmvae.training.loop import MetricsLogged, train
from dmvae.training.settings import resolve, run_record, trusted
from dmvae.training.setup import WorkerData
from dmvae.training.state import TrainState, build_optimizer
from dmvae.training.step import Collectives


def make_dataset(
    folder: Path, rows: int = 240, seed: int = 0, left_in_train: bool = True, missing_cells: float = 0.0
) -> Path:
    """Write a dataset of two float modalities that share a cause, a third of each missing, and that share of cells."""
    rng = np.random.default_rng(seed)
    cause = rng.normal(size=(rows, 2))
    arrays = {
        "left": (cause @ rng.normal(size=(2, 5)) + 0.3 * rng.normal(size=(rows, 5))).astype(np.float32),
        "right": (cause @ rng.normal(size=(2, 3)) + 0.3 * rng.normal(size=(rows, 3))).astype(np.float32),
    }
    if missing_cells:
        for values in arrays.values():
            values[rng.random(values.shape) < missing_cells] = np.nan
    lost = rng.integers(0, 3, size=rows)  # 0: left is missing, 1: right is, 2: neither
    splits = rng.choice(["train", "val", "test"], p=[0.7, 0.15, 0.15], size=rows)
    if not left_in_train:
        lost[splits == "train"] = 0
    masks = {"mask.left": lost != 0, "mask.right": lost != 1}
    source = folder / "rows.npz"
    folder.mkdir(parents=True, exist_ok=True)
    np.savez(source, id=np.arange(rows), split=splits, **arrays, **masks)
    prepare(
        PrepareConfig.model_validate(
            {"dataset": str(folder / "data"), "source": {"kind": "npz", "path": str(source)}}
        ),
        progress=lambda text: None,
    )  # fmt: skip
    return folder / "data"


def make_config(folder: Path, dataset: Path | str, name: str = "run", **changes: Any) -> TrainConfig:
    """Describe a short run in float64; `changes` are laid over, by section."""
    tree: dict[str, Any] = {
        "name": name,
        "runs_dir": str(folder / "runs"),
        "data": {"dataset": str(dataset), "streams": 8},
        "model": {
            "latent_dim": 2,
            "modalities_specific_dim": 1,
            "architectures": {"left": {"hidden_dims": [8]}, "right": {"hidden_dims": [8]}},
        },
        "optim": {"learning_rate": 0.01},
        "training": {"epochs": 2, "batch_size": 32, "precision": "float64", "log_steps": 1},
        "evaluation": {"num_draws": 20, "proposal": "encoder"},
        "tracking": {"uri": f"sqlite:///{folder}/mlflow.db"},
    }
    migrate(folder / "mlflow.db")
    for section, change in changes.items():
        tree[section] = {**tree.get(section, {}), **change} if isinstance(change, dict) else change
    return TrainConfig.model_validate(tree)


def migrate(database: Path) -> None:
    """Create an MLflow database as a copy of an empty one, which takes far less time than MLflow does."""
    if not database.exists():
        database.parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(_empty_database(), database)


@cache
def _empty_database() -> Path:
    database = Path(tempfile.mkdtemp(), "mlflow.db")
    atexit.register(shutil.rmtree, database.parent, ignore_errors=True)
    MlflowClient(f"sqlite:///{database}").search_experiments()
    return database


def finish_here(config: TrainConfig) -> Path:
    """Write what a finished run of `jobs.train` writes, but train without Ray; return its folder.

    For tests of what comes after training: a group of Ray's workers takes twenty times as long as these few steps.
    """
    dataset = open_dataset(config.data.dataset)
    resolved = resolve(config, dataset)
    record, run_dir = run_record(resolved, dataset.manifest), Path(config.runs_dir, config.name)
    with open_run(
        config.tracking, config.name, run_dir / "tracking", record, dataset=dataset_record(resolved, dataset)
    ) as tracked:
        state, logged = train_here(config)
        for kept in ("best", "last"):
            checkpoint.save(state, record, run_dir / kept)
        best, extras = str(run_dir / "best"), Extras(trust=trusted(resolved.model))
        metrics = evaluate_split(
            best, dataset, config.evaluation, config.data.train_split, 1, lambda line: None, extras
        )
        with Outbox(tracked) as outbox:
            outbox.log_metrics(metrics, max(logged))
    (run_dir / "run.json").write_text(json.dumps(record))
    result = {"epochs": config.training.epochs, "patience": None, "metrics": metrics, "run_id": tracked.run_id}
    (run_dir / "result.json").write_text(json.dumps(result))
    return run_dir


def train_here(config: TrainConfig) -> tuple[TrainState, dict[int, dict[str, float]]]:
    """Train in this process, without Ray or MLflow; return the final state and the metrics by step."""
    resolved = resolve(config, open_dataset(config.data.dataset))
    dtype = torch.float64 if config.training.precision == "float64" else torch.float32
    torch.manual_seed(config.seed)
    model = DMVAE(resolved.model).to(dtype)
    state = TrainState(model, build_optimizer(model, resolved.optim))
    metrics: dict[int, dict[str, float]] = {}
    for event in train(state, WorkerData(resolved, 0, 1, dtype), resolved, Collectives(model)):
        if isinstance(event, MetricsLogged):
            metrics.setdefault(event.global_step, {}).update(event.metrics)
    return state, metrics
