from types import SimpleNamespace

import pytest

from dmvae.data import progress
from dmvae.data.progress import Progress, minutes


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    now = [100.0]
    monkeypatch.setattr(progress, "time", SimpleNamespace(monotonic=lambda: now[0]))
    return now


def test_a_line_gives_the_share_the_speed_and_the_time_left(clock: list[float]) -> None:
    lines: list[str] = []
    task = Progress(lines.append, "read", total=1000)
    clock[0] += 2
    task.update(100)  # not due yet
    clock[0] += 8
    task.update(200)
    assert lines == ["read 200 of 1,000 rows, 20 rows/s, 0:40 left"]


def test_without_a_total_no_time_is_given(clock: list[float]) -> None:
    lines: list[str] = []
    task = Progress(lines.append, "read")
    clock[0] += 10
    task.update(200)
    assert lines == ["read 200 rows, 20 rows/s"]


def test_what_an_earlier_process_did_does_not_count_towards_the_speed(clock: list[float]) -> None:
    lines: list[str] = []
    task = Progress(lines.append, "embedded", total=1000, already_done=800)
    clock[0] += 10
    task.update(900)
    assert lines == ["embedded 900 of 1,000 rows, 10 rows/s, 0:10 left"]


def test_lines_are_rare_and_the_end_is_left_to_the_caller(clock: list[float]) -> None:
    lines: list[str] = []
    task = Progress(lines.append, "trained", total=100, unit="steps")
    for done in range(1, 101):
        clock[0] += 1
        task.update(done)
    assert len(lines) == 19
    assert not any("100 of 100" in line for line in lines)


def test_durations_are_minutes_and_seconds() -> None:
    assert [minutes(seconds) for seconds in (0.0, 59.9, 60.0, 3725.0)] == ["0:00", "0:59", "1:00", "62:05"]
