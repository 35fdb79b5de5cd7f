"""Categories, of rows that may be padded."""

import math

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor

from dmvae.distributions.likelihoods.likelihood import Likelihood, gram
from dmvae.distributions.likelihoods.registry import register


class Categorical(Likelihood):
    """Independent categories, int64 in [0, classes), with logits in the output's last dimension.

    Elements of the class `pad` fill up rows that are shorter than others. They count as missing, and the class has
    probability 0.
    """

    support = "whole numbers from 0 to classes - 1"
    classes: int

    def __init__(self, shape: tuple[int, ...], classes: int, pad: int | None = None) -> None:
        super().__init__(shape)
        self.classes, self.pad = classes, pad
        self.output_shape = (*shape, classes)

    def log_prob(self, output: Tensor, value: Tensor, cells: Tensor | None = None) -> Float[Tensor, "..."]:
        """Return the log-probability in nats, summed over the modality's elements."""
        log_p = torch.log_softmax(self._without_pad(output), dim=-1)
        place = value.unsqueeze(-1) + torch.zeros_like(log_p[..., :1], dtype=torch.int64)
        elements = log_p.expand(*place.shape[:-1], self.classes).gather(-1, place)
        if self.pad is not None:
            elements = elements.masked_fill(place == self.pad, 0.0)
        return self._sum(elements.squeeze(-1), cells)

    def in_support(self, value: Tensor) -> bool:
        """Tell whether every value is one of the classes."""
        return bool(((value >= 0) & (value < self.classes)).all())

    def mean(self, output: Tensor) -> Tensor:
        """Return the probabilities of the classes, in the last dimension."""
        return torch.softmax(self._without_pad(output), dim=-1)

    def sample(self, output: Tensor, generator: torch.Generator | None = None) -> Tensor:
        """Draw a class for every element; never `pad`."""
        p = self.mean(output)
        return torch.multinomial(p.flatten(0, -2), 1, generator=generator).view(p.shape[:-1])

    def likeliest(self, output: Tensor, value: Tensor | None = None) -> Tensor:
        """Return the most probable class of every element, and padding where `value` has it."""
        found = self._without_pad(output).argmax(-1)
        return found if self.pad is None or value is None else torch.where(value == self.pad, self.pad, found)

    def score(self, output: Float[Tensor, "row ..."], value: Tensor) -> Float[Tensor, "row ..."]:
        """Return onehot(x) - p, and 0 for padding."""
        score = F.one_hot(value, self.classes) - self.mean(output)
        return score if self.pad is None else score.masked_fill((value == self.pad).unsqueeze(-1), 0.0)

    def information(
        self, tangents: Float[Tensor, "row tangent ..."], output: Float[Tensor, "row ..."], value: Tensor
    ) -> Float[Tensor, "row tangent tangent"]:
        """Return J' (diag(p) - p p') J, which is the covariance of the rows of J under p."""
        p = self.mean(output).unsqueeze(1)
        if self.pad is not None:
            p = p.masked_fill((value == self.pad).unsqueeze(1).unsqueeze(-1), 0.0)
        centred = tangents - (p * tangents).sum(-1, keepdim=True)
        return gram(centred * p.sqrt())

    def _without_pad(self, output: Tensor) -> Tensor:
        if self.pad is None:
            return output
        return output.index_fill(-1, torch.tensor([self.pad], device=output.device), -math.inf)


register("categorical", Categorical)
