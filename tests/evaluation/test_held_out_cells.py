"""Held-out cells: which are hidden, and how well a model and baselines fill them in."""

from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch

from dmvae import Batch
from dmvae.config.data import PrepareConfig
from dmvae.data.batch import has_cells
from dmvae.data.preparation.prepare import prepare
from dmvae.data.reading.dataset import Split, open_dataset
from dmvae.evaluation.cells import Table, choose_hidden, held_out_cells
from dmvae.evaluation.masking import Removal
from dmvae.evaluation.measures import MEASURES, EvaluatedSplit
from dmvae.evaluation.suite import EvaluationSuite
from tests.linear_gaussian import linear_model, sample_rows
from tests.runs import make_dataset

SHAPES = {"a": (4,), "b": (3,)}
COLUMNS = {"a": torch.arange(4), "b": torch.tensor([0, 2])}


def rows(num: int, seed: int, missing: float = 0.1) -> Batch:
    model = linear_model(SHAPES, missing_cells=("a", "b"), scales=0.4)
    found = sample_rows(model, num, seed=seed, missing_cells=missing)
    return Batch(found.data, found.masks, ids=torch.arange(num), cells=found.cells)


@pytest.mark.parametrize("mechanism", ["random", "value"])
def test_the_share_of_hidden_cells_is_the_rate_and_depends_on_ids_alone(mechanism: str) -> None:
    batch = rows(1500, seed=0)
    values, known = Table.of(COLUMNS, batch).read(batch)
    assert values.shape == (1500, 6)
    torch.testing.assert_close(values.sum(0) / known.sum(0), torch.zeros(6, dtype=torch.float64), atol=1e-9, rtol=0)
    hidden = choose_hidden(values, known, batch, 0.3, mechanism)  # type: ignore[arg-type]
    assert not bool((hidden & ~known).any())
    assert float(hidden[known].double().mean()) == pytest.approx(0.3, abs=0.02)
    by_size = hidden[known & (values > 1)].double().mean() - hidden[known & (values < -1)].double().mean()
    assert abs(float(by_size) - (0.45 if mechanism == "value" else 0)) < 0.1
    few = batch[torch.tensor([9, 3])]
    assert torch.equal(choose_hidden(values[[9, 3]], known[[9, 3]], few, 0.3, mechanism), hidden[[9, 3]])  # type: ignore[arg-type]


def test_hidden_cells_are_missing_and_no_others() -> None:
    batch = rows(50, seed=1)
    table = Table.of(COLUMNS, batch)
    values, known = table.read(batch)
    hidden = choose_hidden(values, known, batch, 0.5, "random")
    given = table.hide(batch, hidden)
    _, left = table.read(given)
    assert torch.equal(left, known & ~hidden)
    assert torch.equal(has_cells(given, "b")[:, 1], has_cells(batch, "b")[:, 1])


def test_the_true_model_predicts_cells_better_than_baselines_and_its_intervals_hold() -> None:
    model, train, test = linear_model(SHAPES, missing_cells=("a", "b"), scales=0.4), rows(600, 2), rows(300, 3)

    def blocks() -> Iterator[Batch]:
        yield test[:200]
        yield test[200:]

    metrics = held_out_cells(model, COLUMNS, train, blocks)
    for how in ("random", "value"):
        for rate in (10, 30, 50):
            place = f"cells/{how}/{rate}"
            ours = metrics[f"{place}/rmse"]
            assert metrics[f"{place}/mean"] > ours + 0.1
            for name in ("nearest_neighbours", "iterative_ridge", "factor_analysis"):
                assert metrics[f"{place}/{name}"] > ours - 0.03, name
                gap, se = (metrics[f"{place}/{name}_minus_ours{end}"] for end in ("", "_se"))
                assert gap == pytest.approx(metrics[f"{place}/{name}"] - ours)
                assert se > 0
            assert metrics[f"{place}/coverage90"] == pytest.approx(0.9, abs=0.06)
            assert metrics[f"{place}/coverage50"] == pytest.approx(0.5, abs=0.1)
    assert metrics["cells/random/10/factor_analysis"] < metrics["cells/random/10/mean"]


def test_a_model_that_reads_no_missing_cells_is_skipped_with_a_line(tmp_path: Path) -> None:
    np.savez(tmp_path / "rows.npz", a=np.random.default_rng(0).normal(size=(40, 4)))
    config = {"dataset": f"{tmp_path}/data", "source": {"kind": "npz", "path": f"{tmp_path}/rows.npz"}}
    prepare(PrepareConfig.model_validate(config), lambda text: None)
    dataset, told = open_dataset(tmp_path / "data"), list[str]()
    for missing_cells in ((), ("a",)):
        model = linear_model({"a": (4,)}, missing_cells=missing_cells).float()
        suite = EvaluationSuite(model, dataset.split("train"), dataset.split("test"), progress=told.append)
        found = MEASURES["cells"].compute(EvaluatedSplit(suite, np.zeros(0)))
        assert bool(found) == bool(missing_cells)
    assert told == ["cells skipped: the model was trained without missing cells of floating-point modalities"]


def test_missing_cells_count_in_no_error_of_a_held_out_modality(tmp_path: Path) -> None:
    dataset, told = open_dataset(make_dataset(tmp_path, missing_cells=0.4)), list[str]()
    model = linear_model({"left": (5,), "right": (3,)}, missing_cells=("left", "right")).float()
    suite = EvaluationSuite(model, dataset.split("train"), dataset.split("test"), progress=told.append)
    metrics = suite.imputation()
    train, test = (rows_of(dataset.split(name)) for name in ("train", "test"))
    for name in ("left", "right"):
        known, seen = test.cells[name], train.cells[name]
        mean = (train.data[name].double() * seen).sum(0) / seen.sum(0)
        expected = ((test.data[name] - mean)[known] ** 2).mean().sqrt()
        assert metrics[f"imputation/{name}/mean"] == pytest.approx(float(expected))
        assert f"imputation/{name}/ridge" not in metrics
    assert (
        "ridge skipped: it needs rows that have all cells of a modality or none; the measure cells has others" in told
    )
    assert MEASURES["rivals"].compute(EvaluatedSplit(suite, np.zeros(0))) == {}
    assert told[-1] == "linear densities skipped: they are of rows without missing cells, which ['left', 'right'] have"
    assert "missing/random/50/rmse/left" in suite.robustness(Removal(("random",), (0.5,), 0))


def rows_of(split: Split) -> Batch:
    return split.read(np.arange(len(split)))
