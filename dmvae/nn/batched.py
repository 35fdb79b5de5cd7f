"""Batched execution: small perceptrons of several modalities with the same layout run as one batched product.

With many small networks, most of a step is the cost of launching operations. Weights stay in one module per modality;
they are stacked for the product, and autograd returns the gradient of each.
"""

from collections.abc import Callable, Hashable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn

from dmvae.distributions.gaussian import at_least_float32
from dmvae.nn.networks import EncoderOutput
from dmvae.nn.networks.mlp import MLPDecoder, MLPEncoder, Skip
from dmvae.nn.own_networks import check_output

_ACTIVATIONS: dict[type[nn.Module], Callable[[Tensor], Tensor]] = {nn.ReLU: torch.relu_, nn.SiLU: F.silu}
_LOG_VAR_RANGE = -20.0, 10.0
_SMALL = 2**17
"""Perceptrons with more weights than this gain nothing from being batched."""


@dataclass(frozen=True, eq=False)
class Decoder:
    """A decoder network as a function from [z_shared, z_private] to the parameters of a likelihood.

    Attributes:
        network: the decoder.
        modality: its name, for messages.
        output_shape: the shape of the likelihood's parameters for one row.
    """

    network: nn.Module
    modality: str
    output_shape: tuple[int, ...]

    def __call__(self, z: Float[Tensor, "row latent"]) -> Tensor:
        """Decode latents, in float32 or better.

        Raises:
            ValueError: if the network's output has another shape, which would broadcast to a wrong density.
        """
        output = self.network(in_type_of(self.network, z))
        check_output(output, {"reconstruction": self.output_shape}, "decoder", self.modality, z.shape[0])
        return at_least_float32(output.reconstruction)


def in_type_of(network: nn.Module, latent: Tensor) -> Tensor:
    """Return latents, which are float32 or better, in the type of a network in half precision."""
    weight = next(network.parameters(), None)
    is_half = weight is not None and weight.dtype in (torch.float16, torch.bfloat16)
    return latent.to(weight.dtype) if weight is not None and is_half else latent


@dataclass(frozen=True, eq=False)
class EncoderInput:
    """An encoder, the values of some rows, and which of their cells are observed; None: its rows have all cells.

    `shapes` has the name and the shape, for one row, of each output that the encoder must have.
    """

    encoder: nn.Module
    shapes: Mapping[str, tuple[int, ...]]
    values: Tensor
    cells: Tensor | None = None

    @property
    def arguments(self) -> tuple[Tensor, ...]:
        """What the encoder is called with."""
        return (self.values,) if self.cells is None else (self.values, self.cells)


def bound_log_var(log_var: Tensor) -> Tensor:
    """Bound a posterior's log-variance softly, in float32 or better: the identity from -20 to 10.

        inside = clamp(log_var, -20, 10)
        bounded = inside + asinh(log_var - inside)

    Outside, the variance or the precision grows linearly with the network's output, no longer exponentially, and the
    gradient does not vanish.
    """
    log_var = at_least_float32(log_var)
    low, high = _LOG_VAR_RANGE
    if log_var.device.type == "cpu" and log_var.numel():
        # without the operations below, a step of small networks is 3% faster; elsewhere, asking would stop the queue
        lowest, highest = torch.aminmax(log_var.detach())
        if lowest >= low and highest <= high:
            return log_var
    inside = log_var.clamp(low, high)
    return inside + torch.asinh(log_var - inside)


def encode_each(given: Mapping[str, EncoderInput]) -> dict[str, EncoderOutput]:
    """Run every encoder on its rows; those with the same layout and number of rows as one batched product.

    Log-variances are softly bounded.
    """
    layouts = {name: layout(own.encoder) for name, own in given.items()}
    kinds = {name: found and (found, given[name].values.shape[0]) for name, found in layouts.items()}
    outputs: dict[str, EncoderOutput] = {}
    for names in group_by_layout(kinds):
        if len(names) == 1:
            own = given[names[0]]
            try:
                output = own.encoder(*own.arguments)
            except ValueError as error:  # batch normalisation refuses to train on one row
                raise ValueError(
                    f"The encoder of modality {names[0]!r} failed on the {len(own.values)} rows of the batch that have "
                    f"it: {error}"
                ) from error
            check_output(output, own.shapes, "encoder", names[0], len(own.values))
            outputs[names[0]] = EncoderOutput(
                output.embedding,
                bound_log_var(output.log_covariance),
                output.style_embedding,
                bound_log_var(output.style_log_covariance),
            )
            continue
        encoders = [encoder for name in names if isinstance(encoder := given[name].encoder, MLPEncoder)]
        features = [encoder.features(*given[name].arguments) for encoder, name in zip(encoders, names, strict=True)]
        shared, shared_log_var, private, private_log_var = torch.split(
            _run_alike(encoders, torch.stack(features)), encoders[0].heads.sizes, dim=-1
        )
        parts = shared, bound_log_var(shared_log_var), private, bound_log_var(private_log_var)
        unbound = zip(*(part.unbind() for part in parts), strict=True)
        outputs |= {name: EncoderOutput(*output) for name, output in zip(names, unbound, strict=True)}
    return outputs


def decode_each(decoders: Sequence[Callable[[Tensor], Tensor]], z: Float[Tensor, "decoder row latent"]) -> Tensor:
    """Run decoders with the same layout, or one of any kind, each on its rows; return `(decoder, row, *output)`."""
    if len(decoders) == 1:
        return decoders[0](z[0]).unsqueeze(0)
    networks = [decoder.network for decoder in decoders if isinstance(decoder, Decoder)]
    output, (first, *_) = at_least_float32(_run_alike(networks, in_type_of(networks[0], z))), networks
    assert isinstance(first, MLPDecoder)
    return output.reshape(*output.shape[:2], *first.output_shape)


def decoder_layout(decode: Callable[[Tensor], Tensor]) -> Hashable | None:
    """Return a key that is equal for decoders that `decode_each` can batch; None for one that must run alone."""
    return layout(decode.network) if isinstance(decode, Decoder) else None


def layout(network: nn.Module) -> Hashable | None:
    """Return a key that is equal for perceptrons that can run as one batched product; None for any other network.

    A network that has hooks, is compiled, or has other layers than it was built with, must run alone.
    """
    if not isinstance(network, MLPEncoder | MLPDecoder) or type(network) not in (MLPEncoder, MLPDecoder):
        return None
    body = network._modules["body"]
    if _is_watched(network) or type(body) is not nn.Sequential or _is_watched(body):
        return None
    kinds: list[Any] = [type(network)]
    num_weights = 0
    for layer in _layers_of(network):
        if _is_watched(layer):
            return None
        if type(layer) in _ACTIVATIONS and len(kinds) > 1:
            kinds.append(type(layer))
            continue
        if type(layer) is nn.LayerNorm and len(kinds) > 1:
            kinds.append((nn.LayerNorm, layer.normalized_shape, layer.eps))
            continue
        weight, bias = (layer._parameters.get(part) for part in ("weight", "bias"))
        if type(layer).forward is not nn.Linear.forward or weight is None or bias is None:
            return None
        num_weights += weight.numel()
        kinds.append((*weight.shape, weight.dtype))
    skip: Any = network._modules.get("skip")
    if skip is not None:
        if type(skip) is not Skip or _is_watched(skip):
            return None
        num_weights += skip.weight.numel()
        kinds.append((*skip.weight.shape, skip.weight.dtype))
    if num_weights > _SMALL:
        return None
    kinds.append(tuple(network.heads.sizes) if isinstance(network, MLPEncoder) else network.output_shape)
    return tuple(kinds)


def group_by_layout(kinds: Mapping[str, Hashable | None]) -> list[tuple[str, ...]]:
    """Group names with equal keys, in their order; a name without a key is a group of its own."""
    found: dict[Hashable, list[str]] = {}
    for name, kind in kinds.items():
        found.setdefault(name if kind is None else (kind,), []).append(name)
    return [tuple(names) for names in found.values()]


def _is_watched(module: nn.Module) -> bool:
    forward, backward = module._forward_hooks or module._forward_pre_hooks, module._backward_hooks
    return bool(forward or backward or module._backward_pre_hooks) or module._compiled_call_impl is not None


def _layers_of(network: nn.Module) -> list[Any]:
    # called several times a step, and attributes of nn.Module are slow
    parts: dict[str, Any] = network._modules
    heads = [parts["heads"]] if "heads" in parts else []
    return [*parts["body"]._modules.values(), *heads]


def _run_alike(networks: Sequence[nn.Module], x: Float[Tensor, "network row _"]) -> Tensor:
    given = x
    for layers in zip(*(_layers_of(network) for network in networks), strict=True):
        kind = type(layers[0])
        if kind in _ACTIVATIONS:
            x = _ACTIVATIONS[kind](x)
            continue
        weight, bias = (torch.stack([layer._parameters[part] for layer in layers]) for part in ("weight", "bias"))
        if kind is nn.LayerNorm:
            x = F.layer_norm(x, layers[0].normalized_shape, eps=layers[0].eps)
            x = torch.addcmul(bias.unsqueeze(1), x, weight.unsqueeze(1))
        else:
            x = torch.baddbmm(bias.unsqueeze(1), x, weight.mT)
    skips: list[Any] = [network._modules.get("skip") for network in networks]
    if skips[0] is None:
        return x
    return torch.baddbmm(x, given, torch.stack([skip.full_weight for skip in skips]).mT)
