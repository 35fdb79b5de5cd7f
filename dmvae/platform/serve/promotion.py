"""Moving the champion's alias: only to a version that is better on the same rows, and back."""

import json
import subprocess
import sys
import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pyarrow.parquet as pq

from dmvae.config.registry import PromoteConfig
from dmvae.data.reading.dataset import open_dataset
from dmvae.model.predictor import UNITS
from dmvae.platform.serve.registry import CARD, CHAMPION, PREVIOUS, RegistryError, download
from dmvae.platform.tracking.mlflow_delivery import answers, connect
from dmvae.platform.tracking.runs import tracking_uri

if TYPE_CHECKING:
    from mlflow import MlflowClient


@dataclass(frozen=True)
class Decision:
    """Whether the alias moved, to which version, and why."""

    moved: bool
    champion: str
    reason: str


def promote(config: PromoteConfig, progress: Callable[[str], None]) -> Decision:
    """Judge candidate and champion on the same rows and move the alias if the candidate is better.

    Raises:
        RegistryError: if a model's files are gone, it was trained on another dataset, or its modalities are others.
    """
    uri = tracking_uri(config.tracking)
    with answers(uri):
        client = connect(uri)
        if config.rollback:
            return _roll_back(client, config.name)
        champion = _alias(client, config.name, CHAMPION)
        candidate = str(config.version or _newest(client, config.name))
        if candidate == champion:
            return Decision(False, champion, f"version {candidate} is the champion already")
        with tempfile.TemporaryDirectory() as scratch:
            folders = {v: _fetch(config, v, Path(scratch)) for v in (candidate, champion) if v is not None}
            _check_alike(config, folders)
            judged = {
                v: _evaluate(config, folder, Path(scratch) / f"judged-{v}", v, progress)
                for v, folder in folders.items()
            }
        better, reason = (
            (True, "there was no champion")
            if champion is None
            else _compare(config, judged[candidate], judged[champion])
        )
        tags = {"promotion.against": champion or "none", "promotion.reason": reason, "promotion.time": _now()}
        for key, value in tags.items():
            client.set_model_version_tag(config.name, candidate, key, value)
        if better:
            _move(client, config.name, candidate, champion)
        return Decision(better, candidate if better else str(champion), reason)


def _roll_back(client: "MlflowClient", name: str) -> Decision:
    champion, previous = _alias(client, name, CHAMPION), _alias(client, name, PREVIOUS)
    if previous is None:
        raise RegistryError(
            f"a rollback goes to the previous champion; {name!r} has none. Promote a version by number."
        )
    _move(client, name, previous, champion)
    reason = f"rolled back from version {champion}"
    client.set_model_version_tag(name, previous, "promotion.reason", reason)
    client.set_model_version_tag(name, previous, "promotion.time", _now())
    return Decision(True, previous, reason)


def _move(client: "MlflowClient", name: str, to: str, before: str | None) -> None:
    if before is not None:
        client.set_registered_model_alias(name, PREVIOUS, before)
    client.set_registered_model_alias(name, CHAMPION, to)


def _alias(client: "MlflowClient", name: str, alias: str) -> str | None:
    found = _model(client, name).aliases.get(alias)
    return None if found is None else str(found)


def _newest(client: "MlflowClient", name: str) -> str:
    versions = [int(v.version) for v in client.search_model_versions(f"name = '{name}'")]
    if not versions:
        raise RegistryError(f"a candidate is a version of {name!r}; it has none. Register a run first.")
    return str(max(versions))


def _model(client: "MlflowClient", name: str) -> Any:
    from mlflow.exceptions import MlflowException

    try:
        return client.get_registered_model(name)
    except MlflowException:
        known = sorted(model.name for model in client.search_registered_models())
        raise RegistryError(
            f"a registered model has this name; got {name!r}. Known: {', '.join(known) or 'none'}."
        ) from None


def _fetch(config: PromoteConfig, version: str, scratch: Path) -> Path:
    return download(f"models:/{config.name}/{version}", scratch / f"version-{version}", config.tracking)


def _check_alike(config: PromoteConfig, folders: dict[str, Path]) -> None:
    fingerprint = open_dataset(config.dataset).manifest.fingerprint
    modalities: dict[str, list[str]] = {}
    for version, folder in folders.items():
        trained = json.loads((folder / CARD).read_text())["dataset"]["fingerprint"]
        if trained != fingerprint:
            raise RegistryError(
                f"models are compared on the dataset that they were trained on; version {version} was trained on "
                f"{trained[:12]}, and {config.dataset} is {fingerprint[:12]}. Name its dataset, or train it anew."
            )
        modalities[version] = sorted(json.loads((folder / UNITS).read_text()))
    if len({tuple(names) for names in modalities.values()}) > 1:
        raise RegistryError(f"models are compared that have the same modalities; got {modalities}. Promote by number.")


def _evaluate(
    config: PromoteConfig, folder: Path, output: Path, version: str, progress: Callable[[str], None]
) -> tuple[dict[str, float], dict[Any, tuple[float, float]]]:
    """Judge a version in a process of its own; return its figures, and NLL and error by row id."""
    progress(f"judging version {version}")
    settings = {
        "model": str(folder),
        "dataset": config.dataset,
        "workers": config.workers,
        "output": str(output),
        "evaluation": config.evaluation.model_dump(mode="json", exclude_none=True),
    }
    program = (
        "import sys, json; from dmvae.platform.serve.promotion import judge_here; judge_here(json.loads(sys.argv[1]))"
    )
    done = subprocess.run(  # noqa: S603
        [sys.executable, "-c", program, json.dumps(settings)], capture_output=True, text=True, check=False
    )
    if done.returncode:
        lines = done.stderr.strip().splitlines() or ["no reason given"]
        raise RegistryError(f"version {version} could not be judged: {lines[-1]}")
    figures = json.loads((output / "summary.json").read_text())["figures"]
    table = pq.read_table(output / "rows.parquet").to_pydict()
    rows = {i: (nll, se) for i, nll, se in zip(table["id"], table["nll"], table["se"], strict=True)}
    return figures, rows


def judge_here(settings: dict[str, Any]) -> None:
    """Run an evaluation in this process."""
    from dmvae.config.evaluation import EvaluateConfig
    from dmvae.platform.evaluate.evaluate import evaluate

    evaluate(EvaluateConfig.model_validate(settings), progress=lambda line: None)


def _compare(config: PromoteConfig, candidate: Any, champion: Any) -> tuple[bool, str]:
    if config.metric != "nll":
        key = f"{config.evaluation.split}/{config.metric}"
        if key not in candidate[0]:
            raise RegistryError(
                f"the metric is a figure of the evaluation; got {key!r}. Known: {', '.join(candidate[0])}."
            )
        gain = candidate[0][key] - champion[0][key]
        gain = gain if config.larger_is_better else -gain
        return (
            gain > config.margin,
            f"{key}: {candidate[0][key]:.4g} against {champion[0][key]:.4g}, better by {gain:.4g}",
        )
    ids = sorted(candidate[1])
    if ids != sorted(champion[1]):
        raise RegistryError("candidate and champion are paired by row; they were judged on different rows.")
    gains = np.array([champion[1][i][0] - candidate[1][i][0] for i in ids])
    sampling = np.array([champion[1][i][1] ** 2 + candidate[1][i][1] ** 2 for i in ids])
    error = float(np.sqrt(gains.var(ddof=1) / len(gains) + sampling.sum() / len(gains) ** 2))
    gain = float(gains.mean())
    return (
        gain > config.errors * error,
        f"nll better by {gain:.4g} nats a row, standard error {error:.2g}, {len(ids)} rows",
    )


def _now() -> str:
    return datetime.now(UTC).isoformat(timespec="seconds")
