from pathlib import Path
from typing import Any

import numpy as np
import pytest

from dmvae.data.preparation import external_shuffle
from dmvae.data.preparation.external_shuffle import ExternalShuffle, hash_keys
from dmvae.data.preparation.rows import Rows
from tests.data.preparation.test_rows import make_rows


def shuffled(rows: Rows, folder: Path, step: int, seed: int = 0) -> tuple[Rows, np.ndarray[Any, Any]]:
    taken = ExternalShuffle(rows.columns, folder / "rows")
    for start in range(0, len(rows), step):
        part = rows.take(slice(start, start + step))
        taken.add(part, hash_keys(part.ids, seed), np.arange(start, start + len(part)))
    kept = [numbers.tolist() for _, numbers in taken.sorted(keep=True)]
    pieces = list(taken.sorted())
    assert kept == [numbers.tolist() for _, numbers in pieces]
    taken.remove()
    assert not list(folder.iterdir())
    return Rows.join([piece for piece, _ in pieces]), np.concatenate([numbers for _, numbers in pieces])


@pytest.mark.parametrize("string_ids", [True, False])
@pytest.mark.slow
def test_the_order_depends_on_ids_and_seed_and_not_on_memory_or_chunks(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, string_ids: bool
) -> None:
    rows = make_rows(150, string_ids=string_ids)
    held, numbers = shuffled(rows, tmp_path, 150)
    for limit, step in ((5000, 40), (100, 150)):  # the last one divides files again
        monkeypatch.setattr(external_shuffle, "HELD_BYTES", limit)
        spilled, again = shuffled(rows, tmp_path, step)
        assert np.array_equal(numbers, again)
        assert np.array_equal(spilled.ids, held.ids)
    assert np.array_equal(np.sort(numbers), np.arange(150))
    assert abs(np.corrcoef(numbers, np.arange(150))[0, 1]) < 0.3
    assert not np.array_equal(shuffled(rows, tmp_path, 150, seed=1)[1], numbers)


def test_rows_come_back_whole_from_files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(external_shuffle, "HELD_BYTES", 10_000)
    rows = make_rows(300, string_ids=True)
    found, numbers = shuffled(rows, tmp_path, 100)
    truth = rows.take(numbers)
    assert np.array_equal(found.ids, truth.ids)
    assert found.labels is not None
    assert np.array_equal(np.maximum(found.labels, -1), truth.labels)
    for name, mask in truth.present.items():
        assert np.array_equal(found.present[name], mask)
        assert np.array_equal(found.data[name][mask], truth.data[name][mask])


def test_a_key_is_the_same_everywhere() -> None:
    assert hash_keys(np.array([7, -1]), 3).tolist() == hash_keys(np.array(["7", "-1"]), 3).tolist()
    assert hash_keys(np.array(["patient é"]), 0).tolist() == [hash_keys(np.array(["x", "patient é"]), 0)[1]]
    keys = hash_keys(np.arange(5000), 0)
    assert len(np.unique(keys)) == 5000
    assert abs(float((keys >> np.uint64(63)).mean()) - 0.5) < 0.03
