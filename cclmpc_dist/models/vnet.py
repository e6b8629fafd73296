"""The V-Net of the LA papers [P: UA-MT, Yu et al., MICCAI 2019], split into encoder and decoder.

3x3x3 convolutions in blocks of 1, 2, 3, 3, 3, then 3, 3, 2, 1; halved by strided and doubled by transposed
convolutions; skips by addition. Maps are (B, C, *S); a map at stride s has filters * s channels. `dims` 2 or 3
picks the operators.
"""

import math
from collections.abc import Sequence
from functools import partial
from itertools import pairwise

import torch
from torch import Tensor, nn

from cclmpc_dist.errors import InputError
from cclmpc_dist.models.instance_norm import InstanceNorm2d, InstanceNorm3d
from cclmpc_dist.models.recompute import recomputed

STRIDES = (1, 2, 4, 8, 16)
ENCODER_DEPTHS = (1, 2, 3, 3, 3)
DECODER_DEPTHS = (3, 3, 2, 1)


class Conv3d(nn.Conv3d):
    """torch's, but in float32 for bf16 on a CPU where the first axis has 2 positions.

    There oneDNN 3.12 (torch 2.13) returns weight gradients off by up to 1e38 for 3x3x3 kernels, and says nothing.
    """

    def forward(self, x: Tensor) -> Tensor:
        if x.device.type == "cpu" and x.shape[2] == 2 and torch.is_autocast_enabled("cpu"):
            with torch.autocast("cpu", enabled=False):
                return super().forward(x.to(self.weight.dtype))
        return super().forward(x)


def conv(dims: int) -> type[nn.Conv2d] | type[nn.Conv3d]:
    """The convolution of `dims` dimensions."""
    return nn.Conv2d if dims == 2 else Conv3d


def normalisation(kind: str, dims: int, channels: int) -> nn.Module:
    """The norm layer `model.norm` names. Group norm takes 8 groups, or as many as divide the channels.

    Raises InputError for sync_batch without a CUDA device: torch's refuses CPU tensors.
    """
    if kind == "batch":
        return (nn.BatchNorm2d if dims == 2 else nn.BatchNorm3d)(channels)
    if kind == "instance":
        return (InstanceNorm2d if dims == 2 else InstanceNorm3d)(channels, affine=True)
    if kind == "group":
        return nn.GroupNorm(math.gcd(8, channels), channels)
    assert kind == "sync_batch", kind
    if not torch.cuda.is_available():
        raise InputError("model.norm = sync_batch needs CUDA devices: take batch (per rank), instance or group")
    return nn.SyncBatchNorm(channels)


def _with_norm(layer: nn.Module, norm: str, dims: int, channels: int) -> nn.Sequential:
    return nn.Sequential(layer, normalisation(norm, dims, channels), nn.ReLU(inplace=True))


def _block(dims: int, channels_in: int, channels: int, depth: int, norm: str) -> nn.Sequential:
    """`depth` times convolution, norm, ReLU at one resolution."""
    widths = pairwise([channels_in, *[channels] * depth])
    return nn.Sequential(*(_with_norm(conv(dims)(a, b, 3, padding=1), norm, dims, b) for a, b in widths))


def _down(dims: int, channels: int, norm: str) -> nn.Sequential:
    return _with_norm(conv(dims)(channels, 2 * channels, 2, stride=2), norm, dims, 2 * channels)


def _up(dims: int, channels: int, norm: str) -> nn.Sequential:
    transposed = nn.ConvTranspose2d if dims == 2 else nn.ConvTranspose3d
    return _with_norm(transposed(channels, channels // 2, 2, stride=2), norm, dims, channels // 2)


def _dropout(dims: int, p: float) -> nn.Module:
    return nn.Dropout2d(p) if dims == 2 else nn.Dropout3d(p)


class Encoder(nn.Module):
    """(B, channels, *S) -> a pyramid of five maps at strides 1, 2, 4, 8, 16; S in multiples of 16.

    recompute: strides of the stages whose activations backward computes anew.
    """

    def __init__(
        self,
        dims: int,
        channels: int,
        filters: int = 16,
        norm: str = "batch",
        dropout: float = 0.5,
        recompute: Sequence[int] = (),
    ) -> None:
        super().__init__()
        self.recompute = frozenset(recompute)
        widths = [filters * stride for stride in STRIDES]
        inputs = [channels, *widths[1:]]
        self.blocks = nn.ModuleList(
            _block(dims, a, b, depth, norm) for a, b, depth in zip(inputs, widths, ENCODER_DEPTHS, strict=True)
        )
        self.downs = nn.ModuleList(_down(dims, width, norm) for width in widths[:-1])
        self.dropout = _dropout(dims, dropout)

    def shallow(self, x: Tensor) -> list[Tensor]:
        """The maps at strides 1, 2, 4, 8."""
        maps = [self._run(0, x)]
        for level in (1, 2, 3):
            maps.append(self._run(level, maps[-1]))
        return maps

    def deep(self, s8: Tensor) -> Tensor:
        """The map at stride 16, from the one at stride 8, after dropout."""
        return self.dropout(self._run(4, s8))

    def _run(self, level: int, x: Tensor) -> Tensor:
        if STRIDES[level] in self.recompute:
            return recomputed(partial(self._stage, level), self, x)
        return self._stage(level, x)

    def _stage(self, level: int, x: Tensor) -> Tensor:
        found: Tensor = self.blocks[level](self.downs[level - 1](x) if level else x)
        return found

    def forward(self, x: Tensor) -> list[Tensor]:
        maps = self.shallow(x)
        return [*maps, self.deep(maps[-1])]


class Decoder(nn.Module):
    """The pyramid -> logits (B, classes, *S). recompute: as the encoder's."""

    def __init__(
        self,
        dims: int,
        classes: int,
        filters: int = 16,
        norm: str = "batch",
        dropout: float = 0.5,
        recompute: Sequence[int] = (),
    ) -> None:
        super().__init__()
        self.recompute = frozenset(recompute)
        widths = [filters * stride for stride in STRIDES[::-1]]
        self.ups = nn.ModuleList(_up(dims, width, norm) for width in widths[:-1])
        self.blocks = nn.ModuleList(
            _block(dims, width, width, depth, norm) for width, depth in zip(widths[1:], DECODER_DEPTHS, strict=True)
        )
        self.dropout = _dropout(dims, dropout)
        self.head = conv(dims)(filters, classes, 1)

    def forward(self, pyramid: Sequence[Tensor]) -> Tensor:
        *skips, x = pyramid
        for level in range(4):
            x = self._run(level, x, skips[-1 - level])
        return self.head(self.dropout(x))

    def _run(self, level: int, x: Tensor, skip: Tensor) -> Tensor:
        if STRIDES[-2 - level] in self.recompute:
            return recomputed(partial(self._stage, level), self, x, skip)
        return self._stage(level, x, skip)

    def _stage(self, level: int, x: Tensor, skip: Tensor) -> Tensor:
        found: Tensor = self.blocks[level](self.ups[level](x) + skip)
        return found
