"""Networks for 64x64 images, for padded text and for a table."""

import math
from pathlib import Path
from types import SimpleNamespace

import torch
from safetensors.torch import load_file
from torch import Tensor, nn

from dmvae.nn.networks import DecoderOutput, Dimensions, EncoderOutput


class Heads(nn.Module):
    """Linear maps to the means and log-variances of both latents."""

    def __init__(self, features: int, dims: Dimensions) -> None:
        super().__init__()
        self.sizes = [dims.shared_dim] * 2 + [dims.private_dim] * 2
        self.linear = nn.Linear(features, sum(self.sizes))

    def forward(self, features: Tensor) -> EncoderOutput:
        return EncoderOutput(*self.linear(features).split(self.sizes, dim=-1))


class Block(nn.Module):
    """Two convolutions, normalised, around a skip connection."""

    def __init__(self, width: int, norm: str) -> None:
        super().__init__()
        self.body = nn.Sequential(
            nn.Conv2d(width, width, 3, padding=1), normalisation(norm, width), nn.ReLU(),
            nn.Conv2d(width, width, 3, padding=1), normalisation(norm, width),
        )  # fmt: skip

    def forward(self, x: Tensor) -> Tensor:
        return torch.relu(x + self.body(x))


def normalisation(norm: str, width: int) -> nn.Module:
    return nn.BatchNorm2d(width) if norm == "batch" else nn.GroupNorm(2, width)


class ResNetEncoder(nn.Module):
    """A small residual network."""

    def __init__(self, dims: Dimensions, width: int, norm: str) -> None:
        super().__init__()
        self.stem = nn.Conv2d(dims.shape[0], width, 4, stride=4)
        self.block = Block(width, norm)
        self.pool = nn.Sequential(nn.Conv2d(width, width, 4, stride=4), nn.ReLU(), nn.Flatten())
        self.heads = Heads(width * (dims.shape[1] // 16) * (dims.shape[2] // 16), dims)

    def forward(self, x: Tensor) -> EncoderOutput:
        return self.heads(self.pool(self.block(self.stem(x))))


class ResNetDecoder(nn.Module):
    """Its mirror."""

    def __init__(self, dims: Dimensions, width: int) -> None:
        super().__init__()
        self.small = width, dims.output_shape[1] // 16, dims.output_shape[2] // 16
        self.linear = nn.Linear(dims.shared_dim + dims.private_dim, math.prod(self.small))
        self.up = nn.Sequential(
            nn.ConvTranspose2d(width, width, 4, stride=4), nn.ReLU(),
            nn.ConvTranspose2d(width, dims.output_shape[0], 4, stride=4),
        )  # fmt: skip

    def forward(self, z: Tensor) -> DecoderOutput:
        return DecoderOutput(self.up(self.linear(z).unflatten(-1, self.small)))


def resnet(
    dims: Dimensions, width: int = 8, norm: str = "group", pretrained: str | None = None
) -> tuple[nn.Module, nn.Module]:
    """Return an encoder, which may start from saved weights, and a decoder."""
    encoder = ResNetEncoder(dims, width, norm)
    if pretrained is not None:
        encoder.load_state_dict(load_file(Path(pretrained)))
    return encoder, ResNetDecoder(dims, width)


class TextEncoder(nn.Module):
    """A transformer over the classes of a row; padding is neither attended to nor averaged."""

    def __init__(self, dims: Dimensions, width: int = 8, heads: int = 2) -> None:
        super().__init__()
        assert dims.classes is not None
        self.pad = dims.pad
        self.classes = nn.Embedding(dims.classes, width)
        self.places = nn.Parameter(0.1 * torch.randn(dims.shape[0], width))
        self.layer = nn.TransformerEncoderLayer(width, heads, 2 * width, dropout=0.0, batch_first=True)
        self.heads = Heads(width, dims)

    def forward(self, x: Tensor) -> EncoderOutput:
        absent = torch.zeros_like(x, dtype=torch.bool) if self.pad is None else x == self.pad
        absent = absent & ~absent.all(1, keepdim=True)  # a row of padding alone attends to it
        features = self.layer(self.classes(x) + self.places, src_key_padding_mask=absent)
        present = (~absent).to(features.dtype).unsqueeze(-1)
        return self.heads((features * present).sum(1) / present.sum(1))


class TextDecoder(nn.Module):
    """A transformer over positions, which returns an object of its own."""

    def __init__(self, dims: Dimensions, width: int = 8, heads: int = 2) -> None:
        super().__init__()
        length, classes = dims.output_shape
        self.latents = nn.Linear(dims.shared_dim + dims.private_dim, width)
        self.places = nn.Parameter(torch.randn(length, width))
        self.layer = nn.TransformerEncoderLayer(width, heads, 2 * width, dropout=0.0, batch_first=True)
        self.logits = nn.Linear(width, classes)

    def forward(self, z: Tensor) -> SimpleNamespace:
        return SimpleNamespace(reconstruction=self.logits(self.layer(self.latents(z).unsqueeze(1) + self.places)))


class TableEncoder(nn.Module):
    """A perceptron for counts."""

    def __init__(self, dims: Dimensions, width: int = 16) -> None:
        super().__init__()
        self.body = nn.Sequential(nn.Flatten(), nn.Linear(math.prod(dims.shape), width), nn.ReLU())
        self.heads = Heads(width, dims)

    def forward(self, x: Tensor) -> EncoderOutput:
        return self.heads(self.body(torch.log1p(x)))


class TableDecoder(nn.Module):
    """A perceptron to the parameters of the likelihood, whatever their shape."""

    def __init__(self, dims: Dimensions, width: int = 16) -> None:
        super().__init__()
        self.shape = dims.output_shape
        latents, size = dims.shared_dim + dims.private_dim, math.prod(dims.output_shape)
        self.body = nn.Sequential(nn.Linear(latents, width), nn.ReLU(), nn.Linear(width, size))

    def forward(self, z: Tensor) -> DecoderOutput:
        return DecoderOutput(self.body(z).unflatten(-1, self.shape))


def table(dims: Dimensions, width: int = 16) -> tuple[nn.Module, nn.Module]:
    """Return the perceptrons of a table."""
    return TableEncoder(dims, width), TableDecoder(dims, width)
