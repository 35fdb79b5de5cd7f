"""What may change when a run or a study resumes, and what the refusal says."""

import json
from pathlib import Path
from typing import Any

import pytest

from dmvae.config.training import TrainConfig
from dmvae.platform.errors import RunError
from dmvae.platform.resume import ResumeRules, default_of, flatten

RULES = ResumeRules("run", TrainConfig, ("optim.clip_norm", "training.checkpoint_*", "workers.*"), ("training.epochs",))
BEFORE: dict[str, Any] = {
    "optim": {"clip_norm": None, "learning_rate": 0.1},
    "training": {"epochs": 5, "checkpoint_steps": 10},
    "workers": {},
    "name": "one",
    "dataset": {"fingerprint": "f"},
}


def check(folder: Path, **now: Any) -> None:
    (folder / "run.json").write_text(json.dumps(BEFORE))
    RULES.check(folder / "run.json", {**BEFORE, **now}, "runs/one")


def test_settings_that_may_change_or_grow_do_not_stop_a_run(tmp_path: Path) -> None:
    check(tmp_path, optim={"clip_norm": 3.0, "learning_rate": 0.1}, workers={"num": 4})
    check(tmp_path, training={"epochs": 6, "checkpoint_steps": None})


def test_without_a_record_every_setting_is_allowed(tmp_path: Path) -> None:
    RULES.check(tmp_path / "run.json", BEFORE, "runs/one")


@pytest.mark.parametrize(
    ("now", "line"),
    [
        ({"training": {"epochs": 4, "checkpoint_steps": 10}}, "  training.epochs: 5 in the run, 4 requested"),
        (
            {"optim": {"clip_norm": None, "learning_rate": 0.2}},
            "  optim.learning_rate: 0.1 in the run, 0.2 requested",
        ),
        ({"seed": 3}, "  seed: 0 in the run, 3 requested"),
    ],
)
def test_a_refusal_names_what_differs_and_every_setting_that_may(
    now: dict[str, Any], line: str, tmp_path: Path
) -> None:
    with pytest.raises(RunError) as refusal:
        check(tmp_path, **now)
    text = str(refusal.value)
    assert text.splitlines()[0] == "Cannot resume the run at runs/one with other settings:"
    assert text.splitlines()[1:-1] == [line]
    assert all(setting in text.splitlines()[-1] for setting in (*RULES.may_change, *RULES.may_grow))


def test_settings_are_flattened_and_empty_sections_are_values() -> None:
    assert flatten({"optim": {"learning_rate": 1e-3}, "a": {"b": None, "c": {}}, "d": (1, 2)}) == {
        "optim.learning_rate": 1e-3,
        "a.b": None,
        "a.c": {},
        "d": (1, 2),
    }


def test_a_setting_that_a_record_lacks_has_its_default() -> None:
    assert default_of(TrainConfig, "data.unit") == "batch"
    assert default_of(TrainConfig, "name") is None
    assert default_of(TrainConfig, "optim.freeze") == ()
    assert default_of(TrainConfig, "no.such.setting") is None
