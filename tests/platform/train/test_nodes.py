"""A run over three nodes, each a `ray start` of its own: one is lost during the run, and another joins.

Acceptance only: it starts four Ray nodes, and waits until Ray has noticed each change.
"""

import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import psutil
import pytest
from ray.util.state import list_nodes

from tests.kills import logged, start_driver, wait_for
from tests.platform.tracking.test_tracking import free_port
from tests.platform.train.test_elastic import assert_same_curves
from tests.runs import make_config, make_dataset, train_here

STEPS = 27
pytestmark = [pytest.mark.ray, pytest.mark.acceptance, pytest.mark.timeout(1200)]


class Nodes:
    """A head and nodes of one CPU each, started as the files of `cluster/` start them."""

    def __init__(self, folder: Path) -> None:
        self.folder, self.port = folder, free_port()
        self.address = f"127.0.0.1:{self.port}"
        self.environment = {name: value for name, value in os.environ.items() if name != "RAY_ADDRESS"}
        self.processes: dict[str, subprocess.Popen[bytes]] = {}
        head = ["--head", f"--port={self.port}", f"--temp-dir={folder}", "--num-cpus=1"]
        ports = ("dashboard-port", "ray-client-server-port", "dashboard-agent-listen-port", "metrics-export-port")
        self._start("head", *head, *(f"--{name}={free_port()}" for name in ports))
        wait_for(lambda: self._ray("health-check", "--address", self.address), 240)

    def add(self, name: str) -> None:
        """Let a node join."""
        ports = ("dashboard-agent-listen-port", "metrics-export-port")
        self._start(name, f"--address={self.address}", "--num-cpus=1", *(f"--{port}={free_port()}" for port in ports))

    def kill(self, name: str) -> None:
        """End a node as a machine ends: its raylet and everything that it started, at once."""
        process = self.processes.pop(name)
        for one in self._family(process):
            one.kill()
        process.wait()

    def stop(self) -> None:
        """End every process of this cluster, and no other."""
        for name in reversed(list(self.processes)):
            self.kill(name)

    def _start(self, name: str, *flags: str) -> None:
        command = [str(Path(sys.executable).with_name("ray")), "start", "--block", "--disable-usage-stats"]
        command += ["--object-store-memory=100000000", *flags]
        with (self.folder / f"{name}.log").open("wb") as log:
            self.processes[name] = subprocess.Popen(
                command, env=self.environment, stdout=log, stderr=log, start_new_session=True
            )

    def _ray(self, *arguments: str) -> bool:
        command = [str(Path(sys.executable).with_name("ray")), *arguments]
        return subprocess.run(command, env=self.environment, capture_output=True, check=False).returncode == 0

    def count(self) -> int:
        """Return how many nodes the head knows and has heard of lately."""
        return sum(node.state == "ALIVE" for node in list_nodes(self.address))

    def hosts(self) -> set[str]:
        """Return the nodes where training workers live."""
        return {name for name, process in self.processes.items() if any(map(_trains, self._family(process)))}

    @staticmethod
    def _family(process: subprocess.Popen[bytes]) -> list[psutil.Process]:
        parent = psutil.Process(process.pid)
        return [parent, *parent.children(recursive=True)]


def _trains(process: psutil.Process) -> bool:
    try:
        return any("RayTrainWorker" in part for part in process.cmdline())
    except psutil.Error:  # it has just ended
        return False


@pytest.fixture
def nodes(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Nodes]:
    # a socket's path has room for 107 letters
    started = Nodes(tmp_path_factory.mktemp("n"))
    try:
        yield started
    finally:
        started.stop()


@pytest.fixture(scope="module")
def dataset(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """27 steps an epoch."""
    return make_dataset(tmp_path_factory.mktemp("data"), rows=1200)


def test_a_run_over_three_nodes_loses_one_and_takes_another(nodes: Nodes, dataset: Path, tmp_path: Path) -> None:
    nodes.add("one")
    nodes.add("two")
    elastic = {"num": 3, "min_num": 2, "resize_seconds": 2.0}
    config = make_config(tmp_path, dataset, training={"epochs": 120, "checkpoint_steps": 10}, workers=elastic)
    wait_for(lambda: nodes.count() == 3)
    driver = start_driver(config, tmp_path, address=nodes.address)
    run_dir = tmp_path / "runs" / "run"
    wait_for(lambda: logged(run_dir) >= 20, 600)
    wait_for(lambda: nodes.hosts() == {"head", "one", "two"})

    nodes.kill("one")
    at = logged(run_dir)
    wait_for(lambda: logged(run_dir) >= at + 20, 600)
    assert nodes.hosts() == {"head", "two"}

    nodes.add("three")
    wait_for(lambda: nodes.hosts() == {"head", "two", "three"}, 600)
    joined = logged(run_dir)
    assert joined < config.training.epochs * STEPS, "the run went on while the node came"
    assert driver.wait(600) == 0
    said = (tmp_path / "driver.log").read_text()
    assert said.count("resuming after") >= 2
    _, straight = train_here(config)
    assert_same_curves(run_dir, straight, 1e-9)
