"""Register the model of a finished run with MLflow, and load `models:/NAME@champion` back as a `DMVAE`."""

import json
import re
import shutil
import tempfile
from collections.abc import Collection, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import mlflow
from mlflow import MlflowClient
from mlflow.entities.model_registry import ModelVersion
from mlflow.exceptions import MlflowException

from dmvae.config.errors import UserError
from dmvae.config.own_code import check_trust
from dmvae.config.section import scrub
from dmvae.config.tracking import TrackingConfig
from dmvae.data.files import sha256_of
from dmvae.data.reading.dataset import Dataset, open_dataset
from dmvae.model.assembly import own_code_of
from dmvae.model.dmvae import DMVAE
from dmvae.model.predictor import UNITS
from dmvae.model.serialization import MODEL_CONFIG, MODEL_PRIOR, MODEL_WEIGHTS, read_config
from dmvae.platform.records import read_result, read_run, required
from dmvae.platform.remote_fs import local
from dmvae.platform.serve.mlflow_model import quiet_mlflow, save
from dmvae.platform.serve.model_card import CARD, README, card_text, make_card
from dmvae.platform.serve.shipped_code import find_code
from dmvae.platform.tracking.delivery_log import UnreachableError
from dmvae.platform.tracking.mlflow_delivery import RefusedError, answers, connect
from dmvae.platform.tracking.runs import tracking_uri

CHAMPION, PREVIOUS = "champion", "previous"
BEST = "best"


class RegistryError(UserError):
    """A model cannot be registered, found, promoted or served; the message says why and how to fix it."""


@dataclass(frozen=True)
class Registered:
    """One version of a registered model."""

    name: str
    version: str
    uri: str
    tracking_uri: str
    own_code: dict[str, str] = field(default_factory=dict)
    """How each package of own code comes along, in words."""


@contextmanager
def mlflow_client(uri: str, action: str, fix: str = "Check tracking.uri.") -> Iterator[MlflowClient]:
    """Yield a client of the MLflow at `uri`.

    Args:
        uri: of the tracking server or database.
        action: what is done with the client, as "register 'digits'".
        fix: what the user can do if it fails.

    Raises:
        RegistryError: if MLflow refuses a call or cannot be reached.
    """
    try:
        with answers(uri):
            yield connect(uri)
    except (RefusedError, UnreachableError) as error:
        raise RegistryError(f"Cannot {action}: {error} (MLflow at {scrub(uri)}). {fix}") from None


def register(run_dir: Path, name: str, tracking: TrackingConfig, trust: Collection[str] = ()) -> Registered:
    """Register the best model of a finished run as a new version of `name`.

    Registering the same weights again returns the version that has them. Own code that the model names is run, and
    becomes a requirement or, if no index has it, a part of the model.

    Raises:
        RegistryError: if the run is not finished, its dataset has changed, or MLflow cannot be reached.
    """
    uri = tracking_uri(tracking)
    result, run = _read(run_dir)
    dataset, best = _dataset_of(run), run_dir / BEST
    own = own_code_of(read_config(best))
    check_trust(own, trust, str(best))
    with mlflow_client(uri, f"register {name!r}") as client:
        version = _version_with(client, name, sha256_of(best / MODEL_WEIGHTS))
        if version is None:
            with tempfile.TemporaryDirectory() as scratch:
                content, saved, paths = Path(scratch) / "content", Path(scratch) / "model", list(own.values())
                specs = _write_model(content, best, dataset)
                code = find_code(content, paths)
                card = make_card(run, result, dataset, sha256_of(content / MODEL_WEIGHTS), code.own)
                (content / CARD).write_text(json.dumps(card, indent=2) + "\n")
                (content / README).write_text(card_text(card, specs))
                save(content, saved, code, paths)
                version = _upload(client, name, saved, result["run_id"], card)
    own_code = json.loads(version.tags.get("own_code", "{}"))
    return Registered(name, str(version.version), f"models:/{name}/{version.version}", scrub(uri), own_code)


def _read(run_dir: Path) -> tuple[dict[str, Any], dict[str, Any]]:
    files = [run_dir / "result.json", run_dir / "run.json", run_dir / BEST / MODEL_WEIGHTS]
    missing = [str(file) for file in files if not file.is_file()]
    if missing:
        raise RegistryError(
            f"{run_dir} is not a finished run: missing {', '.join(missing)}. Finish its training first."
        )
    result = required(read_result(files[0]), files[0])
    return result.model_dump(), required(read_run(files[1]), files[1])


def _dataset_of(run: Mapping[str, Any]) -> Dataset:
    dataset = open_dataset(run["data"]["dataset"])
    found, expected = dataset.manifest.fingerprint, run["dataset"]["fingerprint"]
    if found != expected:
        raise RegistryError(
            f"The dataset {dataset.where} has changed since the run was trained: expected fingerprint "
            f"{expected[:12]}, but got {found[:12]}. Restore the dataset, or train the run again."
        )
    return dataset


def _write_model(content: Path, best: Path, dataset: Dataset) -> dict[str, Any]:
    """Write weights, configuration and `units.json`; return the specs of the modalities."""
    content.mkdir()
    for file in (MODEL_CONFIG, MODEL_WEIGHTS, MODEL_PRIOR):
        if file != MODEL_PRIOR or (best / file).is_file():
            shutil.copy2(best / file, content / file)
    has_size_factor = dataset.manifest.size_factor is not None
    modalities = dataset.manifest.modalities.items()
    specs = {name: info.model_dump(mode="json") | {"has_size_factor": has_size_factor} for name, info in modalities}
    (content / UNITS).write_text(json.dumps(specs, indent=2) + "\n")
    return specs


def _version_with(client: MlflowClient, name: str, weights: str) -> ModelVersion | None:
    """Return the newest version that has these weights, if any."""
    found = [v for v in client.search_model_versions(f"name = '{name}'") if v.tags.get("weights") == weights]
    return max(found, key=lambda v: int(v.version), default=None)


def _upload(client: MlflowClient, name: str, saved: Path, run_id: str, card: Mapping[str, Any]) -> ModelVersion:
    run = client.get_run(run_id)
    logged = client.create_logged_model(run.info.experiment_id, name=name, source_run_id=run_id, model_type="DMVAE")
    client.log_model_artifacts(logged.model_id, str(saved))
    client.finalize_logged_model(logged.model_id, "READY")
    for key, value in card["metrics"].items():
        client.log_metric(run_id, key, value, step=1_000_000_000, model_id=logged.model_id)
    try:
        client.create_registered_model(name, description="A DMVAE that answers rows with missing modalities.")
    except MlflowException:
        client.get_registered_model(name)  # it exists already; any other error is raised again here
    tags = {"weights": card["weights"], "dataset": card["dataset"]["fingerprint"], "run": card["run"]}
    tags |= {"own_code": json.dumps(card["own_code"])} if "own_code" in card else {}
    # `models:/ID` would be looked up in the tracking server that MLflow's global state names
    source = client.get_logged_model(logged.model_id).artifact_location
    text = (saved / "README.md").read_text()
    return client.create_model_version(name, source, run_id, tags=tags, description=text, model_id=logged.model_id)


def load(source: str, trust: Collection[str] = ()) -> DMVAE:
    """Return the `DMVAE` at a folder, a URI (`s3://BUCKET/RUN/best`) or in the registry.

    Args:
        source: for a registered model, `models:/NAME@ALIAS` or `models:/NAME/VERSION`.
        trust: as in `DMVAE.load`.

    Raises:
        FileNotFoundError: if the folder holds no model.
        RegistryError: if MLflow cannot be reached, has no such model, or lacks its files.
    """
    if not source.startswith("models:/"):
        with local(source) as folder:
            return DMVAE.load(folder, trust=trust)
    with downloaded(source, TrackingConfig()) as folder:
        return DMVAE.load(folder, trust=trust)


@contextmanager
def downloaded(source: str, tracking: TrackingConfig) -> Iterator[Path]:
    """Yield a folder with the files of a registered model, which is removed after the block.

    Raises:
        RegistryError: as `download` does.
    """
    with tempfile.TemporaryDirectory() as scratch:
        yield download(source, Path(scratch), tracking)


def download(source: str, target: Path, tracking: TrackingConfig) -> Path:
    """Download a registered model to `target`; return the folder with the weights and `units.json`.

    Raises:
        RegistryError: if MLflow cannot be reached, has no such model, or lacks its files.
    """
    uri = tracking_uri(tracking)
    fix = "Choose another version, or register the run again."
    with quiet_mlflow(), mlflow_client(uri, f"load {source}", fix) as client:
        version = find_version(client, source)
        folder = mlflow.artifacts.download_artifacts(
            artifact_uri=str(version.source), dst_path=str(target), tracking_uri=uri
        )
    found = sorted(Path(folder).rglob(MODEL_WEIGHTS))
    if not found or not (found[0].parent / UNITS).is_file():
        raise RegistryError(
            f"{source} is not a DMVAE: {MODEL_WEIGHTS} or {UNITS} is missing. Choose a model that dmvae registered."
        )
    return found[0].parent


def find_version(client: MlflowClient, source: str) -> ModelVersion:
    """Return the version that `models:/NAME@ALIAS` or `models:/NAME/VERSION` stands for.

    Raises:
        RegistryError: if `source` is neither.
    """
    by_alias, by_number = (re.fullmatch(rf"models:/([^/@]+){mark}(.+)", source) for mark in ("@", "/"))
    if by_alias:
        return client.get_model_version_by_alias(by_alias[1], by_alias[2])
    if by_number:
        return client.get_model_version(by_number[1], by_number[2])
    raise RegistryError(f"Invalid model {source!r}. Expected models:/NAME@ALIAS or models:/NAME/VERSION.")
