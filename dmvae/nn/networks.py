"""The encoder and the decoder of one modality, and the architectures known by name."""

import itertools
import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn

from dmvae.config.model import ArchitectureConfig


@dataclass(frozen=True, eq=False)
class EncoderOutput:
    """What an encoder returns: shared and private (style) means and log-variances."""

    embedding: Float[Tensor, "row shared"]
    log_covariance: Float[Tensor, "row shared"]
    style_embedding: Float[Tensor, "row private"]
    style_log_covariance: Float[Tensor, "row private"]


@dataclass(frozen=True, eq=False)
class DecoderOutput:
    """What a decoder returns: the parameters of its modality's likelihood, `(rows, *output_shape)`."""

    reconstruction: Tensor


@dataclass(frozen=True)
class Dimensions:
    """The sizes that a pair of networks has to meet.

    Attributes:
        shape: shape of one row of the modality.
        output_shape: shape of the likelihood's parameters for one row.
        shared_dim: dimension of the shared latent.
        private_dim: dimension of the private latent.
        classes: of categorical values, else None.
        counts: whether the values are counts, which spread over orders of magnitude.
        start: what the decoder's output is about before training.
        pad: the class of elements that are none; None: there are no such elements.
    """

    shape: tuple[int, ...]
    output_shape: tuple[int, ...]
    shared_dim: int
    private_dim: int
    classes: int | None = None
    counts: bool = False
    start: float = 0.0
    pad: int | None = None


class _Heads(nn.Linear):
    """One linear map to both Gaussians: shared mean, shared log-variance, private mean, private log-variance."""

    def __init__(self, in_features: int, dims: Dimensions) -> None:
        super().__init__(in_features, 2 * dims.shared_dim + 2 * dims.private_dim)
        self.sizes = [dims.shared_dim] * 2 + [dims.private_dim] * 2

    def split(self, features: Tensor) -> EncoderOutput:
        return EncoderOutput(*self(features).split(self.sizes, dim=-1))


def _layers(sizes: list[int], dropout: float) -> list[nn.Module]:
    """Linear, ReLU and, if asked for, dropout, for every pair of neighbouring sizes."""
    layers: list[nn.Module] = []
    for in_size, out_size in itertools.pairwise(sizes):
        layers += [nn.Linear(in_size, out_size), nn.ReLU()]
        layers += [nn.Dropout(dropout)] if dropout else []
    return layers


def _begin(last: nn.Module, dims: Dimensions) -> nn.Module:
    """Move the bias of a decoder's last layer to where its output begins."""
    assert isinstance(last.bias, Tensor)
    with torch.no_grad():
        last.bias += dims.start
    return last


def _hidden_dims(architecture: ArchitectureConfig) -> tuple[int, ...]:
    return (256,) if architecture.hidden_dims is None else architecture.hidden_dims


class MLPEncoder(nn.Module):
    """A perceptron on the flattened row; categories enter one-hot, padding as zeros, counts as log(1 + x)."""

    def __init__(self, architecture: ArchitectureConfig, dims: Dimensions) -> None:
        super().__init__()
        self.classes, self.pad, self.counts = dims.classes, dims.pad, dims.counts
        sizes = [math.prod(dims.shape) * (dims.classes or 1), *_hidden_dims(architecture)]
        self.body = nn.Sequential(*_layers(sizes, architecture.dropout))
        self.heads = _Heads(sizes[-1], dims)

    def forward(self, x: Tensor) -> EncoderOutput:
        """Map `(rows, *shape)` to the posteriors' parameters."""
        return self.heads.split(self.body(self.features(x)))

    def features(self, x: Tensor) -> Float[Tensor, "row _"]:
        """Return rows as the first layer takes them."""
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
            *_layers(sizes, architecture.dropout), _begin(nn.Linear(sizes[-1], math.prod(dims.output_shape)), dims)
        )

    def forward(self, z: Tensor) -> DecoderOutput:
        """Map `(rows, shared + private)` to `(rows, *output_shape)`."""
        return DecoderOutput(self.body(z).unflatten(-1, self.output_shape))


_CHANNELS = (32, 64, 128, 256)
_CONV_FEATURES = 512


class ConvEncoder(nn.Module):
    """Four convolutions (kernel 4, stride 2), then 512 features; 28x28 is padded to 32x32."""

    def __init__(self, architecture: ArchitectureConfig, dims: Dimensions) -> None:
        super().__init__()
        channels, self.pad = _image(architecture, dims)
        self.counts = dims.counts
        convolutions: list[nn.Module] = []
        for before, after in itertools.pairwise((channels, *_CHANNELS)):
            convolutions += [nn.Conv2d(before, after, kernel_size=4, stride=2, padding=1), nn.ReLU()]
        self.convolutions = _convolve(convolutions)
        self.body = nn.Sequential(*_layers([_CHANNELS[-1] * 4, _CONV_FEATURES], architecture.dropout))
        self.heads = _Heads(_CONV_FEATURES, dims)

    def forward(self, x: Tensor) -> EncoderOutput:
        """Map `(rows, channels, height, width)` to the posteriors' parameters."""
        x = torch.log1p(x) if self.counts else x
        x = F.pad(x, (self.pad,) * 4) if self.pad else x
        return self.heads.split(self.body(self.convolutions(x).flatten(1)))


class ConvDecoder(nn.Module):
    """The mirror of `ConvEncoder`; for 28x28 the border of the 32x32 image is cut off."""

    def __init__(self, architecture: ArchitectureConfig, dims: Dimensions) -> None:
        super().__init__()
        channels, self.pad = _image(architecture, dims)
        sizes = [dims.shared_dim + dims.private_dim, _CONV_FEATURES, _CHANNELS[-1] * 4]
        self.body = nn.Sequential(*_layers(sizes, architecture.dropout))
        convolutions: list[nn.Module] = []
        for before, after in itertools.pairwise((*reversed(_CHANNELS), channels)):
            convolutions += [nn.ConvTranspose2d(before, after, kernel_size=4, stride=2, padding=1), nn.ReLU()]
        self.convolutions = _convolve([*convolutions[:-2], _begin(convolutions[-2], dims)])

    def forward(self, z: Tensor) -> DecoderOutput:
        """Map `(rows, shared + private)` to `(rows, channels, height, width)`."""
        image = self.convolutions(self.body(z).unflatten(-1, (_CHANNELS[-1], 2, 2)))
        return DecoderOutput(F.pad(image, (-self.pad,) * 4) if self.pad else image)


def _convolve(layers: list[nn.Module]) -> nn.Sequential:
    """Chain layers, with the channels of a filter's pixel side by side: torch lays images out alike, and is faster."""
    chained: nn.Sequential = nn.Sequential(*layers).to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    return chained


def _image(architecture: ArchitectureConfig, dims: Dimensions) -> tuple[int, int]:
    if architecture.hidden_dims is not None:
        raise ValueError(
            f"the conv architecture has its own widths; got hidden_dims={architecture.hidden_dims}. Remove hidden_dims."
        )
    if len(dims.shape) != 3 or dims.shape[1:] not in ((32, 32), (28, 28)) or dims.classes is not None:
        raise ValueError(
            f"the conv architecture takes images (channels, 32, 32) or (channels, 28, 28); got shape {dims.shape}"
            f"{'' if dims.classes is None else ' of categories'}. Use mlp, or register an architecture."
        )
    return dims.shape[0], (32 - dims.shape[1]) // 2


_SEQUENCE_WIDTHS = (64, 64)
_NEIGHBOURS = 5


class SequenceEncoder(nn.Module):
    """Classes and places embedded, convolutions over neighbours, and their mean over the row; padding is left out.

    How much padding a row has changes nothing.
    """

    def __init__(self, architecture: ArchitectureConfig, dims: Dimensions) -> None:
        super().__init__()
        widths, self.pad = _sequence(architecture, dims), dims.pad
        assert dims.classes is not None
        self.classes = nn.Embedding(dims.classes, widths[0])
        self.places = nn.Parameter(0.1 * torch.randn(dims.shape[0], widths[0]))
        self.convolutions = nn.ModuleList(
            nn.Conv1d(before, after, _NEIGHBOURS, padding=_NEIGHBOURS // 2)
            for before, after in itertools.pairwise(widths)
        )
        self.dropout = nn.Dropout(architecture.dropout)
        self.heads = _Heads(widths[-1], dims)

    def forward(self, x: Tensor) -> EncoderOutput:
        """Map `(rows, length)` to the posteriors' parameters."""
        features = self.classes(x) + self.places
        there = (torch.ones_like(x) if self.pad is None else x != self.pad).to(features.dtype).unsqueeze(1)
        features = features.mT * there  # (rows, width, length)
        for convolution in self.convolutions:
            features = self.dropout(F.relu(convolution(features))) * there
        return self.heads.split(features.sum(-1) / there.sum(-1).clamp(min=1))


class SequenceDecoder(nn.Module):
    """A perceptron from the latents and a place to the classes' logits there; every place is by itself."""

    def __init__(self, architecture: ArchitectureConfig, dims: Dimensions) -> None:
        super().__init__()
        first, *others = reversed(_sequence(architecture, dims))
        assert dims.classes is not None
        self.latents = nn.Linear(dims.shared_dim + dims.private_dim, first)
        self.places = nn.Parameter(torch.randn(dims.shape[0], first))
        self.body = nn.Sequential(
            nn.ReLU(), *_layers([first, *others], architecture.dropout), nn.Linear([first, *others][-1], dims.classes)
        )

    def forward(self, z: Tensor) -> DecoderOutput:
        """Map `(rows, shared + private)` to `(rows, length, classes)`."""
        return DecoderOutput(self.body(self.latents(z).unsqueeze(-2) + self.places))


def _sequence(architecture: ArchitectureConfig, dims: Dimensions) -> tuple[int, ...]:
    """Return the widths of the layers."""
    if len(dims.shape) != 1 or dims.classes is None or architecture.hidden_dims == ():
        raise ValueError(
            f"the sequence architecture takes categorical sequences (length,) and a width or more; got shape "
            f"{dims.shape}, classes={dims.classes}, hidden_dims={architecture.hidden_dims}. Use mlp, or correct them."
        )
    return _SEQUENCE_WIDTHS if architecture.hidden_dims is None else architecture.hidden_dims


Builder = Callable[[ArchitectureConfig, Dimensions], nn.Module]

_REGISTRY: dict[str, tuple[Builder, Builder]] = {
    "mlp": (MLPEncoder, MLPDecoder),
    "conv": (ConvEncoder, ConvDecoder),
    "sequence": (SequenceEncoder, SequenceDecoder),
}


def register(name: str, encoder: Builder, decoder: Builder) -> None:
    """Make a pair of networks known as `name` in `architectures`, built from (ArchitectureConfig, Dimensions)."""
    if name in _REGISTRY:
        raise ValueError(f"an architecture's name is registered once; got {name!r} again. Choose another.")
    _REGISTRY[name] = (encoder, decoder)


def builders(name: str) -> tuple[Builder, Builder]:
    """Return the encoder's and the decoder's builder of a registered architecture.

    Raises:
        ValueError: if no architecture of that name is registered.
    """
    if name not in _REGISTRY:
        raise ValueError(f"architectures name a known architecture; got {name!r}. Known: {', '.join(_REGISTRY)}.")
    return _REGISTRY[name]
