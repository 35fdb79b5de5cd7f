"""Requests and answers by the names of features and classes."""

import math
from typing import Any

import pytest
import torch

from dmvae.config.model import DMVAEConfig
from dmvae.model.dmvae import DMVAE
from dmvae.model.modality_spec import ModalitySpec
from dmvae.model.predictor import OPERATIONS, Predictor, Request

FEATURES = ("age", "crp", "sex", "stage", "visits", "seen")
CLINIC = ModalitySpec.model_validate(
    {
        "shape": (6,),
        "dtype": "float64",
        "likelihood": "columns",
        "scaling": "columns",
        "mean": (50.0, 1.0, 0.0, 0.0, 0.0, 19000.0),
        "std": (10.0, 2.0, 1.0, 1.0, 1.0, 100.0),
        "features": FEATURES,
        "columns": [
            {"kind": "real"},
            {"kind": "positive"},
            {"kind": "binary", "classes": ("f", "m")},
            {"kind": "category", "classes": ("I", "II", "III")},
            {"kind": "count"},
            {"kind": "real", "since": "1970-01-01"},
        ],
    }
)
BLOOD = ModalitySpec(shape=(2,), dtype="float32", features=("iron", "zinc"))
ROW: dict[str, Any] = {"age": 61, "crp": math.e, "sex": "f", "stage": "II", "visits": 3, "seen": "2022-01-09"}


@pytest.fixture(scope="module")
def served() -> Predictor:
    torch.manual_seed(0)
    config = DMVAEConfig(
        input_dims={"clinic": (6,), "blood": (2,)},
        latent_dim=2,
        decoders_dist={"clinic": "columns"},
        decoder_dist_params={
            "clinic": {"kinds": [column.kind for column in CLINIC.columns], "classes": (3,), "rates": (2.0,)}
        },
    )
    return Predictor(DMVAE(config), {"clinic": CLINIC, "blood": BLOOD})


def test_a_row_by_name_is_the_row_as_a_list(served: Predictor) -> None:
    by_name = served.batch(served.parse([{"clinic": ROW, "blood": {"zinc": 2, "iron": 1}}]))
    as_list = served.batch(served.parse([{"clinic": list(ROW.values()), "blood": [1, 2]}]))
    assert torch.equal(by_name.data["clinic"], as_list.data["clinic"])
    assert by_name.data["blood"].tolist() == as_list.data["blood"].tolist() == [[1, 2]]
    assert by_name.data["clinic"][0].tolist() == pytest.approx([1.1, 0, 0, 1, 3, 0.01])


@pytest.mark.parametrize("operation", OPERATIONS)
def test_every_operation_takes_rows_by_name(served: Predictor, operation: Any) -> None:
    answers = served.answer([{"clinic": ROW}, {}], Request(operation=operation))
    assert [answer["observed"] for answer in answers] == [["clinic"], []]


def test_answers_have_the_names_of_features_and_classes(served: Predictor) -> None:
    (answer,) = served.answer([{"blood": [1, 2]}], Request(operation="impute", num_samples=2))
    told = answer["imputed"]["clinic"]
    assert tuple(told["best"]) == FEATURES
    assert set(told["mean"]) == set(told["sd"]) == {"age", "crp", "visits", "seen"}
    assert told["best"]["sex"] in ("f", "m")
    assert told["best"]["stage"] in ("I", "II", "III")
    assert told["best"]["seen"].startswith("20")
    assert {column: tuple(p) for column, p in told["probabilities"].items()} == {
        "sex": ("f", "m"),
        "stage": ("I", "II", "III"),
    }
    assert all(sum(p.values()) == pytest.approx(1, abs=1e-5) for p in told["probabilities"].values())
    assert [tuple(sample) for sample in told["samples"]] == [FEATURES, FEATURES]
    (other,) = served.answer([{"clinic": ROW}], Request(operation="impute"))
    assert tuple(other["imputed"]["blood"]["mean"]) == ("iron", "zinc")


def test_the_nll_is_of_the_values_as_given(served: Predictor) -> None:
    (answer,) = served.answer([{"clinic": ROW}], Request(operation="nll", num_draws=200))
    batch = served.batch(served.parse([{"clinic": ROW}]))
    scaled = served.model.joint_nll(
        type(batch)(batch.data, batch.masks, ids=torch.zeros(1, dtype=torch.int64)), K=200
    ).nll
    jacobian = math.log(10) + math.log(2) + math.log(math.e) + math.log(100)
    assert answer["nll"] == pytest.approx(float(scaled) + jacobian)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"clinic": {**ROW, "sxe": "f"}}, r"Row 0, clinic: unknown feature 'sxe'. Did you mean 'sex'\?"),
        (
            {"clinic": {**ROW, "stage": "IIII"}},
            r"Row 0, clinic.stage: unknown class 'IIII'. Did you mean 'III'\? Known: I",
        ),
        ({"clinic": {**ROW, "seen": "yesterday"}}, r"Row 0, clinic.seen: expected a date such as 2024-05-31"),
        ({"clinic": {**ROW, "crp": 0}}, r"Row 0, clinic.crp: values must be above 0, but got 0"),
        ({"clinic": {**ROW, "visits": 1.5}}, r"Row 0, clinic.visits: counts must be whole numbers"),
        ({"clinic": {**ROW, "age": "old"}}, r"Row 0, clinic.age: expected a finite number, got 'old'"),
        ({"clinic": {**ROW, "age": math.inf}}, r"Row 0, clinic.age: expected a finite number, got inf"),
        ({"clinic": [1, 2]}, r"Row 0, clinic: expected 6 values, got 2"),
        ({"blood": ["a", 2]}, r"Row 0, blood: expected shape \(2,\), got ragged lists or no numbers"),
        ({"blood": {"irn": 1}}, r"Row 0, blood: unknown feature 'irn'. Did you mean 'iron'\?"),
    ],
)
def test_a_faulty_cell_is_named(served: Predictor, change: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        served.batch(served.parse([change]))


def test_a_class_that_training_lacked_may_be_said(served: Predictor) -> None:
    batch = served.batch(served.parse([{"clinic": {**ROW, "stage": "unseen in training"}}]))
    assert batch.data["clinic"][0, 3] == 3
