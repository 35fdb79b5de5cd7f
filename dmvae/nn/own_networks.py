"""The networks of a modality: registered, or from a person's own code, which is called and checked here."""

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from dmvae.config.model import ArchitectureConfig
from dmvae.config.own_code import ARCHITECTURES, OwnCodeError, announced, check_call, import_object, is_import_path
from dmvae.nn.networks import Dimensions, architecture_of, is_registered

PARTS = ("encoder", "decoder")
_ROWS = 2


def own_paths(settings: ArchitectureConfig) -> dict[str, str]:
    """Return the import paths that settings name, themselves or by an entry point, by setting: `name`, `encoder`."""
    paths = {part: path for part in PARTS if (path := getattr(settings, part)) is not None}
    if len(paths) < len(PARTS) and not is_registered(settings.name):
        path = settings.name if is_import_path(settings.name) else announced(ARCHITECTURES).get(settings.name)
        paths |= {} if path is None else {"name": path}
    return paths


def build_networks(
    settings: ArchitectureConfig, dims: Dimensions, modality: str, parts: Sequence[str] = PARTS
) -> dict[str, nn.Module]:
    """Build the encoder and the decoder of a modality, or the parts that are asked for.

    Raises:
        ValueError: if the architecture is unknown or does not suit the sizes, or own code cannot be imported or called.
        OwnCodeError: if own code raises an error.
    """
    paths, setting = own_paths(settings), f"model.architectures.{modality}"
    networks = {part: _call(paths[part], settings, dims, f"{setting}.{part}") for part in parts if part in paths}
    left = [part for part in parts if part not in paths]
    if left and "name" in paths:
        pair = _pair(paths["name"], settings, dims, f"{setting}.name")
        networks |= {part: pair[part] for part in left}
    elif left:
        if settings.params and not networks:
            raise ValueError(
                f"{setting}.params have no effect: architecture {settings.name!r} takes none. Remove them, or name "
                "your own code."
            )
        architecture = architecture_of(settings, dims, modality)
        networks |= {part: getattr(architecture, part)(settings, dims) for part in left}
    for part in paths.keys() & networks.keys():
        if not isinstance(networks[part], nn.Module):
            raise ValueError(f"{setting}.{part}: must return a torch.nn.Module, but got {_kind(networks[part])}.")
    return networks


def _pair(path: str, settings: ArchitectureConfig, dims: Dimensions, setting: str) -> dict[str, nn.Module]:
    if settings.hidden_dims is not None or settings.dropout:
        raise ValueError(f"{setting}: hidden_dims and dropout have no effect on {path!r}. Pass them in params.")
    found = _call(path, settings, dims, setting)
    if not isinstance(found, tuple | list) or [isinstance(part, nn.Module) for part in found] != [True, True]:
        raise ValueError(f"{setting}: {path!r} must return the pair (encoder, decoder), but got {_kind(found)}.")
    return dict(zip(PARTS, found, strict=True))


def _call(path: str, settings: ArchitectureConfig, dims: Dimensions, setting: str) -> Any:
    function = import_object(path, setting)
    check_call(function, "dimensions", settings.params, f"{setting} = {path!r}")
    try:
        return function(dims, **settings.params)
    except Exception as error:  # own code can raise anything
        raise OwnCodeError(f"{setting}: {path!r} failed with {type(error).__name__}: {error}") from error


def check_networks(
    networks: Mapping[str, nn.Module], dims: Dimensions, modality: str, like: Tensor, with_cells: bool = False
) -> None:
    """Check, on two rows of zeros, that networks return what the model takes, and treat rows one by one.

    Args:
        networks: by part, in any mode, which is restored.
        dims: of the modality.
        modality: its name.
        like: gives dtype and device.
        with_cells: whether the encoder also takes which cells are observed.

    Raises:
        ValueError: naming the modality, what a network returned and what it must return, or layers that mix rows.
        OwnCodeError: if a network raises an error.
    """
    values = like.new_zeros(_ROWS, *dims.shape, dtype=None if dims.classes is None else torch.int64)
    cells = (torch.ones_like(values, dtype=torch.bool),) if with_cells else ()
    inputs = {"encoder": (values, *cells), "decoder": (like.new_zeros(_ROWS, dims.shared_dim + dims.private_dim),)}
    for part, network in networks.items():
        _check_layers(network, part, modality)
        training = network.training
        try:
            with torch.no_grad():
                output = network.eval()(*inputs[part])
        except Exception as error:
            first = inputs[part][0]
            raise OwnCodeError(
                f"The {part} of modality {modality!r} failed on {tuple(first.shape)}, {first.dtype}: "
                f"{type(error).__name__}: {error}"
            ) from error
        finally:
            network.train(training)
        wanted = encoder_shapes(dims.shared_dim, dims.private_dim) if part == "encoder" else {}
        check_output(output, wanted or {"reconstruction": dims.output_shape}, part, modality, _ROWS)


def encoder_shapes(shared_dim: int, private_dim: int) -> dict[str, tuple[int, ...]]:
    """Return the shape that each output of an encoder must have for one row."""
    shared, private = (shared_dim,), (private_dim,)
    return {
        "embedding": shared, "log_covariance": shared, "style_embedding": private, "style_log_covariance": private,
    }  # fmt: skip


def check_output(output: Any, shapes: Mapping[str, tuple[int, ...]], part: str, modality: str, rows: int) -> None:
    """Check the names and shapes of a network's outputs.

    Raises:
        ValueError: naming the modality, the output, its shape and the shape that it must have.
    """
    for name, shape in shapes.items():
        found = getattr(output, name, None)
        if not isinstance(found, Tensor):
            raise ValueError(
                f"The {part} of modality {modality!r} must return an object with the tensor `{name}`, but got "
                f"{_kind(output if found is None else found)}. Needed: {', '.join(shapes)}."
            )
        if found.shape != (rows, *shape):
            raise ValueError(
                f"The {part} of modality {modality!r} must return `{name}` of shape {(rows, *shape)} for {rows} rows, "
                f"but got {tuple(found.shape)}."
            )


def _check_layers(network: nn.Module, part: str, modality: str) -> None:
    """Refuse layers that let the result of a row depend on the rows beside it, or whose weights do not exist yet."""
    training = network.training
    mixing = {
        name: type(layer).__name__
        for name, layer in network.train().named_modules()
        if isinstance(layer, nn.modules.batchnorm._BatchNorm) and layer.training
    }
    network.train(training)
    if mixing:
        name, kind = next(iter(mixing.items()))
        raise ValueError(
            f"The {part} of modality {modality!r} has batch normalisation ({name or 'itself'}: {kind}"
            f"{f', and {len(mixing) - 1} more' if len(mixing) > 1 else ''}), so its result for a row depends on the "
            "rows beside it and on the number of workers. Use GroupNorm or LayerNorm, or keep its statistics fixed "
            "(torchvision.ops.FrozenBatchNorm2d)."
        )
    lazy = [name for name, parameter in network.named_parameters() if nn.parameter.is_lazy(parameter)]
    if lazy:
        raise ValueError(
            f"The {part} of modality {modality!r} has lazy layers ({lazy[0]}), whose size is not known before they "
            "run. Give their sizes, which the dimensions tell."
        )


def _kind(found: Any) -> str:
    if isinstance(found, tuple | list):
        return f"({', '.join(type(part).__name__ for part in found)})"
    return type(found).__name__
