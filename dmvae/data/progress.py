"""Progress lines of a long task: how much is done, how fast, and the time left."""

import time
from collections.abc import Callable

_INTERVAL_SECONDS = 5.0


class Progress:
    """Logs a line every few seconds while a task runs.

    Args:
        log: called with each line.
        task: begins each line, such as "read".
        total: units in the whole task; None if unknown, and then no line gives the time left.
        unit: what is counted.
        already_done: units that an earlier process finished; they do not count towards the speed.
    """

    def __init__(
        self,
        log: Callable[[str], None],
        task: str,
        total: int | None = None,
        unit: str = "rows",
        already_done: int = 0,
    ) -> None:
        self._log, self._task, self._total, self._unit = log, task, total, unit
        self._first = already_done
        self._start = self._logged = time.monotonic()

    def update(self, done: int) -> None:
        """Note that `done` units of the whole task are finished, and log a line if one is due.

        The last unit is not logged: the caller says what came of the task.
        """
        if done != self._total and self.is_due():
            self._log(self.line(done))

    def is_due(self) -> bool:
        """Return whether a line is due, every few seconds; then the next one is due later."""
        is_due = time.monotonic() - self._logged >= _INTERVAL_SECONDS
        if is_due:
            self._logged = time.monotonic()
        return is_due

    def line(self, done: int) -> str:
        """Return the line for `done` units."""
        of_total = "" if self._total is None else f" of {self._total:,}"
        left = self.time_left(done)
        return (
            f"{self._task} {done:,}{of_total} {self._unit}, {self._speed(done):,.0f} {self._unit}/s"
            f"{', ' if left else ''}{left}"
        )

    def time_left(self, done: int) -> str:
        """Return the time left at the speed so far, such as `3:05 left`; nothing if it is not known."""
        speed = self._speed(done)
        return "" if self._total is None or not speed else f"{minutes((self._total - done) / speed)} left"

    def _speed(self, done: int) -> float:
        return (done - self._first) / max(time.monotonic() - self._start, 1e-9)


def minutes(seconds: float) -> str:
    """Return a duration as minutes and seconds, such as `3:05`."""
    return f"{int(seconds) // 60}:{int(seconds) % 60:02d}"
