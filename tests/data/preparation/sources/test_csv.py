from pathlib import Path

import numpy as np
import pytest

from dmvae.config.data import PrepareConfig
from dmvae.config.sources import CsvSource, CsvTable
from dmvae.data.errors import DatasetError
from dmvae.data.preparation import external_shuffle
from dmvae.data.preparation.prepare import prepare
from dmvae.data.reading.dataset import open_dataset
from tests.data.preparation.test_rows import read_all

BLOOD = "id,iron,zinc\n7,1.5,2\n3,,\n9,4,5.5\n"
GENES = "id\tg1\tg2\tnote\n9\t1\t2\tx\n4\t3\t4\ty\n"
PEOPLE = "id,label,split\n3,1,train\n4,,train\n7,0,val\n9,2,train\n"


def write(folder: Path, **files: str) -> CsvSource:
    names = {"blood": "blood.csv", "genes": "genes.tsv", "people": "people.csv"}
    for name, text in files.items():
        (folder / names[name]).write_text(text)
    tables = {"blood": CsvTable(path=str(folder / "blood.csv"))}
    if "genes" in files:
        tables["genes"] = CsvTable(path=str(folder / "genes.tsv"), columns="g*", dtype="float32")
    return CsvSource(modalities=tables, rows=str(folder / "people.csv") if "people" in files else None)


def test_an_absent_id_or_empty_cells_are_a_missing_modality(tmp_path: Path) -> None:
    rows = read_all(write(tmp_path, blood=BLOOD, genes=GENES), tmp_path)
    assert rows.ids.tolist() == [7, 3, 9, 4]
    assert rows.present["blood"].tolist() == [True, False, True, False]
    assert rows.present["genes"].tolist() == [False, False, True, True]
    assert rows.data["blood"][2].tolist() == [4, 5.5]
    assert rows.data["genes"][2:].tolist() == [[1, 2], [3, 4]]


def test_labels_and_splits_come_from_the_table_of_rows_and_back_from_shards(tmp_path: Path) -> None:
    source = write(tmp_path, blood=BLOOD, genes=GENES, people=PEOPLE)
    dataset = open_dataset(
        prepare(PrepareConfig(dataset=str(tmp_path / "dataset"), source=source), progress=lambda _: None)
    )
    split = dataset.split("train")
    assert sorted(split.ids().tolist()) == [4, 9]  # 3 has no modality at all
    batch = split.read(np.argsort(split.ids()))
    assert batch.data["genes"].tolist() == [[3, 4], [1, 2]]
    assert batch.masks["blood"].tolist() == [False, True]
    assert dataset.split("val").ids().tolist() == [7]


def test_ids_with_leading_zeros_stay_strings(tmp_path: Path) -> None:
    rows = read_all(write(tmp_path, blood="id,a\n007,1\n12,2\n"), tmp_path)
    assert rows.ids.tolist() == ["007", "12"]


@pytest.mark.parametrize(
    ("files", "message"),
    [
        ({"blood": BLOOD + "3,1,1\n"}, r"Duplicate id '3' in .*blood.csv, lines 3 and 5"),
        (
            {"blood": BLOOD, "genes": "id\tg1\nP1\t2\n"},
            r"No id of .*blood.csv occurs in another file: .*'P1'.* in column 'id'",
        ),
        ({"blood": BLOOD, "people": "id\n7\n9\n"}, r"1 ids of .*blood.csv are not in .*people.csv, .*'3' in line 3"),
        ({"blood": "id,a\n1,2,3\n"}, r"Cannot read .*blood.csv as a table .*Expected 2 columns, got 3"),
        ({"blood": "id,a,a\n1,2,3\n"}, r"Duplicate column names in .*blood.csv: a\."),
        ({"blood": BLOOD, "people": "id,split\n3,train\n7,\n9,val\n"}, r"Missing split in .*people.csv, line 3"),
        ({"blood": "name,a\n1,2\n"}, r"Id column 'id' not found in .*blood.csv, which has name, a"),
        (
            {"blood": BLOOD, "people": "id,label\n3,1.5\n7,1\n9,0\n"},
            r"Labels must be integers, text, .* but got 1.5 in .*people.csv, line 2",
        ),
    ],
)
def test_a_faulty_table_is_named_with_its_line(tmp_path: Path, files: dict[str, str], message: str) -> None:
    with pytest.raises(DatasetError, match=message):
        read_all(write(tmp_path, **files), tmp_path)


def test_rows_of_no_group_are_no_group(tmp_path: Path) -> None:
    source = write(tmp_path, blood=BLOOD, people="id,clinic\n3,a\n7,\n9,b\n").model_copy(update={"group": "clinic"})
    with pytest.raises(DatasetError, match=r"Missing group in .*people.csv, line 3"):
        read_all(source, tmp_path)


def test_what_is_said_of_rows_is_no_feature_of_them(tmp_path: Path) -> None:
    everything = str(tmp_path / "blood.csv")
    write(tmp_path, blood="id,size_factor,clinic,iron\n7,1.5,2,3\n3,0.5,2,4\n")
    tables = {"blood": CsvTable(path=everything)}
    source = CsvSource(modalities=tables, rows=everything, group="clinic")
    assert read_all(source, tmp_path).data["blood"].tolist() == [[3], [4]]


def test_a_modality_may_be_called_rows(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(external_shuffle, "HELD_BYTES", 1)
    write(tmp_path, blood=BLOOD)
    source = CsvSource(modalities={"rows": CsvTable(path=str(tmp_path / "blood.csv"))})
    config = PrepareConfig(dataset=str(tmp_path / "dataset"), source=source, splits={"train": 1.0})
    assert open_dataset(prepare(config, lambda _: None)).manifest.input_dims == {"rows": (2,)}


@pytest.mark.parametrize(("cell", "dtype"), [("300", "uint8"), ("0.5", "uint8"), ("2.5", "int64")])
def test_values_that_a_type_does_not_hold_are_refused(tmp_path: Path, cell: str, dtype: str) -> None:
    write(tmp_path, blood=f"id,iron\n1,2\n2,\n3,{cell}\n")
    group = CsvTable.model_validate({"path": str(tmp_path / "blood.csv"), "dtype": dtype})
    with pytest.raises(
        DatasetError, match=rf"Cannot convert {cell}.* to {dtype} for modality 'blood' in .*blood.csv, line 4"
    ):
        read_all(CsvSource(modalities={"blood": group}), tmp_path)
