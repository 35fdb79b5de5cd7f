"""Convolutional networks, for images of 28x28 or 32x32."""

import itertools

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from dmvae.config.model import ArchitectureConfig
from dmvae.nn.networks.interface import DecoderOutput, Dimensions, EncoderOutput, Heads, dense_layers, start_at
from dmvae.nn.networks.registry import register

_CHANNELS = (32, 64, 128, 256)
_CONV_FEATURES = 512


class ConvEncoder(nn.Module):
    """Four convolutions (kernel 4, stride 2), then 512 features; 28x28 is padded to 32x32."""

    def __init__(self, architecture: ArchitectureConfig, dims: Dimensions) -> None:
        super().__init__()
        channels, self.pad = dims.shape[0], (32 - dims.shape[1]) // 2
        self.counts = dims.counts
        channels *= 2 if dims.missing_cells else 1
        convolutions: list[nn.Module] = []
        for before, after in itertools.pairwise((channels, *_CHANNELS)):
            convolutions += [nn.Conv2d(before, after, kernel_size=4, stride=2, padding=1), nn.ReLU()]
        self.convolutions = _convolve(convolutions)
        self.body = nn.Sequential(*dense_layers([_CHANNELS[-1] * 4, _CONV_FEATURES], architecture.dropout))
        self.heads = Heads(_CONV_FEATURES, dims)

    def forward(self, x: Tensor, cells: Tensor | None = None) -> EncoderOutput:
        """Map `(rows, channels, height, width)`, and which pixels are observed, to the posteriors' parameters."""
        x = torch.log1p(x) if self.counts else x
        x = x if cells is None else torch.cat((x, cells.to(x.dtype)), dim=1)
        x = F.pad(x, (self.pad,) * 4) if self.pad else x
        return self.heads.split(self.body(self.convolutions(x).flatten(1)))


class ConvDecoder(nn.Module):
    """The mirror of `ConvEncoder`; for 28x28 the border of the 32x32 image is cropped."""

    def __init__(self, architecture: ArchitectureConfig, dims: Dimensions) -> None:
        super().__init__()
        channels, self.pad = dims.shape[0], (32 - dims.shape[1]) // 2
        sizes = [dims.shared_dim + dims.private_dim, _CONV_FEATURES, _CHANNELS[-1] * 4]
        self.body = nn.Sequential(*dense_layers(sizes, architecture.dropout))
        convolutions: list[nn.Module] = []
        for before, after in itertools.pairwise((*reversed(_CHANNELS), channels)):
            convolutions += [nn.ConvTranspose2d(before, after, kernel_size=4, stride=2, padding=1), nn.ReLU()]
        self.convolutions = _convolve([*convolutions[:-2], start_at(convolutions[-2], dims)])

    def forward(self, z: Tensor) -> DecoderOutput:
        """Map `(rows, shared + private)` to `(rows, channels, height, width)`."""
        image = self.convolutions(self.body(z).unflatten(-1, (_CHANNELS[-1], 2, 2)))
        return DecoderOutput(F.pad(image, (-self.pad,) * 4) if self.pad else image)


def _convolve(layers: list[nn.Module]) -> nn.Sequential:
    """Chain layers in the channels-last memory format, which is faster."""
    chained: nn.Sequential = nn.Sequential(*layers).to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    return chained


def _fault(architecture: ArchitectureConfig, dims: Dimensions) -> str | None:
    if architecture.hidden_dims is not None:
        return f"its widths are fixed, but got hidden_dims={architecture.hidden_dims}. Remove hidden_dims."
    if len(dims.shape) != 3 or dims.shape[1:] not in ((32, 32), (28, 28)) or dims.classes is not None:
        what = "" if dims.classes is None else " of categories"
        return (
            f"expected images (channels, 32, 32) or (channels, 28, 28), got shape {dims.shape}{what}. Use mlp, or "
            "register an architecture."
        )
    return None


register("conv", ConvEncoder, ConvDecoder, _fault)
