"""Perceptrons, for values of any shape."""

import math

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn

from dmvae.config.model import ArchitectureConfig
from dmvae.nn.networks.interface import DecoderOutput, Dimensions, EncoderOutput, Heads, dense_layers, start_at
from dmvae.nn.networks.registry import register


class MLPEncoder(nn.Module):
    """A perceptron on the flattened row; categories are one-hot, padding is zero, counts are log(1 + x)."""

    def __init__(self, architecture: ArchitectureConfig, dims: Dimensions) -> None:
        super().__init__()
        self.classes, self.pad, self.counts = dims.classes, dims.pad, dims.counts
        sizes = [math.prod(dims.shape) * (dims.classes or 1), *_hidden_dims(architecture)]
        self.body = nn.Sequential(*dense_layers(sizes, architecture.dropout))
        self.heads = Heads(sizes[-1], dims)

    def forward(self, x: Tensor) -> EncoderOutput:
        """Map `(rows, *shape)` to the posteriors' parameters."""
        return self.heads.split(self.body(self.features(x)))

    def features(self, x: Tensor) -> Float[Tensor, "row _"]:
        """Return rows in the form that the first layer takes."""
        if self.classes is not None:
            padding = None if self.pad is None else (x == self.pad).unsqueeze(-1)
            x = F.one_hot(x, self.classes).to(self.heads.weight.dtype)
            x = x if padding is None else x.masked_fill(padding, 0.0)
        elif self.counts:
            x = torch.log1p(x)
        return x.flatten(1)


class MLPDecoder(nn.Module):
    """A perceptron from [z_shared, z_private] to the likelihood's parameters: the encoder's mirror."""

    def __init__(self, architecture: ArchitectureConfig, dims: Dimensions) -> None:
        super().__init__()
        self.output_shape = dims.output_shape
        sizes = [dims.shared_dim + dims.private_dim, *reversed(_hidden_dims(architecture))]
        self.body = nn.Sequential(
            *dense_layers(sizes, architecture.dropout),
            start_at(nn.Linear(sizes[-1], math.prod(dims.output_shape)), dims),
        )

    def forward(self, z: Tensor) -> DecoderOutput:
        """Map `(rows, shared + private)` to `(rows, *output_shape)`."""
        return DecoderOutput(self.body(z).unflatten(-1, self.output_shape))


def _hidden_dims(architecture: ArchitectureConfig) -> tuple[int, ...]:
    return (256,) if architecture.hidden_dims is None else architecture.hidden_dims


register("mlp", MLPEncoder, MLPDecoder)
