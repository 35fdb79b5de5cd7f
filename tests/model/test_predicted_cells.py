"""Missing cells of served rows: null inside a row, filled in given everything else, with their spread."""

import math
from typing import Any

import numpy as np
import pytest
import torch

from dmvae import DMVAE, Batch, DMVAEConfig
from dmvae.model.predictor import ModalitySpec, Predictor, Request

UNITS = {
    "gene": ModalitySpec(shape=(3,), dtype="float32", scaling="standardise", mean=(1.0, 2.0, 3.0), std=(2.0, 4.0, 0.5)),
    "kind": ModalitySpec(shape=(2,), dtype="int64", classes=3, likelihood="categorical"),
    "count": ModalitySpec(shape=(3,), dtype="float64", likelihood="negative_binomial"),
    "named": ModalitySpec(shape=(2,), dtype="float32", features=("age", "bmi")),
}
PARTLY = {"gene": [3.0, None, 2.5], "kind": [None, 2], "count": [4, None, 90], "named": {"bmi": 21.5}}


def predictor(missing_cells: tuple[str, ...] = tuple(UNITS)) -> Predictor:
    torch.manual_seed(0)
    config = DMVAEConfig(
        input_dims={name: unit.shape for name, unit in UNITS.items()},
        latent_dim=2,
        decoders_dist={"kind": "categorical", "count": "negative_binomial"},
        decoder_dist_params={"kind": {"classes": 3}, "count": {"size_factor": 50.0, "rate": 0.3}},
        missing_cells=missing_cells,
    )
    return Predictor(DMVAE(config), UNITS)


def test_null_cells_are_missing_and_the_others_are_read() -> None:
    served = predictor()
    batch = served.batch(served.parse([PARTLY, {"gene": [None, None, None]}]))
    assert batch.cells["gene"].tolist() == [[True, False, True], [False] * 3]
    assert batch.masks["gene"].tolist() == [True, False]
    assert batch.data["gene"][0].tolist() == [1.0, 0.0, -1.0]
    assert batch.cells["kind"].tolist() == [[False, True], [False, False]]
    assert batch.cells["named"][0].tolist() == [False, True]


def test_imputed_rows_keep_their_cells_and_say_how_far_the_others_may_be() -> None:
    served = predictor()
    full = {"gene": [3.0, 2.0, 2.5], "kind": [0, 2], "count": [4, 7, 90]}
    partly, whole = served.answer([PARTLY, full], Request(num_draws=200, num_samples=3))
    assert partly["observed"] == list(UNITS)
    assert whole["imputed"].keys() == {"named"}
    gene = partly["imputed"]["gene"]
    for key in ("mean", "best"):
        assert (gene[key][0], gene[key][2]) == (3.0, 2.5)
    assert (gene["sd"][0], gene["sd"][2]) == (0.0, 0.0)
    assert gene["sd"][1] > 0
    assert [sample[0] for sample in gene["samples"]] == [3.0] * 3
    quantiles = np.array(list(gene["quantiles"].values()))
    assert list(gene["quantiles"]) == ["0.05", "0.25", "0.5", "0.75", "0.95"]
    assert (np.diff(quantiles[:, 1]) > 0).all()
    assert (quantiles[:, [0, 2]] == [3.0, 2.5]).all()
    assert partly["imputed"]["kind"]["mean"][1] == [0.0, 0.0, 1.0]
    assert sum(partly["imputed"]["kind"]["mean"][0]) == pytest.approx(1)
    assert partly["imputed"]["named"]["best"]["bmi"] == pytest.approx(21.5)
    counts = np.array(list(partly["imputed"]["count"]["quantiles"].values()))
    assert (counts == np.rint(counts)).all()
    assert (counts[:, [0, 2]] == [4, 90]).all()
    assert counts[-1, 1] > counts[0, 1]


def test_an_answer_does_not_depend_on_the_other_rows_and_garbage_is_refused() -> None:
    served, request = predictor(), Request(num_draws=20)
    (alone,) = served.answer([PARTLY], request)
    beside = served.answer([{"count": [1, 2, None]}, PARTLY], request)[1]
    assert alone["imputed"]["count"]["quantiles"] == beside["imputed"]["count"]["quantiles"]
    np.testing.assert_allclose(alone["imputed"]["gene"]["mean"], beside["imputed"]["gene"]["mean"], rtol=1e-5)
    for row, message in (
        ({"gene": [1.0, math.inf, None]}, "Row 0, gene: values must be finite, but got infinity"),
        ({"count": [1, -2, None]}, "Row 0, count: counts must be whole numbers of 0 or more, but got -2"),
        ({"kind": [None, 3]}, "Row 0, kind: values must be classes 0 to 2, but got 3"),
    ):
        with pytest.raises(ValueError, match=message):
            served.answer([row], request)


def test_a_model_of_whole_rows_refuses_missing_cells() -> None:
    served = predictor(missing_cells=())
    row: dict[str, Any] = {"gene": [1.0, None, 2.0]}
    with pytest.raises(
        ValueError, match=r"Row 0, gene: values must be finite, but got NaN or null\. The model was trained"
    ):
        served.answer([row], Request())


def test_the_nll_of_a_row_with_missing_cells_is_that_of_its_units() -> None:
    served = predictor()
    (answer,) = served.answer([{"gene": [3.0, None, 2.5]}], Request(operation="nll", num_draws=300))
    batch = served.batch(served.parse([{"gene": [3.0, None, 2.5]}]))
    scaled = served.model.joint_nll(Batch(batch.data, batch.masks, cells=batch.cells), 300).nll
    assert answer["nll"] == pytest.approx(float(scaled[0]) + np.log([2.0, 0.5]).sum())


def test_counts_are_drawn_at_the_size_factors_of_their_rows() -> None:
    served = predictor()
    rows = served.parse([{"count": [None, 3, 5], "size_factor": 10.0}, {"count": [None, 3, 5], "size_factor": 1000.0}])
    batch = served.batch(rows)
    output = torch.zeros(4000, 2, 3).log_softmax(-1)
    draws = served.model.draw_values(output, "count", batch, torch.Generator().manual_seed(0))
    np.testing.assert_allclose(draws.mean((0, 2)), [10 / 3, 1000 / 3], rtol=0.05)
