"""Standard-normal noise as a function of a row's key, independent of batch and worker.

torch's generators are sequences: a worker with some rows of a batch would have to draw the noise of the others too, and
a row's noise would depend on its neighbours. Here every value is a function of (key, place) alone: the SplitMix64
finaliser of a counter (Steele, Lea and Flood 2014), then the Box-Muller transform.
"""

import math

import numpy as np
import torch
from jaxtyping import Float, Int64
from torch import Tensor

from dmvae.data.batch import Ids

_GOLDEN = -7046029254386353131  # 0x9E3779B97F4A7C15 as int64
_MIX_1 = -4658895280553007687  # 0xBF58476D1CE4E5B9
_MIX_2 = -7723592293110705685  # 0x94D049BB133111EB

VERSION = 3
"""Changes when a key gives other values or estimates use keys otherwise, so that estimates of one version are not
resumed with another."""


def _mix(x: Tensor) -> Tensor:
    """Apply the SplitMix64 finaliser elementwise; int64 arithmetic wraps, and a mask makes `>>` logical."""
    return _mix_in_place(x.clone())


def _mix_in_place(x: Tensor) -> Tensor:
    shifted = torch.empty_like(x)
    torch.bitwise_right_shift(x, 30, out=shifted)
    x.bitwise_xor_(shifted.bitwise_and_(0x3FFFFFFFF)).mul_(_MIX_1)
    torch.bitwise_right_shift(x, 27, out=shifted)
    x.bitwise_xor_(shifted.bitwise_and_(0x1FFFFFFFFF)).mul_(_MIX_2)
    torch.bitwise_right_shift(x, 31, out=shifted)
    return x.bitwise_xor_(shifted.bitwise_and_(0x1FFFFFFFF))


def _mix_number(x: int) -> int:
    """Apply the SplitMix64 finaliser to a Python integer."""
    x = _wrap((x ^ ((x >> 30) & 0x3FFFFFFFF)) * _MIX_1)
    x = _wrap((x ^ ((x >> 27) & 0x1FFFFFFFFF)) * _MIX_2)
    return x ^ ((x >> 31) & 0x1FFFFFFFF)


def _wrap(x: int) -> int:
    """Wrap a Python integer into the range of int64, as tensor arithmetic does."""
    return (x + 2**63) % 2**64 - 2**63


def chain(*parts: int | Tensor) -> Tensor:
    """Hash integers and broadcastable int64 tensors into int64 keys; the order of the parts matters."""
    number, key = 0, None
    for part in parts:
        if isinstance(part, Tensor):
            key = torch.tensor(number, dtype=torch.int64, device=part.device) if key is None else key.to(part.device)
            key = _mix((key + _GOLDEN) ^ _mix(part + _GOLDEN))
            continue
        hashed = _mix_number(_wrap(part + _GOLDEN))
        if key is None:
            # in Python integers as long as all rows have the parts in common: tensor operations cost much more
            number = _mix_number(_wrap(number + _GOLDEN) ^ hashed)
        else:
            key = _mix((key + _GOLDEN) ^ hashed)
    return torch.tensor(number, dtype=torch.int64) if key is None else key


def row_keys(ids: Ids) -> Int64[Tensor, " row"]:
    """Return an int64 key per row id; different ids have different keys (strings: except with probability 2^-64)."""
    if isinstance(ids, Tensor):
        return ids.to(torch.int64)
    if len(ids) == 0:
        return torch.zeros(0, dtype=torch.int64)
    encoded = np.char.encode(ids.astype(str), "utf-8")
    width = -(-max(encoded.dtype.itemsize, 1) // 8) * 8
    words = np.ascontiguousarray(encoded.astype(f"S{width}")).view(np.int64).reshape(len(ids), -1)
    keys = torch.zeros(len(ids), dtype=torch.int64)
    for place in range(words.shape[1]):
        word = torch.from_numpy(words[:, place].copy())
        # padding depends on the longest id of the batch: it must not change the key of a shorter one
        keys = torch.where(word == 0, keys, chain(keys, place, word))
    return keys


def standard_normal(
    keys: Int64[Tensor, " row"], num: int, start: int = 0, dtype: torch.dtype = torch.float32
) -> Float[Tensor, "row {num}"]:
    """Draw N(0, 1) values: places `start` to `start + num` of every key's stream.

    The value at (key, place) depends on nothing else, so any split of rows or places gives the same noise. It has the
    precision of float32 in any `dtype`, and its magnitude is at most 6.7.
    """
    first, last = start // 2, -(-(start + num) // 2)
    counter = torch.arange(first + 1, last + 1, dtype=torch.int64, device=keys.device) * _GOLDEN
    bits = _mix_in_place(_mix(keys)[:, None] + counter)
    # two signed 32-bit halves: one for the angle, the magnitude of the other, 0 to 2^31, for the radius
    halves = bits.view(torch.int32).view(*bits.shape, 2).float()
    angle = halves[..., 0] * (2 * math.pi * 2**-32)
    radius = halves[..., 1].abs().add_(0.5).mul_(2**-31).log_().mul_(-2).sqrt_()
    torch.mul(torch.cos(angle), radius, out=halves[..., 0])
    torch.mul(angle.sin_(), radius, out=halves[..., 1])
    return halves.flatten(1)[:, start - 2 * first :][:, :num].to(dtype)
