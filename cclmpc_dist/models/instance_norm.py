"""Instance norm that is quick on a CPU; torch's own copies a channels-last map into the other layout and back.

torch's batch norm knows the layout, and the batch norm of one image is its instance norm. But it sums a channel's
positions one after the other: slow where channels are fewer than a vector's lanes, and 2e-4 off for 400,000 positions
in float32. So r neighbouring positions are taken for channels of their own, which the layout allows without a copy,
and their r statistics are merged.

Layout: x (B, C, *S) channels-last, n positions; an image is seen as (1, r C, n / r, 1).
"""

import math
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.nn import functional as F

from cclmpc_dist.dtypes import wide

LANES = 1024  # channels of the view
LAYOUTS = {4: torch.channels_last, 5: torch.channels_last_3d}


def _images(x: Tensor) -> tuple[Tensor, ...]:
    positions, channels = math.prod(x.shape[2:]), x.shape[1]
    together = math.gcd(positions, max(1, LANES // channels))
    rows = x.movedim(1, -1).view(len(x), positions // together, together * channels)
    return rows.transpose(1, 2)[:, None, ..., None].unbind()


def _scaled(x: Tensor, scale: Tensor, shift: Tensor, out: Tensor) -> None:
    """out = x scale + shift, for one image; both per channel of the view."""
    zero, one, unused = torch.zeros_like(scale), torch.ones_like(scale), scale.new_empty(0)
    torch.ops.aten.native_batch_norm.out(
        x, scale, shift, zero, one, False, 0.0, 0.0, out=out, save_mean=unused, save_invstd=unused
    )


class _InstanceNorm(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, weight, bias, eps):  # type: ignore
        images = _images(x)
        moments = x.new_zeros(images[0].shape[1], dtype=wide(x))  # makes statistics of bf16 float32
        found = [torch.batch_norm_update_stats(one, moments, moments, 0.0) for one in images]
        means, variances = (torch.stack(part).unflatten(1, (-1, x.shape[1])) for part in zip(*found, strict=True))
        mean = means.mean(1)  # (B, C)
        variance = (variances + (means - mean[:, None]).square_()).mean(1)
        scale = (variance + eps).rsqrt()
        factor = scale * weight
        y = torch.empty_like(x)
        _affine(images, factor, bias - mean * factor, _images(y))
        ctx.save_for_backward(x, weight, mean, scale)
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx, grad):  # type: ignore
        x, weight, mean, scale = ctx.saved_tensors
        grad = grad.contiguous(memory_format=LAYOUTS[x.dim()])
        images, grads = _images(x), _images(grad)
        repeats = images[0].shape[1] // x.shape[1]
        one = scale.new_ones(images[0].shape[1])
        sums = [  # over positions of grad (x - mean) and of grad
            torch.ops.aten.native_batch_norm_backward(
                g, image, one, centre.repeat(repeats), one, None, None, False, 0.0, [False, True, True]
            )[1:]
            for g, image, centre in zip(grads, images, mean, strict=True)
        ]
        slopes, totals = (torch.stack(part).unflatten(1, (repeats, -1)).sum(1) for part in zip(*sums, strict=True))
        positions = x[0, 0].numel()
        factor = scale * weight
        pull = -factor * scale.square() * slopes / positions
        grad_x, rest = torch.empty_like(x), torch.empty_like(x)
        _affine(grads, factor, torch.zeros_like(factor), _images(grad_x))
        _affine(images, pull, -pull * mean - factor * totals / positions, _images(rest))
        return grad_x.add_(rest), (slopes * scale).sum(0), totals.sum(0), None


def _affine(images: tuple[Tensor, ...], scale_BC: Tensor, shift_BC: Tensor, out: tuple[Tensor, ...]) -> None:
    repeats = images[0].shape[1] // scale_BC.shape[1]
    for image, scale, shift, into in zip(images, scale_BC.repeat(1, repeats), shift_BC.repeat(1, repeats), out,
                                         strict=True):  # fmt: skip
        _scaled(image, scale, shift, into)


def _norm(module: Any, x: Tensor, otherwise: Any) -> Tensor:
    if x.device.type != "cpu":
        return otherwise(x)
    if x.is_contiguous() or not x.is_contiguous(memory_format=LAYOUTS[x.dim()]):
        return F.group_norm(x, x.shape[1], module.weight, module.bias, module.eps)
    return _InstanceNorm.apply(x, module.weight, module.bias, module.eps)


class InstanceNorm2d(nn.InstanceNorm2d):
    """With weight and bias, without running statistics; one position a channel gives 0 times weight plus bias."""

    def forward(self, x: Tensor) -> Tensor:
        return _norm(self, x, super().forward)


class InstanceNorm3d(nn.InstanceNorm3d):
    """As InstanceNorm2d."""

    def forward(self, x: Tensor) -> Tensor:
        return _norm(self, x, super().forward)
