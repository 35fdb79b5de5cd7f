"""The resources that a job may request: those of the cluster, or those that its autoscaler may still start.

A head without CPUs needs a cluster of its own: acceptance only.
"""

import subprocess
import sys
from pathlib import Path

import pytest

from dmvae.platform.cluster import limits, resources
from tests.searches import make_search

pytestmark = pytest.mark.usefixtures("cluster")

ROOT = Path(__file__).parents[2]


def test_without_an_autoscaler_the_limits_are_what_is_there() -> None:
    found = limits()
    assert found["CPU"] >= 4, "what the tests' cluster is started with, or all of a larger machine"
    assert found == resources()


@pytest.mark.acceptance
def test_a_head_without_work_takes_as_many_trials_at_a_time_as_are_asked_for(dataset: Path, tmp_path: Path) -> None:
    """As in the files of `cluster/`, whose heads have no CPUs and whose workers are started on demand."""
    file = tmp_path / "search.json"
    file.write_text(make_search(tmp_path, dataset, trials=64, max_concurrent=16).model_dump_json())
    program = (
        "import ray\n"
        "from pathlib import Path\n"
        "from dmvae.config.search import SearchConfig\n"
        "from dmvae.platform.tune.space import max_concurrent\n"
        "ray.init(address='local', num_cpus=0, num_gpus=0, include_dashboard=False, log_to_driver=False)\n"
        f"config = SearchConfig.model_validate_json(Path({str(file)!r}).read_text())\n"
        "print(max_concurrent(config), max_concurrent(config.model_copy(update={'max_concurrent': None})))\n"
        "ray.shutdown()\n"
    )
    done = subprocess.run([sys.executable, "-c", program], cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.stdout.splitlines()[-1:] == ["16 64"], done.stderr
