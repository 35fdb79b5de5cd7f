"""A search configuration to the best model that a budget finds: Ray Tune runs the trials, Optuna proposes them."""

import json
import logging
import math
import os
import shutil
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import optuna
import tomli_w
from optuna.storages import InMemoryStorage
from pydantic import ValidationError
from ray import tune
from ray.tune.schedulers import ASHAScheduler, MedianStoppingRule, TrialScheduler
from ray.tune.search.optuna import OptunaSearch

from dmvae.config.search import Domain, SearchConfig, lay_over
from dmvae.config.training import TrainConfig
from dmvae.data.files import write_atomically
from dmvae.data.reading.dataset import Dataset, open_dataset
from dmvae.evaluation import search_objectives as merit
from dmvae.platform.cluster import limits, local_cluster, messages, resources
from dmvae.platform.tracking.outbox import TrackedRun
from dmvae.platform.tracking.runs import open_run, sync, tracking_uri
from dmvae.platform.train.trainer import (
    RunError,
    TrainSummary,
    absolute,
    dataset_record,
    default_of,
    leaves,
    resolve,
    train_run,
)
from dmvae.platform.tune import study
from dmvae.platform.tune.study import Trial, TrialResult
from dmvae.platform.tune.trial import EPOCH, TRIAL, TrialTask, run_trial, value_names

_STUDY = "study.json"
_BEST_TOML = "best.toml"
_CHECKED_POINTS = 16
_RETRIES = 2  # of a trial whose process or node is lost; what the trial itself did wrong is not tried again
# what may change while a study goes on: it alters no trial's result
_MAY_CHANGE = ("trials", "max_concurrent", "retrain.", "runs_dir", "gpus_per_trial", "base.tracking.", "earlier_study")


@dataclass(frozen=True)
class SearchSummary:
    """What a search found.

    Attributes:
        study_dir: its folder.
        trials: all of them, in the order in which they were drawn.
        best: the best trial, or those of the Pareto front.
        retrained: the run of the best configuration, if one was asked for.
        run_id: of the study's MLflow run.
        tracking_uri: where that is.
    """

    study_dir: Path
    trials: list[Trial]
    best: list[Trial]
    retrained: TrainSummary | None
    run_id: str
    tracking_uri: str


def search(config: SearchConfig, progress: Callable[[str], None]) -> SearchSummary:
    """Run, or go on with, the study that `config` describes; train its best configuration; record all of it.

    Raises:
        RunError: if the folder belongs to another study, there is too little room for a trial, or every trial failed.
        ValueError: if the space leads to configurations that cannot be, or the data cannot give an objective.
        TrackingError: if MLflow cannot be reached.
    """
    optuna.logging.set_verbosity(optuna.logging.WARNING)
    dataset = open_dataset(config.base.data.dataset)
    check_space(config, dataset)
    data = config.base.data
    merit.check(dataset, data.train_split, data.val_split, config.objectives, config.judged_rows)
    study_dir = Path(config.runs_dir, config.name).absolute()
    record = {**config.model_dump(mode="json"), "dataset": {"fingerprint": dataset.manifest.fingerprint}}
    _check_same_study(study_dir, record)
    earlier = _earlier(config)
    placed = config.model_copy(update={"base": _placed(config)})
    num = max(config.workers_per_trial, config.retrain.workers or config.base.workers.num)
    with local_cluster(math.ceil(num * config.base.workers.cpus)):
        concurrent = max_concurrent(placed)
        study_dir.mkdir(parents=True, exist_ok=True)
        with open_run(
            config.base.tracking,
            config.name,
            study_dir / "tracking",
            record,
            {"kind": "search"},
            dataset_record(config.base, dataset),
        ) as tracked:
            write_atomically(study_dir / _STUDY, json.dumps(record, indent=2) + "\n")
            with messages(progress) as queue:
                task = TrialTask(placed, study_dir, tracked.run_id, queue)
                _run_trials(task, concurrent, tracked, earlier, progress)
            trials = study.trials_of(study_dir)
            sync(study_dir / "trials")
            best = study.best_trials(config, trials)
            if not best:
                raise RunError(_why_none(trials, study_dir))
            _write_best(config, best[0], dataset, study_dir)
            _record_study(config, trials, best, study_dir, tracked, progress)
            retrained = _retrain(config, best[0], study_dir, dataset, tracked, progress)
    return SearchSummary(study_dir, trials, best, retrained, tracked.run_id, tracking_uri(config.base.tracking))


def check_space(config: SearchConfig, dataset: Dataset) -> None:
    """Check that trials can be: every setting's extremes, and points drawn at random, make a whole configuration.

    Raises:
        ValueError: naming the setting, its value and what is wrong with it.
    """
    modalities = tuple(dataset.manifest.modalities)

    def try_out(chosen: dict[str, Any]) -> None:
        try:
            resolve(lay_over(config.base, chosen, "trial", modalities), dataset)
        except ValidationError as error:
            first = error.errors(include_url=False)[0]
            path = ".".join(map(str, first["loc"]))
            law = "there is no such setting" if first["type"] == "extra_forbidden" else first["msg"]
            raise ValueError(f"space: {path}: {law.removeprefix('Value error, ')} (tried {chosen})") from None
        except ValueError as error:
            raise ValueError(f"space: {error} (tried {chosen})") from None

    for path, domain in config.space.items():
        for value in domain.extremes:
            try_out({**domain.when, path: value})
    sampled = optuna.create_study(sampler=optuna.samplers.RandomSampler(seed=config.seed))
    for _ in range(_CHECKED_POINTS):
        try_out(study.draw(sampled.ask(), config))
    for point in config.start_from:
        for path, value in point.items():
            domain = config.space[path]
            inside = value in domain.values if domain.values is not None else _is_between(domain, value)
            if not inside:
                raise ValueError(
                    f"start_from gives values of the space; {path!r} has no {value!r}. Change one of them."
                )


def _is_between(domain: Domain, value: Any) -> bool:
    assert domain.low is not None
    assert domain.high is not None
    is_number = isinstance(value, int | float) and not isinstance(value, bool)
    return is_number and domain.low <= value <= domain.high and (isinstance(value, int) or not domain.is_whole)


def _check_same_study(study_dir: Path, record: Mapping[str, Any]) -> None:
    """Refuse to go on with another study's folder, saying what differs."""
    file = study_dir / _STUDY
    if not file.is_file():
        return
    before, now = leaves(json.loads(file.read_text())), leaves(record)
    before |= {key: default_of(SearchConfig, key) for key in now.keys() - before.keys()}
    differing = [key for key in sorted(before.keys() | now.keys()) if before.get(key) != now.get(key)]
    refused = [key for key in differing if not key.startswith(_MAY_CHANGE)]
    if now["trials"] < before["trials"]:
        refused.append("trials")
    if refused:
        lines = "\n".join(f"  {key}: {before.get(key)!r} in the study, {now.get(key)!r} asked for" for key in refused)
        raise RunError(
            f"a study goes on with the settings that it began with (trials may grow; max_concurrent, retrain, "
            f"gpus_per_trial and tracking may change); {study_dir} differs:\n{lines}\nChange them back, or choose "
            "another name."
        )


def max_concurrent(config: SearchConfig) -> int:
    """Return how many trials run at a time: what is asked for, or what the cluster has room for.

    Raises:
        RunError: if it has no room for as many as asked, or for one.
    """
    workers, gpus = config.base.workers, config.gpus_per_trial
    cpus, there = workers.num * workers.cpus, limits()
    if workers.device == "auto" and not gpus:
        there["GPU"] = resources().get("GPU", 0.0)  # as in a run: nodes with GPUs are started where they are asked for
    if workers.num > 1 and workers.device != "cpu" and there.get("GPU", 0) >= workers.num:
        gpus = float(workers.num)
    room = there.get("CPU", 0) / cpus
    if gpus:
        room = min(room, there.get("GPU", 0) / gpus)
    room = int(min(room + 1e-9, max(config.trials, config.max_concurrent or 1)))
    wanted = config.max_concurrent or max(room, 1)
    if wanted > room:
        raise RunError(
            f"trials at a time have room on the cluster; got {wanted}, each of {cpus:g} CPUs and {gpus:g} GPUs, "
            f"on {there.get('CPU', 0):g} CPUs and {there.get('GPU', 0):g} GPUs, which take {room}. "
            "Lower max_concurrent or base.workers, or enlarge the cluster."
        )
    return wanted


def _run_trials(
    task: TrialTask, concurrent: int, tracked: TrackedRun, earlier: list[Trial], progress: Callable[[str], None]
) -> None:
    config, known = task.config, study.trials_of(task.study_dir)
    unfinished = [trial for trial in known if trial.result is None]
    todo = len(unfinished) + max(0, config.trials - len(known))
    if known:
        progress(
            f"study {config.name}: {len(known) - len(unfinished)} trials are done, {len(unfinished)} go on, "
            f"{max(0, config.trials - len(known))} are new"
        )
    if todo == 0:
        return
    progress(f"study {config.name}: {config.trials} trials, {concurrent} at a time, on {', '.join(config.objectives)}")
    storage = task.study_dir / ".tune"
    shutil.rmtree(storage, ignore_errors=True)
    with _quiet(), tracked.spool() as spool:
        watcher = _Watcher(task, spool, progress, known, todo, concurrent)
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
        raise KeyboardInterrupt  # Tune returns as if all were well when a person stops it


def _resources_of(config: SearchConfig) -> Any:
    workers = config.base.workers
    if workers.num > 1:  # its own workers have the resources; a demand of nothing at all is refused
        return {"CPU": 0, "node:__internal_head__": 0.001}
    return {"CPU": workers.cpus, "GPU": config.gpus_per_trial}


def _searcher(task: TrialTask, known: list[Trial], earlier: list[Trial]) -> OptunaSearch:
    """Return Optuna with all that is known told to it: trial i of the study is its trial i.

    A trial that was drawn and has no result yet is proposed again as it was; it goes on in its folder.
    """
    config, storage = task.config, InMemoryStorage()
    # earlier trials would take numbers: they stand at negative ones, in front of a study of their own
    told = optuna.create_study(storage=storage, study_name=config.name, directions=study.directions(config))
    for trial in earlier:
        told.add_trials(list(study.frozen_trials(config, [trial])))
    offset = len(told.trials)
    for trial in known:
        if trial.result is not None:
            told.add_trials(list(study.frozen_trials(config, [trial])))
        else:
            told.enqueue_trial(study.encoded(config, trial.params))
    for point in config.start_from[max(0, len(known)) :]:
        told.enqueue_trial(study.encoded(config, point))
    names = value_names(config)
    several = config.is_multiple
    return OptunaSearch(
        space=partial(_propose, config=config, study_dir=task.study_dir, offset=offset),
        metric=names if several else names[0],
        mode=["min"] * len(names) if several else "min",
        sampler=study.sampler(config, len(known)),
        study_name=config.name,
        storage=storage,
    )


def _propose(trial: Any, config: SearchConfig, study_dir: Path, offset: int) -> dict[str, Any]:
    """Have Optuna fill in a trial, and write it down before anything is done for it."""
    number = trial.number - offset
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
    """Writes down how trials end, and tells the person who waits and the study's MLflow run."""

    def __init__(
        self, task: TrialTask, spool: Any, say: Callable[[str], None], known: list[Trial], todo: int, concurrent: int
    ) -> None:
        self._task, self._spool, self._say = task, spool, say
        self._todo, self._done, self._concurrent = todo, 0, concurrent
        self._start, self._told = time.monotonic(), len([trial for trial in known if trial.result is not None])

    def __getstate__(self) -> dict[str, Any]:
        """Return nothing: Tune writes its callbacks down with a state of its own, which is never read back."""
        return {}

    def on_trial_complete(self, iteration: int, trials: list[Any], trial: Any, **info: Any) -> None:
        """A trial has come to its end, or the scheduler has stopped it."""
        last = trial.last_result or {}
        figures = {k: v for k, v in last.items() if isinstance(v, float) and self._is_figure(k)}
        reason = f"stopped early by {self._task.config.scheduler} after {int(last.get(EPOCH, 0))} epochs"
        self._end(trial, TrialResult("stopped", int(last.get(EPOCH, 0)), figures, reason))

    def on_trial_error(self, iteration: int, trials: list[Any], trial: Any, **info: Any) -> None:
        """A trial has failed, or its process is gone for good."""
        self._end(trial, TrialResult("failed", 0, {}, f"its process ended {_RETRIES + 1} times without a result"))

    def _end(self, trial: Any, otherwise: TrialResult) -> None:
        folder = self._task.study_dir / "trials" / f"{int(trial.config[TRIAL]):04d}"
        if not (folder / study.RESULT).is_file():
            study.write_result(folder, otherwise)
        self._done += 1
        trials = study.trials_of(self._task.study_dir)
        ended = next(t for t in trials if t.folder == folder)
        best = study.best_trials(self._task.config, trials)
        self._say(_line(self._task.config, ended, best, self._left()))
        self._told += 1
        if best and best[0].result is not None:
            figures = {f"best/{name}": value for name, value in best[0].result.figures.items()}
            self._spool.log({**figures, "trials/done": self._told, "best/trial": best[0].number}, self._told)

    def _is_figure(self, name: str) -> bool:
        stem = name.partition("/")[0].removesuffix("_se")
        return stem in (*self._task.config.objectives, "seconds_per_step", "parameters", "joint_nll")

    def _left(self) -> str:
        seconds = int((time.monotonic() - self._start) / self._done * (self._todo - self._done))
        return f"{self._done}/{self._todo} done, {seconds // 60}:{seconds % 60:02d} left"


def _line(config: SearchConfig, trial: Trial, best: list[Trial], left: str) -> str:
    assert trial.result is not None
    figures = trial.result.figures
    shown = "  ".join(
        f"{name} {figures[name]:.4g} ± {figures.get(f'{name}_se', 0.0):.2g}"
        for name in config.objectives
        if name in figures
    )
    settings = " ".join(f"{path.rpartition('.')[2]}={_short(value)}" for path, value in trial.params.items())
    mark = "*" if trial.number in [one.number for one in best] else " "
    ending = "" if trial.result.status == "complete" else f"  [{trial.result.status}: {trial.result.reason}]"
    return f"trial {trial.number:>3}{mark} {shown}  {settings}{ending}  ({left})"


def _short(value: Any) -> str:
    return f"{value:.3g}" if isinstance(value, float) else str(value)


def _why_none(trials: list[Trial], study_dir: Path) -> str:
    reasons = sorted({f"{t.result.status}: {t.result.reason}" for t in trials if t.result is not None})
    return (
        f"a search ends with a trial that was trained to its end within the limits; none of {len(trials)} was. "
        f"{'; '.join(reasons[:5])}. Change the space or the limits, and the name, or remove {study_dir}."
    )


def _write_best(config: SearchConfig, best: Trial, dataset: Dataset, study_dir: Path) -> TrainConfig:
    retrain = config.retrain
    name = retrain.name or f"{config.name}-trial-{best.number:04d}"
    found = lay_over(config.base, best.params, name, tuple(dataset.manifest.modalities))
    tree = found.model_dump(mode="json", exclude_unset=True)
    tree["runs_dir"] = config.runs_dir
    if retrain.epochs is not None:
        tree.setdefault("training", {})["epochs"] = retrain.epochs
    if retrain.workers is not None:
        tree.setdefault("workers", {})["num"] = retrain.workers
    tree = _without_none(tree)
    text = f"# The best of {config.trials} trials of the study {config.name}: trial {best.number}.\n" + tomli_w.dumps(
        tree
    )
    write_atomically(study_dir / _BEST_TOML, text)
    return TrainConfig.model_validate(tree)


def _without_none(tree: Any) -> Any:
    """TOML has no null: what is unset is left out."""
    if isinstance(tree, dict):
        return {key: _without_none(value) for key, value in tree.items() if value is not None}
    return tree


def _retrain(
    config: SearchConfig,
    best: Trial,
    study_dir: Path,
    dataset: Dataset,
    tracked: TrackedRun,
    progress: Callable[[str], None],
) -> TrainSummary | None:
    if config.retrain.how == "none":
        return None
    found = _write_best(config, best, dataset, study_dir)
    if config.retrain.how == "checkpoint":
        from dmvae.platform.evaluate.evaluate import judge

        evaluation = found.evaluation
        figures = judge(
            str(best.folder / "best"), dataset, evaluation, found.data.train_split, found.workers.num, progress
        )
        with tracked.spool() as spool:
            spool.log(figures, len(study.trials_of(study_dir)))
            spool.artifact(best.folder / "best", "checkpoints")
        assert best.result is not None
        uri = tracking_uri(config.base.tracking)
        return TrainSummary(best.folder, str(best.folder), figures, best.result.run_id, uri, was_finished=False)
    progress(f"training the best configuration, trial {best.number}, as run {found.name}")
    summary = train_run(found, progress)
    with tracked.spool() as spool:
        spool.log(
            {f"retrained/{name}": value for name, value in summary.metrics.items()}, len(study.trials_of(study_dir))
        )
    return summary


def _record_study(
    config: SearchConfig,
    trials: list[Trial],
    best: list[Trial],
    study_dir: Path,
    tracked: TrackedRun,
    progress: Callable[[str], None],
) -> None:
    """Write and record what the study found: best.toml, a table, Optuna's file, plots."""
    table = [{"trial": t.number, **t.params, **vars(t.result)} for t in trials if t.result is not None]
    write_atomically(study_dir / "trials.json", json.dumps(table, indent=2) + "\n")
    exported = study.export(config, trials, study_dir / "optuna.db")
    files = [study_dir / _BEST_TOML, study_dir / "trials.json", study_dir / "optuna.db"]
    try:
        from dmvae.platform.tune.study_plots import draw_plots

        files.append(draw_plots(config, exported, study_dir / "plots"))
    except ImportError as error:
        progress(f"no plots: {error}. Install the extra `report`.")
    with tracked.spool() as spool:
        for file in files:
            spool.artifact(file)


def _earlier(config: SearchConfig) -> list[Trial]:
    """Read the trials of the study to learn from.

    Raises:
        RunError: if it has another space or other objectives.
    """
    if config.earlier_study is None:
        return []
    file = Path(config.earlier_study) / _STUDY
    if not file.is_file():
        raise RunError(f"earlier_study is a study's folder; {config.earlier_study} has no {_STUDY}.")
    before = json.loads(file.read_text())
    now = config.model_dump(mode="json")
    for key in ("space", "objectives", "weights"):
        if before.get(key) != now[key]:
            raise RunError(
                f"earlier_study has the same {key}; got {before.get(key)} there and {now[key]} here. Leave it out."
            )
    return [trial for trial in study.trials_of(Path(config.earlier_study)) if trial.result is not None]


def _placed(config: SearchConfig) -> TrainConfig:
    """Return what trials start from, with paths and a tracking URI that hold in processes that start elsewhere."""
    base = absolute(config.base)
    tracking = base.tracking.model_copy(update={"uri": tracking_uri(base.tracking)})
    workers = base.workers.model_copy(update={"num": config.workers_per_trial, "min_num": None})
    return base.model_copy(update={"tracking": tracking, "workers": workers})


@contextmanager
def _quiet() -> Iterator[None]:
    """Keep Tune from writing files that nobody reads, and from refusing reports without figures."""
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
