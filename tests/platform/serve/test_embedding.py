"""Embedded datasets: every row once, with the latents that the model gives row by row, on any number of workers."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import pytest
import torch

from dmvae import DMVAE
from dmvae.cli import run_verb
from dmvae.config.data import PrepareConfig
from dmvae.config.registry import EmbedConfig
from dmvae.config.training import TrainConfig
from dmvae.data.batch import has
from dmvae.data.format.schema import MISSING_INTEGER
from dmvae.data.preparation.prepare import prepare
from dmvae.data.reading.dataset import open_dataset
from dmvae.data.reading.loader import read_rows
from dmvae.evaluation.latents import fit_density
from dmvae.evaluation.suite import first_blocks
from dmvae.model.predictor import UNITS, ModalitySpec, Predictor, Request
from dmvae.model.serialization import MODEL_PRIOR
from dmvae.platform.serve.embedding import Embedder, _key, _shards, embed
from dmvae.training.settings import resolve
from tests.runs import make_config, make_dataset, train_here

pytestmark = pytest.mark.usefixtures("cluster")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A trained model and its dataset."""
    place = tmp_path_factory.mktemp("embedding")
    dataset = make_dataset(place, rows=600)
    state, _ = train_here(make_config(place, dataset))
    state.model.fitted_prior = fit_density(state.model, first_blocks(open_dataset(dataset).split("train")), 2)
    state.model.save(place / "model")
    return place


def configure(folder: Path, output: Path, **changes: Any) -> EmbedConfig:
    return EmbedConfig(
        model=str(folder / "model"),
        dataset=str(folder / "data"),
        output=str(output),
        private=True,
        impute=True,
        **changes,
    )


def read(output: Path) -> dict[str, list[Any]]:
    tables = [pq.read_table(file).to_pydict() for file in sorted(output.rglob("*.parquet"))]
    return {key: [value for table in tables for value in table[key]] for key in tables[0]}


def test_latents_equal_encode_row_by_row_on_one_and_two_workers(folder: Path, tmp_path: Path) -> None:
    summary = embed(configure(folder, tmp_path / "one"), lambda line: None)
    embed(configure(folder, tmp_path / "two", workers=2), lambda line: None)
    one, two = read(tmp_path / "one"), read(tmp_path / "two")
    assert one == two
    dataset = open_dataset(folder / "data")
    assert summary.rows == summary.fresh == 600
    assert sorted(one["id"]) == list(range(600)), "every row once"
    found = {row: place for place, row in enumerate(one["id"])}
    specs = {name: ModalitySpec.model_validate(info.model_dump()) for name, info in dataset.manifest.modalities.items()}
    predictor = Predictor(DMVAE.load(folder / "model"), specs)
    for name in dataset.manifest.splits:
        for _, batch in read_rows(dataset.split(name), 7, dtype=predictor.model.dtype):
            row, place = batch[0], found[int(batch[0].ids[0])]  # type: ignore[index]
            np.testing.assert_allclose(
                one["shared_mean"][place], predictor.model.encode(row, return_mean=True).z[0], rtol=1e-5
            )
            for modality in specs:
                seen = bool(has(row, modality)[0])
                assert one[f"observed/{modality}"][place] == seen
                assert (one[f"private_mean/{modality}"][place] is not None) == seen
                assert (one[f"imputed/{modality}"][place] is None) == seen
                if not seen:  # from the fitted prior
                    expected = predictor.model.predict(row, gen_mod=modality, return_mean=True)[modality][0]
                    np.testing.assert_allclose(one[f"imputed/{modality}"][place], expected, rtol=1e-4, atol=1e-5)
    given = {"left": [1.0, 2.0, 3.0, 4.0, 5.0]}
    (answer,) = predictor.answer([given], Request(operation="encode"))
    assert answer["observed"] == ["left"]


def test_finished_shards_are_kept_and_partial_ones_are_embedded_again(folder: Path, tmp_path: Path) -> None:
    config, dataset = configure(folder, tmp_path / "out"), open_dataset(folder / "data")
    key, shards = _key(folder / "model", dataset, config), list(_shards(dataset, None))
    Embedder(str(folder / "model"), str(folder / "data"), str(tmp_path / "out"), config, key).write(shards[0])
    (tmp_path / "out" / shards[1].split).mkdir()
    (tmp_path / "out" / shards[1].split / ".part-00000.parquet.partial").write_bytes(b"half a file")
    first = (tmp_path / "out" / shards[0].file).stat().st_mtime_ns
    summary = embed(config, lambda line: None)
    assert summary.fresh == 600 - shards[0].rows
    assert (tmp_path / "out" / shards[0].file).stat().st_mtime_ns == first
    assert sorted(read(tmp_path / "out")["id"]) == list(range(600))
    with pytest.raises(ValueError, match="Choose another output"):
        embed(config.model_copy(update={"private": False}), lambda line: None)
    (folder / "model" / MODEL_PRIOR).rename(tmp_path / MODEL_PRIOR)
    assert _key(folder / "model", dataset, config) != key, "imputations are from another prior"
    (tmp_path / MODEL_PRIOR).rename(folder / "model" / MODEL_PRIOR)


def test_a_dataset_with_other_scaling_is_brought_to_the_scale_of_the_model(folder: Path, tmp_path: Path) -> None:
    dataset = open_dataset(folder / "data")
    infos = {name: info.model_dump(mode="json") for name, info in dataset.manifest.modalities.items()}
    model = tmp_path / "model"
    DMVAE.load(folder / "model").save(model)
    infos["left"] |= {"scaling": "standardise", "mean": [1.0] * 5, "std": [2.0] * 5}
    (model / UNITS).write_text(json.dumps(infos))
    embed(EmbedConfig(model=str(model), dataset=str(folder / "data"), output=str(tmp_path / "out"), split="val"), print)
    row = next(batch for _, batch in read_rows(dataset.split("val"), 1, dtype=torch.float64) if has(batch, "left")[0])
    (answer,) = Predictor.load(model).answer(
        [{n: row.data[n][0].tolist() for n in row.data if has(row, n)[0]}], Request(operation="encode")
    )
    found = read(tmp_path / "out")
    np.testing.assert_allclose(
        found["shared_mean"][found["id"].index(int(row.ids[0]))],
        answer["shared"]["mean"],
        rtol=1e-4,  # type: ignore[index]
    )


def test_a_model_that_mlflow_lacks_is_one_message(
    folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    flags = [
        "--dataset",
        str(folder / "data"),
        "--output",
        str(tmp_path),
        "--tracking.uri",
        f"sqlite:///{tmp_path}/m.db",
    ]
    assert run_verb("embed", ["models:/nobody@champion", *flags]) == 1
    message = capsys.readouterr().err
    assert message.startswith("error: Cannot load models:/nobody@champion: ")
    assert len(message.splitlines()) == 1


def test_imputed_columns_have_the_names_of_features_and_classes(tmp_path: Path) -> None:
    ages, names = ["age,sex,stage,id"], ["I", "II", "III"]
    ages += [f"{30 + row}.5,{'fm'[row % 2]},{names[row % 3]},{row}" for row in range(20)]
    (tmp_path / "clinic.csv").write_text("\n".join(ages) + "\n")
    (tmp_path / "blood.csv").write_text("id,iron\n" + "".join(f"{row},{row / 7}\n" for row in range(10, 30)))
    source = {"kind": "csv", "modalities": {n: {"path": f"{tmp_path}/{n}.csv"} for n in ("clinic", "blood")}}
    config = {"dataset": f"{tmp_path}/data", "source": source, "splits": {"train": 1.0}}
    prepare(PrepareConfig.model_validate(config), progress=lambda _: None)
    run = {"name": "r", "data": {"dataset": f"{tmp_path}/data", "val_split": "train"}}
    run |= {"evaluation": {"split": "train"}}
    torch.manual_seed(0)
    DMVAE(resolve(TrainConfig.model_validate(run), open_dataset(tmp_path / "data")).model).save(tmp_path / "model")
    embed(configure(tmp_path, tmp_path / "out"), lambda line: None)
    found = read(tmp_path / "out")
    place = found["id"].index(25)  # without the table
    assert {key for key in found if key.startswith("imputed/")} == {
        "imputed/clinic/age", "imputed/clinic/sex", "imputed/clinic/stage", "imputed/blood/iron",
    }  # fmt: skip
    assert found["imputed/clinic/sex"][place] in ("f", "m")
    assert found["imputed/clinic/stage"][place] in names
    assert sum(found[f"probability/clinic/stage/{name}"][place] for name in names) == pytest.approx(1, abs=1e-5)
    assert found["imputed/clinic/age"][found["id"].index(15)] is None
    assert found["imputed/blood/iron"][place] is None


def test_missing_cells_are_imputed_and_the_others_kept(tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    values = rng.normal(5, 2, (30, 3))
    values[rng.random(values.shape) < 0.3] = np.nan
    values[0] = (1, np.nan, 2)
    codes = rng.integers(0, 3, (30, 2))
    codes[::4, 1] = MISSING_INTEGER
    np.savez(tmp_path / "rows.npz", x=values, code=codes, count=np.where(codes < 0, np.nan, 7.0))
    config = {
        "dataset": f"{tmp_path}/data",
        "source": {"kind": "npz", "path": f"{tmp_path}/rows.npz"},
        "scaling": {"x": "standardise"},
        "likelihood": {"count": "poisson"},
        "splits": {"train": 1.0},
    }
    prepare(PrepareConfig.model_validate(config), progress=lambda _: None)
    run = {"name": "r", "data": {"dataset": f"{tmp_path}/data", "val_split": "train"}}
    run |= {"evaluation": {"split": "train"}}
    torch.manual_seed(0)
    DMVAE(resolve(TrainConfig.model_validate(run), open_dataset(tmp_path / "data")).model).save(tmp_path / "model")
    embed(configure(tmp_path, tmp_path / "out"), lambda line: None)
    found = read(tmp_path / "out")
    for place, number in enumerate(found["id"]):
        known = ~np.isnan(values[number])
        if known.all() or not known.any():
            assert (found["imputed/x"][place] is None) == bool(known.all())
            continue
        parts = [np.array(found[f"imputed{part}/x"][place]) for part in ("", "_sd", "_q0.05", "_q0.95")]
        for part in (parts[0], *parts[2:]):
            np.testing.assert_allclose(part[known], values[number][known], rtol=1e-5)
        assert (parts[1][known] == 0).all()
        assert (parts[1][~known] > 0).all()
        assert (parts[2][~known] < parts[3][~known]).all()
        assert (found["imputed/code"][place] is None) == bool(number % 4)
    place = found["id"].index(4)
    np.testing.assert_allclose(np.sum(np.reshape(found["imputed/code"][place], (2, 3)), axis=1), 1, rtol=1e-5)
    assert found["imputed_q0.95/count"][place][0] == 7
    assert found["imputed_q0.95/count"][place][1] == round(found["imputed_q0.95/count"][place][1])
    assert "imputed_sd/code" not in found
