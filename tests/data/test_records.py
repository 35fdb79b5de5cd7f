import os
from pathlib import Path
from typing import Annotated

import pytest
from pydantic import Field

from dmvae.data.records import Record, RecordError, read_record


class Note(Record):
    epoch: Annotated[int, Field(ge=0)]
    best: float | None = None


REMEDY = "Restore it."


def test_a_valid_record_is_read_and_an_absent_one_is_none(tmp_path: Path) -> None:
    file = tmp_path / "note.json"
    assert read_record(file, Note, REMEDY) is None
    file.write_text('{"epoch": 3, "best": Infinity}')
    assert read_record(file, Note, REMEDY) == Note(epoch=3, best=float("inf"))
    file.write_text('{"epoch": 3, "version": 1}')
    assert read_record(file, Note, REMEDY) == Note(epoch=3)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("", "is empty, as after a power cut"),
        ("{}", "epoch: this field is missing"),
        ("[]", "valid dictionary"),
        ('{"epoch": -5}', "epoch: .*greater than or equal to 0, but got -5"),
        ('{"epoch": 1.5}', "epoch: "),
        ('{"epoch": 1, "window": 2}', "window: unknown field. A newer release may have written it"),
        ('{"epoch": 1, "version": 2}', "expected version 1, got 2. .*newer release: upgrade dmvae"),
        ("[" * 20_000, "is not valid JSON"),
        ('{"epoch": ' + "9" * 5000 + "}", "not valid JSON|epoch"),
        ('{"epoch": 3', "is not valid JSON"),
        ("\x00" * 40, "is not valid JSON"),
    ],
)
def test_what_is_wrong_is_said_with_file_and_remedy(content: str, message: str, tmp_path: Path) -> None:
    file = tmp_path / "note.json"
    file.write_text(content)
    with pytest.raises(RecordError, match=message) as raised:
        read_record(file, Note, REMEDY)
    assert str(file) in str(raised.value)
    assert REMEDY in str(raised.value) or "upgrade dmvae" in str(raised.value)
    assert len(str(raised.value)) < 500


@pytest.mark.parametrize("kind", ["folder", "link to itself", "link to nothing", "pipe", "utf-16", "large"])
def test_what_is_no_regular_text_file_is_named(kind: str, tmp_path: Path) -> None:
    file = tmp_path / "note.json"
    if kind == "folder":
        file.mkdir()
    elif kind == "link to itself":
        file.symlink_to(file)
    elif kind == "link to nothing":
        file.symlink_to(tmp_path / "gone")
    elif kind == "pipe":
        os.mkfifo(file)
    elif kind == "utf-16":
        file.write_text('{"epoch": 1}', encoding="utf-16")
    else:
        with file.open("wb") as stream:
            stream.truncate(1 << 30)
    with pytest.raises(RecordError, match=f"{file}.* Restore it."):
        read_record(file, Note, REMEDY)
