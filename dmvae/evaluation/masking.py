"""Removal of modalities from rows: at random, or more often for larger labels."""

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace
from functools import partial
from itertools import product
from typing import Literal

import torch
from jaxtyping import Bool
from torch import Tensor

from dmvae.data.batch import Batch, has
from dmvae.distributions.noise import chain, row_keys, standard_normal

Mechanism = Literal["random", "label"]


def mask_modalities(batch: Batch, *names: str) -> Batch:
    """Return a batch without some modalities."""
    return replace(
        batch,
        data={name: values for name, values in batch.data.items() if name not in names},
        masks={name: mask for name, mask in (batch.masks or {}).items() if name not in names},
        cells={name: mask for name, mask in (batch.cells or {}).items() if name not in names},
        # without any data, the ids give the number of rows
        ids=torch.arange(len(batch)) if batch.ids is None else batch.ids,
    )


def keep(batch: Batch, kept: Mapping[str, Bool[Tensor, " row"]]) -> Batch:
    """Return a batch in which modalities are missing where `kept` is False."""
    masks = {name: has(batch, name).to(values.device) & kept[name].to(values.device)
             for name, values in batch.data.items()}  # fmt: skip
    return replace(batch, masks=masks)


def remove(
    batch: Batch, rate: float | int, mechanism: Mechanism = "random", num_labels: int = 0, seed: int = 0
) -> Batch:
    """Remove each modality of each row with a probability of mean `rate`; a row can lose all of them.

    With `label` the probability grows with the label: from 0 up to rate 0.5, up to 1 above.

        p = 2 rate r                      up to rate 0.5,  r = label / (num_labels - 1)
        p = 1 - 2 (1 - rate) (1 - r)      above

    The result depends only on the seed and the row's id. A higher rate removes the same and more.

    Raises:
        ValueError: for a rate outside [0, 1], or without labels for `label`.
    """
    if not 0 <= rate <= 1:
        raise ValueError(f"rate must lie in [0, 1], but got {rate}.")
    probability = torch.full((len(batch),), float(rate), dtype=torch.float64)
    if mechanism == "label":
        if batch.labels is None or num_labels < 2:
            raise ValueError("Cannot remove modalities by label: expected labelled rows of at least two classes.")
        place = batch.labels.cpu().clamp(0, num_labels - 1).double() / (num_labels - 1)
        probability = 2 * rate * place if rate <= 0.5 else 1 - 2 * (1 - rate) * (1 - place)
    ids = torch.arange(len(batch)) if batch.ids is None else batch.ids
    names = sorted(batch.data)
    uniform = torch.special.ndtr(standard_normal(chain(seed, row_keys(ids)), len(names), dtype=torch.float64))
    return keep(batch, {name: uniform[:, place] >= probability for place, name in enumerate(names)})


@dataclass(frozen=True)
class Removal:
    """A plan of removals, to measure robustness: each mechanism at each rate."""

    mechanisms: tuple[Mechanism, ...]
    rates: tuple[float | int, ...]
    num_labels: int

    def each(self) -> Iterator[tuple[str, Callable[[Batch], Batch]]]:
        """Yield the prefix of the metrics, `missing/HOW/RATE` with the rate in percent, and the removal."""
        for mechanism, rate in product(self.mechanisms, self.rates):
            remove_so = partial(remove, rate=rate, mechanism=mechanism, num_labels=self.num_labels)
            yield f"missing/{mechanism}/{rate:.0%}".removesuffix("%"), remove_so
