"""The log file of a run."""

import re
from pathlib import Path

import pytest

from dmvae.config.errors import Stopped
from dmvae.platform import logs
from dmvae.platform.errors import RunError
from dmvae.platform.logs import LOG_FILE, log_file


def test_lines_have_a_time_in_the_file_and_none_on_the_screen(tmp_path: Path) -> None:
    screen: list[str] = []
    for line in ("epoch 1/2", "epoch 2/2"):  # a resumed run appends
        with log_file(tmp_path, screen.append) as log:
            log(line)
    assert screen == ["epoch 1/2", "epoch 2/2"]
    lines = (tmp_path / LOG_FILE).read_text().splitlines()
    assert [re.fullmatch(r"\d{4}-\d\d-\d\d \d\d:\d\d:\d\d,\d{3} (.*)", line)[1] for line in lines] == screen  # type: ignore[index]


@pytest.mark.parametrize(
    ("error", "last"),
    [
        (RunError("Training failed."), "RunError: Training failed."),
        (Stopped("SIGTERM ended this run.", 143), "SIGTERM ended this run."),
        (KeyboardInterrupt(), "Interrupted."),
    ],
)
def test_the_last_line_says_how_the_command_ended(tmp_path: Path, error: BaseException, last: str) -> None:
    with pytest.raises(type(error)), log_file(tmp_path, lambda line: None):
        raise error
    assert (tmp_path / LOG_FILE).read_text().endswith(f" {last}\n")


def test_a_long_log_is_rotated(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(logs, "_MAX_BYTES", 500)
    with log_file(tmp_path, lambda line: None) as log:
        for number in range(100):
            log(f"line {number}")
    assert sorted(file.name for file in tmp_path.iterdir()) == ["log.txt", "log.txt.1", "log.txt.2"]
    assert (tmp_path / "log.txt").read_text().endswith("line 99\n")
