"""A fitted model answers in the units and names of the data."""

import io
import subprocess
import sys
from pathlib import Path

import mudata
import numpy as np
import pandas as pd
import pytest
import torch

import dmvae
from dmvae.data.errors import DatasetError
from tests.data.preparation.test_objects import make_anndata
from tests.fitting.rows import SHORT, arrays, frames


@pytest.fixture(scope="module")
def fitted(tmp_path_factory: pytest.TempPathFactory) -> dmvae.Fitted:
    folder = tmp_path_factory.mktemp("fitted")
    settings = SHORT | {"training": SHORT["training"] | {"epochs": 40}, "optim": {"learning_rate": 0.02}}
    labels = (frames()["left"]["a"].reindex([f"row{n}" for n in range(120)]) > 100).to_list()
    return dmvae.fit(frames(), folder=folder, labels=labels, **settings)


def test_latents_are_those_of_the_model_by_id(fitted: dmvae.Fitted) -> None:
    data = frames()
    latents = fitted.latents(data, private=True)
    assert list(latents.columns[:2]) == ["shared_0", "shared_1"]
    assert latents.index.tolist() == [*(f"row{n}" for n in range(10, 120)), *(f"row{n}" for n in range(10))]
    info = fitted.modalities["right"]
    only_right = torch.tensor(data["right"].loc[["row3"]].to_numpy())
    mean, std = (torch.tensor(part, dtype=torch.float64) for part in (info.mean, info.std))
    scaled = (only_right - mean) / std
    expected = fitted.model.encode({"right": scaled}, return_mean=True)
    np.testing.assert_allclose(latents.loc["row3"][:2], expected.z[0], rtol=1e-10)
    assert latents.loc["row3"].filter(like="left_").isna().all()


def test_answers_do_not_depend_on_the_other_rows_or_their_order(fitted: dmvae.Fitted) -> None:
    data = frames()
    latents = fitted.latents(data)
    few = {name: table[[row.endswith("7") for row in table.index]].iloc[::-1] for name, table in data.items()}
    found = fitted.latents(few)
    pd.testing.assert_frame_equal(found, latents.loc[found.index], rtol=1e-10)
    nll = fitted.nll(few, num_draws=20)
    pd.testing.assert_frame_equal(nll, fitted.nll(data, num_draws=20).loc[nll.index], rtol=1e-8)


def test_columns_in_another_order_are_put_in_order_by_name(fitted: dmvae.Fitted) -> None:
    data = frames()
    turned = {name: table[table.columns[::-1]] for name, table in data.items()}
    pd.testing.assert_frame_equal(fitted.latents(turned), fitted.latents(data))


def test_imputation_fills_only_what_is_missing_in_the_units_of_the_data(fitted: dmvae.Fitted) -> None:
    data = frames()
    left = fitted.impute(data, num_draws=200)["left"]
    assert list(left.values.columns) == list("abcd")
    observed = left.values.loc[data["left"].index]
    pd.testing.assert_frame_equal(observed, data["left"], check_names=False)
    assert (left.sd.loc[data["left"].index] == 0).all(axis=None)
    missing = left.values.loc[[f"row{n}" for n in range(10)]]
    truth = frames_without_loss()["left"].loc[missing.index]
    assert left.missing.sum() == 40
    error = np.sqrt(((missing - truth) ** 2).mean(axis=None))
    assert error < 0.7 * np.sqrt(((truth - data["left"].mean()) ** 2).mean(axis=None))
    assert (left.quantiles[0.05].loc[missing.index] < missing).all(axis=None)
    assert (left.quantiles[0.95].loc[missing.index] > missing).all(axis=None)
    assert repr(left) == "Imputed(40 of 480 values, sd, quantiles [0.05, 0.95])"


def frames_without_loss() -> dict[str, pd.DataFrame]:
    """Return the values of `frames` before any were lost."""
    rng = np.random.default_rng(0)
    cause = rng.normal(size=(120, 2))
    left = 100 + 5 * (cause @ rng.normal(size=(2, 4)) + 0.3 * rng.normal(size=(120, 4)))
    return {"left": pd.DataFrame(left, index=[f"row{n}" for n in range(120)], columns=list("abcd"))}


def test_the_nll_is_a_density_of_the_values_as_given() -> None:
    """Ten times the values of one modality: 4 log 10 nats more for each row that has it."""
    data = frames()
    larger = data | {"left": 10 * data["left"]}
    before, after = (dmvae.fit(d, **SHORT).nll(d, num_draws=20).nll for d in (data, larger))
    expected = pd.Series(0.0, index=before.index)
    expected[data["left"].index] = 4 * np.log(10)
    np.testing.assert_allclose(after - before, expected, atol=1e-6)


def test_predictions_and_samples_have_names_and_units(fitted: dmvae.Fitted) -> None:
    predicted = fitted.predict(frames(), "left", given="right")
    assert predicted.shape == (120, 4)
    assert abs(predicted.loc[[f"row{n}" for n in range(10)]].to_numpy().mean() - 100) < 10
    samples = fitted.sample(50)
    assert list(samples["right"].columns) == list("xyz")
    assert abs(samples["left"].to_numpy().mean() - 100) < 10
    with pytest.raises(ValueError, match="Unknown modality 'lefd' for target"):
        fitted.predict(frames(), "lefd")


def test_classes_come_back_by_name_and_unseen_ones_are_read() -> None:
    rng = np.random.default_rng(0)
    group = rng.integers(0, 3, 90)
    table = pd.DataFrame({"kind": np.array(["red", "green", "blue"])[group], "size": group + rng.normal(0, 0.1, 90)})
    data = {"table": table.iloc[:80], "other": group[:, None] + 0.1 * rng.normal(size=(90, 2))}
    data["other"] = pd.DataFrame(data["other"])
    fitted = dmvae.fit(data, training={"epochs": 15}, optim={"learning_rate": 0.02}, progress=False)
    imputed = fitted.impute(data)["table"].values
    assert imputed["kind"].iloc[:80].tolist() == table["kind"].iloc[:80].tolist()
    assert (imputed["kind"].iloc[80:] == table["kind"].iloc[80:]).mean() > 0.7
    strange = data | {"table": table.iloc[:80].assign(kind="violet")}
    assert fitted.latents(strange).notna().all(axis=None)


def test_images_come_back_as_arrays() -> None:
    rng = np.random.default_rng(0)
    data = {"image": rng.integers(0, 256, (40, 1, 3, 3)).astype(np.uint8), "text": rng.normal(size=(40, 2))}
    fitted = dmvae.fit(data, training={"epochs": 1}, progress=False)
    imputed = fitted.impute({"text": data["text"]})["image"]
    assert imputed.values.shape == (40, 1, 3, 3)
    assert imputed.missing.all()
    assert 0 < imputed.values.mean() < 255


def test_single_missing_values_are_imputed() -> None:
    data = arrays()
    truth, data["left"][20, 1] = data["left"][20, 1], np.nan
    fitted = dmvae.fit(data, **SHORT)
    left = fitted.impute(data)["left"]
    assert left.missing[20].tolist() == [False, True, False, False]
    assert left.sd.iloc[20, 1] > 0
    assert left.sd.iloc[20, 0] == 0
    assert abs(left.values.iloc[20, 1] - truth) < 40
    whole = arrays()
    assert fitted.nll(data, num_draws=20).nll[20] < fitted.nll(whole, num_draws=20).nll[20]


@pytest.mark.parametrize("kept", [True, False])
def test_a_saved_fit_answers_as_before_in_another_process(fitted: dmvae.Fitted, tmp_path: Path, kept: bool) -> None:
    found = fitted if kept else dmvae.fit(frames(), **SHORT)
    found.save(tmp_path / "saved")
    again = dmvae.load(tmp_path / "saved")
    assert repr(again) == repr(found)
    pd.testing.assert_frame_equal(again.history, found.history)
    pd.testing.assert_frame_equal(again.latents(frames()), found.latents(frames()))
    if kept:
        assert again.evaluate(measures=(), num_draws=20) == found.evaluate(measures=(), num_draws=20)
        return
    with pytest.raises(DatasetError, match="evaluate needs the prepared rows"):
        again.evaluate()
    program = f"import dmvae; print(dmvae.load({str(tmp_path / 'saved')!r}))"
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == repr(found)


@pytest.mark.slow
def test_evaluation_measures_the_validation_rows(fitted: dmvae.Fitted) -> None:
    metrics = fitted.evaluate(measures=("imputation",), num_draws=20)
    assert np.isfinite(metrics["nll"])
    assert metrics["imputation/left/rmse"] > 0
    with pytest.raises(ValueError, match=r"Unknown measures \['imputations'\]"):
        fitted.evaluate(measures=("imputations",))


WRONG = {
    "a modality": ({"lefd": np.zeros((2, 4))}, r"Unknown modalities \['lefd'\] in data"),
    "a feature": (
        {"left": pd.DataFrame(np.zeros((2, 3)), columns=list("abc"))},
        r"data\['left'\] lacks 1 of the features.*'d'",
    ),
    "a shape": ({"left": np.zeros((2, 5))}, r"Rows of data\['left'\] must have the shape \(4,\)"),
    "some features": (
        {"left": np.array([[0, 1, 2, np.nan]])},
        r"data\['left'\] must have all features of a row or none",
    ),
}


@pytest.mark.parametrize("fault", WRONG)
def test_data_that_does_not_fit_the_model_is_refused_by_name(fitted: dmvae.Fitted, fault: str) -> None:
    data, message = WRONG[fault]
    with pytest.raises(DatasetError, match=message):
        fitted.latents(data)


@pytest.mark.filterwarnings("ignore:The inplace keyword", "ignore:var_names are not unique", "ignore:.*X_dmvae")
def test_latents_and_imputations_are_written_into_mudata_in_its_order() -> None:
    mudata.set_options(pull_on_update=False)
    names = [f"c{number}" for number in range(40)]
    mdata = mudata.MuData({"rna": make_anndata(names[5:]), "prot": make_anndata(names[:35])})
    fitted = dmvae.fit(mdata, training={"epochs": 1}, progress=False)
    fitted.annotate(mdata)
    latents = fitted.latents(mdata)
    np.testing.assert_array_equal(mdata.obsm["X_dmvae"], latents.loc[mdata.obs_names])
    np.testing.assert_allclose(mdata["rna"].layers["imputed"], mdata["rna"].X)


def test_pictures_are_drawn(fitted: dmvae.Fitted) -> None:
    data = frames()
    for figure in (
        fitted.plot.curves(),
        fitted.plot.map(data, color="left/a", method="pca"),
        fitted.plot.map(data, color=["x"] * 60 + ["y"] * 60, method="pca"),
        fitted.plot.missingness(data),
        fitted.plot.imputed(data, "right"),
    ):
        assert any(axes.has_data() for axes in figure.axes)
        figure.savefig(io.BytesIO(), format="png")
    with pytest.raises(ValueError, match="Unknown column 'left/q' for color"):
        fitted.plot.map(data, color="left/q", method="pca")


@pytest.mark.slow
def test_a_report_is_written(fitted: dmvae.Fitted, tmp_path: Path) -> None:
    assert fitted.report(tmp_path / "report").read_text().startswith("<!doctype html>")


def test_a_dataset_on_disk_is_read_as_the_rows_it_was_made_of(fitted: dmvae.Fitted) -> None:
    folder = fitted.config.data.dataset
    latents = fitted.latents(folder)
    pd.testing.assert_frame_equal(latents, fitted.latents(frames()).loc[latents.index], rtol=1e-9)
    assert fitted.latents(arrays()).shape == latents.shape
