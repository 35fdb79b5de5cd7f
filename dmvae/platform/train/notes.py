"""What a user should know of a run before it starts."""

from collections.abc import Iterator

from torch import nn

from dmvae.config.training import TrainConfig
from dmvae.data.reading.dataset import Dataset
from dmvae.data.reading.split import Split
from dmvae.training.settings import blank_model, start_weights


def notes(config: TrainConfig, dataset: Dataset, device: str) -> Iterator[str]:
    """Yield lines about a resolved configuration and its data.

    Args:
        config: resolved.
        dataset: the one that `config` names.
        device: `GPU` or `CPU`.
    """
    model = blank_model(config.model)
    new = start_weights(model, config)
    if new:
        yield f"note: {', '.join(new)} start anew, all else from {config.init_from}"
    if any(isinstance(layer, nn.modules.dropout._DropoutNd) for layer in model.modules()):
        yield "note: With dropout, the result depends on the number of workers"
    if device == "CPU" and config.training.precision == "bfloat16":
        yield "note: bfloat16 saves no time on CPUs"
    validation = dataset.split(config.data.val_split)
    unseen = [name for name, number in validation.observed.items() if number == 0]
    if unseen:
        yield f"note: No row of split {validation.name!r} has {', '.join(unseen)}: it has no validation metrics"
    yield from _ties(dataset.split(config.data.train_split))


def _ties(split: Split) -> Iterator[str]:
    """Name the modalities that no row of a split has together."""
    apart = split.never_together()
    groups = _linked([name for name, number in split.observed.items() if number], apart)
    if len(groups) > 1:
        parts = " to ".join(", ".join(group) for group in groups)
        yield (
            f"warning: Nothing in this data ties {parts}: no row of split {split.name!r} has both, so the model cannot "
            "learn to predict one from the other"
        )
    group_of = {name: number for number, group in enumerate(groups) for name in group}
    for one, two in apart:
        if group_of[one] == group_of[two]:
            yield f"note: No row of split {split.name!r} has both {one} and {two}: only other modalities tie them"


def _linked(names: list[str], apart: list[tuple[str, str]]) -> list[list[str]]:
    """Group names that pairs connect, directly or through others; all pairs but those in `apart` do."""
    groups: list[list[str]] = []
    for name in names:
        linked = [group for group in groups if any((other, name) not in apart for other in group)]
        groups = [group for group in groups if group not in linked]
        groups.append([*(other for group in linked for other in group), name])
    return sorted((sorted(group, key=names.index) for group in groups), key=lambda group: names.index(group[0]))
