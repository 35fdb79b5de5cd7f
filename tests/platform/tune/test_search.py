"""Searches on a small local cluster: what they find, write and record, and what a kill leaves."""

import json
import os
import signal
import subprocess
import sys
import tomllib
from contextlib import suppress
from pathlib import Path

import optuna
import pytest
from mlflow import MlflowClient

from dmvae.config.training import TrainConfig
from dmvae.platform.errors import RunError
from dmvae.platform.tune.search import search
from dmvae.platform.tune.study import trials_of
from tests.kills import wait_for
from tests.runs import make_dataset
from tests.searches import make_search

pytestmark = pytest.mark.usefixtures("cluster")

EPOCHS = 24


@pytest.fixture(scope="module")
def large(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_dataset(tmp_path_factory.mktemp("search"), rows=1200)


def quiet(line: str) -> None:
    """Nobody reads along."""


def test_a_search_finds_records_and_trains_the_best(large: Path, tmp_path: Path) -> None:
    config = make_search(
        tmp_path,
        large,
        objectives=["imputation_and_nll"],
        scheduler="asha",
        grace_epochs=1,
        base={"training": {"epochs": 3}},
        retrain={"how": "train"},
    )
    said: list[str] = []
    found = search(config, said.append)
    assert len(found.trials) == 4
    assert all(trial.result is not None for trial in found.trials)
    (best,) = found.best
    complete = [t.result.figures for t in found.trials if t.result and t.is_candidate]
    assert best.result is not None
    least = min(complete, key=lambda figures: figures["imputation_and_nll"])
    limit = least["imputation_and_nll"] + least["imputation_and_nll_se"]
    close = [figures for figures in complete if figures["imputation_and_nll"] <= limit]
    assert best.result.figures["joint_nll"] == min(figures["joint_nll"] for figures in close)
    assert best.result.figures["imputation_and_nll_se"] > 0
    assert sum(line.startswith("trial ") for line in said) == 4
    trained = TrainConfig.model_validate(tomllib.loads((found.study_dir / "best.toml").read_text()))
    assert trained.model.latent_dim == best.params["model.latent_dim"]
    assert found.retrained is not None
    assert "test/nll" in found.retrained.metrics
    exported = optuna.load_study(study_name="study", storage=f"sqlite:///{found.study_dir}/optuna.db")
    assert len(exported.trials) == 4
    assert exported.best_value == pytest.approx(least["imputation_and_nll"]) or len(complete) < 4
    client = MlflowClient(found.tracking_uri)
    parent = client.get_run(found.run_id)
    assert parent.info.status == "FINISHED"
    assert parent.data.metrics["best/joint_nll"] == best.result.figures["joint_nll"]
    children = client.search_runs([parent.info.experiment_id], f"tags.`mlflow.parentRunId` = '{found.run_id}'")
    assert len(children) == 4
    assert {child.info.status for child in children} <= {"FINISHED", "KILLED"}
    listed = {file.path for file in client.list_artifacts(found.run_id)}
    assert {"best.toml", "trials.json", "optuna.db", "plots"} <= listed

    before = {trial.number: trial for trial in found.trials}
    again = search(config, quiet)
    assert {trial.number: trial for trial in again.trials} == before
    more = search(config.model_copy(update={"trials": 5}), quiet)
    assert [trial.number for trial in more.trials] == [0, 1, 2, 3, 4]
    assert all(before[number] == more.trials[number] for number in before)
    with pytest.raises(RunError, match=r"judged_rows: 200 in the study, 100 requested"):
        search(config.model_copy(update={"judged_rows": 100}), quiet)


def start(config_file: Path, folder: Path) -> subprocess.Popen[bytes]:
    command = [sys.executable, "-m", "jobs.search", str(config_file)]
    environment = {name: value for name, value in os.environ.items() if name != "RAY_ADDRESS"}
    with (folder / "driver.log").open("ab") as log:
        return subprocess.Popen(
            command, cwd=Path(__file__).parents[3], stdout=log, stderr=log, env=environment, start_new_session=True
        )


def kill(driver: subprocess.Popen[bytes]) -> None:
    """Kill the driver alone; Ray's processes see that it is gone."""
    with suppress(ProcessLookupError):  # on a busy machine it may have come to its end
        os.kill(driver.pid, signal.SIGKILL)
    driver.wait()


def kill_and_go_on(large: Path, folder: Path, moments: list[int], trials: int) -> None:
    """Kill the driver when so many epochs have been logged in all, then let the search come to its end."""
    import tomli_w

    config = make_search(folder, large, trials=trials, base={"training": {"epochs": EPOCHS}}, max_concurrent=2)
    file, study_dir = folder / "search.toml", Path(config.runs_dir) / config.name
    tree = json.loads(config.model_dump_json(exclude_none=True, exclude_unset=True))
    file.write_text(tomli_w.dumps(tree))

    def epochs() -> int:
        files = study_dir.glob("trials/*/tracking/metrics.jsonl")
        return sum(line.count("val/loss") for file in files for line in file.read_text().splitlines())

    finished: dict[int, object] = {}
    best: list[float] = []
    for moment in moments:
        driver = start(file, folder)
        wait_for(lambda moment=moment: epochs() >= moment or driver.poll() is not None)  # noqa: B023
        kill(driver)
        now = {trial.number: trial for trial in trials_of(study_dir)}
        assert all(now[number] == trial for number, trial in finished.items()), "a finished trial stays as it was"
        finished = {number: trial for number, trial in now.items() if trial.result is not None}
        best.append(min((t.result.figures["imputation"] for t in finished.values()), default=float("inf")))
    driver = start(file, folder)
    assert driver.wait(400) == 0, (folder / "driver.log").read_text()[-2000:]
    ended = trials_of(study_dir)
    assert [trial.number for trial in ended] == list(range(trials)), "the budget, exactly"
    assert all(trial.result is not None and trial.result.status == "complete" for trial in ended)
    assert all(ended[number] == trial for number, trial in finished.items())
    best.append(min(t.result.figures["imputation"] for t in ended if t.result))
    assert best == sorted(best, reverse=True), "the best never gets worse"
    for trial in ended:
        lines = [json.loads(line) for line in (trial.folder / "tracking" / "metrics.jsonl").read_text().splitlines()]
        steps = [line["step"] for line in lines if "val/loss" in line.get("metrics", {})]
        assert len(steps) == len(set(steps)) == EPOCHS, "every epoch once"
    client = MlflowClient(str(config.base.tracking.uri))
    (experiment,) = [e for e in client.search_experiments() if e.name == "dmvae"]
    runs = client.search_runs([experiment.experiment_id])
    assert len(runs) == trials + 1
    assert {run.info.status for run in runs} == {"FINISHED"}


def test_a_killed_search_goes_on_with_every_trial(large: Path, tmp_path: Path) -> None:
    kill_and_go_on(large, tmp_path, [8], trials=2)


@pytest.mark.acceptance
def test_a_search_killed_five_times_ends_as_if_it_had_not(large: Path, tmp_path: Path) -> None:
    kill_and_go_on(large, tmp_path, [10, 50, 90, 120, 150], trials=8)


@pytest.mark.acceptance
def test_trials_of_two_workers_end_on_two_cpus_with_some_stopped(large: Path, tmp_path: Path) -> None:
    base = {"training": {"epochs": 3}}
    config = make_search(tmp_path, large, scheduler="asha", grace_epochs=1, base=base, workers_per_trial=2)
    found = search(config, quiet)
    assert len(found.trials) == 4
    assert {trial.result.status for trial in found.trials if trial.result} == {"complete", "stopped"}


def test_a_trial_that_fails_is_recorded_and_the_study_goes_on(large: Path, tmp_path: Path) -> None:
    rates = {"optim.learning_rate": {"values": [0.01, 1e300]}}
    config = make_search(
        tmp_path, large, space=rates, trials=2, start_from=[{"optim.learning_rate": r} for r in (1e300, 0.01)]
    )
    found = search(config, quiet)
    failed, best = (trial.result for trial in found.trials)
    assert failed is not None
    assert best is not None
    assert failed.status == "failed"
    assert "Loss became non-finite at epoch 1" in failed.reason
    assert best.status == "complete"
    assert [trial.number for trial in found.best] == [1]
    client = MlflowClient(found.tracking_uri)
    child = client.get_run(failed.run_id)
    assert child.info.status == "FAILED"
    assert child.data.tags["mlflow.parentRunId"] == found.run_id
    hopeless = make_search(tmp_path, large, "hopeless", space={"optim.learning_rate": {"values": [1e300]}}, trials=1)
    with pytest.raises(RunError, match="No trial out of 1 finished"):
        search(hopeless, quiet)
    greedy = make_search(tmp_path, large, "greedy", max_concurrent=99)
    with pytest.raises(RunError, match="max_concurrent=99 does not fit"):
        search(greedy, quiet)
    assert not (tmp_path / "runs" / "greedy").exists()
