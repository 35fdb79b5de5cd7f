"""What is refused before work begins: rows, models and measures that do not go together."""

import torch

from dmvae.config.evaluation import EvaluationConfig
from dmvae.config.likelihoods import values_of
from dmvae.config.model import DMVAEConfig
from dmvae.config.training import TrainConfig
from dmvae.data.reading.dataset import Dataset
from dmvae.data.reading.loader import read_rows
from dmvae.data.reading.split import Split
from dmvae.distributions.likelihoods import Likelihood, build
from dmvae.evaluation.suite import check_labels
from dmvae.model.dmvae import DMVAE


def check_data(config: TrainConfig, dataset: Dataset) -> None:
    """Check the rows that a run reads: `Split.verify`, that ids occur once, `check_support`, `check_measures`.

    Args:
        config: resolved.
        dataset: its.

    Raises:
        ValueError: naming the split or shard, the column and the first such row.
    """
    for name in (config.data.train_split, config.data.val_split, config.evaluation.split):
        split = dataset.split(name)
        split.verify()
        split.check_ids()
        check_support(config.model, split, torch.float64 if config.training.precision == "float64" else torch.float32)
    check_measures(config.model, config.evaluation, dataset, config.data.train_split)


def check_support(config: DMVAEConfig, split: Split, dtype: torch.dtype = torch.float32) -> None:
    """Check that observed values are such as the likelihoods can judge, where reading does not promise it.

    Raises:
        ValueError: naming the modality, its likelihood and the first row.
    """
    likelihoods = {name: build(config, name) for name in config.modalities}
    # stored values are finite; uint8 is in [0, 1] when read
    doubtful = [
        name
        for name, info in split.manifest.modalities.items()
        if info.dtype == "float64"
        or (
            likelihoods[name].support != Likelihood.support
            and not (info.dtype == "uint8" and values_of(config.distributions[name]) == "unit")
        )
    ]

    def fits(name: str, values: torch.Tensor) -> bool:
        # what float64 holds may be infinite in float32
        return bool(torch.isfinite(values).all()) and likelihoods[name].in_support(values)

    for _, batch in read_rows(split, 8192, dtype=dtype) if doubtful else ():
        for name in doubtful:
            mask = (batch.masks or {}).get(name, torch.ones(len(batch), dtype=torch.bool))
            if fits(name, batch.data[name][mask]):
                continue
            row = next(i for i in mask.nonzero().flatten().tolist()
                       if not fits(name, batch.data[name][i]))  # fmt: skip
            assert batch.ids is not None
            raise ValueError(
                f"Value outside the support of the {config.distributions[name]} likelihood "
                f"({likelihoods[name].support}, finite in {dtype}): split {split.name!r}, column {name!r}, "
                f"id {batch.ids[row]}. Choose another likelihood for it, or correct the data."
            )


def check_measures(config: DMVAEConfig, evaluation: EvaluationConfig, dataset: Dataset, train_split: str) -> None:
    """Check that what is to be judged can be, before the work that it comes after.

    Raises:
        ValueError: for a modality that the model has not, or a measure that needs labels where there are none.
    """
    known = config.modalities
    unknown = [name for name in evaluation.modalities or () if name not in known]
    if unknown or evaluation.modalities == ():
        raise ValueError(
            f"evaluation.modalities names modalities of the model, {list(known)}; got {unknown or 'none'}. "
            "Leave it out for all."
        )
    if {"coherence", "probes"} & set(evaluation.measures):
        check_labels(dataset.split(train_split), dataset.split(evaluation.split))


def check_fit(model: DMVAE, dataset: Dataset) -> None:
    """Check that a model has the modalities and shapes of a dataset.

    Raises:
        ValueError: saying what differs.
    """
    found, own = dict(dataset.manifest.input_dims), model.config.shapes
    if found != own:
        raise ValueError(f"a model is judged on data of its own modalities {own}; {dataset.where} has {found}.")
