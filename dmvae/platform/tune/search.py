"""Search for the best configuration within a budget of trials, then train it."""

import json
import math
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import optuna
import tomli_w

from dmvae.config.search import SearchConfig, lay_over
from dmvae.config.training import TrainConfig
from dmvae.data.files import write_atomically
from dmvae.data.reading.dataset import Dataset, open_dataset
from dmvae.evaluation import search_objectives
from dmvae.platform.cluster import local_cluster, messages
from dmvae.platform.errors import RunError
from dmvae.platform.logs import log_file
from dmvae.platform.records import read_settings
from dmvae.platform.resume import ResumeRules
from dmvae.platform.stopping import time_limit
from dmvae.platform.tracking.outbox import Outbox
from dmvae.platform.tracking.runs import RESUME_SECONDS, Waiting, open_run, sync, tracking_uri
from dmvae.platform.tracking.tracked_run import TrackedRun
from dmvae.platform.train.trainer import TrainSummary, dataset_record, train_run
from dmvae.platform.tune import study
from dmvae.platform.tune.space import check_space, max_concurrent
from dmvae.platform.tune.study import Trial
from dmvae.platform.tune.trial import TrialTask
from dmvae.platform.tune.trials import run_trials
from dmvae.training.settings import absolute, trusted

_STUDY = "study.json"
_BEST_TOML = "best.toml"
_RULES = ResumeRules(
    "study",
    SearchConfig,
    # settings that alter no trial's result
    may_change=(
        "max_concurrent",
        "retrain.*",
        "runs_dir",
        "gpus_per_trial",
        "base.tracking.*",
        "earlier_study",
        "time_budget",
    ),
    may_grow=("trials",),
)


@dataclass(frozen=True)
class SearchSummary:
    """The outcome of a search.

    Attributes:
        study_dir: the study's folder.
        objectives: what trials were compared by.
        trials: all trials, in the order in which they were drawn.
        best: the best trial, or the trials on the Pareto front.
        config: the best configuration.
        retrained: the run of the best configuration; None with `retrain.how = "none"`.
        run_id: id of the study's MLflow run.
        tracking_uri: MLflow's URI.
    """

    study_dir: Path
    objectives: tuple[str, ...]
    trials: list[Trial]
    best: list[Trial]
    config: TrainConfig
    retrained: TrainSummary | None
    run_id: str
    tracking_uri: str


def search(config: SearchConfig, progress: Callable[[str], None]) -> SearchSummary:
    """Run or resume the study that `config` describes, train its best configuration, and record both in MLflow.

    Raises:
        RunError: if the folder holds another study, a trial does not fit on the cluster, or every trial failed.
        ValueError: if the space contains invalid configurations, or the data lacks what an objective needs.
        TrackingError: if MLflow cannot be reached.
    """
    config = _with_own_objectives(config, progress)
    optuna.logging.set_verbosity(optuna.logging.WARNING)
    dataset = open_dataset(config.base.data.dataset)
    check_space(config, dataset)
    data = config.base.data
    search_objectives.check(dataset, data.train_split, data.val_split, config.objectives, config.judged_rows)
    study_dir = Path(config.runs_dir, config.name).absolute()
    record = {
        **config.model_dump(mode="json", exclude={"best_so_far"}),
        "dataset": {"fingerprint": dataset.manifest.fingerprint},
    }
    _RULES.check(study_dir / _STUDY, record, str(study_dir))
    earlier = _earlier(config)
    placed = config.model_copy(update={"base": _placed(config)})
    num = max(config.workers_per_trial, config.retrain.workers or config.base.workers.num)
    with local_cluster(math.ceil(num * config.base.workers.cpus)):
        concurrent = max_concurrent(placed)
        study_dir.mkdir(parents=True, exist_ok=True)
        with (
            open_run(
                config.base.tracking,
                config.name,
                study_dir / "tracking",
                record,
                {"kind": "search"},
                dataset_record(config.base, dataset),
                Waiting(RESUME_SECONDS, progress) if study.trials_of(study_dir) else None,
            ) as tracked,
            log_file(study_dir, progress) as log,
        ):
            write_atomically(study_dir / _STUDY, json.dumps(record, indent=2) + "\n")
            with messages(log) as queue:
                task = TrialTask(placed, study_dir, tracked.run_id, queue)
                try:
                    with time_limit(config.time_budget):
                        run_trials(task, concurrent, tracked, earlier, log)
                except KeyboardInterrupt:
                    _keep_best_so_far(config, dataset, study_dir, tracked, log)
                    raise
            trials = study.trials_of(study_dir)
            sync(study_dir / "trials", tracked.uri)
            best = study.best_trials(config, trials)
            if not best:
                raise RunError(_why_none(trials, study_dir))
            found = _write_best(config, best[0], dataset, study_dir)
            _record_study(config, trials, study_dir, tracked, log)
            retrained = _retrain(config, found, best[0], study_dir, dataset, tracked, log)
    uri = tracking_uri(config.base.tracking)
    return SearchSummary(study_dir, config.objectives, trials, best, found, retrained, tracked.run_id, uri)


def _keep_best_so_far(
    config: SearchConfig, dataset: Dataset, study_dir: Path, tracked: TrackedRun, progress: Callable[[str], None]
) -> None:
    """Write and record the best configuration of a study that was stopped, if a trial is finished."""
    trials = study.trials_of(study_dir)
    best = study.best_trials(config, trials)
    if best:
        _write_best(config, best[0], dataset, study_dir)
        _record_study(config, trials, study_dir, tracked, progress)
        finished = sum(trial.result is not None for trial in trials)
        progress(f"the best of the {finished} trials that are finished: {study_dir / _BEST_TOML}")


def best_so_far(config: SearchConfig) -> SearchSummary:
    """Write the best configuration of the trials that are finished; nothing is trained or sent to MLflow.

    Raises:
        RunError: if no trial is finished.
    """
    config = _with_own_objectives(config, lambda line: None)
    study_dir = Path(config.runs_dir, config.name).absolute()
    trials = study.trials_of(study_dir)
    best = study.best_trials(config, trials)
    if not best:
        raise RunError(f"No trial of the study is finished within the limits. Wait, or look into {study_dir}.")
    found = _write_best(config, best[0], open_dataset(config.base.data.dataset), study_dir)
    run_id = best[0].result.run_id if best[0].result is not None else ""
    uri = tracking_uri(config.base.tracking)
    return SearchSummary(study_dir, config.objectives, trials, best, found, None, run_id, uri)


def _why_none(trials: list[Trial], study_dir: Path) -> str:
    reasons = sorted({f"{t.result.status}: {t.result.reason}" for t in trials if t.result is not None})
    return (
        f"No trial out of {len(trials)} finished within the limits ({'; '.join(reasons[:5])}). "
        f"Change space or limits and choose another name, or delete {study_dir}."
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
    header = f"# The best of {config.trials} trials of the study {config.name}: trial {best.number}.\n"
    write_atomically(study_dir / _BEST_TOML, header + tomli_w.dumps(tree))
    return TrainConfig.model_validate(tree)


def _without_none(tree: Any) -> Any:
    """Leave out what is None: TOML has no null."""
    if isinstance(tree, dict):
        return {key: _without_none(value) for key, value in tree.items() if value is not None}
    return tree


def _retrain(
    config: SearchConfig,
    found: TrainConfig,
    best: Trial,
    study_dir: Path,
    dataset: Dataset,
    tracked: TrackedRun,
    progress: Callable[[str], None],
) -> TrainSummary | None:
    if config.retrain.how == "none":
        return None
    if config.retrain.how == "checkpoint":
        from dmvae.platform.evaluate.evaluate import Extras, evaluate_split

        evaluation = found.evaluation
        figures = evaluate_split(
            str(best.folder / "best"),
            dataset,
            evaluation,
            found.data.train_split,
            found.workers.num,
            progress,
            Extras(trust=trusted(found.model)),
        )
        with Outbox(tracked) as outbox:
            outbox.log_metrics(figures, len(study.trials_of(study_dir)))
            outbox.log_artifact(best.folder / "best", "checkpoints")
        assert best.result is not None
        uri = tracking_uri(config.base.tracking)
        return TrainSummary(best.folder, str(best.folder), figures, best.result.run_id, uri, was_finished=False)
    progress(f"training the best configuration (trial {best.number}) as run {found.name}")
    summary = train_run(found, progress)
    with Outbox(tracked) as outbox:
        outbox.log_metrics(
            {f"retrained/{name}": value for name, value in summary.metrics.items()}, len(study.trials_of(study_dir))
        )
    return summary


def _record_study(
    config: SearchConfig,
    trials: list[Trial],
    study_dir: Path,
    tracked: TrackedRun,
    progress: Callable[[str], None],
) -> None:
    """Write the table of trials, Optuna's database and the plots; record them with best.toml in MLflow."""
    table = [{"trial": t.number, **t.params, **vars(t.result)} for t in trials if t.result is not None]
    write_atomically(study_dir / "trials.json", json.dumps(table, indent=2) + "\n")
    exported = study.export(config, trials, study_dir / "optuna.db")
    files = [study_dir / _BEST_TOML, study_dir / "trials.json", study_dir / "optuna.db"]
    try:
        from dmvae.platform.tune.study_plots import draw_plots

        files.append(draw_plots(config, exported, study_dir / "plots"))
    except ImportError as error:
        progress(f"Plots were skipped: {error}. Install the extra `report`.")
    with Outbox(tracked) as outbox:
        for file in files:
            outbox.log_artifact(file)


def _with_own_objectives(config: SearchConfig, progress: Callable[[str], None]) -> SearchConfig:
    """Return the configuration with the objectives that the study began with, if it has the default: that changed."""
    before = read_settings(Path(config.runs_dir, config.name, _STUDY))
    default = SearchConfig.model_fields["objectives"].default
    if before is None or config.objectives != default or tuple(before["objectives"]) == default:
        return config
    kept = tuple(before["objectives"])
    progress(f"note: The study keeps the objectives that it began with: {', '.join(kept)}")
    return config.model_copy(update={"objectives": kept})


def _earlier(config: SearchConfig) -> list[Trial]:
    """Return the finished trials of `earlier_study`.

    Raises:
        RunError: if that study has another space or other objectives.
    """
    if config.earlier_study is None:
        return []
    file = Path(config.earlier_study) / _STUDY
    before = read_settings(file)
    if before is None:
        raise RunError(f"earlier_study must be a study's folder: {config.earlier_study} has no {_STUDY}.")
    now = config.model_dump(mode="json")
    for key in ("space", "objectives", "weights"):
        if before.get(key) != now[key]:
            raise RunError(
                f"earlier_study must have the same {key}: expected {now[key]}, got {before.get(key)}. "
                "Remove earlier_study."
            )
    return [trial for trial in study.trials_of(Path(config.earlier_study)) if trial.result is not None]


def _placed(config: SearchConfig) -> TrainConfig:
    """Return the base configuration with absolute paths and the resolved tracking URI, for processes elsewhere."""
    base = absolute(config.base)
    tracking = base.tracking.model_copy(update={"uri": tracking_uri(base.tracking)})
    workers = base.workers.model_copy(update={"num": config.workers_per_trial, "min_num": None})
    return base.model_copy(update={"tracking": tracking, "workers": workers})
