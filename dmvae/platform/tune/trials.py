"""Run the trials of a study with Ray Tune: Optuna proposes them, a callback writes down how they end."""

import itertools
import logging
import os
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import optuna
from optuna.storages import InMemoryStorage
from ray import tune
from ray.tune.schedulers import ASHAScheduler, MedianStoppingRule, TrialScheduler
from ray.tune.search.optuna import OptunaSearch

from dmvae.config.search import SearchConfig
from dmvae.data.progress import Progress
from dmvae.platform.tracking.outbox import Outbox
from dmvae.platform.tracking.tracked_run import TrackedRun
from dmvae.platform.tune import study
from dmvae.platform.tune.study import Trial, TrialResult
from dmvae.platform.tune.trial import EPOCH, TRIAL, TrialTask, run_trial, value_names

_RETRIES = 2  # of a trial whose process or node is lost; a trial that failed by itself is not tried again


def run_trials(
    task: TrialTask, concurrent: int, tracked: TrackedRun, earlier: list[Trial], progress: Callable[[str], None]
) -> None:
    """Run the trials that are missing or unfinished, up to the budget.

    Raises:
        KeyboardInterrupt: if the search was interrupted before its last trial ended.
    """
    config, known = task.config, study.trials_of(task.study_dir)
    study.check_trials(config, known)
    unfinished = [trial for trial in known if trial.result is None]
    todo = len(unfinished) + max(0, config.trials - len(known))
    if known:
        progress(
            f"study {config.name}: {len(known) - len(unfinished)} trials finished, {len(unfinished)} to resume, "
            f"{max(0, config.trials - len(known))} new"
        )
    if todo == 0:
        return
    progress(f"study {config.name}: {config.trials} trials, {concurrent} at a time, on {', '.join(config.objectives)}")
    storage = task.study_dir / ".tune"
    shutil.rmtree(storage, ignore_errors=True)
    with _quiet(), Outbox(tracked) as outbox:
        watcher = _Watcher(task, outbox, progress, known, todo)
        tuner = tune.Tuner(
            tune.with_resources(tune.with_parameters(run_trial, task=task), _resources_of(config)),
            tune_config=tune.TuneConfig(
                search_alg=_searcher(task, known, earlier),
                scheduler=_scheduler(config),
                num_samples=todo,
                max_concurrent_trials=concurrent,
                reuse_actors=config.base.workers.num == 1,
            ),
            run_config=tune.RunConfig(
                name=config.name,
                storage_path=str(storage),
                failure_config=tune.FailureConfig(max_failures=_RETRIES),
                callbacks=[watcher],
                verbose=0,
            ),
        )
        try:
            tuner.fit()
        except SystemExit:  # how Ray ends a driver that was interrupted
            raise KeyboardInterrupt from None
    shutil.rmtree(storage, ignore_errors=True)
    left = [trial.number for trial in study.trials_of(task.study_dir) if trial.result is None]
    if left:
        raise KeyboardInterrupt  # Tune returns normally when it is interrupted


def _resources_of(config: SearchConfig) -> Any:
    workers = config.base.workers
    if workers.num > 1:  # its workers hold the resources; Ray refuses a trial that asks for nothing
        return {"CPU": 0, "node:__internal_head__": 0.001}
    return {"CPU": workers.cpus, "GPU": config.gpus_per_trial}


def _searcher(task: TrialTask, known: list[Trial], earlier: list[Trial]) -> OptunaSearch:
    """Return Optuna with every known trial added, in the order of their numbers; new ones get the free numbers.

    A trial that was drawn and has no result yet is enqueued with the same parameters; it resumes in its folder.
    """
    config, storage = task.config, InMemoryStorage()
    # trials of an earlier study come first and take numbers: `offset` keeps this study's numbers starting at 0
    told = optuna.create_study(storage=storage, study_name=config.name, directions=study.directions(config))
    for trial in earlier:
        told.add_trials(list(study.frozen_trials(config, [trial])))
    offset = len(told.trials)
    for trial in known:
        if trial.result is not None:
            told.add_trials(list(study.frozen_trials(config, [trial])))
        else:
            told.enqueue_trial(study.encoded(config, trial.params))
    free = list(itertools.islice(study.free_numbers(known), config.trials))
    for number in free:
        if number < len(config.start_from):
            told.enqueue_trial(study.encoded(config, config.start_from[number]))
    numbers = tuple([trial.number for trial in known] + free)
    names = value_names(config)
    several = config.is_multiple
    return OptunaSearch(
        space=partial(_propose, config=config, study_dir=task.study_dir, offset=offset, numbers=numbers),
        metric=names if several else names[0],
        mode=["min"] * len(names) if several else "min",
        sampler=study.sampler(config, len(known)),
        study_name=config.name,
        storage=storage,
    )


def _propose(
    trial: Any, config: SearchConfig, study_dir: Path, offset: int, numbers: tuple[int, ...]
) -> dict[str, Any]:
    """Let Optuna draw a trial's parameters, and write them to disk before the trial starts."""
    number = numbers[trial.number - offset]
    study.write_params(study_dir, number, study.draw(trial, config))
    return {TRIAL: number}


def _scheduler(config: SearchConfig) -> TrialScheduler | None:
    epochs = config.base.training.epochs
    grace = config.grace_epochs or max(1, epochs // 4)
    metric: Any = {"metric": value_names(config)[0], "mode": "min", "time_attr": EPOCH}
    if config.scheduler == "asha":
        return ASHAScheduler(max_t=epochs, grace_period=grace, reduction_factor=config.reduction, **metric)
    return MedianStoppingRule(grace_period=grace, **metric) if config.scheduler == "median" else None


class _Watcher(tune.Callback):
    """Record how each trial ends: in its folder, on the console and in the study's MLflow run."""

    def __init__(self, task: TrialTask, outbox: Any, log: Callable[[str], None], known: list[Trial], todo: int) -> None:
        self._task, self._outbox, self._log = task, outbox, log
        self._todo, self._done = todo, 0
        self._progress = Progress(log, "trial", todo, "trials")
        self._logged = len([trial for trial in known if trial.result is not None])

    def __getstate__(self) -> dict[str, Any]:
        """Return nothing: Tune pickles its callbacks into a state file, which is never read back."""
        return {}

    def on_trial_complete(self, iteration: int, trials: list[Any], trial: Any, **info: Any) -> None:
        """Record a trial that ended, or that the scheduler stopped."""
        last = trial.last_result or {}
        metrics = {k: v for k, v in last.items() if isinstance(v, float) and self._is_metric(k)}
        reason = f"stopped early by {self._task.config.scheduler} after {int(last.get(EPOCH, 0))} epochs"
        self._end(trial, TrialResult("stopped", int(last.get(EPOCH, 0)), metrics, reason))

    def on_trial_error(self, iteration: int, trials: list[Any], trial: Any, **info: Any) -> None:
        """Record a trial that failed, or whose process was lost for good."""
        self._end(trial, TrialResult("failed", 0, {}, f"its process died {_RETRIES + 1} times without a result"))

    def _end(self, trial: Any, otherwise: TrialResult) -> None:
        folder = self._task.study_dir / "trials" / f"{int(trial.config[TRIAL]):04d}"
        if not (folder / study.RESULT).is_file():
            study.write_result(folder, otherwise)
        self._done += 1
        trials = study.trials_of(self._task.study_dir)
        ended = next(t for t in trials if t.folder == folder)
        best = study.best_trials(self._task.config, trials)
        self._log(
            _line(
                self._task.config,
                ended,
                best,
                f"{self._done}/{self._todo} done, {self._progress.time_left(self._done)}",
            )
        )
        self._logged += 1
        if best and best[0].result is not None:
            metrics = {f"best/{name}": value for name, value in best[0].result.figures.items()}
            self._outbox.log_metrics(
                {**metrics, "trials/done": self._logged, "best/trial": best[0].number}, self._logged
            )

    def _is_metric(self, name: str) -> bool:
        stem = name.partition("/")[0].removesuffix("_se")
        return stem in (*self._task.config.objectives, "seconds_per_step", "parameters", "joint_nll")


def _line(config: SearchConfig, trial: Trial, best: list[Trial], left: str) -> str:
    assert trial.result is not None
    metrics = trial.result.figures
    shown = "  ".join(
        f"{name} {metrics[name]:.4g} ± {metrics.get(f'{name}_se', 0.0):.2g}"
        for name in config.objectives
        if name in metrics
    )
    settings = " ".join(f"{path.rpartition('.')[2]}={_short(value)}" for path, value in trial.params.items())
    mark = "*" if trial.number in [one.number for one in best] else " "
    ending = "" if trial.result.status == "complete" else f"  [{trial.result.status}: {trial.result.reason}]"
    return f"trial {trial.number:>3}{mark} {shown}  {settings}{ending}  ({left})"


def _short(value: Any) -> str:
    return f"{value:.3g}" if isinstance(value, float) else str(value)


@contextmanager
def _quiet() -> Iterator[None]:
    """Keep Tune from writing unused log files, and from rejecting reports without the objective."""
    wanted = {
        "TUNE_DISABLE_AUTO_CALLBACK_LOGGERS": "1",
        "TUNE_DISABLE_STRICT_METRIC_CHECKING": "1",
        "RAY_CHDIR_TO_TRIAL_DIR": "0",
        "RAY_AIR_NEW_OUTPUT": "0",
        "TUNE_FUNCTION_THREAD_TIMEOUT_S": "20",
    }
    before = {name: os.environ.get(name) for name in wanted}
    os.environ.update(wanted)
    levels = {name: logging.getLogger(name).level for name in ("ray.tune", "optuna")}
    for name in levels:
        logging.getLogger(name).setLevel(logging.ERROR)
    try:
        yield
    finally:
        for name, level in levels.items():
            logging.getLogger(name).setLevel(level)
        for name, value in before.items():
            os.environ.pop(name, None) if value is None else os.environ.update({name: value})
