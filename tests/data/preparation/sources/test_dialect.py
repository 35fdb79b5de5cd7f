"""Delimited text as programs and countries write it."""

import gzip
from pathlib import Path
from typing import Any

import pytest

from dmvae.config.sources import CsvDialect, CsvSource
from dmvae.data.errors import DatasetError
from dmvae.data.preparation.prepare import read_source
from dmvae.data.preparation.rows import Rows
from tests.data.preparation.test_rows import collect

WANTED = [[0.13, -0.5], [1.5, 1234.25], [2.5, 3.0]]
PLAIN = "id,a,b\nP1,0.13,-0.5\nP2,1.5,1234.25\nP3,2.5,3\n"
COMMA = "id;a;b\nP1;0,13;-0,5\nP2;1,5;1234,25\nP3;2,5;3\n"


def read(folder: Path, text: str | bytes, name: str = "t.csv", **settings: Any) -> tuple[Rows, tuple[str, ...]]:
    content = text.encode() if isinstance(text, str) else text
    (folder / name).write_bytes(gzip.compress(content) if name.endswith(".gz") else content)
    table = {"m": {"path": str(folder / name)}}
    stream = read_source(CsvSource.model_validate({"modalities": table, **settings}), 0, folder)
    return collect(stream), tuple(note.replace(str(folder / name), "FILE") for note in stream.notes)


@pytest.mark.parametrize(
    ("text", "name", "note"),
    [
        (PLAIN, "t.csv", ""),
        (PLAIN.replace(",", "\t"), "t.tsv", ""),
        (PLAIN.replace(",", "\t"), "t.tsv.gz", ""),
        (PLAIN, "t.csv.gz", ""),
        (PLAIN.replace(",", "\t"), "t.txt", "delimiter tab"),
        (PLAIN.replace(",", " "), "t.txt", "delimiter space"),
        (PLAIN.replace(",", "|"), "t.csv", "delimiter '|'"),
        (COMMA, "t.csv", "delimiter ';', decimal mark ','"),
        (COMMA.replace("1234", "1.234"), "t.csv", "delimiter ';', decimal mark ',', thousands '.'"),
        (COMMA.replace("1234", "1 234"), "t.csv", "delimiter ';', decimal mark ',', thousands ' '"),
        (PLAIN.replace("1234.25", '"1,234.25"'), "t.csv", "thousands ','"),
        (PLAIN.replace("1234.25", "1'234.25"), "t.csv", 'thousands "\'"'),
        ("sep=;\n" + PLAIN.replace(",", ";"), "t.csv", "delimiter ';', names in line 2"),
        ("Clinic, 2020\n\n" + PLAIN, "t.csv", "names in line 3"),
        ("# made by\n# a program\n" + PLAIN, "t.csv", "lines with '#' ignored, names in line 3"),
        (PLAIN.replace("P2", "# half way\nP2"), "t.csv", "lines with '#' ignored"),
        ("\ufeff" + PLAIN, "t.csv", ""),
        (PLAIN.encode("utf-16"), "t.csv", "encoding utf-16"),
        (PLAIN.replace("\n", "\r\n"), "t.csv", ""),
        (PLAIN.replace("id,", ","), "t.csv", "the first column is named 'row names'"),
        (PLAIN.replace("id,", "").replace(",", "\t"), "t.tsv", "the first column is named 'row names'"),
        ("#" + PLAIN.replace(",", "\t"), "t.tsv", ""),
    ],
)
def test_every_way_of_writing_gives_the_same_values(tmp_path: Path, text: str | bytes, name: str, note: str) -> None:
    rows, notes = read(tmp_path, text, name)
    assert rows.ids.tolist() == ["P1", "P2", "P3"]
    assert rows.data["m"].tolist() == WANTED
    assert notes == ((f"FILE: {note}",) if note else ())


def test_text_that_is_not_utf_8_is_read_and_said(tmp_path: Path) -> None:
    rows, notes = read(tmp_path, "id,größe\nMüller,1\nMeier,2\n".encode("latin-1"))
    assert rows.ids.tolist() == ["Müller", "Meier"]
    assert notes == ("FILE: encoding cp1252",)


def test_missing_words_are_missing_and_said(tmp_path: Path) -> None:
    rows, notes = read(tmp_path, "id,a\nu,?\nv,.\nw,-\nx,n/a\ny,-9\nz,1\n", dialect={"null": ["-9"]})
    assert rows.present["m"].tolist() == [False] * 5 + [True]
    assert notes == ("FILE: missing: -, ., ?",)


def test_settings_overrule_what_is_found(tmp_path: Path) -> None:
    rows, _ = read(tmp_path, "u;1,234\nv;5,678\n", id="1", dialect={"header": 0, "decimal": ",", "delimiter": ";"})
    assert rows.data["m"].tolist() == [[1.234], [5.678]]
    rows, _ = read(tmp_path, 'id,a\nu,"1,234"\nv,12\n', dialect={"thousands": ","})
    assert rows.data["m"].tolist() == [[1234], [12]]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ('id,a\nu,"1,234"\nv,"5,678"\n', r"Unclear number '[15],\d+' in column 'a' of .*t.csv: .* Set decimal or"),
        ("1.5,2.5,3.5\n4.5,5.5,6.5\n", r"The first line of .* holds numbers \(1.5, 2.5, 3.5\).*header = 0"),
        ("", r"t.csv has no lines"),
        ("id,a\nu,1\nv,2,3\n", r"Cannot read .* header in line 1 and delimiter ',': .*Expected 2 columns, got 3"),
        ("id,a\nu,1\n,2\n", r"Missing id in .*t.csv, line 3"),
        ("x,a\nu,1\n", r"Id column 'id' not found in .*source.join = 'order'"),
    ],
)
def test_what_cannot_be_told_is_refused(tmp_path: Path, text: str, message: str) -> None:
    with pytest.raises(DatasetError, match=message):
        read(tmp_path, text)


def test_an_encoding_that_shows_late_is_named_with_the_remedy(tmp_path: Path) -> None:
    text = b"id,a\n" + b"".join(b"%d,1\n" % row for row in range(300_000)) + "ü,2\n".encode("latin-1")
    with pytest.raises(DatasetError, match=r"as text in utf8: .* Set source.dialect.encoding"):
        read(tmp_path, text)
    rows, _ = read(tmp_path, text, dialect={"encoding": "latin-1"})
    assert rows.ids[-1] == "ü"


def joined(tmp_path: Path, one: str, other: str, **settings: Any) -> tuple[Rows, tuple[str, ...]]:
    (tmp_path / "one.csv").write_text(one)
    (tmp_path / "other.csv").write_text(other)
    tables = {"a": {"path": str(tmp_path / "one.csv")}, "b": {"path": str(tmp_path / "other.csv")}}
    stream = read_source(CsvSource.model_validate({"modalities": tables, **settings}), 0, tmp_path)
    return collect(stream), tuple(note.replace(f"{tmp_path}/", "") for note in stream.notes)


def test_rows_are_joined_by_their_order_when_asked(tmp_path: Path) -> None:
    rows, _ = joined(tmp_path, "x\n1\n2\n", "y\n3\n4\n", join="order")
    assert rows.ids.tolist() == [0, 1]
    assert rows.data["b"].tolist() == [[3], [4]]
    with pytest.raises(DatasetError, match=r"other.csv has 3 and another one 2|one.csv has 2 and another one 3"):
        joined(tmp_path, "x\n1\n2\n", "y\n3\n4\n5\n", join="order")


def test_the_join_is_reported(tmp_path: Path) -> None:
    _, notes = joined(tmp_path, "id,x\nu,1\nv,2\n", "id,y\nv,1\nw,2\nz,3\n")
    assert notes == ("joined 4 rows: 1 in every source, 1 only in one.csv, 2 only in other.csv",)


@pytest.mark.parametrize("ids", [("p1", "P1"), ("07", "7"), ("S-01", "S_01"), ("5.0", "5"), (" u", "u")])
def test_ids_written_in_two_ways_are_refused(tmp_path: Path, ids: tuple[str, str]) -> None:
    with pytest.raises(DatasetError, match=r"1 ids are written in two ways, such as .*Write ids the same way"):
        joined(tmp_path, f"id,x\nsame,1\n{ids[0]},2\n", f"id,y\nsame,1\n{ids[1]},2\n")
    rows, _ = joined(tmp_path, f"id,x\n{ids[0]},1\n{ids[1]},2\n", f"id,y\n{ids[1]},2\n")
    assert len(rows) == 2  # one file has both, so they are two


def test_columns_that_are_not_taken_are_said(tmp_path: Path) -> None:
    (tmp_path / "t.csv").write_text("id,a_1,b,label\nu,1,2,3\n")
    source = CsvSource.model_validate({"modalities": {"a": {"path": f"{tmp_path}/t.csv", "columns": "a_*"}}})
    assert read_source(source, 0, tmp_path).notes == (f"{tmp_path}/t.csv: not taken: 2 columns (b, label)",)


def test_a_dialect_may_be_of_one_file(tmp_path: Path) -> None:
    assert CsvDialect().header is None
    (tmp_path / "t.csv").write_text("id,a\nu,1\n")
    table = {"path": f"{tmp_path}/t.csv", "dialect": {"delimiter": ";"}}
    with pytest.raises(DatasetError, match=r"Id column 'id' not found in .*which has id,a"):
        read_source(CsvSource.model_validate({"modalities": {"a": table}}), 0, tmp_path)
