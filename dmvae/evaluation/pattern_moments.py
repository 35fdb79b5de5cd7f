"""Second moments of incomplete rows, one matrix per set of modalities: all that a linear-Gaussian fit reads of them."""

import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Literal

import torch
from jaxtyping import Float, Int64
from torch import Tensor

from dmvae.data.batch import Batch

Pattern = tuple[str, ...]
"""The modalities that a row has, sorted; never empty."""
Moments = Sequence[tuple[Pattern, Float[Tensor, "_ _"]]]
"""For each pattern a matrix R with R' R = the sum over its rows of [x, 1] [x, 1]'."""
Noise = Literal["own", "one"]

_OWN_SHARE = 0.9  # of a feature's own variance in its prior variance; the rest is its modality's mean variance
_SMALLEST_START = 1e-3  # of a noise, as a share of the variance


@dataclass(frozen=True)
class Layout:
    """Where the features of each modality are when all lie side by side.

    Attributes:
        shapes: of one row of each modality, sorted by name.
    """

    shapes: Mapping[str, tuple[int, ...]]

    @cached_property
    def columns(self) -> dict[str, slice]:
        """Each modality's features."""
        sizes = [math.prod(shape) for shape in self.shapes.values()]
        ends = torch.tensor(sizes).cumsum(0).tolist()
        return {name: slice(end - size, end) for name, size, end in zip(self.shapes, sizes, ends, strict=True)}

    @property
    def num_features(self) -> int:
        """The number of features of all modalities."""
        return sum(map(math.prod, self.shapes.values()))

    def index(self, pattern: Iterable[str]) -> Int64[Tensor, " feature"]:
        """Return the columns of some modalities."""
        spans = [torch.arange(self.columns[name].start, self.columns[name].stop) for name in pattern]
        return torch.cat([torch.zeros(0, dtype=torch.int64), *spans])


def gather_moments(batches: Iterable[Batch]) -> tuple[Moments, Layout]:
    """Return the moments of each set of modalities, and how the modalities lie side by side.

    R has the rows themselves, or is a triangle when they outnumber the features: memory is bounded by the number of
    sets of modalities times the square of the number of features.

    Raises:
        ValueError: for values that are not floating-point, or a modality whose shape changes.
    """
    moments: dict[Pattern, Tensor] = {}
    shapes: dict[str, tuple[int, ...]] = {}
    for batch in batches:
        for pattern, _, values in rows_by_pattern(batch):
            for name in pattern:
                shape = tuple(batch.data[name].shape[1:])
                if shapes.setdefault(name, shape) != shape:
                    raise ValueError(f"Modality {name!r} must keep its shape, but got {shapes[name]} and {shape}.")
            extended = torch.cat((values, torch.ones_like(values[:, :1])), dim=1)
            moments[pattern] = _compress(torch.cat((moments.get(pattern, extended[:0]), extended)))
    return list(moments.items()), Layout(dict(sorted(shapes.items())))


def centre(moments: Moments, layout: Layout) -> tuple[Float[Tensor, " feature"], Moments]:
    """Return each feature's observed mean, and the moments about it."""
    sums, counts = torch.zeros(2, layout.num_features, dtype=torch.float64)
    for pattern, root in moments:
        sums[layout.index(pattern)] += root[:, -1] @ root[:, :-1]
        counts[layout.index(pattern)] += num_rows(root)
    origin = sums / counts
    return origin, [
        (pattern, torch.cat((root[:, :-1] - root[:, -1:] * origin[layout.index(pattern)], root[:, -1:]), dim=1))
        for pattern, root in moments
    ]


def num_rows(root: Float[Tensor, "_ _"]) -> float:
    """Return the number of rows behind one matrix of moments."""
    return float(root[:, -1].square().sum())


def pairwise_covariance(moments: Moments, layout: Layout) -> Float[Tensor, "feature feature"]:
    """Return covariances about 0, each over the rows that have both features; 0 where none has."""
    products, pairs = torch.zeros(2, layout.num_features, layout.num_features, dtype=torch.float64)
    for pattern, root in moments:
        index = layout.index(pattern)
        products[index[:, None], index] += root[:, :-1].T @ root[:, :-1]
        pairs[index[:, None], index] += num_rows(root)
    return torch.where(pairs > 0, products / pairs, 0.0)


def rows_by_pattern(rows: Batch) -> Iterator[tuple[Pattern, Int64[Tensor, " chosen"], Float[Tensor, "chosen _"]]]:
    """Yield each set of modalities, the numbers of the rows that have just these, and their values side by side.

    Raises:
        ValueError: for values that are not floating-point.
    """
    names, masks, everywhere = sorted(rows.data), rows.masks or {}, torch.ones(len(rows), dtype=torch.bool)
    for name in names:
        if not rows.data[name].is_floating_point():
            raise ValueError(f"Modality {name!r} must be floating-point, but got {rows.data[name].dtype}.")
    if not names:
        return
    present = torch.stack([masks[name].cpu() if name in masks else everywhere for name in names], dim=1)
    patterns, place = torch.unique(present, dim=0, return_inverse=True)
    for number, here in enumerate(patterns.tolist()):
        pattern = tuple(name for name, has in zip(names, here, strict=True) if has)
        if pattern:
            chosen = (place == number).nonzero().squeeze(1)
            values = [rows.data[name][chosen.to(rows.data[name].device)].flatten(1) for name in pattern]
            yield pattern, chosen, torch.cat(values, dim=1).to("cpu", torch.float64)


def _compress(root: Float[Tensor, "_ _"]) -> Float[Tensor, "_ _"]:
    # a triangle of the same moments; QR keeps the digits that R' R would lose
    return torch.linalg.qr(root, mode="r").R if len(root) > root.shape[1] else root


@dataclass(frozen=True, eq=False)
class FitData:
    """What fits of any number of factors read of the rows, gathered once.

    Attributes:
        layout: of the modalities.
        origin: each feature's observed mean.
        moments: about it, the prior's rows among them.
        group: features with the same number share a noise.
        unit: each feature's prior deviation.
        covariance: about the origin.
    """

    layout: Layout
    origin: Float[Tensor, " feature"]
    moments: Moments
    group: Int64[Tensor, " feature"]
    unit: Float[Tensor, " feature"]
    covariance: Float[Tensor, "feature feature"]

    @classmethod
    def of(cls, rows: Batch | Iterable[Batch], noise: Noise, shrinkage: float) -> "FitData":
        """Gather the moments of rows.

        With shrinkage, that many rows of independent features stand beside each row of data. Their variance is the
        feature's own for nine tenths and the mean of its modality for one tenth.
        """
        moments, layout = gather_moments([rows] if isinstance(rows, Batch) else rows)
        # moments about the mean keep the digits of features whose mean is large
        origin, moments = centre(moments, layout)
        own = pairwise_covariance(moments, layout).diagonal()
        prior = [_OWN_SHARE * own[span] + (1 - _OWN_SHARE) * own[span].mean() for span in layout.columns.values()]
        unit = torch.cat(prior).clamp(min=1e-300).sqrt()
        if shrinkage:
            added = shrinkage * sum(num_rows(root) for _, root in moments)
            independent = math.sqrt(added) * torch.cat((unit, torch.ones(1, dtype=torch.float64))).diag()
            moments = [*moments, (tuple(layout.shapes), independent)]
        return cls(layout, origin, moments, _noise_groups(layout, noise), unit, pairwise_covariance(moments, layout))

    @cached_property
    def spectrum(self) -> tuple[Tensor, Tensor, Tensor]:
        """The deviation of the features that share a noise, and eigenvalues and eigenvectors in units of it."""
        own = self.covariance.diagonal()
        scale = (self.pool(own) / self.pool(torch.ones_like(own))).clamp(min=1e-300).sqrt()
        return (scale, *torch.linalg.eigh(self.covariance / torch.outer(scale, scale)))

    def start(self, num_factors: int) -> tuple[Tensor, Tensor, Tensor]:
        """Return W of the leading eigenvectors, mu = 0 and the noise that is left, at which EM begins."""
        scale, eigenvalues, vectors = self.spectrum
        # covariances of different rows need not be positive definite together: the start stays inside
        rest = max(float(eigenvalues[:-num_factors].mean()), _SMALLEST_START * float(eigenvalues.mean()))
        weight = vectors[:, -num_factors:] * torch.sqrt((eigenvalues[-num_factors:] - rest).clamp(min=0))
        weight = weight * scale[:, None]
        left = self.pool(self.covariance.diagonal() - weight.square().sum(1)) / self.pool(torch.ones_like(scale))
        return weight, torch.zeros_like(scale), torch.maximum(left, _SMALLEST_START * scale.square())

    def pool(self, values: Float[Tensor, " feature"]) -> Float[Tensor, " feature"]:
        """Return for each feature the sum over the features that share its noise."""
        return torch.zeros_like(values).index_add(0, self.group, values)[self.group]


def _noise_groups(layout: Layout, noise: Noise) -> Int64[Tensor, " feature"]:
    group = torch.arange(layout.num_features)
    for name, span in layout.columns.items():
        if noise == "one" or len(layout.shapes[name]) > 1:
            group[span] = 0 if noise == "one" else span.start
    return group
