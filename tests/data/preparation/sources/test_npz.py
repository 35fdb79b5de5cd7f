"""Every source: converted from a file as people have it, read back equal; what is wrong with it named, nothing left."""

import os
import signal
import subprocess
import sys
import time
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.csv as pacsv
import pyarrow.parquet as pq
import pytest
import torch
from PIL import Image

from dmvae.config.data import PrepareConfig
from dmvae.config.sources import NpzSource
from dmvae.data.errors import DatasetError
from dmvae.data.preparation import external_shuffle, stream
from dmvae.data.preparation.prepare import prepare, read_source
from dmvae.data.preparation.rows import Rows
from dmvae.data.reading.dataset import open_dataset
from tests.data.preparation.test_rows import collect

NUM = 60


def truth() -> Rows:
    """Rows of two views, either of which may be missing, some labels too."""
    draw = np.random.default_rng(0)
    kind = draw.integers(0, 4, NUM)  # 0: both, 1 and 2: one, 3: both
    return Rows(
        ids=np.array([f"p{row:03d}" for row in range(NUM)]),
        data={name: draw.normal(size=(NUM, size)).astype(np.float32) for name, size in (("a", 3), ("b", 2))},
        present={"a": kind != 1, "b": kind != 2},
        labels=draw.integers(-1, 3, NUM),
    )


def npz(folder: Path, rows: Rows) -> dict[str, Any]:
    views = {name: np.where(rows.present[name][:, None], values, np.nan) for name, values in rows.data.items()}
    np.savez_compressed(folder / "rows.npz", id=rows.ids, label=rows.labels, **views)
    return {"kind": "npz", "path": f"{folder}/rows.npz"}


def tensors(folder: Path, rows: Rows) -> dict[str, Any]:
    """Torch tensors, as the README shows."""
    x, y, has_y = (torch.from_numpy(part) for part in (rows.data["a"], rows.data["b"], rows.present["b"]))
    rest = {"mask.a": rows.present["a"], "label": rows.labels, "id": rows.ids}
    np.savez(folder / "rows.npz", **{"a": x.numpy(), "b": y.numpy(), "mask.b": has_y.numpy()}, **rest)
    return {"kind": "npz", "path": f"{folder}/rows.npz"}


def parquet(folder: Path, rows: Rows) -> dict[str, Any]:
    views = [row.tolist() if here else None for row, here in zip(rows.data["a"], rows.present["a"], strict=True)]
    lists = pa.array(views, pa.list_(pa.float32()))
    columns = {f"b_{i}": pa.array(rows.data["b"][:, i], mask=~rows.present["b"]) for i in range(2)}
    labels = pa.array(rows.labels, mask=rows.labels < 0)
    pq.write_table(pa.table({"patient": rows.ids, "class": labels, "a": lists, **columns}), folder / "rows.parquet")
    groups = {"a": {"columns": "a"}, "b": {"columns": "b_*"}}
    return {
        "kind": "parquet",
        "path": f"{folder}/rows.parquet",
        "id": "patient",
        "label": "class",
        "modalities": groups,
    }


def csv(folder: Path, rows: Rows) -> dict[str, Any]:
    """A table a view, in another order, without the rows that lack it."""
    order = np.random.default_rng(1).permutation(NUM)
    for name, values in rows.data.items():
        here = order[rows.present[name][order]]
        columns = {f"{name}{i}": values[here, i] for i in range(values.shape[1])}
        pacsv.write_csv(pa.table({"id": rows.ids[here], **columns}), folder / f"{name}.csv")
    pacsv.write_csv(
        pa.table({"id": rows.ids, "label": pa.array(rows.labels, mask=rows.labels < 0)}), folder / "rows.csv"
    )
    tables = {name: {"path": f"{folder}/{name}.csv", "dtype": "float32"} for name in rows.data}
    return {"kind": "csv", "rows": f"{folder}/rows.csv", "modalities": tables}


def h5mu(folder: Path, rows: Rows) -> dict[str, Any]:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of mudata and anndata, about pandas
        import anndata
        import mudata
        import pandas as pd

        pd.set_option("future.infer_string", False)
        views = {
            name: anndata.AnnData(values[rows.present[name]], obs=pd.DataFrame(index=rows.ids[rows.present[name]]))
            for name, values in rows.data.items()
        }
        both = mudata.MuData(views)
        of = dict(zip(rows.ids.tolist(), rows.labels.tolist(), strict=True))
        both.obs["label"] = pd.array([None if of[key] < 0 else of[key] for key in both.obs_names], dtype="Int64")
        both.write(folder / "rows.h5mu")
        pd.reset_option("future.infer_string")
    return {"kind": "h5mu", "path": f"{folder}/rows.h5mu"}


@pytest.mark.parametrize("small", [False, True])
@pytest.mark.parametrize("write", [npz, tensors, parquet, csv, h5mu])
def test_a_source_is_read_back_equal_missing_values_included(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, write: Callable[[Path, Rows], dict[str, Any]], small: bool
) -> None:
    if small:  # many chunks, and files to shuffle them
        monkeypatch.setattr(stream, "CHUNK_BYTES", 150)
        monkeypatch.setattr(external_shuffle, "HELD_BYTES", 1000)
    rows = truth()
    config = {"dataset": f"{tmp_path}/data", "source": write(tmp_path, rows), "splits": {"train": 1}}
    dataset = open_dataset(prepare(PrepareConfig.model_validate(config), progress=lambda _: None))
    split = dataset.split("train")
    batch = split.read(np.arange(NUM))
    order = np.argsort(split.ids())
    assert split.ids()[order].tolist() == rows.ids.tolist()
    assert batch.labels is not None
    assert batch.labels[order].tolist() == rows.labels.tolist()
    assert batch.masks is not None
    for name, values in rows.data.items():
        here = rows.present[name]
        assert batch.masks[name][order].tolist() == here.tolist()
        assert np.array_equal(batch.data[name].numpy()[order][here], values[here])
    assert not list((tmp_path / "data").glob(".*"))


def test_images_are_read_back_equal(tmp_path: Path) -> None:
    pixels = np.random.default_rng(0).integers(0, 256, (5, 4, 6, 3), dtype=np.uint8)
    for row in range(4):  # the last one is absent
        Image.fromarray(pixels[row]).save(tmp_path / f"{row}.png")
    lines = [f"{row},{row}.png,{row % 2 or ''},{'train' if row else 'val'}" for row in range(5)]
    (tmp_path / "rows.csv").write_text("id,file,label,split\n" + "\n".join(lines))
    scans = {"scan": {"column": "file", "size": [4, 6]}, "grey": {"column": "file", "size": [4, 6], "channels": 1}}
    source = {"kind": "images", "table": f"{tmp_path}/rows.csv", "folder": str(tmp_path), "modalities": scans}
    config = PrepareConfig.model_validate({"dataset": f"{tmp_path}/data", "source": source})
    told: list[str] = []
    dataset = open_dataset(prepare(config, told.append))
    assert "dropped 1 rows without any modality" in told
    for name, ids in (("train", {1, 2, 3}), ("val", {0})):
        split = dataset.split(name)
        batch = split.read(np.arange(len(split)))
        assert set(split.ids().tolist()) == ids
        assert np.array_equal(
            np.rint(batch.data["scan"].numpy() * 255), pixels[split.ids()].transpose(0, 3, 1, 2).astype(float)
        )


def bad_parquet(folder: Path, **columns: Any) -> dict[str, Any]:
    pq.write_table(pa.table(columns), folder / "bad.parquet", row_group_size=2)
    return {"kind": "parquet", "path": f"{folder}/bad.parquet"}


def bad_csv(folder: Path, text: str, rows: str | None = None) -> dict[str, Any]:
    (folder / "bad.csv").write_text(text)
    if rows:
        (folder / "rows.csv").write_text(rows)
    table = {"a": {"path": f"{folder}/bad.csv"}}
    return {"kind": "csv", "modalities": table, "rows": f"{folder}/rows.csv" if rows else None}


def bad_image(folder: Path) -> dict[str, Any]:
    Image.new("L", (2, 2)).save(folder / "good.png")
    (folder / "cut.png").write_bytes((folder / "good.png").read_bytes()[:40])
    (folder / "rows.csv").write_text("id,file\n1,good.png\n2,cut.png\n")
    image = {"scan": {"column": "file", "size": [2, 2]}}
    return {"kind": "images", "table": f"{folder}/rows.csv", "folder": str(folder), "modalities": image}


@pytest.mark.parametrize(
    ("source", "message"),
    [
        (lambda f: bad_parquet(f, id=[4, 5, 4], x=[1.0, 2, 3]), r"Duplicate id 4.*parquet, row [02].*row [02]"),
        (lambda f: bad_csv(f, "id,x\nu,1\nv,2\nu,3\n"), r"Duplicate id 'u' in .*bad.csv, lines 2 and 4"),
        (lambda f: bad_csv(f, "id,x\nu,1\nv,2,3\n"), r"Cannot read .*bad.csv .*Row #3: Expected 2 columns, got 3"),
        (
            lambda f: bad_csv(f, "id,x\nu,1\nv,2\n", "id\ny\nz\n"),
            r"2 ids of .*bad.csv are not in .*rows.csv, .*'u' in line 2",
        ),
        (bad_image, r"Cannot decode image .*cut.png: .*rows.csv, line 3"),
        (lambda f: bad_parquet(f, x=[1.0, 2, 3], label=[0, 1.0, 0.5]), r"Labels must .*0.5 in .*bad.parquet, row \d"),
        (lambda f: bad_csv(f, "id,x\nu,1\nv,2\n", "id,label\nu,0\nv,.5\n"), r"Labels must .*0.5 in .*rows.csv, line 3"),
        (
            lambda f: bad_parquet(f, x=[1.0], joint=[1.0]),
            r"Cannot read .*bad.parquet: .*joint.*source.modalities",
        ),
        (
            lambda f: bad_csv(f, "id,x\nu,1\nv,two\n"),
            r"Column 'x' .* but also 'two' in .*bad.csv, line 3",
        ),
        (
            lambda f: bad_parquet(f, x=[[1.0], [2], [3], [np.inf]]),
            r"'x' must be finite, but got infinity in .*bad.parquet, row 3",
        ),
        (
            lambda f: bad_parquet(f, x=[1.0, 2.0], split=["train", "../up"]),
            r"Cannot use the split in .*bad.parquet, row 1: ",
        ),
    ],
)
def test_bad_input_is_named_by_file_and_row_and_leaves_no_half_dataset(
    tmp_path: Path, source: Callable[[Path], dict[str, Any]], message: str
) -> None:
    tree = source(tmp_path)
    before = set(tmp_path.iterdir())
    with pytest.raises(DatasetError, match=message) as caught:
        prepare(PrepareConfig.model_validate({"dataset": f"{tmp_path}/data", "source": tree}), progress=lambda _: None)
    assert "\n" not in str(caught.value)
    assert set(tmp_path.iterdir()) == before


KILLED = """
import sys
from dmvae.config.data import PrepareConfig
from dmvae.config.sources import NpzSource
from dmvae.data.preparation import external_shuffle
from dmvae.data.preparation import stream
from dmvae.data.preparation.prepare import prepare

stream.CHUNK_BYTES, external_shuffle.HELD_BYTES = 1000, 100_000
prepare(PrepareConfig(dataset=sys.argv[2], source=NpzSource(path=sys.argv[1])))
"""


def test_a_killed_run_leaves_nothing_that_looks_like_a_dataset(tmp_path: Path) -> None:
    np.savez(tmp_path / "rows.npz", x=np.zeros((50_000, 8)))
    command = [sys.executable, "-c", KILLED, str(tmp_path / "rows.npz"), str(tmp_path / "data")]
    with subprocess.Popen(command, stdout=subprocess.DEVNULL, env=os.environ) as process:
        while not list(tmp_path.glob(".data.*/.scratch/rows/*")) and process.poll() is None:
            time.sleep(0.01)
        process.kill()
    assert process.returncode == -signal.SIGKILL
    assert not (tmp_path / "data").exists()
    assert not list(tmp_path.rglob("dataset.json"))
    source = {"kind": "npz", "path": f"{tmp_path}/rows.npz"}
    prepare(PrepareConfig.model_validate({"dataset": f"{tmp_path}/data", "source": source}), progress=lambda _: None)
    assert len(open_dataset(tmp_path / "data").split("train")) == 40_000


def saved(tmp_path: Path, **arrays: Any) -> str:
    np.savez(tmp_path / "t.npz", **arrays)
    return str(tmp_path / "t.npz")


def test_arrays_that_are_no_modality_are_left_alone_and_said(tmp_path: Path) -> None:
    x, names = np.zeros((40, 3), np.float32), np.array(["a", "b", "c"])
    objects = np.array([{"made": "by hand"}], dtype=object)
    path = saved(tmp_path, x=x, feature_names=names, version=np.int64(3), info=objects)
    stream = read_source(NpzSource(path=path), 0, tmp_path)
    assert stream.notes == ("not taken: 3 arrays (feature_names <U1[3], version int64[], info object[1])",)
    assert list(collect(stream).data) == ["x"]


def test_arrays_and_their_types_are_chosen(tmp_path: Path) -> None:
    path = saved(tmp_path, **{"x-raw": np.arange(6).reshape(3, 2), "z": np.zeros((3, 1))})
    source = NpzSource.model_validate({"path": path, "modalities": {"x": {"array": "x-raw", "dtype": "float32"}}})
    stream = read_source(source, 0, tmp_path)
    assert stream.notes == ("not taken: 1 arrays (z float64[3, 1])",)
    rows = collect(stream)
    assert rows.data["x"].dtype == np.float32
    assert rows.data["x"].tolist() == [[0, 1], [2, 3], [4, 5]]
    wrong = NpzSource.model_validate({"path": path, "modalities": {"x": {"array": "x-rwa"}}})
    with pytest.raises(DatasetError, match=r"Array 'x-rwa' not found.*Did you mean 'x-raw'\?"):
        read_source(wrong, 0, tmp_path)


def test_arrays_of_splits_are_refused(tmp_path: Path) -> None:
    path = saved(tmp_path, x_train=np.zeros((6, 2)), y_train=np.zeros(6), x_test=np.zeros((2, 2)), y_test=np.zeros(2))
    with pytest.raises(DatasetError, match=r"'x_train' and 'x_test' are splits of one modality. Concatenate them"):
        read_source(NpzSource(path=path), 0, tmp_path)


@pytest.mark.parametrize(
    ("array", "message"),
    [
        (np.array(["a"] * 9), "must be of type uint8"),
        (np.array([None] * 9), "must hold numbers or strings, but got object"),
        (np.array(1.0), "'x' must have rows, but is a single number"),
    ],
)
def test_a_chosen_array_that_is_no_modality_is_refused(tmp_path: Path, array: Any, message: str) -> None:
    source = NpzSource.model_validate({"path": saved(tmp_path, x=array), "modalities": {"x": {}}})
    with pytest.raises(DatasetError, match=message):
        collect(read_source(source, 0, tmp_path))
