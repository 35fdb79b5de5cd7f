"""The objectives of a search: an entry of the registry says all that a search needs of one."""

from pathlib import Path

import pytest
import torch

from dmvae import DMVAE, DMVAEConfig
from dmvae.config.search import SearchConfig
from dmvae.data.reading.dataset import open_dataset
from dmvae.evaluation.search_objectives import (
    OBJECTIVES,
    Estimate,
    ModelEvaluation,
    ObjectiveEvaluator,
    SearchObjective,
    compared_values,
)
from tests.runs import make_dataset

BASE = {"name": "b", "data": {"dataset": "nowhere"}}


def make(**changes: object) -> SearchConfig:
    return SearchConfig.model_validate({"name": "s", "base": BASE, "trials": 2} | changes)


def test_a_weighted_sum_is_minimised_with_coherence_against_it() -> None:
    config = make(objectives=["imputation", "coherence"], weights=[2.0, 10.0])
    assert compared_values(config, {"imputation": 0.5, "coherence": 0.25}) == (2 * 0.5 - 10 * 0.25,)
    several = make(objectives=["imputation", "coherence"], scheduler="none")
    assert compared_values(several, {"imputation": 0.5, "coherence": 0.25}) == (0.5, -0.25)


def test_an_objective_is_added_with_one_entry(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    def largest(evaluation: ModelEvaluation) -> dict[str, Estimate]:
        return {"largest": Estimate(max(float(p.detach().abs().max()) for p in evaluation.model.parameters()))}

    monkeypatch.setitem(OBJECTIVES, "largest", SearchObjective(largest, direction="maximize"))
    model = DMVAE(DMVAEConfig(input_dims={"a": (3,)}))
    with torch.no_grad():
        next(iter(model.parameters())).flatten()[0] = -50.0
    split = open_dataset(make_dataset(tmp_path, rows=40)).split("val")
    evaluator = ObjectiveEvaluator(split, split, 10, 10)
    found = evaluator.evaluate(model, ("largest", "parameters"))
    assert found["largest"] == Estimate(50.0)
    assert found["parameters"].value == sum(p.numel() for p in model.parameters())
    config = make(objectives=["largest"])
    assert compared_values(config, {"largest": found["largest"].value}) == (-50.0,)
