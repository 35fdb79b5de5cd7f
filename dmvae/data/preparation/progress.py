"""How far a long piece of work is, in lines for a person."""

import time
from collections.abc import Callable

_SECONDS = 5.0


class Pace:
    """Tells, every few seconds, how many rows are done, how fast, and how long it will take.

    Args:
        say: takes the line.
        what: is done with the rows.
        total: how many there are; None: unknown, and then no time is told.
    """

    def __init__(self, say: Callable[[str], None], what: str, total: int | None) -> None:
        self._say, self._what, self._total = say, what, total
        self._start = self._said = time.monotonic()

    def __call__(self, done: int) -> None:
        """Note that `done` rows are done."""
        now = time.monotonic()
        if now - self._said < _SECONDS or done == self._total:
            return
        self._said = now
        rate = done / (now - self._start)
        line = f"{self._what} {done:,} rows, {rate:,.0f} a second"
        if self._total:
            left = int((self._total - done) / max(rate, 1e-9))
            line += f", {left // 60}:{left % 60:02d} left"
        self._say(line)
