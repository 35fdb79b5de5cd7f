"""Perceptrons, alone or with a linear skip connection, for values of any shape."""

import itertools
import math
from collections.abc import Sequence
from functools import partial

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn

from dmvae.config.model import ArchitectureConfig
from dmvae.nn.networks.interface import (
    DecoderOutput,
    Dimensions,
    EncoderOutput,
    Heads,
    dense_layers,
    scale_rate,
    start_at,
)
from dmvae.nn.networks.registry import register
from dmvae.nn.networks.table import TableFeatures


class Skip(nn.Linear):
    """A linear skip connection from a network's input to the means among its outputs; zero for the others.

    The posterior variance of a linear Gaussian model does not depend on x, and exp(log-variance) of values that are not
    standardised would overflow.
    """

    def __init__(self, in_features: int, sizes: Sequence[int], are_means: Sequence[bool]) -> None:
        super().__init__(in_features, sum(itertools.compress(sizes, are_means)), bias=False)
        self.layout = tuple(zip(sizes, are_means, strict=True))

    def forward(self, x: Tensor) -> Tensor:
        """Map `(rows, in_features)` to all outputs."""
        return F.linear(x, self.full_weight)

    @property
    def full_weight(self) -> Float[Tensor, "output input"]:
        """The weight, with rows of zeros for outputs that are no means."""
        means = iter(torch.split(self.weight, [size for size, is_mean in self.layout if is_mean]))
        zeros = self.weight.new_zeros
        parts = [next(means) if is_mean else zeros(size, self.in_features) for size, is_mean in self.layout]
        return parts[0] if len(parts) == 1 else torch.cat(parts)


class MLPEncoder(nn.Module):
    """A perceptron on the flattened row; categories are one-hot, padding is zero, counts are log(1 + x).

    Beside numbers of which some may be missing stand zeros and ones that say which are observed.

    With `skip` it has SiLU for ReLU, layer normalisation, and a linear skip connection to the means: W f(x) + A x + b.
    """

    def __init__(self, architecture: ArchitectureConfig, dims: Dimensions, skip: bool = False) -> None:
        super().__init__()
        self.classes, self.pad, self.counts = dims.classes, dims.pad, dims.counts
        self.table = TableFeatures(dims.kinds, dims.column_classes) if dims.kinds else None
        width = math.prod(dims.shape) * (dims.classes or 1) if self.table is None else self.table.width
        if dims.missing_cells and not dims.classes:  # one-hot classes that are missing are zero everywhere
            width += math.prod(dims.shape)
        sizes = [width, *_hidden_dims(architecture)]
        self.body = nn.Sequential(*dense_layers(sizes, architecture.dropout, nn.SiLU if skip else nn.ReLU, skip))
        self.heads = Heads(sizes[-1], dims)
        # without hidden layers the whole is one linear map
        self.skip = Skip(sizes[0], self.heads.sizes, (True, False, True, False)) if skip and len(sizes) > 1 else None
        for layer in (self.body[0] if len(sizes) > 1 else self.heads, self.skip):
            if isinstance(layer, nn.Linear):
                scale_rate(layer, math.prod(dims.shape))  # of the inputs of a class, one is not zero

    def forward(self, x: Tensor, cells: Tensor | None = None) -> EncoderOutput:
        """Map `(rows, *shape)` to the posteriors' parameters."""
        features = self.features(x, cells)
        output = self.heads(self.body(features))
        output = output if self.skip is None else output + self.skip(features)
        return EncoderOutput(*torch.split(output, self.heads.sizes, dim=-1))

    def features(self, x: Tensor, cells: Tensor | None = None) -> Float[Tensor, "row _"]:
        """Return rows in the form that the first layer takes."""
        if self.classes is not None:
            padding = None if self.pad is None else (x == self.pad).unsqueeze(-1)
            x = F.one_hot(x, self.classes).to(self.heads.weight.dtype)
            x = x if padding is None else x.masked_fill(padding, 0.0)
            return (x if cells is None else x.masked_fill(~cells.unsqueeze(-1), 0.0)).flatten(1)
        if self.table is not None:
            x = self.table.features(x, cells)
        elif self.counts:
            x = torch.log1p(x)
        return x.flatten(1) if cells is None else torch.cat((x.flatten(1), cells.flatten(1).to(x.dtype)), dim=1)


class MLPDecoder(nn.Module):
    """A perceptron from [z_shared, z_private] to the likelihood's parameters: the encoder's mirror.

    With `skip` it has SiLU for ReLU and a linear skip connection: W f(z) + B z + b.
    """

    def __init__(self, architecture: ArchitectureConfig, dims: Dimensions, skip: bool = False) -> None:
        super().__init__()
        self.output_shape = dims.output_shape
        sizes, size = [dims.shared_dim + dims.private_dim, *reversed(_hidden_dims(architecture))], dims.output_shape
        layers = dense_layers(sizes, architecture.dropout, nn.SiLU if skip else nn.ReLU)
        self.body = nn.Sequential(*layers, start_at(nn.Linear(sizes[-1], math.prod(size)), dims))
        self.skip = Skip(sizes[0], (math.prod(size),), (True,)) if skip and len(sizes) > 1 else None

    def forward(self, z: Tensor) -> DecoderOutput:
        """Map `(rows, shared + private)` to `(rows, *output_shape)`."""
        output = self.body(z)
        output = output if self.skip is None else output + self.skip(z)
        return DecoderOutput(output.unflatten(-1, self.output_shape))


def _hidden_dims(architecture: ArchitectureConfig) -> tuple[int, ...]:
    return (256,) if architecture.hidden_dims is None else architecture.hidden_dims


register("mlp", MLPEncoder, MLPDecoder)
register("skip_mlp", partial(MLPEncoder, skip=True), partial(MLPDecoder, skip=True))
