"""Two sides of a comparison, alternating in one run: the ratio of their times, its median and its spread."""

import os
import platform
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass
from importlib.metadata import version

import torch


@dataclass(frozen=True)
class Result:
    """How many times faster our side is.

    Attributes:
        work: what both sides do.
        against: the other side.
        unit: of the figure: `x` (times as fast) or `s` (seconds, where there is no other side).
        cpu: median ratio of process CPU times; None where a side is several processes.
        wall: median ratio of wall-clock times, or the seconds.
        low: smallest ratio of a pair.
        high: largest.
        at_least: what is promised.
        aim: what is aimed at.
        note: what a reader has to know.
    """

    work: str
    against: str
    cpu: float | None
    wall: float
    low: float
    high: float
    at_least: float | None = None
    aim: float | None = None
    unit: str = "x"
    note: str = ""

    @property
    def figure(self) -> float:
        """What is held against the promise: CPU time where there is one process, it is steadier."""
        return self.wall if self.cpu is None else self.cpu

    @property
    def is_kept(self) -> bool:
        """Whether the promise is kept."""
        if self.at_least is None:
            return True
        return self.figure <= self.at_least if self.unit == "s" else self.figure >= self.at_least


def compare(
    work: str,
    against: str,
    ours: Callable[[], object],
    theirs: Callable[[], object],
    repeats: int = 7,
    at_least: float | None = None,
    aim: float | None = None,
    note: str = "",
) -> Result:
    """Time both sides in turn, `repeats` times each after one warm-up each, in this process."""
    ours(), theirs()
    pairs = []
    for number in range(repeats):
        order = (ours, theirs) if number % 2 else (theirs, ours)  # neither always runs on the other's warm caches
        times = {side: _time(side) for side in order}
        pairs.append(
            [theirs_time / ours_time for theirs_time, ours_time in zip(times[theirs], times[ours], strict=True)]
        )
    cpu, wall = ([pair[kind] for pair in pairs] for kind in (0, 1))
    return Result(
        work, against, statistics.median(cpu), statistics.median(wall), min(cpu), max(cpu), at_least, aim, note=note
    )


def _time(side: Callable[[], object]) -> tuple[float, float]:
    cpu, wall = time.process_time(), time.perf_counter()
    side()
    return time.process_time() - cpu, time.perf_counter() - wall


def machine() -> dict[str, str]:
    """Say what the figures were measured on."""
    names = ("torch", "ray", "numpy")
    return {
        "processor": platform.processor() or platform.machine(),
        "cores": str(os.cpu_count()),
        "threads of torch": str(torch.get_num_threads()),
        "python": platform.python_version(),
        **{name: version(name) for name in names},
    }


def markdown(results: list[Result], facts: dict[str, str]) -> str:
    """Write the table that a person reads."""
    lines = [
        "| work | against | figure | spread | wall clock | at least | aim | |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for result in results:
        limits = ["" if limit is None else f"{limit:g}{result.unit}" for limit in (result.at_least, result.aim)]
        kept = "" if result.at_least is None else "kept" if result.is_kept else "missed"
        figure, wall = f"{result.figure:.2f}{result.unit}", f"{result.wall:.2f}{result.unit}"
        spread = f"{result.low:.2f} to {result.high:.2f}"
        lines.append("| " + " | ".join([result.work, result.against, figure, spread, wall, *limits, kept]) + " |")
    notes = [f"- {result.work}: {result.note}" for result in results if result.note]
    measured = ", ".join(f"{name} {value}" for name, value in facts.items())
    return "\n".join([*lines, "", *notes, "", f"Measured with {measured}.", ""])
