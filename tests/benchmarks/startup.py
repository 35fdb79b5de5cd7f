"""What a person waits for before anything happens: `dmvae train --help`, as process CPU time and by the clock."""

import resource
import statistics
import subprocess
import sys
import time
from collections.abc import Callable

from tests.benchmarks.ratio import Result

WORK = "dmvae train --help"


def results(wanted: Callable[[str], bool]) -> list[Result]:
    """Time the command several times."""
    if not wanted(WORK):
        return []
    walls, cpus = [], []
    for _ in range(7):
        before, begun = resource.getrusage(resource.RUSAGE_CHILDREN), time.perf_counter()
        subprocess.run([sys.executable, "-m", "jobs.train", "--help"], stdout=subprocess.DEVNULL, check=True)
        walls.append(time.perf_counter() - begun)
        after = resource.getrusage(resource.RUSAGE_CHILDREN)
        cpus.append(after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime)
    cpu, wall = statistics.median(cpus), statistics.median(walls)
    return [Result(WORK, "-", cpu, wall, min(cpus), max(cpus), 1.0, 0.5, unit="s")]
