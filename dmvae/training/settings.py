"""Resolve a run's settings: fill in from the dataset what the configuration leaves open, and check the result."""

import warnings
from pathlib import Path
from typing import Any

import torch

from dmvae.config.likelihoods import values_of
from dmvae.config.model import DMVAEConfig
from dmvae.config.own_code import OwnCodeError
from dmvae.config.training import TrainConfig
from dmvae.data.format.manifest import Manifest, ModalityInfo
from dmvae.data.reading.dataset import Dataset
from dmvae.data.storage import location
from dmvae.distributions.likelihoods import check_likelihood, find, own_path
from dmvae.model.assembly import dimensions, own_code_of
from dmvae.model.dmvae import DMVAE
from dmvae.model.parts import start_from
from dmvae.nn.own_networks import check_networks
from dmvae.training.state import parameter_groups

_LOWEST_RATE = 1e-3  # of a column of counts, where the decoder starts
_RUN_METRICS = frozenset({"loss", "gradient_norm", "learning_rate", "skipped_steps"})


def resolve(config: TrainConfig, dataset: Dataset) -> TrainConfig:
    """Fill in shapes and likelihoods from the dataset, and check that the model can be built and trained.

    Own code that the config names is imported and tried out; its versions are filled in too.

    Raises:
        ValueError: if the config names an unknown modality or a different shape, no training row has a modality,
            a modality has the name of a metric, the model is too large, own code does not fit, or `init_from` belongs
            to another model.
    """
    resolved = _fill(config, dataset.manifest)
    _check(resolved, dataset)
    model = blank_model(resolved.model)
    resolved = resolved.model_copy(
        update={"model": resolved.model.model_copy(update={"packages": model.config.packages})}
    )
    parameter_groups(model, resolved.optim)  # checks the parts that settings name
    start_weights(model, resolved)
    return resolved


def trusted(config: DMVAEConfig) -> tuple[str, ...]:
    """Return the import paths that a configuration names: its author trusts them in the folders of its models too."""
    return tuple(own_code_of(config).values())


def absolute(config: TrainConfig) -> TrainConfig:
    """Make paths absolute, for processes with another working directory."""
    data = config.data.model_copy(update={"dataset": location.absolute(config.data.dataset)})
    init_from = None if config.init_from is None else str(Path(config.init_from).absolute())
    return config.model_copy(update={"data": data, "init_from": init_from})


def run_record(config: TrainConfig, manifest: Manifest) -> dict[str, Any]:
    """Return the content of `run.json`: the resolved configuration and the dataset's fingerprint."""
    return {**config.model_dump(mode="json"), "dataset": {"fingerprint": manifest.fingerprint}}


def _fill(config: TrainConfig, manifest: Manifest) -> TrainConfig:
    model = config.model.model_dump(exclude_defaults=True)
    given, shapes = model.get("input_dims"), dict(manifest.input_dims)
    if given is not None and {name: tuple(shape) for name, shape in given.items()} != shapes:
        raise ValueError(
            f"model.input_dims must be the dataset's shapes {shapes}, but got {given}. Remove model.input_dims."
        )
    model["input_dims"] = shapes
    model["decoders_dist"] = _distributions(model.get("decoders_dist") or {}, manifest)
    params = dict(model.get("decoder_dist_params") or {})
    for name, info in manifest.modalities.items():
        known = _known_params(name, info, model["decoders_dist"][name])
        if known:
            params[name] = known | params.get(name, {})
    model["decoder_dist_params"] = params or None
    missing = {*(model.get("missing_cells") or ()), *manifest.missing_cells}
    model["missing_cells"] = tuple(name for name in shapes if name in missing)
    return TrainConfig.model_validate({**config.model_dump(), "model": model})


def _distributions(given: dict[str, str], manifest: Manifest) -> dict[str, str]:
    """Return the likelihoods that are given, and for the others what the dataset proposes."""
    proposed = {name: info.likelihood for name, info in manifest.modalities.items()}
    for name, likelihood in proposed.items():
        if name not in given and own_path(likelihood) is not None:
            raise ValueError(
                f"The dataset proposes the likelihood {likelihood!r} for {name!r}, which is code that is not part of "
                f"dmvae. If you trust it, set model.decoders_dist.{name} to it; else to another likelihood."
            )
    for name, likelihood in given.items():
        find(likelihood, name)  # imports own code, so that its values and parameters are known
    return proposed | given


def _known_params(name: str, info: ModalityInfo, likelihood: str) -> dict[str, Any]:
    """Return the likelihood's parameters that the manifest knows."""
    if values_of(likelihood) == "counts" and info.size_factor and info.rate:
        return {"size_factor": info.size_factor, "rate": info.rate}
    if values_of(likelihood) == "columns":
        if info.columns is None:
            raise ValueError(
                f"The {likelihood} likelihood needs a table whose columns have kinds, but modality {name!r} has none. "
                f"Choose another likelihood in model.decoders_dist, or prepare it with a list of columns."
            )
        kinds = [column.kind for column in info.columns]
        classes = [len(column.classes) for column in info.columns if column.kind == "category"]
        rates = [max(column.rate or 0.0, _LOWEST_RATE) for column in info.columns if column.kind == "count"]
        return {"kinds": kinds, "classes": classes, "rates": rates}
    if values_of(likelihood) != "classes":
        return {}
    if info.classes is None:
        raise ValueError(
            f"The {likelihood} likelihood needs a column of integers, but modality {name!r} is {info.dtype}. Choose "
            f"another likelihood in model.decoders_dist, or prepare the modality as integers."
        )
    return {"classes": info.classes}


def _check(config: TrainConfig, dataset: Dataset) -> None:
    observed = dataset.split(config.data.train_split).observed
    never = [name for name in dataset.manifest.modalities if observed[name] == 0]
    if never:
        raise ValueError(
            f"No row of split {config.data.train_split!r} of {config.data.dataset} has modality "
            f"{', '.join(map(repr, never))}. Prepare the dataset again without it."
        )
    taken = sorted(_RUN_METRICS & set(config.model.modalities))
    if taken:
        raise ValueError(
            f"Modality {', '.join(map(repr, taken))} has the name of a metric of every run. Rename the column."
        )
    metrics = ("loss", *config.model.source_names)
    if config.training.monitor not in metrics:
        raise ValueError(
            f"training.monitor: unknown validation metric {config.training.monitor!r}. Available: {', '.join(metrics)}."
        )
    if dataset.split(config.data.val_split).observed.get(config.training.monitor) == 0:
        raise ValueError(
            f"training.monitor = {config.training.monitor!r}, but no row of split {config.data.val_split!r} has that "
            "modality. Choose another metric, or another data.val_split."
        )


def blank_model(config: DMVAEConfig) -> DMVAE:
    """Build a model without memory for its weights, and try out what own code returns.

    Own code that cannot be built or run without memory is built on the CPU.

    Raises:
        ValueError: if the model is too large, or own code fails or returns something else than the model takes.
    """
    try:
        with torch.device("meta"), warnings.catch_warnings():
            warnings.simplefilter("ignore")  # what own code copies into such weights is lost
            return _checked(config)
    except OwnCodeError:
        with torch.random.fork_rng(devices=[]):
            return _checked(config)
    except (TypeError, RuntimeError) as error:  # what torch raises for sizes beyond 64 bits
        reason = str(error).splitlines()[0]
        raise ValueError(f"The model is too large: {reason}. Lower its dimensions.") from None


def start_weights(model: DMVAE, config: TrainConfig) -> tuple[str, ...]:
    """Copy the weights at `init_from`, if it is set; return the parts of the model that start anew nevertheless.

    Raises:
        ValueError: if the model there, or a part of it, does not fit.
    """
    if config.init_from is None:
        return ()
    return start_from(model, DMVAE.load(config.init_from, trust=trusted(config.model)), config.init_map)


def _checked(config: DMVAEConfig) -> DMVAE:
    model, paths = DMVAE(config), own_code_of(config)
    for name in config.modalities:
        dims = dimensions(config, name, model.likelihoods[name])
        if f"decoders_dist.{name}" in paths:
            check_likelihood(model.likelihoods[name], name)
        networks = {"encoder": model.encoders[name], "decoder": model.decoders[name]}
        own = {part for part in ("name", *networks) if f"architectures.{name}.{part}" in paths}
        if own:
            tried = networks if "name" in own else {part: networks[part] for part in sorted(own)}
            check_networks(tried, dims, name, torch.zeros(()), name in config.missing_cells)
    return model
