"""The objectives of a search: an entry of the registry says all that a search needs of one."""

import math
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
    compared_error,
    compared_values,
)
from tests.runs import make_dataset

BASE = {"name": "b", "data": {"dataset": "nowhere"}}


def make(**changes: object) -> SearchConfig:
    return SearchConfig.model_validate({"name": "s", "base": BASE, "trials": 2} | changes)


def test_a_weighted_sum_is_minimised_with_coherence_against_it() -> None:
    config = make(objectives=["imputation", "coherence"], weights=[2.0, 10.0])
    assert compared_values(config, {"imputation": 0.5, "coherence": 0.25}) == (2 * 0.5 - 10 * 0.25,)
    assert compared_error(config, {"imputation_se": 0.1, "coherence_se": 0.2}) == 2 * 0.1 + 10 * 0.2
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


def test_the_default_is_the_error_and_the_density_in_nats_per_value(tmp_path: Path) -> None:
    split = open_dataset(make_dataset(tmp_path, rows=400)).split("train")
    evaluator = ObjectiveEvaluator(split, split, 200, 50)
    model = DMVAE(DMVAEConfig(input_dims={"left": (5,), "right": (3,)})).eval()
    (name,) = make().objectives
    found = evaluator.evaluate(model, (name,))
    rows = evaluator.rows
    values = 5 * int(rows.masks["left"].sum()) + 3 * int(rows.masks["right"].sum()) if rows.masks else 0
    nll = float(model.joint_nll(rows, 50).nll.sum())
    logs = [math.log(found[f"imputation/{modality}"].value) for modality in ("left", "right")]
    assert found[name].value == pytest.approx(sum(logs) / 2 + 0.25 * nll / values, rel=1e-5)
    assert 0 < found[name].se < 0.2
    assert found["joint_nll"].value == pytest.approx(nll / len(rows), rel=1e-5)
