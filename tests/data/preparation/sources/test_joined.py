"""Sources that are joined on their ids: images, text, tables and arrays."""

import io
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image

from dmvae.config.data import PrepareConfig
from dmvae.data.errors import DatasetError
from dmvae.data.inspection.profile import profile_dataset
from dmvae.data.inspection.suggestions import suggest_likelihoods, suggest_run
from dmvae.data.preparation import stream
from dmvae.data.preparation.prepare import prepare
from dmvae.data.reading.dataset import Dataset, open_dataset

IDS = [f"p{number}" for number in range(40)]
WORDS = ["a red cat", "a blue dog.", "the red dog", "A cat"]
PHOTO = {"column": "image", "size": [4, 4]}


def colour(number: int) -> Image.Image:
    return Image.new("RGB", (4, 4), (number, 0, 0))


def write(folder: Path) -> dict[str, Any]:
    """A table of 40 people, texts of the first 30, images of the last 30, arrays of all but p0."""
    rng = np.random.default_rng(0)
    table = "".join(f"{name},{rng.normal():.3f},{'fm'[i % 2]},{i % 3}\n" for i, name in enumerate(IDS))
    (folder / "people.csv").write_text("id,age,sex,label\n" + table)
    texts = "".join(f"{name}\t{WORDS[i % 4]}\n" for i, name in enumerate(IDS[:30]))
    (folder / "texts.tsv").write_text("id\tcaption\n" + texts)
    for number, name in enumerate(IDS[10:], 10):
        colour(number).save(folder / f"{name}.png")
    for name in IDS[1:]:
        np.save(folder / f"{name}.npy", np.full((2, 3), int(name[1:]), np.float32))
    files = "".join(f"{name},{name}.png,{name}.npy\n" for name in reversed(IDS[1:]))
    (folder / "files.csv").write_text("id,image,volume\n" + files)
    clinic = {"path": f"{folder}/people.csv", "columns": ["age", "sex"]}
    return {
        "dataset": f"{folder}/out",
        "sources": [
            {"kind": "csv", "modalities": {"clinic": clinic}, "rows": f"{folder}/people.csv"},
            {"kind": "text", "path": f"{folder}/texts.tsv", "modalities": {"text": {"column": "caption", "length": 3}}},
            {
                "kind": "images",
                "table": f"{folder}/files.csv",
                "folder": str(folder),
                "modalities": {"photo": PHOTO, "volume": {"column": "volume"}},
            },
        ],
    }


def prepared(tree: dict[str, Any]) -> tuple[Dataset, list[str]]:
    lines: list[str] = []
    return open_dataset(prepare(PrepareConfig.model_validate(tree), lines.append)), lines


def rows_of(dataset: Dataset) -> dict[Any, dict[str, Any]]:
    """The values of every row by its id; a missing modality is left out."""
    found: dict[Any, dict[str, Any]] = {}
    for name in dataset.manifest.splits:
        split = dataset.split(name)
        batch = split.read(np.arange(len(split)))
        masks = {key: mask.reshape(len(mask), -1).any(dim=1) for key, mask in (batch.masks or {}).items()}
        for row, key in enumerate(split.ids().tolist()):
            there = [m for m in batch.data if m not in masks or bool(masks[m][row])]
            found[key] = {m: batch.data[m][row].numpy() for m in there}
    return found


@pytest.mark.parametrize("chunk_bytes", [1 << 24, 500])
def test_every_modality_of_a_row_comes_from_its_source(
    tmp_path: Path, chunk_bytes: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(stream, "CHUNK_BYTES", chunk_bytes)
    dataset, lines = prepared(write(tmp_path))
    rows, vocabulary = rows_of(dataset), dataset.manifest.modalities["text"].vocabulary
    assert vocabulary is not None
    assert sorted(rows) == sorted(IDS)
    for number, name in enumerate(IDS):
        wanted = {"clinic"}
        wanted |= {"text"} if number < 30 else set()
        wanted |= {"photo"} if number >= 10 else set()
        wanted |= {"volume"} if number else set()
        assert set(rows[name]) == wanted
        if "photo" in wanted:
            assert np.rint(rows[name]["photo"][0] * 255).tolist() == [[number] * 4] * 4
        if "volume" in wanted:
            assert rows[name]["volume"].tolist() == [[number] * 3] * 2
        if "text" in wanted:
            words = [vocabulary[int(code)] for code in rows[name]["text"]]
            assert words == [*WORDS[number % 4].lower().replace(".", " .").split(), "<pad>"][:3]
    report = "joined 40 rows: 29 in every source, 0 only in source 1 (csv), 0 only in source 2 (text), "
    assert f"{report}0 only in source 3 (images)" in lines
    assert any("photo: missing, because 9 of 39 files are not found, the first 'p9.png'" in line for line in lines)
    assert "text: cut 8 texts after 3 words" in lines
    assert any("joined 40 rows" in note for note in dataset.manifest.origin["notes"])


def test_the_proposed_run_knows_the_padding(tmp_path: Path) -> None:
    dataset, _ = prepared(write(tmp_path))
    assert dataset.manifest.modalities["text"].pad == 0
    profile = profile_dataset(dataset, lambda _: None)
    run = suggest_run(profile, "data/out", suggest_likelihoods(profile))
    assert run.model.decoder_dist_params["text"]["pad"] == 0
    assert run.model.architectures["text"].name == "sequence"


def test_the_vocabulary_is_that_of_training_rows(tmp_path: Path) -> None:
    splits = ["train" if i < 20 else "test" for i in range(30)]
    texts = [f"{i},{'often here' if i < 20 else 'only tested'}\n" for i in range(30)]
    (tmp_path / "t.csv").write_text("id,caption\n" + "".join(texts))
    (tmp_path / "v.csv").write_text("id,x,split\n" + "".join(f"{i},{i},{s}\n" for i, s in enumerate(splits)))
    text = {"kind": "text", "path": f"{tmp_path}/t.csv", "modalities": {"text": {"column": "caption", "length": 2}}}
    table = {"kind": "csv", "modalities": {"x": {"path": f"{tmp_path}/v.csv"}}, "rows": f"{tmp_path}/v.csv"}
    dataset, _ = prepared({"dataset": f"{tmp_path}/out", "sources": [text, table]})
    assert dataset.manifest.modalities["text"].vocabulary == ("<pad>", "<unknown>", "here", "often")
    batch = dataset.split("test").read(np.arange(10))
    assert (batch.data["text"] == 1).all()


def test_bytes_need_no_vocabulary(tmp_path: Path) -> None:
    pq.write_table(pa.table({"id": ["u", "v", "w"], "t": ["ab", "", "é"]}), tmp_path / "t.parquet")
    text = {"column": "t", "unit": "bytes", "length": 4}
    source = {"kind": "text", "path": f"{tmp_path}/t.parquet", "modalities": {"text": text}}
    dataset, _ = prepared({"dataset": f"{tmp_path}/out", "source": source, "splits": {"train": 1.0}})
    assert {name: row["text"].tolist() for name, row in rows_of(dataset).items()} == {
        "u": [ord("a") + 1, ord("b") + 1, 0, 0],
        "w": [0xC3 + 1, 0xA9 + 1, 0, 0],
    }


@pytest.mark.parametrize("wrapped", [False, True])
def test_images_may_be_bytes_in_parquet(tmp_path: Path, wrapped: bool) -> None:
    contents = []
    for number in (7, 9):
        with io.BytesIO() as file:
            colour(number).save(file, "PNG")
            contents.append(file.getvalue())
    column: list[Any] = [{"bytes": c, "path": "x.png"} for c in contents] if wrapped else contents
    pq.write_table(pa.table({"id": [1, 2, 3], "image": [*column, None]}), tmp_path / "t.parquet")
    source = {"kind": "parquet", "path": f"{tmp_path}/t.parquet", "modalities": {"photo": PHOTO}}
    dataset, _ = prepared({"dataset": f"{tmp_path}/out", "source": source, "splits": {"train": 1.0}})
    found = {key: np.rint(row["photo"][0, 0, 0] * 255) for key, row in rows_of(dataset).items()}
    assert found == {1: 7, 2: 9}


def test_lists_of_different_lengths_are_padded_and_said(tmp_path: Path) -> None:
    lists = {"tokens": [[3, 1], [2], [4, 0, 4], None], "signal": [[0.5], [1.5, 2.5], [], [3.5]]}
    pq.write_table(pa.table({"id": [0, 1, 2, 3], **lists}), tmp_path / "t.parquet")
    source = {"kind": "parquet", "path": f"{tmp_path}/t.parquet"}
    dataset, lines = prepared({"dataset": f"{tmp_path}/out", "source": source, "splits": {"train": 1.0}})
    assert "tokens: sequences of 1 to 3 elements, padded at the end to 3 with class 5" in lines
    assert "signal: sequences of 0 to 2 elements, padded at the end to 2 with missing cells" in lines
    assert dataset.manifest.modalities["tokens"].pad == 5
    rows = rows_of(dataset)
    assert {key: row["tokens"].tolist() for key, row in rows.items() if "tokens" in row} == {
        0: [3, 1, 5],
        1: [2, 5, 5],
        2: [4, 0, 4],
    }
    assert 2 in rows
    assert "signal" not in rows[2]
    cut = {"tokens": {"columns": "tokens", "length": 2}}
    tree = {"dataset": f"{tmp_path}/cut", "source": {**source, "modalities": cut}, "splits": {"train": 1.0}}
    dataset, lines = prepared(tree)
    assert rows_of(dataset)[2]["tokens"].tolist() == [4, 0]
    assert "tokens: sequences of 1 to 3 elements, padded at the end to 2 with class 5; 1 were cut" in lines


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda tree: tree["sources"].append(tree["sources"][1]), r"Modality 'text' is in source 2 \(text\) and in"),
        (lambda tree: tree["sources"][1].update(path="nowhere.csv"), r"Source file not found: nowhere.csv"),
        (
            lambda tree: tree["sources"][1]["modalities"]["text"].update(column="capton"),
            r"Column 'capton' not found in .*texts.tsv.*Did you mean 'caption'\?",
        ),
        (lambda tree: tree.update(sources=tree["sources"][:1]), r"two or more \[\[sources\]\], but got 0 and 1"),
    ],
)
def test_what_cannot_be_joined_is_named(tmp_path: Path, change: Any, message: str) -> None:
    tree = write(tmp_path)
    change(tree)
    with pytest.raises((DatasetError, ValueError), match=message):
        prepared(tree)


def test_ids_written_in_two_ways_are_refused(tmp_path: Path) -> None:
    tree = write(tmp_path)
    file = tmp_path / "texts.tsv"
    file.write_text(file.read_text().replace("p7\t", "P7\t"))
    with pytest.raises(DatasetError, match=r"1 ids are written in two ways, such as 'p7' in source 1 .* and 'P7' in"):
        prepared(tree)
