"""Parts of a model by path, such as `encoders.image`: the weights that a prefix names, and weights of other models."""

from collections.abc import Iterable, Mapping
from difflib import get_close_matches

import torch
from torch import Tensor, nn

from dmvae.model.dmvae import DMVAE


def path_of(name: str) -> str:
    """Return the path of a tensor: `encoders.image.heads.bias` for `_encoders.modality_image.heads.bias`."""
    kind, modality, *rest = name.split(".")
    return ".".join((kind.removeprefix("_"), modality.removeprefix("modality_"), *rest))


def is_in(path: str, prefix: str) -> bool:
    """Return whether a path is a part's own, or of something in it."""
    return path == prefix or path.startswith(f"{prefix}.")


def named_parameters(model: DMVAE) -> dict[str, nn.Parameter]:
    """Return a model's parameters by path."""
    return {path_of(name): parameter for name, parameter in model.named_parameters()}


def check_prefixes(setting: str, prefixes: Iterable[str], paths: Iterable[str]) -> None:
    """Check that every prefix names a weight.

    Raises:
        ValueError: for the first that names none, with the nearest that does, or all parts.
    """
    paths = list(paths)
    for prefix in prefixes:
        if not any(is_in(path, prefix) for path in paths):
            known = list(dict.fromkeys(path.rsplit(".", num)[0] for path in paths for num in range(path.count("."))))
            close = get_close_matches(prefix, known, n=1, cutoff=0.8)
            hint = f"Did you mean {close[0]!r}?" if close else f"Available: {', '.join(_networks(paths))}."
            raise ValueError(f"{setting}: no weights are called {prefix!r}. {hint}")


def start_from(model: DMVAE, other: DMVAE, prefixes: Mapping[str, str]) -> tuple[str, ...]:
    """Copy weights of another model; return the parts of the model that start anew, as `encoders.image`.

    Everything that the other model has in a part is taken. What it lacks, such as a modality that is new, starts anew.

    Args:
        model: takes the weights; on the meta device they are only checked.
        other: the model to take from.
        prefixes: from parts of the model to those of the other, both by path; empty: the whole model.

    Raises:
        ValueError: if a prefix names nothing, or what it names does not fit: other shapes, or another likelihood.
    """
    own, found = ({path_of(name): tensor for name, tensor in m.state_dict().items()} for m in (model, other))
    if prefixes:
        check_prefixes("init_map", prefixes, own)
        check_prefixes("init_map, in the model at init_from", prefixes.values(), found)
        taken = {
            prefix + path.removeprefix(source): path
            for prefix, source in prefixes.items()
            for path in found
            if is_in(path, source)
        }
    else:
        taken = {path: path for path in found}
        differing = _networks(own.keys() ^ found.keys())
        if differing:
            raise ValueError(
                f"The model at init_from must be the same model, but differs in {', '.join(differing)}. Correct "
                "init_from, or name the parts to take in init_map."
            )
    for target, path in taken.items():
        fault = _fault(target, model, own, path, other, found)
        if fault:
            raise ValueError(f"Cannot start {target} from {path} of the model at init_from: {fault}")
    with torch.no_grad():
        for target, path in taken.items():
            own[target].copy_(found[path])
    return tuple(_networks(own.keys() - taken.keys()))


def _fault(
    target: str, model: DMVAE, own: Mapping[str, Tensor], path: str, other: DMVAE, found: Mapping[str, Tensor]
) -> str | None:
    if target not in own:
        return "this model has no such weights. Give its network the layers of that model, or remove it from init_map."
    sizes = tuple(own[target].shape), tuple(found[path].shape)
    if sizes[0] != sizes[1]:
        return f"its shape must be {sizes[0]}, but got {sizes[1]}. Use the sizes of that model."
    modality = target.split(".")[1]
    wanted, got = model.config.distributions[modality], other.config.distributions[path.split(".")[1]]
    if wanted != got and not target.startswith("encoders."):
        return f"its likelihood must be {wanted!r}, but got {got!r}. Set model.decoders_dist.{modality}."
    return None


def _networks(paths: Iterable[str]) -> list[str]:
    return sorted({".".join(path.split(".")[:2]) for path in paths})
