"""Per-row results: each row once, resumable, the same however they are computed; user errors in one line."""

import json
import subprocess
import sys
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
from dmvae.data.preparation.prepare import prepare
from dmvae.data.reading.dataset import open_dataset
from dmvae.data.reading.loader import read_rows
from dmvae.evaluation.imputation import held_out_errors
from dmvae.evaluation.latents import fit_density
from dmvae.evaluation.suite import first_blocks
from dmvae.platform.evaluate.evaluate import evaluate
from dmvae.platform.evaluate.nll_table import Evaluator
from dmvae.platform.evaluate.row_store import BLOCK_ROWS, RowStore
from dmvae.platform.evaluate.worker_pool import torch_device
from tests.runs import make_dataset

pytestmark = pytest.mark.slow


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


def test_every_row_is_written_once_with_its_estimates(model: Path, dataset: Path, tmp_path: Path) -> None:
    lines: list[str] = []
    metrics = evaluate(configure(model, dataset, tmp_path, evaluation={"each_modality": True}), lines.append)
    rows = pq.read_table(tmp_path / "rows.parquet").to_pydict()
    split = open_dataset(dataset).split("train")
    assert rows["id"] == split.ids().tolist()
    assert {"nll", "se", "ess", "khat", "trusted", "proposal"} <= rows.keys()
    nll = np.array(rows["nll"])
    assert metrics["train/nll"] == nll.mean()
    assert metrics["train/nll_rows"] == len(split)
    assert metrics["train/nll_bound_gap"] > 0
    summary = json.loads((tmp_path / "summary.json").read_text())
    assert summary["figures"].keys() == metrics.keys()
    batch = split.read(np.arange(len(split)))
    assert batch.masks is not None
    left, right = batch.masks["left"].numpy(), batch.masks["right"].numpy()
    marginal, conditional = np.array(rows["marginal/left"]), np.array(rows["conditional/right"])
    assert (np.isfinite(marginal) == left).all()
    assert (np.isfinite(conditional) == (left & right)).all()
    np.testing.assert_allclose((marginal + conditional)[left & right], nll[left & right])
    np.testing.assert_array_equal(marginal[left & ~right], nll[left & ~right])
    table = [line for line in lines if line.startswith("train/")]
    assert [line.split()[0] for line in table] == list(metrics)
    assert len({len(line) for line in table}) == 1, "names and values are aligned"
    assert lines[-2].endswith(str(tmp_path / "rows.parquet"))
    assert lines[-1].endswith(str(tmp_path / "summary.json"))


def test_an_interrupted_evaluation_resumes_and_ends_with_the_same_rows(
    model: Path, dataset: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    evaluate(configure(model, dataset, tmp_path / "whole"), quiet)
    real, computed = Evaluator.estimate, []

    def stop_after_two(self: Any, number: int) -> Any:
        if len(computed) == 2:
            raise KeyboardInterrupt
        computed.append(number)
        return real(self, number)

    monkeypatch.setattr(Evaluator, "estimate", stop_after_two)
    with pytest.raises(KeyboardInterrupt):
        evaluate(configure(model, dataset, tmp_path / "cut"), quiet)
    assert not (tmp_path / "cut" / "rows.parquet").exists()

    def count(self: Any, number: int) -> Any:
        computed.append(number)
        return real(self, number)

    monkeypatch.setattr(Evaluator, "estimate", count)
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


def test_blocks_of_another_key_are_ignored_and_strings_survive(tmp_path: Path) -> None:
    store = RowStore(tmp_path, "one")
    store.add(3, {"id": np.array(["a", "bc"]), "nll": np.array([1.0, 2.0])})
    store.flush()
    assert RowStore(tmp_path, "two").blocks() == {}
    (block,) = RowStore(tmp_path, "one").blocks().values()
    assert block["id"].tolist() == ["a", "bc"]
    assert block["id"].dtype.kind == "U"


def test_measures_are_computed_with_the_prior_and_the_density(labelled: Path, tmp_path: Path) -> None:
    model = make_model(tmp_path / "model", {"image": (1, 8, 8), "table": (3,)})
    measures = ["rivals", "coherence", "probes", "imputation", "robustness"]
    config = configure(
        model, labelled, tmp_path / "out", density_components=2, missing_rates=[0.0, 0.5],
        evaluation={"split": "test", "measures": measures},
    )  # fmt: skip
    lines: list[str] = []
    metrics = evaluate(config, lines.append)
    for name in (
        "pca/nll", "factor_analysis/nll_minus_ours_se", "imputation/image/ridge_completed",
        "imputation/table/nearest_neighbours_minus_ours", "imputation/table/gradient_boosting_minus_ours_se",
        "clustering/adjusted_rand_index", "frechet/image", "density/frechet/image",
        "coherence/image/table", "joint_coherence", "density/joint_coherence", "classifier/image",
        "probe/shared", "imputation/table/rmse", "imputation/table/coverage90", "imputation/table/ridge",
        "density/imputation/image/rmse", "missing/label/50/rmse/table", "missing/random/0/coherence/image",
        "missing/random/50/probe/shared", "missing/label/50/coverage90/table", "missing/random/50/nll",
        "missing/label/50/nll_conditional/image",
    ):  # fmt: skip
        assert np.isfinite(metrics[f"test/{name}"]), name
    assert metrics["test/imputation/table/ridge"] < metrics["test/imputation/table/mean"]
    assert metrics["test/frechet_real/image"] < metrics["test/frechet/image"]
    assert "test/frechet/table" not in metrics
    # an untrained model loses everywhere, and the output says so
    said = [line for line in lines if "the model loses" in line]
    assert [line.split(":")[0] for line in said] == ["NLL", "prediction of image", "prediction of table"]
    assert metrics["test/missing/random/0/probe/shared"] >= metrics["test/missing/random/50/probe/shared"]
    assert (tmp_path / "out" / "density.safetensors").is_file()


def test_a_model_with_a_fitted_prior_is_measured_with_it_and_beside_it(labelled: Path, tmp_path: Path) -> None:
    folder = make_model(tmp_path / "model", {"image": (1, 8, 8), "table": (3,)})
    model, train = DMVAE.load(folder), open_dataset(labelled).split("train")
    model.fitted_prior = fit_density(model, first_blocks(train), 2)
    model.save(folder)
    config = configure(folder, labelled, tmp_path / "out", evaluation={"split": "test", "measures": ["imputation"]})
    metrics = evaluate(config, lambda line: None)
    rows = [batch for _, batch in read_rows(open_dataset(labelled).split("test"), 1024)]
    for prefix, density in (("", model.fitted_prior), ("standard_prior/", None)):
        expected = held_out_errors(model, rows, "table", 100, density).rmse
        assert metrics[f"test/{prefix}imputation/table/rmse"] == pytest.approx(expected, rel=1e-6)
    assert "test/standard_prior/imputation/table/ridge" not in metrics


def test_nll_after_a_removal_is_that_of_the_modalities_left(labelled: Path, tmp_path: Path) -> None:
    model = make_model(tmp_path / "model", {"image": (1, 8, 8), "table": (3,)})
    estimate = {"split": "test", "measures": ["robustness"], "each_modality": True}
    metrics = evaluate(
        configure(model, labelled, tmp_path / "out", missing_rates=[0.0, 0.5, 1.0], evaluation=estimate), quiet
    )
    rows = {
        name: np.array(values) for name, values in pq.read_table(tmp_path / "out" / "rows.parquet").to_pydict().items()
    }
    np.testing.assert_array_equal(rows["missing/random/0/nll"], rows["nll"])
    np.testing.assert_array_equal(rows["missing/label/100/nll"], 0)
    both = np.isfinite(rows["conditional/image"])
    np.testing.assert_array_equal(rows["missing/random/0/conditional/image"][both], rows["conditional/image"][both])
    # with nothing left of the others it is the marginal
    np.testing.assert_array_equal(rows["missing/random/100/conditional/image"], rows["marginal/image"])
    half, known = (
        rows["missing/random/50/nll"],
        (rows["nll"], rows["marginal/image"], rows["marginal/table"], 0 * rows["nll"]),
    )
    assert np.any([half == part for part in known], axis=0).all()
    assert metrics["test/missing/random/50/nll"] == half.mean()


def test_a_metric_of_no_rows_is_written_as_null(model: Path, dataset: Path, tmp_path: Path) -> None:
    metrics = evaluate(
        configure(model, dataset, tmp_path, evaluation={"each_modality": True, "modalities": ["left"]}), quiet
    )
    text = (tmp_path / "summary.json").read_text()
    written = json.loads(text, parse_constant=lambda word: pytest.fail(f"{word} is no JSON"))["figures"]
    empty = [name for name, value in metrics.items() if np.isnan(value)]
    assert empty
    assert all(written[name] is None for name in empty)


def test_the_requested_device_is_used(model: Path, dataset: Path, tmp_path: Path) -> None:
    assert torch_device("cpu").type == "cpu"
    if not torch.cuda.is_available():
        with pytest.raises(ValueError, match="No GPU is visible"):
            evaluate(configure(model, dataset, tmp_path, device="gpu"), quiet)


def test_categories_are_evaluated_and_drawn(tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    label = rng.integers(0, 3, 200)
    words = (label[:, None] + rng.integers(0, 2, (200, 4))) % 3
    table = (rng.normal(size=(200, 3)) * 0.2 + label[:, None]).astype(np.float32)
    splits = rng.choice(["train", "test"], p=[0.7, 0.3], size=200)
    masks = {"mask.words": rng.random(200) < 0.8, "mask.table": np.ones(200, dtype=bool)}
    np.savez(tmp_path / "rows.npz", id=np.arange(200), label=label, split=splits, words=words, table=table, **masks)
    source = {"kind": "npz", "path": str(tmp_path / "rows.npz")}
    prepare(PrepareConfig.model_validate({"dataset": str(tmp_path / "data"), "source": source}), quiet)
    torch.manual_seed(0)
    config = DMVAEConfig(
        input_dims={"words": (4,), "table": (3,)}, latent_dim=2, modalities_specific_dim=1,
        decoders_dist={"words": "categorical", "table": "normal"}, decoder_dist_params={"words": {"classes": 3}},
    )  # fmt: skip
    DMVAE(config).save(tmp_path / "model")
    measures = ["rivals", "coherence", "robustness"]
    metrics = evaluate(
        configure(
            tmp_path / "model", tmp_path / "data", tmp_path / "out", missing_rates=[0.5],
            evaluation={"split": "test", "measures": measures, "each_modality": True},
        ), quiet,
    )  # fmt: skip
    for name in (
        "nll_conditional/words",
        "coherence/table/words",
        "missing/random/50/nll",
        "missing/label/50/coherence/words",
    ):
        assert np.isfinite(metrics[f"test/{name}"]), name
    assert "test/imputation/words/rmse" not in metrics
    flags = ["--dataset", str(tmp_path / "data"), "--num-draws", "100", "--density-components", "2"]
    assert run_verb("report", ["--model", str(tmp_path / "model"), *flags]) == 0
    drawn = {file.stem for file in (tmp_path / "model" / "report").glob("*.png")}
    assert {"map", "weights", "coherence", "missing", "imputed-table"} <= drawn


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        (["--evaluation.num-draws", "1"], ["num_draws", "2", "got 1"]),
        (["--evaluation.split", "tset"], ["Unknown split 'tset'", "train"]),
        (["--evaluation.modalities", "middle"], ["evaluation.modalities", "['middle']", "'left'"]),
        (["--evaluation.measures", "coherence"], ["no labels", "Remove these measures"]),
        (["--density-components", "3"], ["has no effect without evaluation.measures"]),
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


def test_a_model_with_other_modalities_is_refused(
    dataset: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    other = make_model(tmp_path / "other", {"left": (5,), "middle": (3,)})
    for verb in ("evaluate", "report"):
        assert run_verb(verb, ["--model", str(other), "--dataset", str(dataset)]) == 1
        assert "does not fit the model" in capsys.readouterr().err


def test_a_report_is_one_page_that_holds_its_pictures(labelled: Path, tmp_path: Path) -> None:
    model = make_model(tmp_path / "run" / "best", {"image": (1, 8, 8), "table": (3,)})
    (tmp_path / "run" / "tracking").mkdir()
    lines = [{"metrics": {"train/loss": 3.0, "val/loss": 4.0, "val/kl_shared/joint": 1.0}, "step": s} for s in (1, 2)]
    (tmp_path / "run" / "tracking" / "metrics.jsonl").write_text("\n".join(map(json.dumps, lines)))
    flags = ["--dataset", str(labelled), "--num-draws", "300", "--density-components", "2"]
    assert run_verb("report", ["--model", str(model.parent), *flags]) == 0
    folder = tmp_path / "run" / "report"
    page = (folder / "report.html").read_text()
    files = {file.stem for file in folder.glob("*.png")}
    drawn = {"curves", "map", "weights", "baselines", "coherence", "missing", "imputed-table", "traversal-shared-image"}
    assert drawn <= files
    assert page.count("data:image/png;base64,") == len(files)
    assert 'src="http' not in page


_PEAKS = """
import resource, sys
from dmvae.config.evaluation import EvaluationConfig
from dmvae.platform.evaluate.nll_table import Task, evaluate_nll
small, large, model = sys.argv[1:]
for dataset, draws in ((small, 300), (small, 6000), (large, 300)):
    evaluate_nll(Task(model, dataset, EvaluationConfig(split="train", num_draws=draws, proposal="encoder")))
    print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss // 1024)
"""


def test_memory_does_not_grow_with_draws_or_rows(dataset: Path, model: Path, tmp_path: Path) -> None:
    large = make_dataset(tmp_path, rows=9000)
    command = [sys.executable, "-c", _PEAKS, str(dataset), str(large), str(model)]
    done = subprocess.run(command, capture_output=True, text=True, check=True, timeout=300)
    first, more_draws, more_rows = map(int, done.stdout.split())
    assert more_draws - first < 32  # MiB; kept whole they would take 400 rows x 6000 draws x 13 doubles = 240
    assert more_rows - first < 48
