"""How a run is told to stop in order: on SIGTERM, or when its time budget is used up.

A driver asks the workers for a last checkpoint, waits for it as long as the grace lasts, and only then interrupts.
"""

import os
import signal
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from types import FrameType
from typing import Any

from dmvae.config.errors import Stopped
from dmvae.config.section import seconds_of

GRACE_SECONDS = 20.0  # from SIGTERM to the end; Kubernetes and Slurm send SIGKILL after 30
_TERMINATED, _OUT_OF_TIME = 143, 75  # exit codes: 128 + SIGTERM, and EX_TEMPFAIL


class Flag:
    """A flag in the cluster that a driver raises and workers look at."""

    def __init__(self) -> None:
        import ray  # here, because every command uses this module, and few use Ray

        self._actor: Any = ray.remote(num_cpus=0)(_Flag).remote()

    def set(self) -> None:
        """Raise the flag."""
        self._actor.set.remote()

    def watch(self) -> Callable[[], bool]:
        """Return what tells, without waiting, whether the flag is raised."""
        import ray

        raised = self._actor.wait.remote()
        return lambda: bool(ray.wait([raised], timeout=0)[0])


class _Flag:
    def __init__(self) -> None:
        import asyncio

        self._event = asyncio.Event()

    async def set(self) -> None:
        self._event.set()

    async def wait(self) -> bool:
        return await self._event.wait()


@contextmanager
def stop_in_order(time_budget: str | None, progress: Callable[[str], None]) -> Iterator[Flag]:
    """Yield a flag that is raised on SIGTERM, or in time for a last checkpoint before the time budget is used up.

    If the block has not ended when the grace is over, it is interrupted.

    Args:
        time_budget: a duration from now, such as `3h30m`; None: no limit.
        progress: called with a line when the flag is raised.

    Raises:
        Stopped: in place of any KeyboardInterrupt after the flag was raised, and at the end of the block.
    """
    flag, wake, done = Flag(), threading.Event(), threading.Event()
    cause: list[tuple[str, int]] = []
    budget = None if time_budget is None else seconds_of(time_budget)
    grace = GRACE_SECONDS if budget is None else min(GRACE_SECONDS, budget / 4)

    def on_sigterm(number: int, frame: FrameType | None) -> None:
        cause.append(("SIGTERM", _TERMINATED))
        wake.set()

    def wait() -> None:
        if not wake.wait(None if budget is None else budget - grace):
            cause.append(("The time budget", _OUT_OF_TIME))
        if done.is_set():
            return
        progress(f"{cause[0][0]} ends this run: writing a last checkpoint, within {grace:.0f} seconds")
        flag.set()
        if not done.wait(grace):
            os.kill(os.getpid(), signal.SIGINT)

    def stopped() -> Stopped:
        what, code = cause[0]
        return Stopped(f"{what} ended this run. Run the same command again to resume from its last checkpoint.", code)

    with handle_sigterm(on_sigterm):
        thread = threading.Thread(target=wait, name="stop in order", daemon=True)
        thread.start()
        try:
            yield flag
        except KeyboardInterrupt:
            if cause:
                raise stopped() from None
            raise
        finally:
            done.set()
            wake.set()
    if cause:
        raise stopped()


@contextmanager
def handle_sigterm(handler: Callable[[int, FrameType | None], None]) -> Iterator[None]:
    """Handle SIGTERM within the block; a thread other than the main one cannot, and leaves it as it is."""
    before: Any = None
    with suppress(ValueError):
        before = signal.signal(signal.SIGTERM, handler)
    try:
        yield
    finally:
        if before is not None:
            signal.signal(signal.SIGTERM, before)


@contextmanager
def time_limit(time_budget: str | None) -> Iterator[None]:
    """Interrupt the block when the time budget is used up.

    Raises:
        Stopped: in place of the KeyboardInterrupt.
    """
    if time_budget is None:
        yield
        return
    is_over = threading.Event()

    def interrupt() -> None:
        is_over.set()
        os.kill(os.getpid(), signal.SIGINT)

    timer = threading.Timer(seconds_of(time_budget), interrupt)
    timer.daemon = True
    timer.start()
    try:
        yield
    except KeyboardInterrupt:
        if is_over.is_set():
            raise Stopped("The time budget is used up. Run the same command again to resume.", _OUT_OF_TIME) from None
        raise
    finally:
        timer.cancel()
