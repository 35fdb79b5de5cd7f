"""Who wins is the best baseline against the model, paired; a small difference is a tie."""

import pytest

from dmvae.evaluation.standings import standings


def figures(ridge: float, pca: float, se: float) -> dict[str, float]:
    found = {"nll": 10.0, "imputation/left/rmse": 0.5, "density/imputation/left/rmse": 0.1}
    for name, value in (("ridge", ridge), ("pca", pca)):
        place = f"imputation/left/{name}"
        found |= {place: value, f"{place}_minus_ours": value - 0.5, f"{place}_minus_ours_se": se}
    return found


@pytest.mark.parametrize(
    ("ridge", "pca", "verdict", "best"),
    [(0.6, 0.7, "win", "ridge"), (0.6, 0.4, "loss", "pca"), (0.6, 0.51, "tie", "pca"), (0.49, 0.7, "tie", "ridge")],
)
def test_the_model_is_held_against_the_best_baseline(ridge: float, pca: float, verdict: str, best: str) -> None:
    (standing,) = standings(figures(ridge, pca, se=0.02))
    assert (standing.verdict, standing.baseline, standing.measure) == (verdict, best, "prediction of left")
    assert {"win": "the model wins", "loss": "the model loses", "tie": "no clear difference"}[verdict] in str(standing)
    assert "0.5" in str(standing)


def test_densities_are_compared_where_baselines_have_one() -> None:
    nll = {"nll": 10.0, "pca/nll": 8.0, "pca/nll_minus_ours": -2.0, "pca/nll_minus_ours_se": 0.1}
    (standing,) = standings(nll)
    assert (standing.ours, standing.theirs, standing.verdict) == (10.0, 8.0, "loss")
    assert standings({"nll": 10.0, "imputation/left/rmse": 0.5}) == []


def test_a_difference_without_a_standard_error_is_no_win() -> None:
    (standing,) = standings(figures(0.6, 0.7, se=float("nan")))
    assert standing.verdict == "tie"
