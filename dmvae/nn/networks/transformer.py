"""A small transformer over sequences of classes, which may be padded."""

from itertools import pairwise

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float
from torch import Tensor, nn

from dmvae.config.model import ArchitectureConfig
from dmvae.nn.networks.interface import Dimensions, EncoderOutput, Heads
from dmvae.nn.networks.registry import register
from dmvae.nn.networks.sequence import SequenceDecoder, sequence_widths

_HEAD_SIZE = 16


class Block(nn.Module):
    """Attention between the places of a row, then a perceptron for each place, both residual and normalised before."""

    def __init__(self, width: int, dropout: float) -> None:
        super().__init__()
        self.attention_norm, self.body_norm = nn.LayerNorm(width), nn.LayerNorm(width)
        self.inputs, self.outputs = nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.body = nn.Sequential(nn.Linear(width, 4 * width), nn.GELU(), nn.Linear(4 * width, width))
        self.dropout = nn.Dropout(dropout)

    def forward(
        self, x: Float[Tensor, "row place width"], there: Bool[Tensor, "row 1 1 place"]
    ) -> Float[Tensor, "row place width"]:
        """Map features of places to features of places; those that are not `there` are not attended to."""
        heads = self.inputs(self.attention_norm(x)).unflatten(-1, (3, -1, _HEAD_SIZE))
        query, key, value = heads.permute(2, 0, 3, 1, 4)  # each (row, head, place, size)
        found = F.scaled_dot_product_attention(query, key, value, attn_mask=there)
        x = x + self.dropout(self.outputs(found.transpose(1, 2).flatten(2)))
        out: Tensor = x + self.dropout(self.body(self.body_norm(x)))
        return out


class TransformerEncoder(nn.Module):
    """Embeddings of classes and places, blocks of attention, and what a place of its own has gathered from the row.

    The amount of padding changes nothing, and missing classes are left out.
    """

    def __init__(self, architecture: ArchitectureConfig, dims: Dimensions) -> None:
        super().__init__()
        widths, self.pad = sequence_widths(architecture), dims.pad
        assert dims.classes is not None
        self.classes = nn.Embedding(dims.classes, widths[0])
        self.places = nn.Parameter(0.1 * torch.randn(dims.shape[0], widths[0]))
        self.summary = nn.Parameter(0.1 * torch.randn(widths[0]))  # is always there, so that an empty row has a result
        self.blocks = nn.ModuleList(Block(width, architecture.dropout) for width in widths)
        self.norm = nn.LayerNorm(widths[-1])
        self.heads = Heads(widths[-1], dims)

    def forward(self, x: Tensor, cells: Tensor | None = None) -> EncoderOutput:
        """Map `(rows, length)` to the posteriors' parameters."""
        there = torch.ones_like(x, dtype=torch.bool) if self.pad is None else x != self.pad
        there = F.pad(there if cells is None else there & cells, (1, 0), value=True)[:, None, None]
        summary = self.summary.expand(len(x), 1, -1)
        features = torch.cat((summary, self.classes(x) + self.places), dim=1)
        for block in self.blocks:
            features = block(features, there)
        return self.heads.split(self.norm(features[:, 0]))


def _fault(architecture: ArchitectureConfig, dims: Dimensions) -> str | None:
    widths = sequence_widths(architecture)
    if len(dims.shape) != 1 or dims.classes is None:
        return (
            f"expected categorical sequences (length,), got shape {dims.shape}, classes={dims.classes}. Use skip_mlp."
        )
    if not widths or widths[0] % _HEAD_SIZE or any(one != other for one, other in pairwise(widths)):
        return (
            f"hidden_dims must have one width per block, all the same multiple of {_HEAD_SIZE}, but got "
            f"{list(widths)}. Correct it."
        )
    return None


register("transformer", TransformerEncoder, SequenceDecoder, _fault)
