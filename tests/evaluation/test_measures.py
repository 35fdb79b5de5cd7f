"""The registry of measures: one entry each, checked before any work."""

from pathlib import Path

import pytest

from dmvae.config.evaluation import EvaluationConfig
from dmvae.data.reading.dataset import open_dataset
from dmvae.evaluation.measures import MEASURES, Measure, check
from dmvae.platform.evaluate.evaluate import evaluate_split
from tests.runs import make_config, make_dataset, train_here


def test_a_measure_is_added_with_one_entry(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    dataset = make_dataset(tmp_path)
    model = tmp_path / "model"
    train_here(make_config(tmp_path, dataset, "measured", training={"epochs": 1}))[0].model.save(model)
    monkeypatch.setitem(MEASURES, "worst_row", Measure(lambda rows: {"nll_worst": float(rows.nll.max())}))
    settings = EvaluationConfig(split="val", num_draws=20, measures=("worst_row",))
    metrics = evaluate_split(str(model), open_dataset(str(dataset)), settings, "train", 1, lambda line: None)
    assert metrics["val/nll_worst"] >= metrics["val/nll"]


def test_an_unknown_measure_is_refused_with_the_known_ones(tmp_path: Path) -> None:
    opened = open_dataset(str(make_dataset(tmp_path)))
    with pytest.raises(ValueError, match=r"Unknown measure 'energy'.*Available: rivals, coherence"):
        check(("rivals", "energy"), opened.split("train"), opened.split("val"))
