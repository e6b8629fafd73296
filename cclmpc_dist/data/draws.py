"""Counter-based random draws: a pure function of keys, the same on every device, rank and restart.

A key names what is drawn for: (seed, stream, epoch, unwrapped position) of an image, folded with a purpose. Draw i
of a key is a 64-bit mix (splitmix64, Steele et al., OOPSLA 2014) of key + i * golden ratio. No state is held.
"""

import hashlib
import math
from collections.abc import Sequence
from typing import TypeVar

import numpy as np
import torch
from torch import Tensor

_GOLDEN = 0x9E3779B97F4A7C15
_MIX_1 = 0xBF58476D1CE4E5B9
_MIX_2 = 0x94D049BB133111EB
_WORD = 1 << 64
Words = TypeVar("Words", Tensor, np.ndarray)  # int64


def _signed(word: int) -> int:
    """The 64-bit pattern of `word` as torch's int64 holds it."""
    word %= _WORD
    return word - _WORD if word >= _WORD >> 1 else word


def key(*parts: int | str) -> int:
    """A signed 64-bit key from integers and names, the same on every machine (blake2b)."""
    text = "\x1f".join(f"{type(part).__name__}:{part}" for part in parts)
    return int.from_bytes(hashlib.blake2b(text.encode(), digest_size=8).digest(), "little", signed=True)


def philox(*parts: int | str) -> np.random.Philox:
    """numpy's counter-based bits under such a key, for draws on the host."""
    return np.random.Philox(key=key(*parts) % _WORD)


def _shift(x: Words, bits: int) -> Words:
    """Logical right shift (that of int64 is arithmetic)."""
    shifted = x >> bits
    shifted &= (1 << (64 - bits)) - 1
    return shifted


def _mix(x: Words) -> Words:
    """splitmix64's finaliser. In place: fields of noise are large."""
    x ^= _shift(x, 30)
    x *= _signed(_MIX_1)
    x ^= _shift(x, 27)
    x *= _signed(_MIX_2)
    x ^= _shift(x, 31)
    return x


def fold(keys_B: Words, purpose: str) -> Words:
    """New int64 keys for one purpose: draws of different purposes never share a counter."""
    return _mix(keys_B ^ key(purpose))


def words(keys_B: Tensor, purpose: str, n: int) -> Tensor:
    """(B, n) int64: n random 64-bit words per key."""
    counter = torch.arange(1, n + 1, device=keys_B.device, dtype=torch.int64) * _signed(_GOLDEN)
    return _mix(fold(keys_B, purpose)[:, None] + counter)


def uniform(keys_B: Tensor, purpose: str, n: int) -> Tensor:
    """(B, n) float32 in [0, 1), 24 random bits each."""
    return _shift(words(keys_B, purpose, n), 40).to(torch.float32).mul_(2.0**-24)


def host_uniform(keys_B: Sequence[int], purpose: str, n: int) -> np.ndarray:
    """What `uniform` gives, for a few keys: numpy takes a fraction of torch's time for so little, and its threads do
    not meet over it."""
    counter = np.arange(1, n + 1) * _signed(_GOLDEN)
    bits = _mix(fold(np.array(keys_B), purpose)[:, None] + counter)
    return _shift(bits, 40).astype(np.float32) * np.float32(2.0**-24)


def normal(keys_B: Tensor, purpose: str, n: int) -> Tensor:
    """(B, n) float32 standard normal, at most 5.77 in size (Box-Muller, both halves of each word).

    The bits are the same on every device; log, cos and sin round by the device's own library.
    """
    half = (n + 1) // 2
    bits = words(keys_B, purpose, half)
    radius = _shift(bits, 40).to(torch.float32).add_(1.0).mul_(2.0**-24).log_().mul_(-2.0).sqrt_()
    angle = bits.bitwise_and_(0xFFFFFF).to(torch.float32).mul_(2.0 * math.pi * 2.0**-24)
    out = torch.empty(keys_B.shape[0], 2 * half, device=keys_B.device)
    torch.mul(radius, angle.cos(), out=out[:, :half])
    torch.mul(radius, angle.sin_(), out=out[:, half:])
    return out[:, :n]


def subset(keys_B: Tensor, purpose: str, size: int, n: int) -> Tensor:
    """(B, n) int64: n of `size` positions per key without repetition, n at most `size`, in random order."""
    return uniform(keys_B, purpose, size).topk(n, dim=1).indices
