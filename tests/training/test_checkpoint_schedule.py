"""Checkpoints by the clock fall where all workers agree, and looking at the clock is rare."""

import pytest

from dmvae.config.training import TrainingConfig
from dmvae.training.checkpoint_schedule import CheckpointClock, StopWatch


class Time:
    """A clock that moves when steps are done, and counts who looks at it."""

    def __init__(self) -> None:
        self.now, self.looks = 1000.0, 0

    def __call__(self) -> float:
        self.looks += 1
        return self.now


def due(config: TrainingConfig, step_seconds: float, steps: int, first: int = 0) -> tuple[list[int], int]:
    clock = Time()
    cadence, found = CheckpointClock(config, clock, first), []
    for done in range(first + 1, first + steps + 1):
        clock.now += step_seconds
        if cadence.is_due(done):
            found.append(done)
    return found, clock.looks


@pytest.mark.parametrize("step_seconds", [0.001, 0.25, 7.0, 50.0])
def test_a_checkpoint_comes_when_its_seconds_are_over(step_seconds: float) -> None:
    steps = int(300 / step_seconds)
    found, looks = due(TrainingConfig(checkpoint_seconds=30.0), step_seconds, steps)
    distances = [(b - a) * step_seconds for a, b in zip([0, *found], found, strict=False)]
    assert len(found) >= 5
    assert all(30.0 - 1e-6 <= distance <= 30.0 + 2 * step_seconds for distance in distances)
    assert looks <= 25 * len(found) + 25


def test_a_slower_pace_is_noticed() -> None:
    clock = Time()
    cadence, begun = CheckpointClock(TrainingConfig(checkpoint_seconds=100.0), clock, 0), clock.now
    for done in range(1, 10_000):
        clock.now += 0.01 if done < 2000 else 1.0
        if cadence.is_due(done):
            break
    assert clock.now - begun < 100 + 4200, "half of what is left was looked past"


def test_steps_and_seconds_may_be_asked_for_together() -> None:
    found, _ = due(TrainingConfig(checkpoint_seconds=10.0, checkpoint_steps=7), 1.0, 22, first=3)
    assert found == [7, 13, 14, 21, 23]


def test_steps_alone_never_look_at_the_clock() -> None:
    assert due(TrainingConfig(checkpoint_steps=5), 1.0, 20) == ([5, 10, 15, 20], 0)
    assert due(TrainingConfig(), 1.0, 20) == ([], 0)


@pytest.mark.parametrize("step_seconds", [0.001, 0.3, 7.0])
def test_a_request_to_stop_is_seen_within_seconds_and_looked_for_rarely(step_seconds: float) -> None:
    clock, asked_at = Time(), 1000.0 + max(60.0, 20 * step_seconds)
    watch = StopWatch(lambda: clock.now >= asked_at, clock)
    clock.now += step_seconds
    while not watch.is_time():
        clock.now += step_seconds
    assert clock.now - asked_at <= max(2.5, 2 * step_seconds)
    assert clock.looks <= 12 + 1.2 * (clock.now - 1000.0)


def test_without_anything_to_look_at_the_clock_is_not_read() -> None:
    clock = Time()
    watch = StopWatch(None, clock)
    assert not any(watch.is_time() for _ in range(100))
    assert clock.looks == 0
