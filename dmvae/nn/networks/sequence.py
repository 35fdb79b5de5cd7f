"""Convolutions over sequences of classes, which may be padded."""

import itertools

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from dmvae.config.model import ArchitectureConfig
from dmvae.nn.networks.interface import DecoderOutput, Dimensions, EncoderOutput, Heads, dense_layers
from dmvae.nn.networks.registry import register

_DEFAULT_WIDTHS = (64, 64)
_KERNEL_SIZE = 5


class SequenceEncoder(nn.Module):
    """Embeddings of classes and positions, convolutions, and their mean over what the row has.

    The amount of padding changes nothing, and missing classes are left out.
    """

    def __init__(self, architecture: ArchitectureConfig, dims: Dimensions) -> None:
        super().__init__()
        widths, self.pad = sequence_widths(architecture), dims.pad
        assert dims.classes is not None
        self.classes = nn.Embedding(dims.classes, widths[0])
        self.places = nn.Parameter(0.1 * torch.randn(dims.shape[0], widths[0]))
        self.convolutions = nn.ModuleList(
            nn.Conv1d(before, after, _KERNEL_SIZE, padding=_KERNEL_SIZE // 2)
            for before, after in itertools.pairwise(widths)
        )
        self.dropout = nn.Dropout(architecture.dropout)
        self.heads = Heads(widths[-1], dims)

    def forward(self, x: Tensor, cells: Tensor | None = None) -> EncoderOutput:
        """Map `(rows, length)` to the posteriors' parameters."""
        features = self.classes(x) + self.places
        there = torch.ones_like(x, dtype=torch.bool) if self.pad is None else x != self.pad
        there = (there if cells is None else there & cells).to(features.dtype).unsqueeze(1)
        features = features.mT * there  # (rows, width, length)
        for convolution in self.convolutions:
            features = self.dropout(F.relu(convolution(features))) * there
        return self.heads.split(features.sum(-1) / there.sum(-1).clamp(min=1))


class SequenceDecoder(nn.Module):
    """A perceptron from the latents and a position to the logits of its classes, for each position alone."""

    def __init__(self, architecture: ArchitectureConfig, dims: Dimensions) -> None:
        super().__init__()
        first, *others = reversed(sequence_widths(architecture))
        assert dims.classes is not None
        self.latents = nn.Linear(dims.shared_dim + dims.private_dim, first)
        self.places = nn.Parameter(torch.randn(dims.shape[0], first))
        self.body = nn.Sequential(
            nn.ReLU(),
            *dense_layers([first, *others], architecture.dropout),
            nn.Linear([first, *others][-1], dims.classes),
        )

    def forward(self, z: Tensor) -> DecoderOutput:
        """Map `(rows, shared + private)` to `(rows, length, classes)`."""
        return DecoderOutput(self.body(self.latents(z).unsqueeze(-2) + self.places))


def sequence_widths(architecture: ArchitectureConfig) -> tuple[int, ...]:
    """Return the widths of the layers of networks for sequences."""
    return _DEFAULT_WIDTHS if architecture.hidden_dims is None else architecture.hidden_dims


def _fault(architecture: ArchitectureConfig, dims: Dimensions) -> str | None:
    if len(dims.shape) == 1 and dims.classes is not None and architecture.hidden_dims != ():
        return None
    return (
        f"expected categorical sequences (length,) and at least one width, got shape {dims.shape}, "
        f"classes={dims.classes}, hidden_dims={architecture.hidden_dims}. Use mlp, or correct them."
    )


register("sequence", SequenceEncoder, SequenceDecoder, _fault)
