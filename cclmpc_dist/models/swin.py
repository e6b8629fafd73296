"""The Transformer decoder: Swin blocks [P: Liu et al., ICCV 2021] on the encoder's pyramid, in 2D or 3D [F].

Features are channels-last inside, (B, *S, C). The blocks are ours and not MONAI's for two reasons: MONAI looks
its position bias up by `table[index]`, whose gradient is not repeatable on a CPU with more than one thread (an
embedding's is), and it numbers offsets wrongly where a map is smaller than the window.
"""

import math
from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from cclmpc_dist.models.recompute import recomputed

STRIDES = (16, 8, 4)


def to_windows(x: Tensor, window: Sequence[int]) -> Tensor:
    """(B, *S, C) -> (B, windows, positions, C); each axis of S is a multiple of the window's."""
    dims = len(window)
    for axis, size in enumerate(window):
        x = x.unflatten(1 + 2 * axis, (-1, size))
    outer, inner = range(1, 2 * dims, 2), range(2, 2 * dims + 1, 2)
    return x.permute(0, *outer, *inner, 2 * dims + 1).flatten(1 + dims, 2 * dims).flatten(1, dims)


def from_windows(x: Tensor, size: Sequence[int], window: Sequence[int]) -> Tensor:
    """The inverse of `to_windows`: (B, windows, positions, C) -> (B, *size, C)."""
    dims = len(window)
    counts = [n // w for n, w in zip(size, window, strict=True)]
    x = x.unflatten(2, tuple(window)).unflatten(1, counts)
    order = [1 + axis + side * dims for axis in range(dims) for side in (0, 1)]
    return x.permute(0, *order, 2 * dims + 1).reshape(x.shape[0], *size, x.shape[-1])


def offsets(window: Sequence[int], table: Sequence[int], device: torch.device) -> Tensor:
    """(n, n) rows of the bias table for each pair of a window's n positions.

    The table is made for windows of size `table`, at least the window's.
    """
    index = torch.zeros(1, 1, dtype=torch.int64, device=device)
    for size, full in zip(window, table, strict=True):
        line = torch.arange(size, device=device)
        relative = line[:, None] - line[None, :] + full - 1
        pairs = index[:, None, :, None] * (2 * full - 1) + relative[None, :, None, :]
        index = pairs.flatten(2, 3).flatten(0, 1)
    return index


def blocked(
    size: Sequence[int],
    padded: Sequence[int],
    window: Sequence[int],
    shift: Sequence[int],
    device: torch.device,
) -> Tensor:
    """(windows, n, n): True where two positions of a shifted window are no neighbours in the map.

    One is wrapped around or padding, the other not. `size` is the map's, `padded` in multiples of the window.
    """
    region = torch.zeros([1] * len(size), dtype=torch.int64, device=device)
    for axis, (n, p, s) in enumerate(zip(size, padded, shift, strict=True)):
        place = torch.arange(p, device=device).roll(-s)
        wrapped = torch.arange(p, device=device) >= p - s
        line = torch.where(place >= n, 2, wrapped.to(torch.int64))
        region = region * 3 + line.reshape([-1 if a == axis else 1 for a in range(len(size))])
    region = to_windows(region[None, ..., None], window)[0, :, :, 0]
    return region[:, :, None] != region[:, None, :]


class Block(nn.Module):
    """Window attention and an MLP, each after a LayerNorm and with a shortcut. (B, *S, C) -> (B, *S, C).

    A map smaller than the window is one window, unshifted, along that axis. No dropout.
    """

    def __init__(self, channels: int, head_width: int, window: Sequence[int], shifted: bool) -> None:
        super().__init__()
        self.heads, self.window, self.shifted = channels // head_width, tuple(window), shifted
        self.norm_attention, self.norm_mlp = nn.LayerNorm(channels), nn.LayerNorm(channels)
        self.qkv, self.out = nn.Linear(channels, 3 * channels), nn.Linear(channels, channels)
        self.mlp = nn.Sequential(nn.Linear(channels, 4 * channels), nn.GELU(), nn.Linear(4 * channels, channels))
        self.bias = nn.Parameter(torch.empty(math.prod(2 * w - 1 for w in window), self.heads))
        nn.init.normal_(self.bias, std=0.02)

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.attend(self.norm_attention(x))
        return x + self.mlp(self.norm_mlp(x))

    def attend(self, x: Tensor) -> Tensor:
        size = x.shape[1:-1]
        window = [min(w, n) for w, n in zip(self.window, size, strict=True)]
        shift = [w // 2 if self.shifted and w < n else 0 for w, n in zip(window, size, strict=True)]
        padded = [math.ceil(n / w) * w for w, n in zip(window, size, strict=True)]
        axes = list(range(1, x.dim() - 1))
        for axis, n, p in zip(axes, size, padded, strict=True):
            if p > n:
                x = torch.cat([x, x.new_zeros([*x.shape[:axis], p - n, *x.shape[axis + 1 :]])], axis)
        x = to_windows(x.roll([-s for s in shift], axes), window)
        apart = None
        if any(shift) or list(size) != padded:
            apart = blocked(size, padded, window, shift, x.device)
        x = from_windows(self.attention(x, window, apart), padded, window).roll(shift, axes)
        return x[(slice(None), *(slice(n) for n in size))]

    def attention(self, x: Tensor, window: Sequence[int], apart: Tensor | None) -> Tensor:
        """Attention inside each window: (B, windows, n, C) -> the same."""
        q, k, v = self.qkv(x).unflatten(-1, (3, self.heads, -1)).permute(3, 0, 1, 4, 2, 5)
        bias = F.embedding(offsets(window, self.window, x.device), self.bias).permute(2, 0, 1)
        scores = (q * q.shape[-1] ** -0.5) @ k.transpose(-2, -1)
        scores = scores + bias.to(scores.dtype)  # cast first: a sum of two types is several times slower
        if apart is not None:
            scores = scores.masked_fill(apart[:, None], -math.inf)
        mixed = scores.softmax(-1).to(v.dtype) @ v
        return self.out(mixed.transpose(2, 3).flatten(-2))


class Expand(nn.Module):
    """LayerNorm, linear layer, pixel shuffle: (B, *S, C) -> (B, *(factor S), channels_out)."""

    def __init__(self, dims: int, channels: int, channels_out: int, factor: int) -> None:
        super().__init__()
        self.factors = [factor] * dims
        self.linear = nn.Sequential(nn.LayerNorm(channels), nn.Linear(channels, channels_out * factor**dims))

    def forward(self, x: Tensor) -> Tensor:
        size = [n * f for n, f in zip(x.shape[1:-1], self.factors, strict=True)]
        x = self.linear(x).unflatten(-1, (math.prod(self.factors), -1))
        return from_windows(x.flatten(1, -3), size, self.factors)


class SwinDecoder(nn.Module):
    """The pyramid -> logits (B, classes, *S).

    Stages of `depth` blocks at strides 16, 8 and 4. Between them the map is expanded twofold and the
    encoder's map is added, as the V-Net does; after the last it is expanded fourfold, the map at stride 1
    is added, then ReLU and a linear layer: little work at full resolution. recompute: strides of the stages whose
    activations backward computes anew.
    """

    def __init__(
        self,
        dims: int,
        classes: int,
        filters: int,
        depth: int,
        window: Sequence[int],
        head_width: int,
        recompute: Sequence[int] = (),
    ) -> None:
        super().__init__()
        self.recompute = frozenset(recompute)
        widths = [filters * stride for stride in STRIDES]
        self.stages = nn.ModuleList(_stage(width, depth, window, head_width) for width in widths)
        steps = zip(widths, [*widths[1:], filters], (2, 2, 4), strict=True)
        self.expands = nn.ModuleList(Expand(dims, a, b, factor) for a, b, factor in steps)
        self.head = nn.Sequential(nn.ReLU(inplace=True), nn.Linear(filters, classes))

    def forward(self, pyramid: Sequence[Tensor]) -> Tensor:
        s1, _, s4, s8, s16 = (level.movedim(1, -1) for level in pyramid)
        x = s16
        for stride, stage, expand, skip in zip(STRIDES, self.stages, self.expands, (s8, s4, s1), strict=True):
            again = stride in self.recompute
            x = expand(recomputed(stage, stage, x) if again else stage(x)) + skip
        return self.head(x).movedim(-1, 1)


def _stage(width: int, depth: int, window: Sequence[int], head_width: int) -> nn.Sequential:
    """Blocks at one stride; every second one shifts its windows."""
    return nn.Sequential(*(Block(width, head_width, window, shifted=i % 2 == 1) for i in range(depth)))
