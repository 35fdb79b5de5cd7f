"""A study on disk: each trial's parameters and result. These files are the study's only state.

    study.json               the search configuration and the dataset's fingerprint
    trials/0000/params.json  written when the trial is drawn
    trials/0000/result.json  written last, when the trial has ended
    trials/0000/checkpoint/, best/, tracking/

A search that is killed at any moment is rebuilt from them: the sampler is given the trials with a result, and those
without are resumed from their checkpoints. No pickle is read.
"""

import dataclasses
import itertools
import json
import math
import re
from collections.abc import Iterator, Mapping
from dataclasses import asdict, field
from pathlib import Path
from typing import Annotated, Any, Literal

import optuna
from optuna.distributions import BaseDistribution, CategoricalDistribution, FloatDistribution, IntDistribution
from optuna.study import StudyDirection
from optuna.trial import FrozenTrial, TrialState, create_trial
from pydantic import ConfigDict, Field
from pydantic.dataclasses import dataclass

from dmvae.config.model import Value
from dmvae.config.search import Domain, SearchConfig
from dmvae.data.files import write_atomically
from dmvae.data.records import read_record
from dmvae.evaluation.search_objectives import compared_error, compared_values
from dmvae.platform.errors import RunError
from dmvae.platform.tracking.tracked_run import read_run_record

Status = Literal["complete", "stopped", "infeasible", "failed"]
PARAMS, RESULT = "params.json", "result.json"
_REMEDY = "Restore it, or remove the trial's folder: its number is then drawn again."


@dataclass(frozen=True, config=ConfigDict(extra="forbid"))
class TrialResult:
    """How a trial ended.

    Attributes:
        status: `complete`; `stopped` early by the scheduler; `infeasible`, beyond a limit; or `failed`.
        epochs: number of epochs trained.
        figures: the objectives and other metrics, each with its standard error as `NAME_se`.
        reason: why, for any status but `complete`.
        run_id: id of its MLflow run.
        seconds: duration of training and evaluation.
    """

    status: Status
    epochs: Annotated[int, Field(ge=0)] = 0
    figures: dict[str, float] = field(default_factory=dict)
    reason: str = ""
    run_id: str = ""
    seconds: float = 0.0


@dataclasses.dataclass(frozen=True)
class Trial:
    """One trial: `params` are JSON values by setting, `result` is None until the trial has ended."""

    number: int
    folder: Path
    params: dict[str, Value]
    result: TrialResult | None

    @property
    def is_candidate(self) -> bool:
        """Whether it may be the best trial: trained to the end, and within the limits."""
        return self.result is not None and self.result.status == "complete"


def trials_of(study_dir: Path) -> list[Trial]:
    """Read the trials of a study, in the order in which they were drawn."""
    folders = [folder for folder in (study_dir / "trials").glob("[0-9]*") if _is_trial(folder)]
    folders.sort(key=lambda folder: int(folder.name))
    return [Trial(int(folder.name), folder, read_params(folder), read_result(folder)) for folder in folders]


def read_params(folder: Path) -> dict[str, Value]:
    """Read the parameters of a trial.

    Raises:
        RecordError: if they are not valid.
        RunError: if they are missing.
    """
    found: dict[str, Value] | None = read_record(folder / PARAMS, dict[str, Any], _REMEDY)
    if found is None:
        raise RunError(f"{folder} has no {PARAMS}. {_REMEDY}")
    return found


def read_result(folder: Path) -> TrialResult | None:
    """Read the result of a trial; None if it has not ended.

    Raises:
        RecordError: if it is not valid.
    """
    found: TrialResult | None = read_record(folder / RESULT, TrialResult, _REMEDY)
    return found


def _is_trial(folder: Path) -> bool:
    """Return whether a trial was drawn into a folder; a kill may leave an empty one.

    Raises:
        RunError: if the folder is not named after a trial, as a copy of one is not.
    """
    if not re.fullmatch(r"\d{4}|[1-9]\d{4,}", folder.name) or not folder.is_dir():
        raise RunError(f"{folder} is not a trial's folder, but a copy or a file. Move it out of the study.")
    return any(not entry.name.startswith(".") for entry in folder.iterdir())


def check_trials(config: SearchConfig, trials: list[Trial]) -> None:
    """Check that trials on disk are trials of this study, and each of them once.

    Raises:
        RunError: naming the folder at fault.
    """
    seen: dict[str, Trial] = {}
    for trial in trials:
        unknown = sorted(trial.params.keys() - config.space.keys())
        if unknown:
            raise RunError(f"{trial.folder / PARAMS} has parameters outside the space: {unknown}. {_REMEDY}")
        try:
            known = {path: distribution(config.space[path]) for path in trial.params}
            create_trial(state=TrialState.RUNNING, params=encoded(config, trial.params), distributions=known)
        except (ValueError, TypeError) as error:
            raise RunError(f"{trial.folder / PARAMS} does not fit the space: {error}. {_REMEDY}") from None
        record = read_run_record(trial.folder / "tracking")
        if record is not None and record.run_id in seen:
            raise RunError(
                f"{trial.folder} and {seen[record.run_id].folder} are the same trial (MLflow run {record.run_id}): one "
                "is a copy. Remove the copy."
            )
        if record is not None:
            seen[record.run_id] = trial


def free_numbers(trials: list[Trial]) -> Iterator[int]:
    """Yield the numbers that no trial has, from 0 on: one whose folder was removed is drawn again."""
    taken = {trial.number for trial in trials}
    return (number for number in itertools.count() if number not in taken)


def write_params(study_dir: Path, number: int, params: Mapping[str, Value]) -> Path:
    """Write a trial's parameters, unless they are there already; return the trial's folder."""
    folder = study_dir / "trials" / f"{number:04d}"
    if not (folder / PARAMS).is_file():
        folder.mkdir(parents=True, exist_ok=True)
        write_atomically(folder / PARAMS, json.dumps(params, indent=2) + "\n")
    return folder


def write_result(folder: Path, result: TrialResult) -> None:
    """Write a trial's result."""
    write_atomically(folder / RESULT, json.dumps(asdict(result), indent=2) + "\n")


def best_trials(config: SearchConfig, trials: list[Trial]) -> list[Trial]:
    """Return the best trial, or with several objectives the Pareto front; of equals, the earlier trial.

    Of trials within one standard error of the best value, the best is the one with the lowest joint NLL, if the
    objectives come with one.
    """
    candidates = [
        (compared_values(config, t.result.figures), t) for t in trials if t.result is not None and t.is_candidate
    ]
    candidates = [(values, trial) for values, trial in candidates if all(map(math.isfinite, values))]
    front: list[tuple[tuple[float, ...], Trial]] = []
    for values, trial in sorted(candidates, key=lambda pair: (pair[0], pair[1].number)):
        if not any(all(a <= b for a, b in zip(other, values, strict=True)) for other, _ in front):
            front.append((values, trial))
    best = [trial for _, trial in front]
    return best if config.is_multiple or not best else [_lowest_nll(config, best[0], candidates)]


def _lowest_nll(config: SearchConfig, best: Trial, candidates: list[tuple[tuple[float, ...], Trial]]) -> Trial:
    """Return the trial of the lowest joint NLL among those within one standard error of the best."""
    assert best.result is not None
    limit = compared_values(config, best.result.figures)[0] + compared_error(config, best.result.figures)
    close = [
        (trial.result.figures["joint_nll"], trial.number, trial)
        for (value,), trial in candidates
        if value <= limit and trial.result is not None and "joint_nll" in trial.result.figures
    ]
    return min(close)[-1] if close else best


def distribution(domain: Domain) -> BaseDistribution:
    """Return Optuna's distribution of a domain; lists and tables are encoded as JSON."""
    if domain.values is not None:
        return CategoricalDistribution([_encode(value) for value in domain.values])
    assert domain.low is not None
    assert domain.high is not None
    if domain.is_whole:
        return IntDistribution(int(domain.low), int(domain.high), domain.log, int(domain.step or 1))
    return FloatDistribution(float(domain.low), float(domain.high), domain.log, domain.step)


def draw(trial: Any, config: SearchConfig) -> dict[str, Value]:
    """Let Optuna suggest a value for every active setting, in the order of the space."""
    chosen: dict[str, Value] = {}
    for path, domain in config.space.items():
        if not config.is_active(path, chosen):
            continue
        if domain.values is not None:
            place = trial.suggest_categorical(path, [_encode(value) for value in domain.values])
            chosen[path] = next(value for value in domain.values if _encode(value) == place)
        elif domain.is_whole:
            step = {} if domain.step is None else {"step": domain.step}
            chosen[path] = trial.suggest_int(path, domain.low, domain.high, log=domain.log, **step)
        else:
            chosen[path] = trial.suggest_float(path, domain.low, domain.high, log=domain.log, step=domain.step)
    return chosen


def encoded(config: SearchConfig, params: Mapping[str, Value]) -> dict[str, Any]:
    """Return a trial's parameters as Optuna stores them."""
    return {path: _encode(v) if config.space[path].values is not None else v for path, v in params.items()}


def frozen_trials(config: SearchConfig, trials: list[Trial]) -> Iterator[FrozenTrial]:
    """Yield finished trials as Optuna's frozen trials."""
    for trial in trials:
        result = trial.result
        if result is None:
            continue
        values = _values(config, result)
        # a trial that was stopped early keeps the value it had reached, as Ray Tune reports it
        state = TrialState.COMPLETE if values is not None else TrialState.FAIL
        yield create_trial(
            state=state,
            values=values,
            params=encoded(config, trial.params),
            distributions={path: distribution(config.space[path]) for path in trial.params},
            user_attrs={"status": result.status, "reason": result.reason, "epochs": result.epochs, **result.figures},
        )


def _values(config: SearchConfig, result: TrialResult) -> list[float] | None:
    if result.status not in ("complete", "stopped") or not set(config.objectives) <= result.figures.keys():
        return None
    values = list(compared_values(config, result.figures))
    return values if all(map(math.isfinite, values)) else None


def sampler(config: SearchConfig, num_known: int) -> optuna.samplers.BaseSampler:
    """Return the sampler; its seed depends on the number of known trials, or a restart would repeat its draws."""
    seed = (config.seed * 1_000_003 + num_known) % 2**32
    if config.sampler == "tpe":
        return optuna.samplers.TPESampler(n_startup_trials=config.startup_trials, constant_liar=True, seed=seed)
    if config.sampler == "gp":
        return optuna.samplers.GPSampler(n_startup_trials=config.startup_trials, seed=seed)
    if config.sampler == "nsga2":
        return optuna.samplers.NSGAIISampler(seed=seed)
    return optuna.samplers.RandomSampler(seed=seed)


def directions(config: SearchConfig) -> list[StudyDirection]:
    """Return the directions: all are minimised, since `compared_values` negates what is maximised."""
    return [StudyDirection.MINIMIZE] * (len(config.objectives) if config.is_multiple else 1)


def export(config: SearchConfig, trials: list[Trial], file: Path) -> optuna.Study:
    """Write a study to an SQLite file for Optuna's dashboard; return the study."""
    file.unlink(missing_ok=True)
    study = optuna.create_study(study_name=config.name, storage=f"sqlite:///{file}", directions=directions(config))
    study.add_trials(list(frozen_trials(config, trials)))
    return study


def _encode(value: Value) -> str | int | float | bool | None:
    return json.dumps(value) if isinstance(value, list | dict) else value
