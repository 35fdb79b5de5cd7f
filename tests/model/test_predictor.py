"""Answers about rows in the units of their data."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from dmvae.config.model import DMVAEConfig
from dmvae.data.batch import Batch
from dmvae.model.dmvae import DMVAE
from dmvae.model.predictor import OPERATIONS, UNITS, ModalitySpec, Predictor, Request

UNIT = {
    "image": ModalitySpec(shape=(1, 2, 2), dtype="uint8", scaling="unit"),
    "gene": ModalitySpec(shape=(3,), dtype="float32", scaling="standardise", mean=(1.0, 2.0, 3.0), std=(2.0, 4.0, 0.5)),
    "count": ModalitySpec(shape=(2,), dtype="float32", scaling="log1p"),
    "level": ModalitySpec(shape=(2,), dtype="float64", scaling="unit", low=(-1.0, 4.0), high=(3.0, 4.0)),
    "kind": ModalitySpec(shape=(2,), dtype="int64", classes=3, likelihood="categorical"),
}
FULL = {"image": [[[0, 255], [51, 102]]], "gene": [3.0, 2.0, 2.5], "count": [0, 7], "level": [1, 5], "kind": [0, 2]}


@pytest.fixture
def served() -> Predictor:
    torch.manual_seed(0)
    config = DMVAEConfig.model_validate(
        {
            "input_dims": {name: unit.shape for name, unit in UNIT.items()},
            "latent_dim": 2,
            "decoders_dist": {"kind": "categorical"},
            "decoder_dist_params": {"kind": {"classes": 3}},
        }
    )
    return Predictor(DMVAE(config), UNIT)


def test_rows_are_brought_to_the_model_s_units_and_back(served: Predictor) -> None:
    batch = served.batch(served.parse([FULL, {"gene": [1.0, 2.0, 3.0]}]))
    assert batch.masks is not None
    assert batch.masks["image"].tolist() == [True, False]
    torch.testing.assert_close(batch.data["image"][0].flatten(), torch.tensor([0.0, 1.0, 0.2, 0.4]))
    torch.testing.assert_close(batch.data["gene"], torch.tensor([[1.0, 0.0, -1.0], [0.0, 0.0, 0.0]]))
    assert batch.data["kind"].dtype == torch.int64
    torch.testing.assert_close(batch.data["count"][0], torch.tensor([1.0, 8.0]).log())
    torch.testing.assert_close(batch.data["level"][0], torch.tensor([0.5, 1.0]))
    for unit in (UNIT["image"], UNIT["gene"], UNIT["count"], UNIT["level"]):
        values = torch.rand(5, *unit.shape)
        torch.testing.assert_close(unit.show(unit.read(values)), values)


def test_measurements_with_a_large_mean_keep_their_digits() -> None:
    unit = ModalitySpec(shape=(2,), dtype="float64", scaling="standardise", mean=(1e9, -1e9), std=(2.0, 0.5))
    torch.manual_seed(0)
    served = Predictor(DMVAE(DMVAEConfig(input_dims={"time": (2,)}, latent_dim=2)), {"time": unit})
    row = {"time": [1e9 + 3, -1e9 - 0.25]}
    assert served.batch(served.parse([row])).data["time"].tolist() == [[1.5, -0.5]]
    batch = served.batch(served.parse([row]))
    read = served.model.means(served.model.predict(batch, return_mean=True)["time"], "time", batch)
    (answer,) = served.answer([row], Request(operation="reconstruct"))
    shown = np.array(answer["values"]["time"])
    np.testing.assert_allclose((shown - unit.mean) / np.array(unit.std), read[0].numpy(), atol=1e-5)


def test_what_is_missing_may_be_left_out_or_null_and_every_answer_says_what_was_observed(served: Predictor) -> None:
    absent, null = served.answer([{"gene": [1, 2, 3]}, {"gene": [1, 2, 3], "image": None}], Request(operation="encode"))
    assert absent == null
    assert absent["observed"] == ["gene"]
    assert absent["private"].keys() == {"gene"}
    for operation in OPERATIONS:
        answers = served.answer([FULL, {}], Request(operation=operation))
        assert [answer["observed"] for answer in answers] == [[*UNIT], []]
    assert served.answer([], Request()) == []


def test_answers_are_the_model_s(served: Predictor) -> None:
    rows = [{"image": FULL["image"]}, {"gene": FULL["gene"], "kind": FULL["kind"]}]
    batch = served.batch(served.parse(rows))
    shared, _ = served.model.posteriors(batch)
    answers = served.answer(rows, Request(operation="encode"))
    np.testing.assert_allclose([a["shared"]["mean"] for a in answers], shared.mean.detach().numpy(), rtol=1e-6)
    imputed = served.answer(rows, Request(operation="impute", num_samples=2))
    predicted = served.model.predict(batch, return_mean=True)["gene"][0]
    torch.testing.assert_close(torch.tensor(imputed[0]["imputed"]["gene"]["best"]), UNIT["gene"].show(predicted))
    assert imputed[0]["imputed"].keys() == {"gene", "count", "level", "kind"}
    assert imputed[1]["imputed"].keys() == {"image", "count", "level"}
    assert np.array(imputed[0]["imputed"]["gene"]["samples"]).shape == (2, 3)
    assert np.array(imputed[0]["imputed"]["kind"]["mean"]).shape == (2, 3)
    assert served.answer(rows, Request(operation="impute", num_samples=2)) == imputed


def test_nll_is_of_the_values_as_they_are_given(served: Predictor) -> None:
    rows = [{"gene": FULL["gene"]}]
    (answer,) = served.answer(rows, Request(operation="nll", num_draws=300))
    batch = served.batch(served.parse(rows))
    scaled = served.model.joint_nll(Batch(batch.data, batch.masks), 300).nll
    assert answer["nll"] == pytest.approx(float(scaled[0]) + np.log([2.0, 4.0, 0.5]).sum())
    (of_counts,) = served.answer([{"count": [0, 7]}], Request(operation="nll", num_draws=300))
    batch = served.batch(served.parse([{"count": [0, 7]}]))
    scaled = served.model.joint_nll(Batch(batch.data, batch.masks), 300).nll
    assert of_counts["nll"] == pytest.approx(float(scaled[0]) + np.log(8))


def test_spread_is_that_of_draws_in_the_units_of_the_data(served: Predictor) -> None:
    (answer,) = served.answer([{"gene": FULL["gene"]}], Request(operation="impute", num_draws=50, num_samples=50))
    for name in ("count", "level", "image"):
        told = answer["imputed"][name]
        np.testing.assert_allclose(told["sd"], np.std(told["samples"], axis=0, ddof=1), rtol=1e-4, atol=1e-6)
        np.testing.assert_allclose(told["mean"], np.mean(told["samples"], axis=0), rtol=1e-4, atol=1e-6)
    assert np.min(answer["imputed"]["count"]["samples"]) >= 0


@pytest.mark.parametrize(
    ("row", "message"),
    [
        (
            {"gnee": [1, 2, 3]},
            r"Row 1, gnee: Extra inputs are not permitted\. Available: image, gene, count,",
        ),
        ({"gene": [1, 2]}, r"Row 1, gene: expected shape \(3,\), got \(2,\)"),
        ({"gene": [1, 2, "x"]}, r"Row 1, gene: Input should be a valid number"),
        ({"gene": [1, 2, float("nan")]}, r"Row 1, gene: values must be finite"),
        ({"image": [[[0, 256], [0, 0]]]}, r"Row 1, image: values must be 0 to 255, but got 0 to 256"),
        ({"image": [[[0, 1], [0]]]}, r"Row 1, image: expected shape \(1, 2, 2\), got ragged lists"),
        ({"count": [0, -1]}, r"Row 1, count: values must be 0 or more, but got -1"),
        ({"kind": [0, 3]}, r"Row 1, kind: values must be classes 0 to 2"),
        ([1, 2], r"Row 1, row: "),
    ],
)
def test_a_wrong_row_is_named_with_its_field(served: Predictor, row: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        served.answer([FULL, row], Request())


def test_it_is_read_from_a_folder(served: Predictor, tmp_path: Path) -> None:
    served.model.save(tmp_path)
    (tmp_path / UNITS).write_text(json.dumps({name: unit.model_dump() for name, unit in UNIT.items()}))
    loaded = Predictor.load(tmp_path)
    assert loaded.answer([FULL], Request(operation="encode")) == served.answer([FULL], Request(operation="encode"))


COUNTED = {
    "rna": ModalitySpec(shape=(2,), dtype="float32", likelihood="poisson"),
    "protein": ModalitySpec(shape=(1,), dtype="float32"),
}


def counted(**changes: Any) -> Predictor:
    torch.manual_seed(0)
    config = DMVAEConfig(
        input_dims={name: unit.shape for name, unit in COUNTED.items()},
        decoders_dist={"rna": "poisson"},
        decoder_dist_params={"rna": {"size_factor": 50.0}},
    )
    return Predictor(DMVAE(config), {name: unit.model_copy(update=changes) for name, unit in COUNTED.items()})


def test_imputed_counts_are_at_the_row_s_size_factor_or_the_training_rows() -> None:
    rows = [{"protein": [0.5]}, {"protein": [0.5], "size_factor": 200.0}]
    first, second = counted().answer(rows, Request(operation="impute"))
    for key in ("mean", "sd", "best"):
        np.testing.assert_allclose(4 * np.array(first["imputed"]["rna"][key]), second["imputed"]["rna"][key], rtol=1e-5)
    one, many = counted().answer(
        [{"rna": [3, 4]}, {"rna": [3, 4], "size_factor": 70}], Request(operation="reconstruct")
    )
    np.testing.assert_allclose(10 * np.array(one["values"]["rna"]), many["values"]["rna"], rtol=1e-5)
    given = Request(operation="nll")
    total, same, other = counted().answer([{"rna": [3, 4], "size_factor": size} for size in (None, 7, 9)], given)
    assert total["nll"] == same["nll"] != other["nll"]


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ({"rna": [1.5, 0]}, "Row 0, rna: counts must be whole numbers of 0 or more, but got 1.5"),
        ({"rna": [1, -2]}, "got -2"),
        ({"rna": [1, 2], "size_factor": 0}, "Row 0, size_factor: must be positive and finite, but got 0"),
        ({"rna": [1, 2]}, "Row 0, size_factor: missing, but the training rows had one"),
    ],
)
def test_counts_that_are_none_are_refused(row: dict[str, Any], message: str) -> None:
    served = counted(has_size_factor=True)
    with pytest.raises(ValueError, match=message):
        served.batch(served.parse([row]))
