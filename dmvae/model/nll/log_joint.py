"""The joint density p(x_A, u) of rows that have the same modalities A, in their latents u = (z_s, z_i for i in A)."""

import math
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import torch
from jaxtyping import Float, Int64
from torch import Tensor

from dmvae.distributions.gaussian import DiagGaussian, log_prior
from dmvae.distributions.likelihoods import Likelihood, log_prob_each
from dmvae.nn.batched import decode_each, decoder_layout, group_by_layout

Decode = Callable[[Tensor], Tensor]
_CACHED_NUMBERS = 2**19
"""Decoder outputs computed at once: those that fit a core's cache are done sooner."""
_DIFFERENCE = 1e-3  # step in a latent's unit, where a decoder has no forward-mode derivative


@dataclass(frozen=True, eq=False)
class ModalityTerm:
    """One modality of a group of rows that all have it.

    Attributes:
        place: names the modality's noise.
        values: `(rows, *shape)`, as `Likelihood.observe` gives them.
        private: q(z_i | x_i), in float64.
        decode: [z_s, z_i] in the decoder's type to the likelihood's parameters.
        likelihood: of the modality.
        dtype: the decoder's floating-point type.
        forward_mode: whether the decoder has forward-mode derivatives.
        cells: `(rows, *shape)`, which values are observed; None: all of them.
    """

    place: int
    values: Tensor
    private: DiagGaussian
    decode: Decode
    likelihood: Likelihood
    dtype: torch.dtype
    forward_mode: bool
    cells: Tensor | None = None

    @property
    def decoded_numbers(self) -> int:
        """Numbers that the decoder returns for one row."""
        return math.prod(self.likelihood.output_shape)

    def linearise(
        self, z: Float[Tensor, "row latent"]
    ) -> tuple[Float[Tensor, " row"], Float[Tensor, "row latent"], Float[Tensor, "row latent latent"]]:
        """Return log p(x_i | z), J' score and J' F J at one point [z_s, z_i] of every row."""
        output, tangents = (_push_forward if self.forward_mode else _differences)(self.decode, z.to(self.dtype))
        if self.cells is not None:
            # score and information are those of each element: without its tangents a missing one has neither
            tangents = tangents.masked_fill(~self.likelihood.output_cells(self.cells).unsqueeze(1), 0.0)
        score = self.likelihood.score(output, self.values)
        gradient = (tangents.flatten(2) @ score.flatten(1).unsqueeze(-1)).squeeze(-1)
        information = self.likelihood.information(tangents, output, self.values)
        (log_p,) = log_prob_each([self.likelihood], output.unsqueeze(0), [self.values], [self.cells])
        return log_p.double(), gradient.double(), information.double()


@dataclass(frozen=True, eq=False)
class PatternRows:
    """Rows that have the same modalities A, as the estimators use them.

    Attributes:
        keys: names of the rows' noise.
        shared: q(z_s | x_A), in float64.
        terms: one per modality in A.
    """

    keys: Int64[Tensor, " row"]
    shared: DiagGaussian
    terms: tuple[ModalityTerm, ...]

    def __len__(self) -> int:
        return len(self.keys)

    def select(self, rows: Int64[Tensor, " chosen"]) -> "PatternRows":
        """Return some of the rows."""
        terms = (
            replace(
                term,
                values=term.values.index_select(0, rows),
                private=_select(term.private, rows),
                cells=None if term.cells is None else term.cells.index_select(0, rows),
            )
            for term in self.terms
        )
        return PatternRows(self.keys[rows], _select(self.shared, rows), tuple(terms))

    @property
    def blocks(self) -> tuple[slice, ...]:
        """The slices of z_s and of each z_i in u."""
        sizes = [part.mean.shape[1] for part in (self.shared, *(term.private for term in self.terms))]
        ends = [sum(sizes[: i + 1]) for i in range(len(sizes))]
        return tuple(slice(end - size, end) for size, end in zip(sizes, ends, strict=True))

    @property
    def probes(self) -> int:
        """Decoder rows that a linearisation takes, of the modality that takes most: 1 + dim(z_s) + dim(z_i)."""
        return 1 + self.shared.mean.shape[1] + max(term.private.mean.shape[1] for term in self.terms)

    def log_joint(self, latents: Float[Tensor, "row draw latent"]) -> Float[Tensor, "row draw"]:
        """Return log p(u) + sum_i log p(x_i | u) of every draw."""
        total = log_prior(latents)
        kinds = {str(place): decoder_layout(term.decode) for place, term in enumerate(self.terms)}
        for family in group_by_layout(kinds):
            places = [int(place) for place in family]
            terms, width = [self.terms[place] for place in places], self.terms[places[0]].decoded_numbers
            at_once = max(1, _CACHED_NUMBERS // (latents.shape[1] * len(terms) * width))
            for start in range(0, len(latents), at_once):
                rows = slice(start, start + at_once)
                total[rows] += _log_likelihood(terms, _inputs(latents[rows], self.blocks, places, terms[0].dtype), rows)
        return total

    def linearise(
        self, latents: Float[Tensor, "row latent"]
    ) -> tuple[Float[Tensor, " row"], Float[Tensor, "row latent"], Float[Tensor, "row latent latent"]]:
        """Return -log p(x_A, u), its gradient and its Gauss-Newton curvature H."""
        energy, gradient = -log_prior(latents), latents.clone()
        hessian = torch.diag_embed(torch.ones_like(latents))
        places = torch.arange(latents.shape[1], device=latents.device)
        shared, *private = (places[block] for block in self.blocks)
        for term, own in zip(self.terms, private, strict=True):
            here = torch.cat((shared, own))
            log_p, slope, information = term.linearise(latents[:, here])
            energy = energy - log_p
            gradient[:, here] -= slope
            hessian[:, here.unsqueeze(1), here] += information
        return energy, gradient, hessian


def _inputs(
    latents: Float[Tensor, "row draw latent"], blocks: Sequence[slice], places: Sequence[int], dtype: torch.dtype
) -> Float[Tensor, "member row draw input"]:
    """Return [z_s, z_i] for the decoders of some of the terms, in their type."""
    shared, *private = (latents[..., block] for block in blocks)
    chosen = [private[place] for place in places]
    size = shared.shape[-1]
    z = latents.new_empty(len(chosen), *latents.shape[:2], size + chosen[0].shape[-1], dtype=dtype)
    z[..., :size] = shared
    for member, own in enumerate(chosen):
        z[member, ..., size:] = own
    return z


def _log_likelihood(
    terms: Sequence[ModalityTerm], z: Float[Tensor, "member row draw latent"], rows: slice
) -> Float[Tensor, "row draw"]:
    """Return the sum over modalities whose decoders run as one of log p(x_i | z_s, z_i) of some rows' draws."""
    output = decode_each([term.decode for term in terms], z.flatten(1, 2))
    output = output.reshape(*z.shape[:3], *output.shape[2:])
    values = [term.values[rows].unsqueeze(1) for term in terms]
    cells = [None if term.cells is None else term.cells[rows].unsqueeze(1) for term in terms]
    return log_prob_each([term.likelihood for term in terms], output, values, cells).double().sum(0)


def has_forward_mode(decode: Decode, z: Float[Tensor, "row latent"]) -> bool:
    """Tell whether a decoder has forward-mode derivatives, by trying it on `z`."""
    try:
        with warnings.catch_warnings():
            # on its first forward-mode derivative torch scripts decompositions of its own, and warns of doing so
            warnings.filterwarnings("ignore", message=".*torch.jit.script", category=DeprecationWarning)
            _push_forward(decode, z)
    # raised for an operation without a forward-mode or batching rule; any other error returns on the next call
    except RuntimeError:
        return False
    return True


def _push_forward(decode: Decode, z: Float[Tensor, "row latent"]) -> tuple[Tensor, Tensor]:
    """Return the output `(row, *out)` and its derivatives `(row, latent, *out)`, exactly."""

    def push(direction: Tensor) -> tuple[Tensor, Tensor]:
        pair = torch.func.jvp(decode, (z,), (direction.expand_as(z),))
        return pair[0], pair[1]

    basis = torch.eye(z.shape[1], dtype=z.dtype, device=z.device)
    # the output is the same for every direction; torch's annotation forgets that None says so
    output, tangents = torch.func.vmap(push, out_dims=(None, 1))(basis)  # type: ignore[arg-type]
    return output, tangents


def _differences(decode: Decode, z: Float[Tensor, "row latent"]) -> tuple[Tensor, Tensor]:
    """Return the output and its derivatives like `_push_forward`, by finite differences."""
    output = decode(z)
    steps = _DIFFERENCE * torch.eye(z.shape[1], dtype=z.dtype, device=z.device)
    moved = decode((z.unsqueeze(1) + steps).flatten(0, 1)).reshape(*z.shape, *output.shape[1:])
    return output, (moved - output.unsqueeze(1)) / _DIFFERENCE


def _select(gaussian: DiagGaussian, rows: Int64[Tensor, " chosen"]) -> DiagGaussian:
    return DiagGaussian(gaussian.mean[rows], gaussian.log_var[rows])
