"""Residual convolutions for images and for series of any size, with a depth that follows from the size."""

import itertools
import math
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from dmvae.config.model import ArchitectureConfig
from dmvae.nn.networks.interface import DecoderOutput, Dimensions, EncoderOutput, Heads, dense_layers, start_at
from dmvae.nn.networks.registry import register

_DENSE_FEATURES = 512
_GROUPS = 8
_FIRST_CHANNELS, _MOST_CHANNELS = 32, 256
_LEAST_SIZE = 8


class Plan:
    """The sizes of a pair of networks: each stage divides the height and width, or the time, by its stride.

    Images halve from stage to stage until no side exceeds 4, series quarter until at most 16 steps are left.

    Attributes:
        convolution: the kind of convolution.
        stride: of every stage.
        kernel: size of its kernels, odd.
        channels: of every stage.
        sizes: of the input and of every stage's output.
    """

    def __init__(self, architecture: ArchitectureConfig, dims: Dimensions) -> None:
        is_image = len(dims.shape) == 3
        self.convolution: Any = nn.Conv2d if is_image else nn.Conv1d
        self.stride, self.kernel, end = (2, 3, 4) if is_image else (4, 7, 16)
        num = max(1, math.ceil(math.log(max(dims.shape[1:]) / end, self.stride)))
        usual = tuple(min(_FIRST_CHANNELS * 2**stage, _MOST_CHANNELS) for stage in range(num))
        self.channels = usual if architecture.hidden_dims is None else architecture.hidden_dims
        self.sizes = [dims.shape[1:]]
        for _ in self.channels:
            self.sizes.append(tuple(math.ceil(size / self.stride) for size in self.sizes[-1]))

    def convolve(self, in_channels: int, out_channels: int, stride: int = 1) -> nn.Module:
        """Return a convolution that keeps the size, or divides it by the stride."""
        padding = self.kernel // 2
        layer: nn.Module = self.convolution(in_channels, out_channels, self.kernel, stride=stride, padding=padding)
        return layer


class Residual(nn.Module):
    """x + conv(SiLU(norm(conv(SiLU(norm(x)))))), with norms over groups of the channels of one row."""

    def __init__(self, channels: int, plan: Plan) -> None:
        super().__init__()
        layers: list[nn.Module] = []
        for _ in range(2):
            groups = math.gcd(_GROUPS, channels)
            layers += [nn.GroupNorm(groups, channels), nn.SiLU(), plan.convolve(channels, channels)]
        self.layers = nn.Sequential(*layers)

    def forward(self, x: Tensor) -> Tensor:
        """Map features to features of the same shape."""
        out: Tensor = x + self.layers(x)
        return out


class ResidualEncoder(nn.Module):
    """Stages of a convolution with a stride and a residual block, then 512 features."""

    def __init__(self, architecture: ArchitectureConfig, dims: Dimensions) -> None:
        super().__init__()
        plan, self.counts = Plan(architecture, dims), dims.counts
        channels = dims.shape[0] * (2 if dims.missing_cells else 1)
        stages: list[nn.Module] = []
        for before, after in itertools.pairwise((channels, *plan.channels)):
            stages += [plan.convolve(before, after, plan.stride), Residual(after, plan)]
        self.stages = _channels_last(nn.Sequential(*stages, nn.SiLU()), plan)
        features = plan.channels[-1] * math.prod(plan.sizes[-1])
        self.body = nn.Sequential(*dense_layers([features, _DENSE_FEATURES], architecture.dropout, nn.SiLU))
        self.heads = Heads(_DENSE_FEATURES, dims)

    def forward(self, x: Tensor, cells: Tensor | None = None) -> EncoderOutput:
        """Map `(rows, *shape)`, and which elements are observed, to the posteriors' parameters."""
        x = torch.log1p(x) if self.counts else x
        x = x if cells is None else torch.cat((x, cells.to(x.dtype)), dim=1)
        return self.heads.split(self.body(self.stages(x).flatten(1)))


class ResidualDecoder(nn.Module):
    """The mirror of `ResidualEncoder`: stages of a residual block, enlargement to the exact size, and a convolution."""

    def __init__(self, architecture: ArchitectureConfig, dims: Dimensions) -> None:
        super().__init__()
        plan = Plan(architecture, dims)
        self.start = (plan.channels[-1], *plan.sizes[-1])
        sizes = [dims.shared_dim + dims.private_dim, _DENSE_FEATURES, math.prod(self.start)]
        self.body = nn.Sequential(*dense_layers(sizes, architecture.dropout, nn.SiLU))
        stages: list[nn.Module] = []
        channels = itertools.pairwise((*reversed(plan.channels), dims.output_shape[0]))
        for (before, after), size in zip(channels, reversed(plan.sizes[:-1]), strict=True):
            stages += [Residual(before, plan), Enlarge(size), plan.convolve(before, after)]
        start_at(stages[-1], dims)
        self.stages = _channels_last(nn.Sequential(*stages), plan)

    def forward(self, z: Tensor) -> DecoderOutput:
        """Map `(rows, shared + private)` to `(rows, *output_shape)`."""
        return DecoderOutput(self.stages(self.body(z).unflatten(-1, self.start)))


class Enlarge(nn.Module):
    """Repeat every element so that the result has a given size."""

    def __init__(self, size: tuple[int, ...]) -> None:
        super().__init__()
        self.size = size

    def forward(self, x: Tensor) -> Tensor:
        """Map `(rows, channels, *any size)` to `(rows, channels, *size)`."""
        return F.interpolate(x, size=self.size)


def _channels_last(layers: nn.Sequential, plan: Plan) -> nn.Sequential:
    """Put the weights of images into the channels-last memory format, which is faster."""
    if plan.convolution is nn.Conv2d:
        layers.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    return layers


def _fault(architecture: ArchitectureConfig, dims: Dimensions, num_dims: int) -> str | None:
    sizes, what = dims.shape[1:], "(channels, height, width)" if num_dims == 3 else "(channels, time)"
    if len(dims.shape) != num_dims or min(sizes, default=0) < _LEAST_SIZE or dims.classes is not None:
        of = "" if dims.classes is None else " of categories"
        return (
            f"expected {what} with sides of {_LEAST_SIZE} or more, got shape {dims.shape}{of}. Use skip_mlp, or "
            "register an architecture."
        )
    if dims.output_shape[1:] != sizes:
        return f"the likelihood needs parameters of shape {dims.output_shape}, not {dims.shape}. Use skip_mlp."
    if architecture.hidden_dims == ():
        return "it needs the channels of at least one stage, but got hidden_dims=(). Remove hidden_dims."
    return None


register("residual", ResidualEncoder, ResidualDecoder, partial(_fault, num_dims=3))
register("series", ResidualEncoder, ResidualDecoder, partial(_fault, num_dims=2))
