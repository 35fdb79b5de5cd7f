"""Check before any work begins that data, model and measures fit together."""

import torch

from dmvae.config.evaluation import EvaluationConfig
from dmvae.config.likelihoods import values_of
from dmvae.config.model import DMVAEConfig
from dmvae.config.training import TrainConfig
from dmvae.data.batch import Batch, has
from dmvae.data.reading.dataset import Dataset
from dmvae.data.reading.loader import read_rows
from dmvae.data.reading.split import Split
from dmvae.distributions.likelihoods import Likelihood, build
from dmvae.evaluation import measures
from dmvae.model.dmvae import DMVAE


def check_data(config: TrainConfig, dataset: Dataset) -> None:
    """Check every split that a run reads: checksums, unique ids, values that its likelihoods support, and measures.

    Args:
        config: resolved.
        dataset: the one that `config` names.

    Raises:
        ValueError: naming the split or shard, the column and the first invalid row.
    """
    for name in (config.data.train_split, config.data.val_split, config.evaluation.split):
        split = dataset.split(name)
        split.verify()
        split.check_ids()
        check_support(config.model, split, torch.float64 if config.training.precision == "float64" else torch.float32)
    check_measures(config.model, config.evaluation, dataset, config.data.train_split)


def check_support(config: DMVAEConfig, split: Split, dtype: torch.dtype = torch.float32) -> None:
    """Check that every observed value is in the support of its likelihood.

    Raises:
        ValueError: naming the modality, its likelihood and the first row.
    """
    likelihoods = {name: build(config, name) for name in config.modalities}
    # stored values are finite, and uint8 is in [0, 1] when read
    to_check = [
        name
        for name, info in split.manifest.modalities.items()
        if info.dtype == "float64"
        or (
            likelihoods[name].support != Likelihood.support
            and not (info.dtype == "uint8" and values_of(config.distributions[name]) == "unit")
        )
    ]
    for _, batch in read_rows(split, 8192, dtype=dtype) if to_check else ():
        for name in to_check:
            row = _first_outside_support(batch, name, likelihoods[name])
            if row is not None:
                assert batch.ids is not None
                raise ValueError(
                    f"Value outside the support of the {config.distributions[name]} likelihood "
                    f"({likelihoods[name].support}, finite in {dtype}): split {split.name!r}, column {name!r}, "
                    f"id {batch.ids[row]}. Choose another likelihood for it, or correct the data."
                )


def _first_outside_support(batch: Batch, name: str, likelihood: Likelihood) -> int | None:
    """Return the index of the first row whose observed value the likelihood does not support."""
    observed, values = has(batch, name), batch.data[name]

    def fits(values: torch.Tensor) -> bool:
        # what float64 holds may be infinite in float32
        return bool(torch.isfinite(values).all()) and likelihood.in_support(values)

    if fits(values[observed]):
        return None
    rows: list[int] = observed.nonzero().flatten().tolist()
    return next(row for row in rows if not fits(values[row]))


def check_measures(config: DMVAEConfig, evaluation: EvaluationConfig, dataset: Dataset, train_split: str) -> None:
    """Check that an evaluation can be run, before the work that precedes it.

    Raises:
        ValueError: if a modality or a measure is unknown, or a measure needs labels that the dataset lacks.
    """
    unknown = [name for name in evaluation.modalities or () if name not in config.modalities]
    if unknown:
        raise ValueError(
            f"Unknown modalities in evaluation.modalities: {unknown}. The model has {list(config.modalities)}."
        )
    if evaluation.modalities == ():
        raise ValueError("evaluation.modalities must not be empty. Remove it to evaluate all modalities.")
    measures.check(evaluation.measures, dataset.split(train_split), dataset.split(evaluation.split))


def check_fit(model: DMVAE, dataset: Dataset) -> None:
    """Check that a model and a dataset have the same modalities and shapes, and that the model reads missing cells.

    Raises:
        ValueError: naming both.
    """
    found, expected = dict(dataset.manifest.input_dims), model.config.shapes
    if found != expected:
        raise ValueError(
            f"The dataset {dataset.where} does not fit the model: expected modalities {expected}, but got {found}. "
            "Choose the dataset that the model was trained on."
        )
    unread = sorted(set(dataset.manifest.missing_cells) - set(model.config.missing_cells))
    if unread:
        raise ValueError(
            f"The dataset {dataset.where} has missing cells in {unread}, but the model was trained on rows that have "
            f"all cells. Train it on this dataset, or prepare the dataset with partial = 'drop'."
        )
