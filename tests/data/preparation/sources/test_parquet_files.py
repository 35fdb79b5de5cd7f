"""What the names of files and folders say, and what a source holds and is not taken."""

from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.dataset as ds
import pyarrow.parquet as pq
import pytest

from dmvae.config.data import PrepareConfig
from dmvae.config.sources import ColumnGroup, ParquetSource
from dmvae.data.errors import DatasetError
from dmvae.data.preparation.prepare import prepare, read_source
from dmvae.data.reading.dataset import open_dataset
from tests.data.preparation.test_rows import read_all


def write(path: Path, columns: dict[str, Any]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    pq.write_table(pa.table(columns), path)


def prepared(tmp_path: Path, source: ParquetSource, **settings: Any) -> tuple[dict[str, int], list[str]]:
    lines: list[str] = []
    config = PrepareConfig(dataset=str(tmp_path / "out"), source=source, replace=True, **settings)
    dataset = open_dataset(prepare(config, lines.append))
    return {name: split.rows for name, split in dataset.manifest.splits.items()}, lines


def test_folders_of_splits_keep_their_rows(tmp_path: Path) -> None:
    splits = ["train"] * 24 + ["val"] * 8 + ["test"] * 8
    table = pa.table({"a": np.arange(40.0), "site": [1, 2] * 20, "split": splits})
    partitioning = ds.partitioning(pa.schema([("split", pa.string()), ("site", pa.int64())]), flavor="hive")
    ds.write_dataset(table, tmp_path / "t", format="parquet", partitioning=partitioning)
    rows, lines = prepared(tmp_path, ParquetSource(path=str(tmp_path / "t"), group="site"))
    assert rows == {"train": 24, "val": 8, "test": 8}
    assert "columns from the names of folders: split, site" in lines


@pytest.mark.parametrize("name", ["train-0000-of-0001.parquet", "train/part-0.parquet", "data/train.parquet"])
@pytest.mark.parametrize("pattern", ["t", "t/**/*.parquet"])
def test_files_named_after_splits_keep_their_rows(tmp_path: Path, name: str, pattern: str) -> None:
    for split, rows in (("train", 24), ("validation", 8), ("test", 9)):
        write(tmp_path / "t" / name.replace("train", split), {"a": np.arange(float(rows))})
    rows_of, lines = prepared(tmp_path, ParquetSource(path=str(tmp_path / pattern)))
    assert rows_of == {"train": 24, "validation": 8, "test": 9}
    assert any(line.startswith("splits from the names of files") for line in lines)


def test_some_files_named_after_splits_are_refused(tmp_path: Path) -> None:
    for name in ("train-0.parquet", "test-0.parquet", "more.parquet"):
        write(tmp_path / name, {"a": [1.0, 2.0]})
    with pytest.raises(DatasetError, match=r"'test-0.parquet' does, but 'more.parquet' does not"):
        read_source(ParquetSource(path=str(tmp_path)), 0, tmp_path)


def test_other_partitions_are_columns(tmp_path: Path) -> None:
    for year, place in ((2001, "a%20b"), (2002, "__HIVE_DEFAULT_PARTITION__")):
        write(tmp_path / f"year={year}" / f"place={place}" / "x.parquet", {"a": [1.0, 2.0]})
    rows = read_all(ParquetSource(path=str(tmp_path), label="place", group="year"))
    assert rows.groups is not None
    assert rows.labels is not None
    assert rows.groups.tolist() == [2001, 2001, 2002, 2002]
    assert rows.labels.tolist() == [0, 0, -1, -1]


def test_a_pandas_index_of_names_is_the_id(tmp_path: Path) -> None:
    frame = pd.DataFrame({"g_1": [1.0, 2.0]}, index=pd.Index(["s7", "s3"], name="sample"))
    frame.to_parquet(tmp_path / "named.parquet")
    frame.reset_index(drop=True).to_parquet(tmp_path / "numbered.parquet")
    frame.rename_axis(None).to_parquet(tmp_path / "unnamed.parquet")
    groups = {"g": ColumnGroup(columns="g_*")}
    for file, ids in (("named", ["s7", "s3"]), ("unnamed", ["s7", "s3"]), ("numbered", [0, 1])):
        assert read_all(ParquetSource(path=str(tmp_path / f"{file}.parquet"), modalities=groups)).ids.tolist() == ids


def test_a_pandas_index_of_several_columns_asks_for_the_id(tmp_path: Path) -> None:
    index = pd.MultiIndex.from_tuples([("p", 1), ("p", 2)], names=["patient", "visit"])
    pd.DataFrame({"a": [1.0, 2.0]}, index=index).to_parquet(tmp_path / "t.parquet")
    with pytest.raises(DatasetError, match=r"several columns \(patient, visit\).* Set source.id"):
        read_all(ParquetSource(path=str(tmp_path / "t.parquet")))


def test_what_is_not_taken_is_said(tmp_path: Path) -> None:
    write(tmp_path / "t" / "x.parquet", {"a_1": [1.0, 2.0], "b": [1.0, 2.0], "c": [1.0, 2.0]})
    (tmp_path / "t" / "README.md").write_text("# a data set")
    (tmp_path / "t" / "_SUCCESS").touch()
    source = ParquetSource(path=str(tmp_path / "t"), modalities={"a": ColumnGroup(columns="a_*")})
    stream = read_source(source, 0, tmp_path)
    assert stream.notes == (
        "not taken: 1 files that are not Parquet (README.md)",
        "not taken: 2 columns (b, c)",
    )
    prepare(PrepareConfig(dataset=str(tmp_path / "out"), source=source), lambda line: None)
    assert open_dataset(tmp_path / "out").manifest.origin["notes"] == list(stream.notes)


def test_types_that_differ_between_files_are_widened_and_said(tmp_path: Path) -> None:
    write(tmp_path / "1.parquet", {"a": pa.array([1, 2], pa.int32()), "b": [1.0, 2.0]})
    write(tmp_path / "2.parquet", {"a": [1.5]})
    stream = read_source(ParquetSource(path=str(tmp_path)), 0, tmp_path)
    assert any("column 'a' is int32 in" in line and "read as double" in line for line in stream.notes)
    assert any("2.parquet lacks b: missing in its rows" in line for line in stream.notes)
    assert read_all(ParquetSource(path=str(tmp_path))).data["a"][:, 0].tolist() == [1, 2, 1.5]


def test_types_that_do_not_go_together_name_files_and_column(tmp_path: Path) -> None:
    write(tmp_path / "1.parquet", {"a": [1.0]})
    write(tmp_path / "2.parquet", {"a": ["x"]})
    with pytest.raises(DatasetError, match=r"Column 'a' must have one type, but is double in .*1.parquet and string"):
        read_all(ParquetSource(path=str(tmp_path)))
