"""Tables: independent columns, each with the distribution of its kind."""

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial, reduce

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from dmvae.distributions.likelihoods.bernoulli import Bernoulli
from dmvae.distributions.likelihoods.categorical import Categorical
from dmvae.distributions.likelihoods.likelihood import Likelihood
from dmvae.distributions.likelihoods.location_scale import SCALE_FLOOR
from dmvae.distributions.likelihoods.negative_binomial import NegativeBinomial
from dmvae.distributions.likelihoods.normal import Normal
from dmvae.distributions.likelihoods.registry import register

UNSEEN_PROBABILITY = 1e-3
"""Probability of a class that no training row has. Data cannot tell it, so the decoder does not either."""


@dataclass(frozen=True)
class _Part:
    """Columns with the same likelihood.

    Attributes:
        likelihood: of these columns.
        columns: their places in the table, the name of a buffer.
        output: their slice of the decoder's output.
    """

    likelihood: Likelihood
    columns: str
    output: slice

    def of(self, output: Tensor) -> Tensor:
        """Return this part's output in the likelihood's shape."""
        own = output[..., self.output]
        return own.reshape(*own.shape[:-1], *self.likelihood.output_shape)


class Columns(Likelihood):
    """A table's row: the product of the distributions of its columns.

        real, positive   normal, with a scale of its own that is learned (positive values are read as logarithms)
        count            negative binomial, with a dispersion of its own that is learned
        binary           Bernoulli
        category         categorical, and one class more for what no training row has

    Values are floats `(rows, columns)`; classes are numbered from 0, and the class "unseen in training" comes last.
    The decoder's output has the locations, the log-means, the logits of binary columns, then those of categories,
    which are ordered by their number of classes.

    Args:
        shape: of one row, (columns,).
        kinds: the kind of each column.
        classes: the number of classes that training rows have, for each column that is a category.
        rates: the mean of each column of counts, at which the decoder starts (default: 1).
        scale_floor: as of `LocationScale`.
    """

    support = "whole numbers of 0 or more in counts, 0 or 1 in binary columns, numbers of classes in categories"

    def __init__(
        self,
        shape: tuple[int, ...],
        kinds: Sequence[str],
        classes: Sequence[int] = (),
        rates: Sequence[float] = (),
        scale_floor: float | int = SCALE_FLOOR,
    ) -> None:
        super().__init__(shape)
        if shape != (len(kinds),):
            raise ValueError(f"kinds must have one kind for each column, but got {len(kinds)} for shape {shape}.")
        self.kinds, self.num_classes = tuple(kinds), tuple(classes)
        places = {kind: [place for place, found in enumerate(kinds) if found == kind] for kind in set(kinds)}
        numbers = sorted([*places.get("real", []), *places.get("positive", [])])
        counts, categories = places.get("count", []), dict(zip(places.get("category", []), classes, strict=True))
        groups: list[tuple[list[int], Callable[[tuple[int, ...]], Likelihood]]] = [
            (numbers, partial(Normal, scale="learned_per_feature", scale_floor=scale_floor)),
            (counts, NegativeBinomial),
            (places.get("binary", []), Bernoulli),
        ]
        groups += [
            ([place for place, own in categories.items() if own == num], partial(_Category, classes=num))
            for num in sorted(set(classes))
        ]
        self.parts: list[_Part] = []
        start = 0
        for number, (columns, build) in enumerate(group for group in groups if group[0]):
            likelihood = build((len(columns),))
            self.add_module(f"part_{number}", likelihood)
            self.register_buffer(f"columns_{number}", torch.tensor(columns), persistent=False)
            stop = start + math.prod(likelihood.output_shape)
            self.parts.append(_Part(likelihood, f"columns_{number}", slice(start, stop)))
            start = stop
        self.output_shape = (start,)
        self.rate_factor = max(part.likelihood.rate_factor for part in self.parts)
        logs = [math.log(rate) for rate in rates] or [0.0] * len(counts)
        self.start = (*[0.0] * len(numbers), *logs, *[0.0] * (start - len(numbers) - len(logs)))

    def log_prob(self, output: Tensor, value: Tensor, cells: Tensor | None = None) -> Float[Tensor, "..."]:
        """Return the log-density or log-probability in nats, summed over columns."""
        each = (
            part.likelihood.log_prob(own, its, None if cells is None else cells[..., self._buffers[part.columns]])
            for part, own, its in self._each(output, value)
        )
        return reduce(torch.add, each)

    def output_cells(self, cells: Bool[Tensor, "..."]) -> Bool[Tensor, "..."]:
        """Return which numbers of the output are parameters of observed cells."""
        parts = []
        for part in self.parts:
            own = part.likelihood.output_cells(cells[..., self._buffers[part.columns]])
            parts.append(own.expand(*cells.shape[:-1], *part.likelihood.output_shape).flatten(cells.dim() - 1))
        return torch.cat(parts, dim=-1)

    def mean(self, output: Tensor) -> Tensor:
        """Return the mean of each column `(..., columns)`; of a category, the most probable class."""
        found = output.new_empty(*output.shape[:-1], *self.shape)
        for part in self.parts:
            own = part.of(output)
            is_category = isinstance(part.likelihood, _Category)
            means = own.argmax(-1).to(output.dtype) if is_category else part.likelihood.mean(own)
            found[..., self._buffers[part.columns]] = means
        return found

    def probabilities(self, output: Tensor) -> dict[int, Float[Tensor, "... class"]]:
        """Return the probabilities of the classes of each binary column and category, by the column's place."""
        found: dict[int, Tensor] = {}
        for part in self.parts:
            own = part.of(output)
            if isinstance(part.likelihood, Bernoulli):
                each = torch.stack((torch.sigmoid(-own), torch.sigmoid(own)), dim=-1)
            elif isinstance(part.likelihood, _Category):
                each = torch.softmax(own, dim=-1)
            else:
                continue
            columns = self._buffers[part.columns]
            assert columns is not None
            found |= dict(zip(columns.tolist(), each.unbind(-2), strict=True))
        return found

    def sample(self, output: Tensor, generator: torch.Generator | None = None) -> Tensor:
        """Draw values; never a class that no training row has."""
        found = output.new_empty(*output.shape[:-1], *self.shape)
        for part in self.parts:
            drawn = part.likelihood.sample(part.of(output), generator)
            found[..., self._buffers[part.columns]] = drawn.to(output.dtype)
        return found

    def initialize(self, value: Float[Tensor, "row ..."], cells: Bool[Tensor, "row ..."] | None = None) -> None:
        """Start every scale at the deviation of training rows."""
        for part in self.parts:
            columns = self._buffers[part.columns]
            part.likelihood.initialize(value[..., columns], None if cells is None else cells[..., columns])

    def in_support(self, value: Tensor) -> bool:
        """Tell whether every value is one of its column's kind."""
        return all(part.likelihood.in_support(value[..., self._buffers[part.columns]]) for part in self.parts)

    def score(self, output: Float[Tensor, "row ..."], value: Tensor) -> Float[Tensor, "row ..."]:
        """Return the scores of the columns, in the output's order."""
        return torch.cat(
            [part.likelihood.score(own, its).flatten(1) for part, own, its in self._each(output, value)], dim=1
        )

    def information(
        self, tangents: Float[Tensor, "row tangent ..."], output: Float[Tensor, "row ..."], value: Tensor
    ) -> Float[Tensor, "row tangent tangent"]:
        """Return the sum of J' F J over columns, which are independent given the output."""
        each = (
            part.likelihood.information(part.of(tangents), own, its) for part, own, its in self._each(output, value)
        )
        return reduce(torch.add, each)

    def _each(self, output: Tensor, value: Tensor) -> Iterator[tuple[_Part, Tensor, Tensor]]:
        """Yield each part with its output and its values, as its likelihood takes them."""
        for part in self.parts:
            own = value[..., self._buffers[part.columns]]
            if part.likelihood.are_counts:  # at size factor 1, whose logarithm is 0
                own = torch.cat((own, torch.zeros_like(own[..., :1])), dim=-1)
            yield part, part.of(output), own


class _Category(Categorical):
    """Categories as floats; the class number `classes` stands for all that no training row has."""

    def log_prob(self, output: Tensor, value: Tensor, cells: Tensor | None = None) -> Float[Tensor, "..."]:
        """Return the log-probability in nats, summed over columns."""
        log_p = torch.log_softmax(output, dim=-1)
        place = value.long().clamp(max=self.classes - 1).unsqueeze(-1) + torch.zeros_like(log_p[..., :1]).long()
        known = log_p.expand(*place.shape[:-1], self.classes).gather(-1, place).squeeze(-1)
        known = known + math.log1p(-UNSEEN_PROBABILITY)
        return self._sum(torch.where(self._is_known(value), known, math.log(UNSEEN_PROBABILITY)), cells)

    def in_support(self, value: Tensor) -> bool:
        """Tell whether every value is one of the classes, or the one for the rest."""
        return bool(((value >= 0) & (value <= self.classes) & (value == value.floor())).all())

    def score(self, output: Float[Tensor, "row ..."], value: Tensor) -> Float[Tensor, "row ..."]:
        """Return onehot(x) - p, and 0 for a class that no training row has."""
        score = super().score(output, value.long().clamp(max=self.classes - 1))
        return score * self._is_known(value).unsqueeze(-1)

    def information(
        self, tangents: Float[Tensor, "row tangent ..."], output: Float[Tensor, "row ..."], value: Tensor
    ) -> Float[Tensor, "row tangent tangent"]:
        """Return J' (diag(p) - p p') J, and 0 for a class that no training row has."""
        known = self._is_known(value).unsqueeze(1).unsqueeze(-1)
        return super().information(tangents * known, output, value)

    def _is_known(self, value: Tensor) -> Tensor:
        return value < self.classes


register("columns", Columns)
