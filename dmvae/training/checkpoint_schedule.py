"""The schedule of checkpoints within an epoch, and of looking whether to stop."""

from collections.abc import Callable

from dmvae.config.training import TrainingConfig

_LOOK_SECONDS = 1.0


class CheckpointClock:
    """Decides when a checkpoint within an epoch is due, the same on all workers: by steps, or by one worker's clock.

    Reading that clock costs a message. The time left and the pace so far decide after how many steps it is read again,
    so that each reading at least halves the time left.
    """

    def __init__(self, config: TrainingConfig, clock: Callable[[], float], done: int) -> None:
        self._steps, self._seconds, self._clock = config.checkpoint_steps, config.checkpoint_seconds, clock
        self._last = self._clock() if self._seconds is not None else 0.0
        self._begun, self._next_reading = done, done + 1

    def is_due(self, done: int) -> bool:
        """Tell whether a checkpoint is due after `done` steps of the run; must be called after every step."""
        by_steps = self._steps is not None and done % self._steps == 0
        return self._is_time(done) or by_steps

    def _is_time(self, done: int) -> bool:
        if self._seconds is None or done < self._next_reading:
            return False
        now = self._clock()
        left, pace = self._seconds - (now - self._last), (now - self._last) / (done - self._begun)
        self._next_reading = done + max(1, int(left / max(pace, 1e-6) / 2))
        if left > 0:
            return False
        self._last, self._begun, self._next_reading = now, done, done + 1
        return True


class StopWatch:
    """Looks about once a second whether training should stop, after the same steps on all workers.

    Args:
        stop_requested: see `Collectives`; None: never stop, and never look.
        clock: see `Collectives`.
    """

    def __init__(self, stop_requested: Callable[[], bool] | None, clock: Callable[[], float]) -> None:
        self._stop_requested, self._clock = stop_requested, clock
        self._last, self._steps, self._left = (clock() if stop_requested is not None else 0.0), 1, 1

    def is_time(self) -> bool:
        """Tell whether to stop now; must be called after every step."""
        if self._stop_requested is None:
            return False
        self._left -= 1
        if self._left > 0:
            return False
        now = self._clock()
        pace = max(now - self._last, 1e-6) / self._steps  # seconds of a step
        self._last, self._steps = now, min(max(1, int(_LOOK_SECONDS / pace)), 2 * self._steps)
        self._left = self._steps
        return self._stop_requested()
