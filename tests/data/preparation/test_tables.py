"""Tables whose columns differ in kind: cells, kinds found in values, classes, and what is refused."""

import datetime
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch

from dmvae.data.errors import DatasetError
from dmvae.data.preparation.column_stats import ColumnStats
from dmvae.data.scaling import Scale
from tests.data.preparation.test_names import made, read

CLINIC = """id,age,crp,sex,stage,visits,smoker,seen
1,61,0.5,f,II,0,true,2024-01-01
2,34.5,12,m,I,11,false,2024-01-31
3,47,3,f,III,2,true,1970-01-02
4,70,110,m,I,30,false,2023-12-31
5,52,1,f,II,7,false,2020-02-29
6,40,2,m,III,9,true,2020-02-29
7,41,2.5,m,III,3,true,2020-02-29
8,42,2.7,m,III,4,true,2020-02-29
9,43,2.9,m,III,5,true,2020-02-29
10,44,0.9,m,III,6,true,2020-02-29
"""


def csv_source(folder: Path, text: str = CLINIC, **settings: Any) -> dict[str, Any]:
    (folder / "t.csv").write_text(text)
    return {"kind": "csv", "modalities": {"clinic": {"path": str(folder / "t.csv"), **settings}}}


def parquet_source(folder: Path, cells: dict[str, Any], **settings: Any) -> dict[str, Any]:
    pq.write_table(pa.table(cells), folder / "t.parquet")
    modalities = {"clinic": {"columns": "*", **settings}}
    return {"kind": "parquet", "path": str(folder / "t.parquet"), "modalities": modalities}


def test_the_kind_of_every_column_is_found_and_its_cells_are_numbers(tmp_path: Path) -> None:
    dataset = made(csv_source(tmp_path), tmp_path)
    info = dataset.manifest.modalities["clinic"]
    assert info.features == ("age", "crp", "sex", "stage", "visits", "smoker", "seen")
    assert [column.kind for column in info.columns] == [
        "real", "positive", "binary", "category", "count", "binary", "real",
    ]  # fmt: skip
    assert [column.classes for column in info.columns] == [
        (), (), ("f", "m"), ("I", "II", "III"), (), ("false", "true"), (),
    ]  # fmt: skip
    assert info.columns[6].since == "1970-01-01"
    assert info.columns[4].rate == pytest.approx(7.7)
    batch = read(dataset)
    values = Scale(info).show(batch.data["clinic"].double())
    assert values[0].tolist() == pytest.approx([61, 0.5, 0, 1, 0, 1, 19723], rel=1e-6)
    assert values[2].tolist() == pytest.approx([47, 3, 0, 2, 2, 1, 1], rel=1e-4)
    scaled = batch.data["clinic"]
    assert scaled[:, [0, 1, 6]].mean(0).abs().max() < 1e-5
    assert scaled[:, [0, 1, 6]].std(0, unbiased=False).tolist() == pytest.approx([1, 1, 1], rel=1e-5)


def test_a_list_chooses_columns_in_its_order(tmp_path: Path) -> None:
    columns = {"b1": [1.5, 2.5], "note": ["x", "y"], "a": [0.5, 1.5], "b2": [4.0, 2.25]}
    source = parquet_source(tmp_path, columns, columns=["a", "b*"], units={"a": "mmol/l"})
    dataset = made(source, tmp_path)
    info = dataset.manifest.modalities["clinic"]
    assert info.features == ("a", "b1", "b2")
    assert info.units == {"a": "mmol/l"}
    assert Scale(info).show(read(dataset).data["clinic"]).tolist() == [[0.5, 1.5, 4.0], [1.5, 2.5, 2.25]]


def test_numbers_alone_stay_a_vector_with_names(tmp_path: Path) -> None:
    info = made(parquet_source(tmp_path, {"a": [0.5, 1.5], "b": [1, 2]}), tmp_path).manifest.modalities["clinic"]
    assert (info.likelihood, info.columns, info.features) == ("normal", None, ("a", "b"))


def test_a_class_that_no_training_row_has_gets_the_number_after_the_last(tmp_path: Path) -> None:
    split = ["train"] * 4 + ["test"] * 2
    source = parquet_source(tmp_path, {"g": ["b", "c", "a", "c", "zz", "b"], "x": np.arange(6.0), "split": split})
    dataset = made(source, tmp_path, splits=None)
    info = dataset.manifest.modalities["clinic"]
    assert info.columns[0].classes == ("a", "b", "c")
    rows = dataset.split("test")
    found = rows.read(np.argsort(rows.ids())).data["clinic"][:, 0]
    assert found.tolist() == [3, 1]


def test_codes_written_as_floats_are_the_classes_of_whole_numbers(tmp_path: Path) -> None:
    text = "id,site,ward\n1,3.0,01\n2,,02\n3,10.0,01\n"
    source = csv_source(tmp_path, text, kinds={"site": "category", "ward": "category"})
    columns = made(source, tmp_path).manifest.modalities["clinic"].columns
    assert [column.classes for column in columns] == [("3", "10"), ("01", "02")]


def test_the_type_of_a_column_is_read_whatever_wrote_it(tmp_path: Path) -> None:
    columns = {
        "category": pa.array(["low", "high", None, "mid"]).dictionary_encode(),
        "decimal": pa.array([1, 2, None, 5]).cast(pa.decimal128(22, 2)),
        "nullable": pa.array([10, None, 12, 99], pa.int64()),
        "moment": pa.array([datetime.datetime(1970, 1, 2, 12), None, None, datetime.datetime(1970, 1, 3)]),
        "text": pa.array(["1.5", None, "NA", "2.5"]),
        "whole": pa.array([1.0, 0.0, float("nan"), 1.0]),
        "full": pa.array([0.25, 0.5, 0.75, 1.0]),
    }
    settings = {"kinds": {"text": "real", "nullable": "real"}}
    source = parquet_source(tmp_path, columns, **settings)
    rows = made(source, tmp_path).manifest.modalities["clinic"]
    assert [column.kind for column in rows.columns] == ["category", "real", "real", "real", "real", "binary", "real"]
    assert rows.columns[0].classes == ("low", "high", "mid")


@pytest.mark.parametrize(
    ("values", "kind"),
    [
        ([0, 1, 1, 0], "binary"),
        ([1, 2, 2], "binary"),
        ([1, 2, 3, 4, 2], "category"),
        ([0, 3, 3, 1, 2], "category"),
        (list(range(12)), "count"),
        ([18, 30, 44, 61, 80, 23, 25, 29, 31], "real"),
        ([-1.5, 2, 3], "real"),
        (np.exp(np.random.default_rng(0).normal(size=300)), "positive"),
        (60 + 5 * np.random.default_rng(0).normal(size=300), "real"),
        (np.random.default_rng(0).poisson(4, 300), "count"),
        ([7.0, 7.0], "real"),
        ([], "real"),
    ],
)
def test_values_suggest_their_kind_whatever_the_chunks(values: Any, kind: str) -> None:
    whole, parts = ColumnStats(), ColumnStats()
    whole.add(np.asarray(values, dtype=np.float64))
    for part in np.array_split(np.asarray(values, dtype=np.float64), 3):
        parts.add(np.append(part, np.nan))
    assert whole.kind()[0] == parts.kind()[0] == kind
    assert whole.kind()[1]


def test_the_jacobian_of_a_table_is_that_of_its_scaling(tmp_path: Path) -> None:
    info = made(csv_source(tmp_path), tmp_path).manifest.modalities["clinic"]
    scale = Scale(info)
    scaled = scale.read(torch.tensor([[61, 0.5, 0, 1, 0, 1, 19723.0]], dtype=torch.float64), torch.float64)
    jacobian = torch.autograd.functional.jacobian(scale.show, scaled).view(7, 7)
    torch.testing.assert_close(scale.log_jacobian(scaled)[0], jacobian.det().abs().log())
    assert info.log_jacobian is None


@pytest.mark.parametrize(
    ("text", "settings", "message"),
    [
        (CLINIC, {"columns": ["age", "sxe"]}, r"Column 'sxe' not found in .*t.csv, .* Did you mean 'sex'\?"),
        (CLINIC, {"columns": ["age", "lab_*"]}, r"Pattern 'lab_\*' matches no column of .*t.csv"),
        (CLINIC, {"kinds": {"stge": "category"}}, r"Column 'stge' of source.modalities.clinic.kinds .* 'stage'\?"),
        (CLINIC, {"classes": {"stage": ["I", "II"]}}, r"Unknown class 'III' of column 'stage' .*line 4. Known: I, II"),
        (CLINIC, {"kinds": {"stage": "binary"}}, r"Column 'stage' .* has 3 classes .* Set it to 'category'"),
        (
            CLINIC,
            {"kinds": {"sex": "real"}},
            r"Column 'sex' of .* must hold numbers, but got 'f' in .*2",
        ),
        (CLINIC, {"kinds": {"age": "count"}}, r"'age' .* must be whole numbers from 0, but got 34.5 in .*line 3"),
        (CLINIC, {"kinds": {"visits": "positive"}}, r"'visits' .* must be above 0, but got 0 in .*line 2"),
        (CLINIC, {"dtype": "int64"}, r"stored as floats, but source.modalities.clinic.dtype is int64"),
        (CLINIC, {"kinds": {"seen": "date"}, "columns": "s*"}, None),
        ("id,seen\n1,2024-01-01\n2,2024-02-30\n", {}, r"'seen' .* holds dates, but also '2024-02-30' in .*line 3"),
        ("id,seen\n1,2024-01-01\n2,May\n", {"kinds": {"seen": "date"}}, r"dates such as .* got 'May' in .*line 3"),
        ("id,a,a\n1,2,3\n", {}, r"Duplicate column names in .*: a"),
        ("id,a,b\n1,inf,x\n", {}, r"Values of column 'a' .* must be finite, but got inf in .*t.csv, line 2"),
        ("id,a\n1,2\n2,5\n3,two\n", {}, r"Column 'a' of modality 'clinic' holds numbers, but also 'two' in .*line 4"),
        (
            "id,name\n" + "".join(f"{n},person {n}\n" for n in range(60)),
            {},
            r"Column 'name' .* has 60 different texts in 60 cells: names or free text",
        ),
    ],
)
def test_a_faulty_table_is_refused_in_one_line(
    tmp_path: Path, text: str, settings: dict[str, Any], message: str | None
) -> None:
    source = csv_source(tmp_path, text, **settings)
    if message is None:
        assert made(source, tmp_path).manifest.modalities["clinic"].columns[3].since == "1970-01-01"
        return
    with pytest.raises(DatasetError, match=message) as caught:
        made(source, tmp_path)
    assert "\n" not in str(caught.value)


def test_a_scaling_or_likelihood_of_the_whole_table_is_refused(tmp_path: Path) -> None:
    with pytest.raises(DatasetError, match=r"Cannot apply scaling.clinic: columns of the table .* differ in kind"):
        made(csv_source(tmp_path), tmp_path, scaling={"clinic": "standardise"})
