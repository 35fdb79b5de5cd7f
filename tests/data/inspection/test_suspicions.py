"""What `jobs.inspect` finds suspicious in columns, ids and splits, and what it leaves alone."""

import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from dmvae.data.inspection.findings import list_findings
from dmvae.data.inspection.profile import profile_dataset
from dmvae.data.reading.dataset import open_dataset
from tests.data.preparation.test_names import made

Cells = dict[str, Any]


def cells(num: int = 300) -> Cells:
    rng = np.random.default_rng(0)
    return {
        "id": [f"P{row}" for row in range(num)],
        "split": ["train"] * (num - 80) + ["val"] * 40 + ["test"] * 40,
        "label": rng.integers(0, 2, num),
        "age": rng.integers(20, 90, num).astype(float),
        "weight": rng.normal(75, 9, num),
        "ldl": rng.normal(3, 0.5, num),
        "score": rng.integers(-8, 120, num).astype(float),
    }


def warnings(folder: Path, table: Cells, **settings: Any) -> list[str]:
    pq.write_table(pa.table(table), folder / "t.parquet")
    own = {"columns": ["age", "weight", "ldl", "score", *settings.pop("more", [])], **settings}
    source = {"kind": "parquet", "path": f"{folder}/t.parquet", "modalities": {"clinic": own}}
    dataset = made(source, folder, splits=None, replace=True)
    return [f.text for f in list_findings(profile_dataset(dataset, lambda _: None)) if f.level == "warning"]


def test_ordinary_columns_are_not_suspicious(tmp_path: Path) -> None:
    assert warnings(tmp_path, cells()) == []


def coded(table: Cells) -> None:
    table["ldl"][::20] = -999
    table["weight"][::40] = -999


def in_two_units(table: Cells) -> None:
    table["weight"][::8] *= 1000


def copied(table: Cells) -> None:
    table["ldl"] = 0.5 + 2 * table["weight"]


def leaked(table: Cells) -> None:
    table["ldl"] = table["label"] + 0.5 * np.random.default_rng(1).random(300)


def constant(table: Cells) -> None:
    table["ldl"][:] = 4.5


def spelled(table: Cells) -> None:
    table["id"][7] = "p009"


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (coded, r"clinic: -999 .* repeated in weight \(\d.\d%\), ldl \(5.0%\).*clinic\.missing = \[-999\]"),
        (in_two_units, "clinic: weight has two groups of values, .* about 9?\\d+ times as large. Check .* unit"),
        (copied, r"1 pairs of columns are copies .*: weight of clinic and ldl of clinic \(linear\)"),
        (leaked, "clinic: the label can be read off ldl alone, in 220 training rows"),
        (constant, "1 of 4 features are constant: ldl. They carry no information"),
        (spelled, "1 ids differ .* only by case, white space or leading zeros, such as '(p009|P9)' and '(p009|P9)'"),
    ],
)
def test_what_is_suspicious_is_named(tmp_path: Path, change: Callable[[Cells], None], message: str) -> None:
    table = cells()
    change(table)
    found = warnings(tmp_path, table)
    assert any(re.search(message, text) for text in found), found


def test_the_remedy_for_a_code_makes_its_cells_missing(tmp_path: Path) -> None:
    table = cells()
    coded(table)
    assert warnings(tmp_path, table, missing=[-999]) == []
    dataset = open_dataset(tmp_path / "out")
    assert float(np.min([stats.low.min() for s in _profiles(dataset) for stats in [s.values["clinic"]]])) > -9


def _profiles(dataset: Any) -> Any:
    return profile_dataset(dataset, lambda _: None).splits.values()


def test_dates_and_words_can_stand_for_missing(tmp_path: Path) -> None:
    table = cells() | {"seen": ["1900-01-01" if row % 9 == 0 else f"2024-01-{1 + row % 28:02}" for row in range(300)]}
    table["sex"] = ["unknown" if row % 7 == 0 else "fm"[row % 2] for row in range(300)]
    settings = {"more": ["seen", "sex"], "kinds": {"seen": "date"}}
    assert any("1900-01-01 is far" in text for text in warnings(tmp_path, table, **settings))
    settings["more"] = ["seen", "sex"]
    assert warnings(tmp_path, table, missing=["1900-01-01", "unknown"], **settings) == []
    info = open_dataset(tmp_path / "out").manifest.modalities["clinic"]
    assert info.columns is not None
    assert info.columns[5].classes == ("f", "m")


def test_a_class_and_a_modality_that_only_other_splits_have_are_said(tmp_path: Path) -> None:
    table = cells() | {"stage": ["I", "II", "III"] * 100}
    table["stage"][-1] = "IV"
    found = warnings(tmp_path, table, more=["stage"])
    assert any("stage has classes in test that no row of train has" in text for text in found)
    pq.write_table(pa.table({k: table[k] for k in ("id", "split", "age")}), tmp_path / "t.parquet")
    numbers = enumerate(np.random.default_rng(0).normal(size=300))
    few = [number if row < 220 or row % 40 == 0 else None for row, number in numbers]
    pq.write_table(pa.table({**{k: table[k] for k in ("id", "split", "age")}, "rna": few}), tmp_path / "u.parquet")
    dataset = made({"kind": "parquet", "path": f"{tmp_path}/u.parquet"}, tmp_path, splits=None, replace=True)
    texts = [f.text for f in list_findings(profile_dataset(dataset, lambda _: None))]
    assert any("rna: only 1 of 40 rows of val have it (2.5%), but 100.0% of train" in text for text in texts)
