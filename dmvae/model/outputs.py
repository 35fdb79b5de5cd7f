"""The results that a model returns."""

from dataclasses import dataclass
from typing import Any

from jaxtyping import Float
from torch import Tensor

from dmvae.model.loss import TermSums


@dataclass(frozen=True, eq=False)
class DMVAEOutput:
    """The result of a forward pass.

    Attributes:
        loss: mean over all rows of the row loss, in nats.
        row_loss: per row, in nats; the sum of the negative ELBOs of its sources.
        terms: the named terms as sums and counts, which add over batches and workers.
    """

    loss: Float[Tensor, ""]
    row_loss: Float[Tensor, " row"]
    terms: TermSums

    @property
    def metrics(self) -> dict[str, Tensor]:
        """The mean of each named term, in nats per row."""
        return self.terms.means()


class ModelOutput(dict[str, Any]):
    """Named results, by key and by attribute."""

    def __getattribute__(self, name: str) -> Any:
        # before a dict's own methods: a modality may be called `values`
        return self[name] if name in self else super().__getattribute__(name)

    def __getattr__(self, name: str) -> Any:
        raise AttributeError(f"No result {name!r}. Available: {', '.join(sorted(self))}.")
