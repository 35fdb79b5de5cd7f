"""Registered models: from a finished run to `models:/NAME@champion`, and back to a `DMVAE`."""

import json
import logging
import re
import shutil
import subprocess
import sys
import tempfile
import warnings
from collections.abc import Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Any

from dmvae.config.errors import UserError
from dmvae.config.tracking import TrackingConfig
from dmvae.data.files import sha256_of
from dmvae.data.reading.dataset import Dataset, open_dataset
from dmvae.model.predictor import UNITS, Predictor
from dmvae.model.serialization import MODEL_CONFIG, MODEL_WEIGHTS
from dmvae.platform.remote_fs import local
from dmvae.platform.tracking.delivery_log import UnreachableError
from dmvae.platform.tracking.mlflow_delivery import RefusedError, answers, connect
from dmvae.platform.tracking.outbox import scrub
from dmvae.platform.tracking.runs import tracking_uri

if TYPE_CHECKING:
    from collections.abc import Iterator

    from mlflow import MlflowClient
    from mlflow.entities.model_registry import ModelVersion

CARD = "card.json"
CHAMPION, PREVIOUS = "champion", "previous"
_PACKAGES = ("torch", "pydantic", "jaxtyping", "safetensors", "numpy", "mlflow")
_ROOT = Path(__file__).parents[2]


class RegistryError(UserError):
    """A model cannot be registered, found or promoted, for a reason that a person can do something about."""


@dataclass(frozen=True)
class Registered:
    """One version of a registered model."""

    name: str
    version: str
    uri: str
    tracking_uri: str


def register(run_dir: Path, name: str, tracking: TrackingConfig) -> Registered:
    """Register a finished run's best model as a new version of `name`; the same model again is the same version.

    Raises:
        RegistryError: if the run has no result yet, or its dataset is not the one that it was trained on any more.
    """
    uri = tracking_uri(tracking)
    result, run = _read(run_dir)
    dataset = _dataset_of(run)
    with tempfile.TemporaryDirectory() as scratch, answers(uri):
        client = connect(uri)
        content, saved = Path(scratch) / "content", Path(scratch) / "model"
        card = _fill(content, run_dir, run, result, dataset)
        known = _same(client, name, card["weights"])
        if known is None:
            save(content, saved)
            known = _upload(client, name, saved, result["run_id"], card)
    return Registered(name, str(known.version), f"models:/{name}/{known.version}", scrub(uri))


def _read(run_dir: Path) -> tuple[dict[str, Any], dict[str, Any]]:
    files = [run_dir / "result.json", run_dir / "run.json", run_dir / "best" / MODEL_WEIGHTS]
    absent = [str(file) for file in files if not file.is_file()]
    if absent:
        raise RegistryError(f"a finished run is registered; {run_dir} lacks {', '.join(absent)}. Train it to its end.")
    return json.loads(files[0].read_text()), json.loads(files[1].read_text())


def _dataset_of(run: Mapping[str, Any]) -> Dataset:
    dataset = open_dataset(run["data"]["dataset"])
    if dataset.manifest.fingerprint != run["dataset"]["fingerprint"]:
        raise RegistryError(
            f"a model is registered with the units of its dataset; {dataset.where} is another one by now (fingerprint "
            f"{dataset.manifest.fingerprint[:12]}, not {run['dataset']['fingerprint'][:12]}). Put the old one back."
        )
    return dataset


def _fill(
    content: Path, run_dir: Path, run: Mapping[str, Any], result: Mapping[str, Any], dataset: Dataset
) -> dict[str, Any]:
    """Write what the registered model carries: weights, configuration, units, card; return the card."""
    content.mkdir()
    for file in (MODEL_CONFIG, MODEL_WEIGHTS):
        shutil.copy2(run_dir / "best" / file, content / file)
    sized = dataset.manifest.size_factor is not None
    modalities = dataset.manifest.modalities.items()
    units = {name: info.model_dump(mode="json") | {"has_size_factor": sized} for name, info in modalities}
    (content / UNITS).write_text(json.dumps(units, indent=2) + "\n")
    train = dataset.split(run["data"]["train_split"])
    card = {
        "run": run["name"],
        "run_id": result["run_id"],
        "dataset": {"name": dataset.name, "fingerprint": dataset.manifest.fingerprint},
        "train_rows": len(train),
        "train_observed": train.observed,
        "metrics": result["metrics"],
        "weights": sha256_of(content / MODEL_WEIGHTS),
    }
    (content / CARD).write_text(json.dumps(card, indent=2) + "\n")
    (content / "card.md").write_text(card_text(card, units))
    return card


def card_text(card: Mapping[str, Any], units: Mapping[str, Any]) -> str:
    """Write the model card: what it was trained on, what it is worth, how it is asked, what it cannot do."""
    metrics, observed = card["metrics"], card["train_observed"]
    split = next((key.partition("/")[0] for key in metrics if key.endswith("/nll")), "test")
    rows = "\n".join(
        f"| {name} | {tuple(unit['shape'])} | {unit['dtype']} | {observed[name] / max(card['train_rows'], 1):.1%} |"
        for name, unit in units.items()
    )
    figures = "\n".join(
        f"| {name} | {value:.4g} | {_error(metrics, name)} |"
        for name, value in sorted(metrics.items())
        if "_se" not in name
    )
    return f"""# {card["run"]}

A Private-Shared Disentangled Multimodal VAE. Any modality of a row may be missing.

Trained on {card["train_rows"]:,} rows of the dataset {card["dataset"]["name"]} (fingerprint
`{card["dataset"]["fingerprint"]}`), MLflow run `{card["run_id"]}`.

| modality | shape of a row | type | observed in training |
|---|---|---|---|
{rows}

| figure | value | standard error |
|---|---|---|
{figures}

`{split}/nll` is in nats a row, of the values as the model reads them; `nll` answers are of values as they are given.

## How to ask it

    import mlflow
    model = mlflow.pyfunc.load_model("models:/NAME@champion")
    model.predict([{{...}}], params={{"operation": "impute"}})

A row is a dict from modality to nested lists in the units of the data; what is missing is left out or null. Operations:
encode, reconstruct, impute, nll, sample. `impute` answers with mean and standard deviation over draws, and `best`, the
prediction from the posteriors' means.

## Limits

It knows what its training rows hold and nothing else. An imputation is a plausible value, not a measurement. NLL
answers with `trusted: false` have an error that is larger than the one they state.
"""


def _error(metrics: Mapping[str, float], name: str) -> str:
    stem, _, last = name.rpartition("/")
    for other in (f"{name}_se", f"{stem}_se/{last}"):
        if other in metrics:
            return f"{metrics[other]:.2g}"
    return ""


def save(content: Path, target: Path) -> None:
    """Write the MLflow model: a pyfunc from code, with the package's core beside it, no pickle."""
    import mlflow

    served = Predictor.load(content)
    shapes = {name: list(shape) for name, shape in served.shapes.items()}
    example = _example(served)
    code = target.with_name("code") / "dmvae"
    _copy_core(code)
    with warnings.catch_warnings(), _silent("mlflow"):
        warnings.simplefilter("ignore")  # of an answer's values any type is right
        mlflow.pyfunc.save_model(
            path=str(target),
            python_model=str(Path(__file__).with_name("pyfunc.py")),
            artifacts={"model": str(content)},
            model_config={"shapes": shapes},
            code_paths=[str(code)],
            input_example=([example], {"operation": "impute", "num_samples": 0, "num_draws": 100, "seed": 0}),
            pip_requirements=[f"{name}=={version(name).partition('+')[0]}" for name in _PACKAGES],
        )
    shutil.copy2(content / "card.md", target / "README.md")


def _example(served: Predictor) -> dict[str, Any]:
    """Return a row that has its first modality alone: a plausible one, drawn from the model."""
    from dmvae.model.predictor import Request

    (drawn,) = served.answer([{}], Request(operation="sample"))
    first = next(iter(served.units))
    unit = served.units[first]
    if unit.classes is not None:
        return {first: [0.0] * len(drawn["values"][first])} if len(unit.shape) == 1 else {}
    counts = first in served.counts
    values = _clipped(drawn["values"][first], 255.0 if unit.dtype == "uint8" else None, 0 if counts else 3)
    return {first: values} | ({"size_factor": 1.0} if counts else {})


def _clipped(values: Any, high: float | None, digits: int) -> Any:
    if isinstance(values, list):
        return [_clipped(value, high, digits) for value in values]
    return round(values if high is None else min(max(values, 0.0), high), digits)


def _copy_core(target: Path) -> None:
    """Copy the modules that answering takes, and no other."""
    program = (
        "import sys, dmvae.model.predictor; "
        "print(*(m.__file__ for n, m in sys.modules.items() if n.split('.')[0] == 'dmvae'))"
    )
    found = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)  # noqa: S603
    for file in map(Path, found.stdout.split()):
        copy = target / file.relative_to(_ROOT)
        copy.parent.mkdir(parents=True, exist_ok=True)
        shutil.copy2(file, copy)


def _same(client: "MlflowClient", name: str, weights: str) -> "ModelVersion | None":
    """Return the version that has these weights already."""
    found = [v for v in client.search_model_versions(f"name = '{name}'") if v.tags.get("weights") == weights]
    return max(found, key=lambda v: int(v.version), default=None)


def _upload(client: "MlflowClient", name: str, saved: Path, run_id: str, card: Mapping[str, Any]) -> "ModelVersion":
    from mlflow.exceptions import MlflowException

    run = client.get_run(run_id)
    logged = client.create_logged_model(run.info.experiment_id, name=name, source_run_id=run_id, model_type="DMVAE")
    client.log_model_artifacts(logged.model_id, str(saved))
    client.finalize_logged_model(logged.model_id, "READY")
    for key, value in card["metrics"].items():
        client.log_metric(run_id, key, value, step=1_000_000_000, model_id=logged.model_id)
    try:
        client.create_registered_model(name, description="A DMVAE: rows with missing modalities in, answers out.")
    except MlflowException:
        client.get_registered_model(name)  # it is there; anything else is raised here
    tags = {"weights": card["weights"], "dataset": card["dataset"]["fingerprint"], "run": card["run"]}
    # `models:/ID` would be looked up in the tracking server that MLflow's global state names
    source = client.get_logged_model(logged.model_id).artifact_location
    text = (saved / "README.md").read_text()
    return client.create_model_version(name, source, run_id, tags=tags, description=text, model_id=logged.model_id)


def load(source: str) -> Any:
    """Return the `DMVAE` of a folder, a URI (`s3://BUCKET/RUN/best`) or a registered model.

    Args:
        source: of a registered model, `models:/NAME@ALIAS` or `models:/NAME/VERSION`.

    Raises:
        FileNotFoundError: if the folder is no model's.
        RegistryError: if MLflow has no such model, or its files are gone.
    """
    from dmvae.model.dmvae import DMVAE

    if not source.startswith("models:/"):
        with local(source) as folder:
            return DMVAE.load(folder)
    with tempfile.TemporaryDirectory() as scratch:
        return DMVAE.load(download(source, Path(scratch), TrackingConfig()))


def download(source: str, target: Path, tracking: TrackingConfig) -> Path:
    """Bring a registered model's files to `target`; return the folder with the weights and `units.json`.

    Raises:
        RegistryError: if MLflow has no such model, or its files are gone.
    """
    import mlflow
    from mlflow.exceptions import MlflowException

    uri = tracking_uri(tracking)
    try:
        with _silent("mlflow"), answers(uri):
            found_version = find(connect(uri), source)
            folder = mlflow.artifacts.download_artifacts(
                artifact_uri=str(found_version.source), dst_path=str(target), tracking_uri=uri
            )
    except (MlflowException, RefusedError, UnreachableError, OSError) as error:
        raise RegistryError(
            f"a registered model is there with its files; {source} of {scrub(uri)}: {str(error).splitlines()[0]} "
            "Name another version, or register the run again."
        ) from None
    found = sorted(Path(folder).rglob(MODEL_WEIGHTS))
    if not found or not (found[0].parent / UNITS).is_file():
        raise RegistryError(f"a registered model is one of this project; {source} has no {MODEL_WEIGHTS} or {UNITS}.")
    return found[0].parent


def find(client: "MlflowClient", source: str) -> "ModelVersion":
    """Return the version that `models:/NAME@ALIAS` or `models:/NAME/VERSION` stands for.

    Raises:
        RegistryError: if `source` is neither.
    """
    by_alias, by_number = (re.fullmatch(rf"models:/([^/@]+){mark}(.+)", source) for mark in ("@", "/"))
    if by_alias:
        return client.get_model_version_by_alias(by_alias[1], by_alias[2])
    if by_number:
        return client.get_model_version(by_number[1], by_number[2])
    raise RegistryError(f"a registered model is named models:/NAME@ALIAS or models:/NAME/VERSION; got {source!r}.")


@contextmanager
def _silent(name: str) -> "Iterator[None]":
    logger = logging.getLogger(name)
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        yield
    finally:
        logger.setLevel(level)
