"""The interface of encoders and decoders, and the layers that several of them use."""

import itertools
from collections.abc import Callable
from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor, nn


@dataclass(frozen=True, eq=False)
class EncoderOutput:
    """The output of an encoder: means and log-variances of the shared and the private (style) posterior."""

    embedding: Float[Tensor, "row shared"]
    log_covariance: Float[Tensor, "row shared"]
    style_embedding: Float[Tensor, "row private"]
    style_log_covariance: Float[Tensor, "row private"]


@dataclass(frozen=True, eq=False)
class DecoderOutput:
    """The output of a decoder: the parameters of its modality's likelihood, `(rows, *output_shape)`."""

    reconstruction: Tensor


@dataclass(frozen=True)
class Dimensions:
    """The sizes and values that a pair of networks is built for.

    Attributes:
        shape: shape of one row of the modality.
        output_shape: shape of the likelihood's parameters for one row.
        shared_dim: dimension of the shared latent.
        private_dim: dimension of the private latent.
        classes: number of classes of categorical values; None for other values.
        counts: whether the values are counts, which spread over orders of magnitude.
        start: what the decoder's output should be close to before training; one number, or one for each element.
        pad: the class that fills up short rows; None if there is none.
        kinds: the kind of each column of a table; empty for other values.
        column_classes: the number of classes of each column that is a category.
        missing_cells: whether cells may be missing; the encoder is then called with the values, 0 where they are
            missing, and a boolean tensor of the same shape that says which are observed.
    """

    shape: tuple[int, ...]
    output_shape: tuple[int, ...]
    shared_dim: int
    private_dim: int
    classes: int | None = None
    counts: bool = False
    start: float | tuple[float, ...] = 0.0
    pad: int | None = None
    kinds: tuple[str, ...] = ()
    column_classes: tuple[int, ...] = ()
    missing_cells: bool = False


class Heads(nn.Linear):
    """A linear map to both posteriors: shared mean, shared log-variance, private mean, private log-variance."""

    def __init__(self, in_features: int, dims: Dimensions) -> None:
        super().__init__(in_features, 2 * dims.shared_dim + 2 * dims.private_dim)
        self.sizes = [dims.shared_dim] * 2 + [dims.private_dim] * 2

    def split(self, features: Tensor) -> EncoderOutput:
        """Map features to the posteriors' parameters."""
        return EncoderOutput(*self(features).split(self.sizes, dim=-1))


_FULL_RATE_INPUTS = 1024
"""Up to so many inputs, a layer learns at the run's learning rate."""


def scale_rate(layer: nn.Linear, num_inputs: int) -> None:
    """Scale the learning rate of a layer that reads the data, so that its effect does not grow with the width.

    Adam moves every weight by about the learning rate, whatever the gradient. A step therefore moves an output by as
    much as there are inputs that are not zero: 10,000 features would drive the networks out of any sensible range.

    Source: Yang et al. 2022, Tensor Programs V (the rate of Adam is proportional to 1 / inputs).
    """
    layer.rate_factor = min(1.0, _FULL_RATE_INPUTS / num_inputs)  # type: ignore[assignment]  # a plain number


def dense_layers(
    sizes: list[int], dropout: float, activation: Callable[[], nn.Module] = nn.ReLU, layer_norm: bool = False
) -> list[nn.Module]:
    """Return a linear layer, the activation and what else is asked for, for every pair of neighbouring sizes.

    Normalisation comes before the activation, dropout after it.
    """
    layers: list[nn.Module] = []
    for in_size, out_size in itertools.pairwise(sizes):
        layers += [nn.Linear(in_size, out_size)]
        layers += [nn.LayerNorm(out_size)] if layer_norm else []
        layers += [activation()]
        layers += [nn.Dropout(dropout)] if dropout else []
    return layers


def start_at(last: nn.Module, dims: Dimensions) -> nn.Module:
    """Shift the bias of a decoder's last layer by the start of its output."""
    assert isinstance(last.bias, Tensor)
    with torch.no_grad():
        last.bias += torch.tensor(dims.start, dtype=last.bias.dtype)
    return last
