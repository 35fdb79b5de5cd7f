"""The interface of likelihoods: density, mean, draws, and the derivatives that the NLL needs."""

from collections.abc import Hashable, Sequence
from typing import ClassVar

import torch
from jaxtyping import Bool, Float
from torch import Tensor, nn

from dmvae.config.likelihoods import LikelihoodSpec

_OF_ANY_MODULE = frozenset(vars(nn.Module()))


class Likelihood(nn.Module):
    """The distribution of one modality given its decoder's output.

    Leading dimensions broadcast: an output `(sources, rows, *output_shape)` goes with values `(rows, *shape)`.

    Attributes:
        spec: what configurations know of a likelihood that is named by its import path; None: real values.
        shape: shape of one row of the modality.
        output_shape: shape that the decoder must return for one row.
        support: the legal values, in words.
        is_continuous: whether draws are real numbers, of which no two are equal.
        are_counts: whether values are counts, whose mean is proportional to the row's size factor.
        size_factor: of rows for which none is known; of counts.
        start: what the decoder's output should be close to before training; one number, or one for each element.
        classes: the number of classes, if values are classes.
        pad: the class that fills up short rows, if there is one.
        rate_factor: multiplies the learning rate of the likelihood's parameters.
    """

    spec: ClassVar[LikelihoodSpec | None] = None
    support: ClassVar[str] = "finite numbers"
    is_continuous: ClassVar[bool] = False
    are_counts: ClassVar[bool] = False
    size_factor: float = 1.0
    start: float | tuple[float, ...] = 0.0
    classes: int | None = None
    pad: int | None = None
    rate_factor: float = 1.0

    def __init__(self, shape: tuple[int, ...]) -> None:
        super().__init__()
        self.shape = shape
        self.output_shape = shape

    def log_prob(self, output: Tensor, value: Tensor, cells: Tensor | None = None) -> Float[Tensor, "..."]:
        """Return log p(value | output) in nats, summed over the modality's elements.

        With `cells`, boolean `(rows, *shape)`, it is the sum over the observed cells, those that are true. The values
        of the others are 0, and do not count.
        """
        raise NotImplementedError

    @property
    def kind(self) -> Hashable | None:
        """A key that is equal for likelihoods that are the same function; None for one with tensors of its own."""
        facts = {name: value for name, value in vars(self).items() if name not in _OF_ANY_MODULE}
        plain = all(isinstance(value, int | float | str | tuple | None) for value in facts.values())
        holds = self._parameters or self._buffers or self._modules
        return (type(self), *facts.items()) if plain and not holds else None

    def mean(self, output: Tensor) -> Tensor:
        """Return E[x | output] on the data's scale."""
        raise NotImplementedError

    def mean_at(self, output: Float[Tensor, "..."], size_factors: Float[Tensor, " row"]) -> Tensor:
        """Return E[x | output] for an output `(..., row, *shape)` and, for counts, the rows' size factors."""
        return self.mean(output)

    def likeliest(self, output: Tensor, value: Tensor | None = None) -> Tensor:
        """Return the best guess of the values: the mean, or the most probable classes, padded as `value` is."""
        return self.mean(output)

    def sample(self, output: Tensor, generator: torch.Generator | None = None) -> Tensor:
        """Draw values given the decoder's output, with its leading dimensions; counts at `size_factor`."""
        raise NotImplementedError(f"{type(self).__name__} does not define `sample`.")

    def sample_at(
        self,
        output: Float[Tensor, "..."],
        size_factors: Float[Tensor, " row"],
        generator: torch.Generator | None = None,
    ) -> Tensor:
        """Draw values for an output `(..., row, *shape)`, counts at the rows' size factors."""
        return self.sample(output, generator)

    def observe(self, value: Tensor, size_factors: Tensor | None) -> Tensor:
        """Return observed rows in the form that `log_prob`, `score` and `information` take: by default, the values."""
        return value

    def output_cells(self, cells: Bool[Tensor, "..."]) -> Bool[Tensor, "..."]:
        """Return which numbers of the output, `(..., *output_shape)`, are parameters of observed cells."""
        return cells.view(*cells.shape, *(1 for _ in self.output_shape[len(self.shape) :]))

    def initialize(self, value: Tensor, cells: Tensor | None = None) -> None:
        """Start the likelihood's parameters, if any, from training rows `(rows, *shape)` that have the modality.

        Values where `cells`, of the same shape, is false are missing.
        """

    def is_density(self, value: Tensor) -> bool:
        """Tell whether `log_prob` is a log-density or log-probability of these values."""
        return True

    def in_support(self, value: Tensor) -> bool:
        """Tell whether every value is legal, that is, has a log-likelihood."""
        return True

    def score(self, output: Float[Tensor, "row ..."], value: Tensor) -> Float[Tensor, "row ..."]:
        """Return d log p(value | output) / d output, smoothed where the density has a kink.

        Computed by automatic differentiation unless the likelihood overrides it.
        """
        with torch.enable_grad():
            leaf = output.detach().requires_grad_()
            (score,) = torch.autograd.grad(self.log_prob(leaf, value).sum(), leaf)
        return score

    def information(
        self, tangents: Float[Tensor, "row tangent ..."], output: Float[Tensor, "row ..."], value: Tensor
    ) -> Float[Tensor, "row tangent tangent"]:
        """Return J' F J of each row's tangents J of the output, F being the Fisher information in the output.

        Unless the likelihood overrides it, F is the curvature of -log p at the value, by automatic differentiation, and
        directions of negative curvature are left out.
        """
        with torch.enable_grad():
            leaf = output.detach().requires_grad_()
            (score,) = torch.autograd.grad(self.log_prob(leaf, value).sum(), leaf, create_graph=True)
            if not score.requires_grad:
                return tangents.new_zeros(*tangents.shape[:2], tangents.shape[1])
            curved = [
                torch.autograd.grad(score, leaf, tangent, retain_graph=True, materialize_grads=True)[0]
                for tangent in tangents.unbind(1)
            ]
        product = -tangents.flatten(2) @ torch.stack(curved, dim=1).flatten(2).mT
        values, vectors = torch.linalg.eigh(0.5 * (product + product.mT).nan_to_num())
        kept: Tensor = (vectors * values.clamp(min=0).unsqueeze(-2)) @ vectors.mT
        return kept

    def _sum(self, elements: Tensor, cells: Tensor | None = None) -> Tensor:
        elements = elements if cells is None else elements.masked_fill(~cells, 0.0)
        return elements.flatten(-len(self.shape)).sum(-1)


def log_prob_each(
    likelihoods: Sequence[Likelihood],
    output: Float[Tensor, "member ..."],
    values: Sequence[Tensor],
    cells: Sequence[Tensor | None],
) -> Float[Tensor, "member ..."]:
    """Return `log_prob` of each likelihood for its output, values and observed cells (None: all of them).

    It is one call if all have the same `kind` and have missing cells, or none has.
    """
    kinds, masks = {likelihood.kind for likelihood in likelihoods}, [mask for mask in cells if mask is not None]
    if len(likelihoods) == 1 or (len(kinds) == 1 and None not in kinds and len(masks) in (0, len(cells))):
        return _log_prob(likelihoods[0], output, stack(values), stack(masks) if masks else None)
    alone = zip(likelihoods, output.unbind(), values, cells, strict=True)
    return torch.stack([_log_prob(*each) for each in alone])


def _log_prob(likelihood: Likelihood, output: Tensor, value: Tensor, cells: Tensor | None) -> Tensor:
    # a registered likelihood need not know of missing cells, unless its modality has some
    return likelihood.log_prob(output, value) if cells is None else likelihood.log_prob(output, value, cells)


def stack(tensors: Sequence[Tensor]) -> Tensor:
    """Stack tensors; a single one is not copied."""
    return tensors[0].unsqueeze(0) if len(tensors) == 1 else torch.stack(list(tensors))


def gram(tangents: Float[Tensor, "row tangent ..."]) -> Float[Tensor, "row tangent tangent"]:
    """Return the inner products of each row's tangents."""
    flat = tangents.flatten(2)
    return flat @ flat.mT
