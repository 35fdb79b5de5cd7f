"""Studies whose folders were removed, copied or damaged: numbers stay unique, and messages name the folder."""

import json
import shutil
from itertools import islice
from pathlib import Path

import pytest

from dmvae.config.search import SearchConfig
from dmvae.data.records import RecordError
from dmvae.platform.errors import RunError
from dmvae.platform.tune.study import (
    TrialResult,
    check_trials,
    free_numbers,
    trials_of,
    write_params,
    write_result,
)

CONFIG = SearchConfig.model_validate(
    {
        "name": "s",
        "trials": 5,
        "base": {"name": "s", "data": {"dataset": "d"}},
        "space": {"optim.learning_rate": {"low": 1e-4, "high": 1e-2, "log": True}},
        "objectives": ["imputation"],
    }
)


@pytest.fixture
def study(tmp_path: Path) -> Path:
    """A study of four trials, the last of which has not ended."""
    for number in range(4):
        folder = write_params(tmp_path, number, {"optim.learning_rate": 1e-3})
        (folder / "tracking").mkdir()
        (folder / "tracking" / "mlflow.json").write_text(json.dumps({"run_id": f"run{number}", "uri": "x"}))
        if number < 3:
            write_result(folder, TrialResult("complete", 2, {"imputation": float("nan")}, "", f"run{number}", 1.0))
    return tmp_path


def test_the_number_of_a_removed_trial_is_drawn_again_and_no_other_twice(study: Path) -> None:
    shutil.rmtree(study / "trials" / "0001")
    known = trials_of(study)
    check_trials(CONFIG, known)
    assert [trial.number for trial in known] == [0, 2, 3]
    assert list(islice(free_numbers(known), 3)) == [1, 4, 5]


@pytest.mark.parametrize("name", ["0001-copy", "1", "00001", "0001 (copy)"])
def test_a_copied_folder_is_named(name: str, study: Path) -> None:
    shutil.copytree(study / "trials" / "0001", study / "trials" / name)
    with pytest.raises(RunError, match=r"trials/.*is not a trial's folder"):
        trials_of(study)


def test_a_copy_under_a_free_number_is_named(study: Path) -> None:
    shutil.copytree(study / "trials" / "0001", study / "trials" / "0004")
    with pytest.raises(RunError, match=r"0004 and .*0001 are the same trial"):
        check_trials(CONFIG, trials_of(study))


@pytest.mark.parametrize("file", ["params.json", "result.json"])
@pytest.mark.parametrize("content", ["", "[]", "null", "[" * 20_000, '{"version": 3}', '{"x": 1}'])
def test_a_damaged_file_is_named(file: str, content: str, study: Path) -> None:
    (study / "trials" / "0002" / file).write_text(content)
    with pytest.raises((RecordError, RunError), match=rf"0002/{file}"):
        check_trials(CONFIG, trials_of(study))


def test_a_trial_without_parameters_is_named_but_an_empty_folder_is_not(study: Path) -> None:
    (study / "trials" / "0004").mkdir()
    assert len(trials_of(study)) == 4
    (study / "trials" / "0001" / "params.json").unlink()
    with pytest.raises(RunError, match=r"0001 has no params\.json"):
        trials_of(study)


def test_a_value_outside_the_space_is_named(study: Path) -> None:
    (study / "trials" / "0003" / "params.json").write_text('{"optim.learning_rate": 7.0}')
    with pytest.raises(RunError, match=r"0003/params\.json does not fit the space"):
        check_trials(CONFIG, trials_of(study))
