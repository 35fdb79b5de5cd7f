"""Networks that do not work, each in its own way."""

import math
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor, nn

from dmvae.distributions.likelihoods.normal import Normal
from dmvae.nn.networks import DecoderOutput, Dimensions, EncoderOutput
from tests.example_package.nets import TableDecoder, TableEncoder

NUMBER = 3


class OneColumn(nn.Module):
    """Returns one number a row, which would broadcast to all features."""

    def __init__(self, dims: Dimensions) -> None:
        super().__init__()
        self.linear = nn.Linear(dims.shared_dim + dims.private_dim, 1)

    def forward(self, z: Tensor) -> DecoderOutput:
        return DecoderOutput(self.linear(z))


class WithoutStyle(nn.Module):
    """Forgets the private latent."""

    def __init__(self, dims: Dimensions) -> None:
        super().__init__()
        self.linear = nn.Linear(math.prod(dims.shape), 2 * dims.shared_dim)

    def forward(self, x: Tensor) -> SimpleNamespace:
        mean, log_var = self.linear(x).chunk(2, dim=-1)
        return SimpleNamespace(embedding=mean, log_covariance=log_var)


class Normalised(nn.Module):
    """Has batch normalisation."""

    def __init__(self, dims: Dimensions) -> None:
        super().__init__()
        self.norm = nn.BatchNorm1d(math.prod(dims.shape))
        self.network = TableEncoder(dims)

    def forward(self, x: Tensor) -> EncoderOutput:
        return self.network(self.norm(x).abs())


class NeedsNumbers(TableEncoder):
    """Reads a value, which tensors without memory do not have."""

    def forward(self, x: Tensor) -> EncoderOutput:
        assert float(x.sum()) < math.inf
        return super().forward(x.abs())


class NotSummed(Normal):
    """Returns the log-density of every element, which would broadcast."""

    def log_prob(self, output: Tensor, value: Tensor) -> Tensor:
        return -((output - value) ** 2)


def lazy(dims: Dimensions) -> tuple[nn.Module, nn.Module]:
    return nn.LazyLinear(4), TableDecoder(dims)


def alone(dims: Dimensions) -> nn.Module:
    return TableEncoder(dims)


def failing(dims: Dimensions) -> tuple[nn.Module, nn.Module]:
    raise KeyError("weights")


def sprung(dims: Dimensions, **params: Any) -> tuple[nn.Module, nn.Module]:
    """Leave a mark where one is wanted: shows that it was called."""
    torch.save({}, params["mark"])
    return TableEncoder(dims), TableDecoder(dims)
