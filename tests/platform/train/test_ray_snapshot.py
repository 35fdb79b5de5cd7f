"""The list of checkpoints that Ray Train reads: ours is the one that Ray itself would have written."""

import asyncio
import json
from pathlib import Path

import pytest
from ray.train import Checkpoint, CheckpointConfig
from ray.train.v2._internal.execution.checkpoint.checkpoint_manager import CheckpointManager
from ray.train.v2._internal.execution.storage import StorageContext
from ray.train.v2._internal.execution.training_report import _TrainingReport

from dmvae.platform.train.ray_snapshot import SNAPSHOT_FILE, build_snapshot

# Ray uses the interface of pydantic 1
pytestmark = pytest.mark.filterwarnings("ignore::pydantic.PydanticDeprecatedSince20")

REPORTS = {f"checkpoint_{step:010d}_000": {"step": step, "score": None} for step in (3, 6)}


def manager_at(folder: Path) -> CheckpointManager:
    storage = StorageContext(storage_path=str(folder), experiment_dir_name="checkpoints")
    return CheckpointManager(CheckpointConfig(num_to_keep=3), storage)


async def report_all(manager: CheckpointManager, folder: Path) -> None:
    for name, metrics in REPORTS.items():
        path = folder / "checkpoints" / name
        path.mkdir(parents=True)
        made = Checkpoint.from_directory(str(path))
        manager.register_checkpoint(_TrainingReport(checkpoint=made, metrics=metrics, validation=False))


def test_the_list_is_what_ray_itself_writes(tmp_path: Path) -> None:
    asyncio.run(report_all(manager_at(tmp_path), tmp_path))
    file = tmp_path / "checkpoints" / SNAPSHOT_FILE
    assert json.loads(file.read_text()) == build_snapshot(REPORTS)


def test_ray_reads_the_list_and_starts_from_the_newest(tmp_path: Path) -> None:
    for name in REPORTS:
        (tmp_path / "checkpoints" / name).mkdir(parents=True)
    (tmp_path / "checkpoints" / SNAPSHOT_FILE).write_text(json.dumps(build_snapshot(REPORTS)))
    manager = manager_at(tmp_path)
    assert [Path(found.checkpoint.path).name for found in manager.best_checkpoint_results] == list(REPORTS)
    assert manager.latest_checkpoint_result is not None
    assert manager.latest_checkpoint_result.metrics == {"step": 6, "score": None}


def test_without_checkpoints_ray_starts_from_the_beginning(tmp_path: Path) -> None:
    (tmp_path / "checkpoints").mkdir()
    (tmp_path / "checkpoints" / SNAPSHOT_FILE).write_text(json.dumps(build_snapshot({})))
    assert manager_at(tmp_path).latest_checkpoint_result is None
