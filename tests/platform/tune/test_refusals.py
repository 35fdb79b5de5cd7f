"""What a search refuses before any trial starts, and what it knows of a study on disk."""

from pathlib import Path
from typing import Any

import pytest

from dmvae.cli import run_verb
from dmvae.data.reading.dataset import open_dataset
from dmvae.evaluation import search_objectives
from dmvae.platform.tune.space import check_space
from dmvae.platform.tune.study import TrialResult, best_trials, trials_of, write_params, write_result
from tests.runs import make_dataset
from tests.searches import make_search


@pytest.fixture(scope="module")
def dataset(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_dataset(tmp_path_factory.mktemp("search"), rows=1200)


@pytest.mark.parametrize(
    ("space", "message"),
    [
        ({"model.latent_dmi": {"low": 1, "high": 4}}, r"space: model\.latent_dmi: unknown setting"),
        ({"model.latent_dim": {"values": [2, "many"]}}, r"space: model\.latent_dim: Input should be a valid integer"),
        ({"model.latent_dim": {"low": 0, "high": 4}}, r"space: model\.latent_dim: Input should be greater than 0"),
        ({"optim.schedule": {"values": ["cosine", "linear"]}}, r"space: optim\.schedule: Input should be 'constant'"),
        ({"model.modalities_specific_dim.up": {"low": 1, "high": 4}}, r"Unknown modalities in modalities_specific_dim"),
        ({"optim.schedule.warm": {"low": 1, "high": 4}}, r"is a value, not a section"),
        ({"optim.weight_decay": {"low": 0.1, "high": 0.2}}, r"weight_decay=0.1 has no effect with"),
        ({"training.monitor": {"values": ["loss", "middle"]}}, r"training\.monitor: unknown validation metric"),
    ],
)
def test_a_space_with_impossible_configurations_is_refused(
    space: dict[str, Any], message: str, dataset: Path, tmp_path: Path
) -> None:
    with pytest.raises(ValueError, match=message):
        check_space(make_search(tmp_path, dataset, space=space), open_dataset(dataset))


def test_a_start_outside_the_space_is_refused(dataset: Path, tmp_path: Path) -> None:
    for value in (99, 1.5, "two"):
        with pytest.raises(ValueError, match="is outside the domain of"):
            check_space(make_search(tmp_path, dataset, start_from=[{"model.latent_dim": value}]), open_dataset(dataset))


def test_an_objective_that_the_data_cannot_give_is_refused(dataset: Path) -> None:
    opened = open_dataset(dataset)
    with pytest.raises(ValueError, match=r"Unknown objective 'loss'\. Available: imputation, imputation_and_nll"):
        search_objectives.check(opened, "train", "val", ("imputation", "loss"), 200)
    with pytest.raises(ValueError, match="have no labels"):
        search_objectives.check(opened, "train", "val", ("coherence",), 200)
    with pytest.raises(ValueError, match="fewer than 16 have"):
        search_objectives.check(opened, "train", "val", ("imputation",), 16)
    search_objectives.check(opened, "train", "val", ("imputation", "joint_nll", "conditional_nll"), 200)


def test_a_person_reads_one_message(dataset: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = tmp_path / "search.toml"
    file.write_text(
        f'name = "s"\ntrials = 2\nruns_dir = "{tmp_path}/runs"\n'
        f'[base]\nname = "b"\ndata = {{ dataset = "{dataset}" }}\n'
        '[space]\n"model.latent_dmi" = { low = 1, high = 3 }\n'
    )
    assert run_verb("search", [str(file)]) == 1
    said = capsys.readouterr().err
    assert said.startswith("error: space: model.latent_dmi: unknown setting")
    assert "Traceback" not in said
    assert not (tmp_path / "runs").exists()
    file.write_text('name = "s"\ntrials = 2\nbase = "nowhere.toml"\n')
    assert run_verb("search", [str(file)]) == 2
    assert "nowhere.toml" in capsys.readouterr().err


def test_the_best_was_trained_to_its_end_and_several_objectives_have_a_front(dataset: Path, tmp_path: Path) -> None:
    config = make_search(tmp_path, dataset)
    outcomes = [("complete", 0.5), ("stopped", 0.1), ("infeasible", 0.2), ("complete", 0.4), ("failed", 0.0)]
    for number, (status, figure) in enumerate(outcomes):
        folder = write_params(tmp_path, number, {"model.latent_dim": 2, "optim.learning_rate": 0.01})
        write_result(folder, TrialResult(status, 3, {"imputation": figure}))  # type: ignore[arg-type]
    write_params(tmp_path, 5, {"model.latent_dim": 2, "optim.learning_rate": 0.02})
    trials = trials_of(tmp_path)
    assert [trial.number for trial in trials] == list(range(6))
    assert trials[5].result is None
    assert [trial.number for trial in best_trials(config, trials)] == [3]

    # of those within one standard error of the best, the one with the best density
    close = tmp_path / "close"
    for number, (error, nll) in enumerate([(0.50, 3.0), (0.52, 1.0), (0.51, 2.0), (0.54, 0.0)]):
        folder = write_params(close, number, {"model.latent_dim": 2, "optim.learning_rate": 0.01})
        write_result(folder, TrialResult("complete", 3, {"imputation": error, "imputation_se": 0.03, "joint_nll": nll}))
    assert [trial.number for trial in best_trials(config, trials_of(close))] == [1]

    several = make_search(tmp_path, dataset, objectives=["imputation", "parameters"])
    front = tmp_path / "front"
    for number, (error, size) in enumerate([(0.5, 10.0), (0.4, 20.0), (0.6, 15.0), (0.3, 40.0), (0.4, 30.0)]):
        folder = write_params(front, number, {"model.latent_dim": 2, "optim.learning_rate": 0.01})
        write_result(folder, TrialResult("complete", 3, {"imputation": error, "parameters": size}))
    assert [trial.number for trial in best_trials(several, trials_of(front))] == [3, 1, 0]
