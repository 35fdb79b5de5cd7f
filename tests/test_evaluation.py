"""Per-row results: each row once, resumable, the same however they are computed; bad input in one message."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import pytest
import torch

from dmvae import DMVAE, DMVAEConfig
from dmvae.cli import run_verb
from dmvae.config.data import PrepareConfig
from dmvae.config.evaluation import EvaluateConfig
from dmvae.data.dataset import open_dataset
from dmvae.data.prepare import prepare
from dmvae.platform import evaluation
from dmvae.platform.evaluation import evaluate
from dmvae.platform.rows import BLOCK_ROWS, RowStore
from tests.runs import make_dataset


def make_model(folder: Path, shapes: dict[str, tuple[int, ...]]) -> Path:
    torch.manual_seed(0)
    config = DMVAEConfig(input_dims=shapes, latent_dim=2, modalities_specific_dim=1)
    DMVAE(config).save(folder)
    return folder


def make_labelled(folder: Path, rows: int = 400) -> Path:
    """Write a dataset with labels, one modality an image."""
    rng = np.random.default_rng(0)
    label = rng.integers(0, 3, rows)
    image = (rng.normal(size=(rows, 1, 8, 8)) * 0.2 + label[:, None, None, None]).astype(np.float32)
    table = (rng.normal(size=(rows, 3)) * 0.2 + label[:, None]).astype(np.float32)
    splits = rng.choice(["train", "test"], p=[0.6, 0.4], size=rows)
    masks = {"mask.image": rng.random(rows) < 0.8, "mask.table": np.ones(rows, dtype=bool)}
    np.savez(folder / "rows.npz", id=np.arange(rows), label=label, split=splits, image=image, table=table, **masks)
    source = {"kind": "npz", "path": str(folder / "rows.npz")}
    prepare(PrepareConfig.model_validate({"dataset": str(folder / "data"), "source": source}), lambda text: None)
    return folder / "data"


@pytest.fixture(scope="module")
def dataset(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_dataset(tmp_path_factory.mktemp("evaluation"), rows=600)


@pytest.fixture(scope="module")
def labelled(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_labelled(tmp_path_factory.mktemp("labelled"))


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_model(tmp_path_factory.mktemp("model"), {"left": (5,), "right": (3,)})


def configure(model: Path, dataset: Path, output: Path, **changes: Any) -> EvaluateConfig:
    estimate = {"split": "train", "num_draws": 20, "proposal": "encoder"} | changes.pop("evaluation", {})
    tree = {"model": str(model), "dataset": str(dataset), "output": str(output), "evaluation": estimate, **changes}
    return EvaluateConfig.model_validate(tree)


def quiet(text: str) -> None:
    pass


def test_every_row_is_there_once_with_its_figures(model: Path, dataset: Path, tmp_path: Path) -> None:
    figures = evaluate(configure(model, dataset, tmp_path, evaluation={"each_modality": True}), quiet)
    rows = pq.read_table(tmp_path / "rows.parquet").to_pydict()
    split = open_dataset(dataset).split("train")
    assert rows["id"] == split.ids().tolist()
    assert {"nll", "se", "ess", "khat", "trusted", "proposal"} <= rows.keys()
    nll = np.array(rows["nll"])
    assert figures["train/nll"] == nll.mean()
    assert figures["train/nll_rows"] == len(split)
    assert figures["train/nll_bound_gap"] > 0
    summary = json.loads((tmp_path / "summary.json").read_text())
    assert summary["figures"].keys() == figures.keys()
    batch = split.read(np.arange(len(split)))
    assert batch.masks is not None
    left, right = batch.masks["left"].numpy(), batch.masks["right"].numpy()
    marginal, conditional = np.array(rows["marginal/left"]), np.array(rows["conditional/right"])
    assert (np.isfinite(marginal) == left).all()
    assert (np.isfinite(conditional) == (left & right)).all()
    np.testing.assert_allclose((marginal + conditional)[left & right], nll[left & right])
    np.testing.assert_array_equal(marginal[left & ~right], nll[left & ~right])


def test_an_interrupted_evaluation_goes_on_and_ends_with_the_same_rows(
    model: Path, dataset: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    evaluate(configure(model, dataset, tmp_path / "whole"), quiet)
    real, computed = evaluation._Evaluator.estimate, []

    def stop_after_two(self: Any, number: int) -> Any:
        if len(computed) == 2:
            raise KeyboardInterrupt
        computed.append(number)
        return real(self, number)

    monkeypatch.setattr(evaluation._Evaluator, "estimate", stop_after_two)
    with pytest.raises(KeyboardInterrupt):
        evaluate(configure(model, dataset, tmp_path / "cut"), quiet)
    assert not (tmp_path / "cut" / "rows.parquet").exists()

    def count(self: Any, number: int) -> Any:
        computed.append(number)
        return real(self, number)

    monkeypatch.setattr(evaluation._Evaluator, "estimate", count)
    evaluate(configure(model, dataset, tmp_path / "cut"), quiet)
    whole, cut = (pq.read_table(tmp_path / name / "rows.parquet") for name in ("whole", "cut"))
    assert cut.column_names == whole.column_names
    for name in whole.column_names:
        np.testing.assert_array_equal(cut[name].to_numpy(), whole[name].to_numpy())
    assert computed == list(range(-(-whole.num_rows // BLOCK_ROWS)))
    assert {file.name for file in (tmp_path / "cut").iterdir()} == {"rows.parquet", "summary.json"}
    evaluate(configure(model, dataset, tmp_path / "cut"), quiet)
    assert len(computed) == len(set(computed))
    evaluate(configure(model, dataset, tmp_path / "cut", evaluation={"seed": 1}), quiet)
    assert len(computed) == 2 * len(set(computed))


def test_blocks_of_another_key_are_not_taken_and_strings_survive(tmp_path: Path) -> None:
    store = RowStore(tmp_path, "one")
    store.add(3, {"id": np.array(["a", "bc"]), "nll": np.array([1.0, 2.0])})
    store.flush()
    assert RowStore(tmp_path, "two").blocks() == {}
    (block,) = RowStore(tmp_path, "one").blocks().values()
    assert block["id"].tolist() == ["a", "bc"]
    assert block["id"].dtype.kind == "U"


def test_measures_are_judged_with_the_prior_and_the_density(labelled: Path, tmp_path: Path) -> None:
    model = make_model(tmp_path / "model", {"image": (1, 8, 8), "table": (3,)})
    measures = ["rivals", "coherence", "probes", "imputation", "robustness"]
    config = configure(
        model, labelled, tmp_path / "out", density_components=2, missing_rates=[0.0, 0.5],
        evaluation={"split": "test", "measures": measures},
    )  # fmt: skip
    figures = evaluate(config, quiet)
    for name in (
        "pca/nll", "coherence/image/table", "joint_coherence", "density/joint_coherence", "classifier/image",
        "probe/shared", "imputation/table/rmse", "imputation/table/coverage90", "imputation/table/ridge",
        "density/imputation/image/rmse", "missing/label/50/rmse/table", "missing/random/0/coherence/image",
    ):  # fmt: skip
        assert np.isfinite(figures[f"test/{name}"]), name
    assert figures["test/imputation/table/ridge"] < figures["test/imputation/table/mean"]
    assert (tmp_path / "out" / "density.safetensors").is_file()


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        (["--evaluation.num-draws", "1"], ["num_draws", "2", "got 1"]),
        (["--evaluation.split", "tset"], ["no split 'tset'", "train"]),
        (["--evaluation.modalities", "middle"], ["evaluation.modalities", "['middle']", "'left'"]),
        (["--evaluation.measures", "coherence"], ["labels", "has none"]),
        (["--density-components", "3"], ["takes effect with evaluation.measures"]),
    ],
)
def test_bad_input_is_one_message(
    flags: list[str], words: list[str], model: Path, dataset: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run_verb("evaluate", ["--model", str(model), "--dataset", str(dataset), *flags]) in (1, 2)
    message = capsys.readouterr().err
    assert message.startswith("error: ")
    assert "Traceback" not in message
    assert len(message.splitlines()) == 1
    for word in words:
        assert word in message


def test_another_model_is_refused(dataset: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    other = make_model(tmp_path / "other", {"left": (5,), "middle": (3,)})
    for verb in ("evaluate", "report"):
        assert run_verb(verb, ["--model", str(other), "--dataset", str(dataset)]) == 1
        assert "a model is judged on data of its own modalities" in capsys.readouterr().err


def test_a_report_is_one_page_with_its_pictures(labelled: Path, tmp_path: Path) -> None:
    model = make_model(tmp_path / "run" / "best", {"image": (1, 8, 8), "table": (3,)})
    (tmp_path / "run" / "tracking").mkdir()
    lines = [{"metrics": {"train/loss": 3.0, "val/loss": 4.0, "val/kl_shared/joint": 1.0}, "step": s} for s in (1, 2)]
    (tmp_path / "run" / "tracking" / "metrics.jsonl").write_text("\n".join(map(json.dumps, lines)))
    flags = ["--dataset", str(labelled), "--num-draws", "300", "--density-components", "2"]
    assert run_verb("report", ["--model", str(model.parent), *flags]) == 0
    folder = tmp_path / "run" / "report"
    page = (folder / "report.html").read_text()
    files = {file.stem for file in folder.glob("*.png")}
    assert {"curves", "map", "weights", "coherence", "missing", "imputed-table", "traversal-shared-image"} <= files
    assert page.count("data:image/png;base64,") == len(files)
    assert 'src="http' not in page
