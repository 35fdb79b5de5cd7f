"""The common part of likelihoods of counts: size factors, and means proportional to them."""

import math

import torch
from jaxtyping import Float
from torch import Tensor

from dmvae.distributions.likelihoods.likelihood import Likelihood


class Counts(Likelihood):
    """Counts 0, 1, 2, ... with the decoder's output as the logarithm of their mean at size factor 1.

    `observe` returns `(rows, size + 1)`: the flattened counts, then the logarithm of the row's size factor, which is
    added to the output. Counts without a size factor take their total.

    Args:
        shape: of one row.
        size_factor: of rows for which none is known, because they lack the modality.
        rate: mean of an element at size factor 1, where the decoder starts; a start far from it makes training slow
            and its result worse. None: 1 / size.
    """

    support = "whole numbers of 0 or more"
    are_counts = True

    def __init__(self, shape: tuple[int, ...], size_factor: float = 1.0, rate: float | None = None) -> None:
        super().__init__(shape)
        self.size_factor = float(size_factor)
        self.start = -math.log(math.prod(shape)) if rate is None else math.log(rate)

    def observe(self, value: Tensor, size_factors: Tensor | None) -> Tensor:
        """Return the counts, and the logarithm of the size factor: where it is not known, of the row's total or 1."""
        counts = value.flatten(1)
        sizes = counts.sum(1).clamp(min=1)
        if size_factors is not None:
            sizes = torch.where(size_factors.isnan(), sizes, size_factors)
        return torch.cat((counts, sizes.log().unsqueeze(1)), dim=1)

    def mean(self, output: Tensor) -> Tensor:
        """Return the mean at `size_factor`."""
        return self.size_factor * output.exp()

    def mean_at(self, output: Float[Tensor, "..."], size_factors: Float[Tensor, " row"]) -> Tensor:
        """Return the size factor times exp of the output."""
        return output.exp() * size_factors.view(-1, *(1 for _ in self.shape))

    def sample(self, output: Tensor, generator: torch.Generator | None = None) -> Tensor:
        """Draw counts at `size_factor`."""
        return torch.poisson(self.mean(output), generator=generator)

    def sample_at(
        self,
        output: Float[Tensor, "..."],
        size_factors: Float[Tensor, " row"],
        generator: torch.Generator | None = None,
    ) -> Tensor:
        """Draw counts at the rows' size factors."""
        shift = (size_factors / self.size_factor).log().view(-1, *(1 for _ in self.shape))
        return self.sample(output + shift, generator)

    def in_support(self, value: Tensor) -> bool:
        """Tell whether every value is a whole number of 0 or more."""
        return bool(((value >= 0) & (value == value.floor()) & value.isfinite()).all())

    def _flat(self, cells: Tensor) -> Tensor:
        return cells.flatten(-len(self.shape))

    def _split(self, output: Tensor, value: Tensor) -> tuple[Tensor, Tensor]:
        """Return flat counts and the logarithm of their means."""
        size = math.prod(self.shape)
        if value.shape[-1] != size + 1:
            leading = value.shape[: value.dim() - len(self.shape)]
            value = self.observe(value.reshape(-1, *self.shape).to(output.dtype), None).view(*leading, size + 1)
        return value[..., :-1], output.flatten(-len(self.shape)) + value[..., -1:]
