"""Move the alias `champion` to a version that is better on the same rows, and back to the previous one."""

import json
import subprocess
import sys
import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
from mlflow import MlflowClient
from mlflow.exceptions import MlflowException

from dmvae.config.evaluation import EvaluateConfig
from dmvae.config.registry import PromoteConfig
from dmvae.data.reading.dataset import open_dataset
from dmvae.data.records import read_record
from dmvae.model.predictor import read_units
from dmvae.platform.evaluate.evaluate import evaluate
from dmvae.platform.records import Card, EvaluationSummary, required
from dmvae.platform.serve.model_card import CARD
from dmvae.platform.serve.registry import CHAMPION, PREVIOUS, RegistryError, download, mlflow_client
from dmvae.platform.tracking.runs import tracking_uri

_REMEDY = "Register the run again."


@dataclass(frozen=True)
class Decision:
    """Whether the alias moved, the champion after it, and the reason."""

    moved: bool
    champion: str
    reason: str


@dataclass(frozen=True)
class _Evaluation:
    """The metrics of one version, and the NLL of each row with its Monte Carlo error, by id."""

    metrics: dict[str, float | None]
    nll: dict[Any, tuple[float, float]]


def promote(config: PromoteConfig, progress: Callable[[str], None]) -> Decision:
    """Evaluate candidate and champion on the same rows, and make the candidate the champion if it is better.

    Raises:
        RegistryError: if MLflow cannot be reached or lacks a model's files, or the versions cannot be compared because
            they were trained on another dataset or have different modalities.
    """
    uri, action = tracking_uri(config.tracking), f"promote {config.name!r}"
    with mlflow_client(uri, action) as client:
        if config.rollback:
            return _roll_back(client, config.name)
        champion = _version_of(client, config.name, CHAMPION)
        candidate = str(config.version or _newest(client, config.name))
    if candidate == champion:
        return Decision(False, champion, f"version {candidate} is already the champion")
    better, reason = _compare(config, candidate, champion, progress)
    with mlflow_client(uri, action) as client:
        _explain(client, config.name, candidate, against=champion or "none", reason=reason)
        if better:
            _move(client, config.name, candidate, champion)
    return Decision(better, candidate if better else str(champion), reason)


def _roll_back(client: MlflowClient, name: str) -> Decision:
    champion, previous = _version_of(client, name, CHAMPION), _version_of(client, name, PREVIOUS)
    if previous is None:
        raise RegistryError(f"{name!r} has no previous champion to roll back to. Set version to promote another one.")
    _move(client, name, previous, champion)
    reason = f"rolled back from version {champion}"
    _explain(client, name, previous, reason=reason)
    return Decision(True, previous, reason)


def _move(client: MlflowClient, name: str, champion: str, previous: str | None) -> None:
    if previous is not None:
        client.set_registered_model_alias(name, PREVIOUS, previous)
    client.set_registered_model_alias(name, CHAMPION, champion)


def _explain(client: MlflowClient, name: str, version: str, **tags: str) -> None:
    """Tag a version with what was decided about it, and when."""
    for key, value in {**tags, "time": datetime.now(UTC).isoformat(timespec="seconds")}.items():
        client.set_model_version_tag(name, version, f"promotion.{key}", value)


def _version_of(client: MlflowClient, name: str, alias: str) -> str | None:
    try:
        found = client.get_registered_model(name).aliases.get(alias)
    except MlflowException:
        known = sorted(model.name for model in client.search_registered_models())
        raise RegistryError(f"Unknown registered model {name!r}. Available: {', '.join(known) or 'none'}.") from None
    return None if found is None else str(found)


def _newest(client: MlflowClient, name: str) -> str:
    versions = [int(v.version) for v in client.search_model_versions(f"name = '{name}'")]
    if not versions:
        raise RegistryError(f"Registered model {name!r} has no versions. Register a run first.")
    return str(max(versions))


def _compare(
    config: PromoteConfig, candidate: str, champion: str | None, progress: Callable[[str], None]
) -> tuple[bool, str]:
    """Evaluate both versions; return whether the candidate is better, and why."""
    versions = [candidate] if champion is None else [candidate, champion]
    with tempfile.TemporaryDirectory() as scratch:
        folders = {
            v: download(f"models:/{config.name}/{v}", Path(scratch) / f"version-{v}", config.tracking) for v in versions
        }
        _check_comparable(config, folders)
        results = {}
        for version, folder in folders.items():
            progress(f"evaluating version {version}")
            results[version] = _evaluate(config, folder, Path(scratch) / f"evaluation-{version}", version)
    if champion is None:
        return True, "there was no champion"
    compare = _compare_nll if config.metric == "nll" else _compare_metric
    return compare(config, results[candidate], results[champion])


def _check_comparable(config: PromoteConfig, folders: dict[str, Path]) -> None:
    fingerprint = open_dataset(config.dataset).manifest.fingerprint
    modalities: dict[str, list[str]] = {}
    for version, folder in folders.items():
        trained = required(read_record(folder / CARD, Card, _REMEDY), folder / CARD).dataset.fingerprint
        if trained != fingerprint:
            raise RegistryError(
                f"Version {version} was trained on another dataset than {config.dataset}: expected fingerprint "
                f"{trained[:12]}, but got {fingerprint[:12]}. Set dataset to its own, or train it again on this one."
            )
        modalities[version] = sorted(read_units(folder))
    if len({tuple(names) for names in modalities.values()}) > 1:
        raise RegistryError(
            f"Cannot compare versions with different modalities: {modalities}. "
            "Register the candidate under another name."
        )


def _evaluate(config: PromoteConfig, folder: Path, output: Path, version: str) -> _Evaluation:
    """Evaluate a version in a process of its own."""
    settings = {
        "model": str(folder),
        "dataset": config.dataset,
        "workers": config.workers,
        "output": str(output),
        "trust": config.trust,
        "evaluation": config.evaluation.model_dump(mode="json", exclude_none=True),
    }
    program = f"import sys; from {__name__} import evaluate_here; evaluate_here(sys.argv[1])"
    done = subprocess.run(  # noqa: S603
        [sys.executable, "-c", program, json.dumps(settings)], capture_output=True, text=True, check=False
    )
    if done.returncode:
        lines = done.stderr.strip().splitlines() or ["no reason given"]
        raise RegistryError(f"Evaluation of version {version} failed: {lines[-1]}")
    file = output / "summary.json"
    metrics = required(read_record(file, EvaluationSummary, _REMEDY), file).figures
    table = pq.read_table(output / "rows.parquet").to_pydict()
    return _Evaluation(
        metrics, {i: (nll, se) for i, nll, se in zip(table["id"], table["nll"], table["se"], strict=True)}
    )


def evaluate_here(settings: str) -> None:
    """Run an evaluation in this process.

    Args:
        settings: of an `EvaluateConfig`, as JSON.
    """
    evaluate(EvaluateConfig.model_validate_json(settings), progress=lambda line: None)


def _compare_metric(config: PromoteConfig, candidate: _Evaluation, champion: _Evaluation) -> tuple[bool, str]:
    key = f"{config.evaluation.split}/{config.metric}"
    if key not in candidate.metrics:
        raise RegistryError(
            f"Unknown metric {key!r}. Available: {', '.join(candidate.metrics)}. "
            "Set metric, or the measure that has it in evaluation.measures."
        )
    new, old = candidate.metrics[key], champion.metrics.get(key)
    if new is None or old is None:
        raise RegistryError(f"Metric {key!r} has no value on this split. Set metric to another one.")
    gain = new - old if config.larger_is_better else old - new
    return gain > config.margin, f"{key}: {new:.4g} against {old:.4g}, better by {gain:.4g}"


def _compare_nll(config: PromoteConfig, candidate: _Evaluation, champion: _Evaluation) -> tuple[bool, str]:
    """Pair the rows; the error of the mean gain has a part from the rows and one from the Monte Carlo estimates."""
    ids = sorted(candidate.nll)
    assert ids == sorted(champion.nll), "both were evaluated on the same split"
    gains = np.array([champion.nll[i][0] - candidate.nll[i][0] for i in ids])
    monte_carlo = np.array([champion.nll[i][1] ** 2 + candidate.nll[i][1] ** 2 for i in ids])
    error = float(np.sqrt(gains.var(ddof=1) / len(gains) + monte_carlo.sum() / len(gains) ** 2))
    gain = float(gains.mean())
    return (
        gain > config.errors * error,
        f"nll better by {gain:.4g} nats per row, standard error {error:.2g}, {len(ids)} rows",
    )
