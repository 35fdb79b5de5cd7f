from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest

from dmvae.config.sources import Source
from dmvae.data.errors import DatasetError
from dmvae.data.preparation.prepare import read_source
from dmvae.data.preparation.rows import Rows
from dmvae.data.preparation.stream import Stream


def make_rows(
    num: int = 50, *, complete: bool = False, string_ids: bool = False, labels: bool = True, seed: int = 0
) -> Rows:
    """Rows of every type that shards store; a missing slot holds garbage."""
    rng = np.random.default_rng(seed)
    data = {
        "image": rng.integers(0, 256, (num, 1, 4, 3), dtype=np.uint8),
        "word": rng.integers(0, 5, (num, 2)),
        "half": rng.normal(size=(num, 3)).astype(np.float16),
        "single": rng.normal(size=(num, 2, 2)).astype(np.float32),
        "double": rng.normal(loc=5, size=(num, 1)),
    }
    present = {name: np.ones(num, dtype=bool) if complete else rng.random(num) < 0.6 for name in data}
    present["image"] |= ~np.logical_or.reduce(list(present.values()))
    for name in ("half", "single", "double"):
        data[name][~present[name]] = np.nan
    ids = rng.permutation(num) + 1000
    return Rows(
        ids=np.array([f"row-{'é' * (number % 4)}{number}" for number in ids]) if string_ids else ids,
        data=data,
        present=present,
        labels=rng.integers(-1, 3, num) if labels else None,
    )


def collect(stream: Stream) -> Rows:
    """All rows of a source."""
    return Rows.join([chunk.rows for chunk in stream.chunks])


def read_all(source: Source, scratch: Path = Path("no folder"), seed: int = 0) -> Rows:
    """All rows of a source, read as its kind says."""
    return collect(read_source(source, seed, scratch))


def test_a_selection_of_rows_keeps_every_part_together() -> None:
    rows = make_rows()
    some = rows.take(np.array([7, 3]))
    assert len(some) == 2
    assert some.ids.tolist() == rows.ids[[7, 3]].tolist()
    assert np.array_equal(some.data["word"], rows.data["word"][[7, 3]])
    assert np.array_equal(some.present["word"], rows.present["word"][[7, 3]])


def test_a_missing_slot_is_null_and_zero_underneath() -> None:
    rows = make_rows()
    column = rows.record_batch(rows.columns.arrow_schema()).column("double")
    values = column.storage.values.to_numpy()
    assert np.array_equal(column.is_valid().to_numpy(zero_copy_only=False), rows.present["double"])
    assert (values[~rows.present["double"]] == 0).all()
    assert isinstance(column.type, pa.FixedShapeTensorType)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"ids": np.zeros(2)}, "Ids must be int64 or strings"),
        ({"ids": np.arange(3)}, "same number of rows"),
        ({"data": {}, "present": {}}, "at least one modality"),
        ({"present": {}}, "Every modality must have a mask"),
        ({"labels": np.arange(5)}, "same number of rows"),
        ({"data": {"a": np.zeros((2, 1), dtype=np.int16)}}, "must be of type uint8"),
        ({"data": {"a": np.zeros(2)}}, r"Reshape it.*\(rows, 1\)"),
        ({"data": {"a": np.zeros((2, 0))}}, r"must have shape \(rows, \*shape\)"),
        ({"data": {"label": np.zeros((2, 1))}, "present": {"label": np.ones(2, dtype=bool)}}, "'label'"),
    ],
)
def test_arrays_that_do_not_fit_together_are_refused(change: dict[str, Any], message: str) -> None:
    fitting = {"ids": np.arange(2), "data": {"a": np.zeros((2, 1))}, "present": {"a": np.ones(2, dtype=bool)}}
    with pytest.raises(DatasetError, match=message):
        Rows(**(fitting | change))
