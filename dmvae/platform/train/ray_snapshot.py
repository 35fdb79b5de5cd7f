"""The file in which Ray Train lists a run's checkpoints, in the private format of the Ray version that is pinned.

Ray overwrites it in place and refuses to start a run whose list is torn or names a checkpoint that is gone. So it is
written anew from the checkpoints before every start.
"""

from collections.abc import Mapping
from typing import Any

import ray
from ray.train.v2._internal.constants import CHECKPOINT_MANAGER_SNAPSHOT_FILENAME

SNAPSHOT_FILE = CHECKPOINT_MANAGER_SNAPSHOT_FILENAME


def build_snapshot(reports: Mapping[str, dict[str, Any]]) -> dict[str, Any]:
    """Return what Ray reads at the start of a run that has these checkpoints.

    Args:
        reports: what each checkpoint was reported with, by its folder's name, oldest first.
    """
    entries = [{"version": 0, "checkpoint_dir_name": name, "metrics": report} for name, report in reports.items()]
    return {
        "ray_version": ray.__version__,
        "checkpoint_results": entries,
        "checkpoint_report_indices": list(range(len(entries))),
        "latest_checkpoint_result": entries[-1] if entries else None,
        "pending_training_results": [],
        "pending_validation_specs": [],
        "current_report_index": len(entries),
        "validated_checkpoint_dir_names": [],
        "timed_out_validation_checkpoint_dir_names": [],
        "failed_validation_checkpoint_dir_names": [],
    }
