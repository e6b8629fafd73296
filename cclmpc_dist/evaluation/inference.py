"""Sliding-window prediction of a whole image.

Layout: C channels, S spatial (H,W or X,Y,Z), K classes, b windows at once.
"""

import itertools
import math
from collections.abc import Callable, Sequence
from typing import Any, Literal

import torch
from torch import Tensor
from torch.nn import functional as F

Predict = Callable[[Tensor], Tensor]  # (b, C, *patch) float32 -> (b, K, *patch) probabilities
Blend = Literal["uniform", "gaussian"]


def starts(size: int, patch: int, stride: int) -> list[int]:
    """First voxels of the windows along one axis, the last one flush with the end (UA-MT's test script, Yu et
    al. 2019).

    size >= patch >= 1 and stride >= 1, in voxels. Gives ceil((size - patch) / stride) + 1 positions.
    """
    assert size >= patch >= 1 <= stride
    count = math.ceil((size - patch) / stride) + 1
    return [min(stride * i, size - patch) for i in range(count)]


@torch.no_grad()
def sliding_window(
    predict: Predict,
    image: Tensor,
    patch: Sequence[int],
    stride: Sequence[int],
    *,
    classes: int,
    batch: int = 4,
    blend: Blend = "uniform",
) -> Tensor:
    """(K, *S) float32 probabilities of a (C, *S) image, on its device: the mean over the windows that see a
    voxel.

    patch and stride are in voxels, one number an axis; a stride may not exceed its patch. An image smaller
    than the patch is padded with 0 on both sides and cut back. `uniform` weighs all windows alike (UA-MT);
    `gaussian` weighs by the distance to a window's centre, sigma = patch / 8 (nnU-Net, Isensee et al. 2021).
    """
    size = image.shape[1:]
    assert len(size) == len(patch) == len(stride)
    assert all(s <= p for s, p in zip(stride, patch, strict=True))
    padded, inside = _pad(image.float(), patch)
    axes = [starts(n, p, s) for n, p, s in zip(padded.shape[1:], patch, stride, strict=True)]
    weights = [_weights(p, blend, image.device) for p in patch]
    total = torch.zeros(classes, *padded.shape[1:], device=image.device)
    window = _outer(weights)
    for corners in _chunks(list(itertools.product(*axes)), batch):
        places = [tuple(slice(a, a + p) for a, p in zip(corner, patch, strict=True)) for corner in corners]
        answer = predict(torch.stack([padded[(slice(None), *place)] for place in places])).float()
        assert answer.shape == (len(places), classes, *patch), f"predict gave {tuple(answer.shape)}"
        for place, probabilities in zip(places, answer if blend == "uniform" else answer * window, strict=True):
            total[(slice(None), *place)] += probabilities
    # A window's weight is a product over axes, so the sum over the grid of windows is one too.
    seen = [_cover(n, a, w) for n, a, w in zip(padded.shape[1:], axes, weights, strict=True)]
    return (total / _outer(seen))[(slice(None), *inside)]


def by_slice(predict: Predict, image: Tensor, patch: Sequence[int], stride: Sequence[int], **options: Any) -> Tensor:
    """(K, H, W, Z) probabilities of a (C, H, W, Z) image by a 2D network: `sliding_window` of each slice of the last
    axis by itself."""
    slices = [sliding_window(predict, one, patch, stride, **options) for one in image.unbind(-1)]
    return torch.stack(slices, dim=-1)


def _pad(image: Tensor, patch: Sequence[int]) -> tuple[Tensor, tuple[slice, ...]]:
    """The image with zeros around it up to the patch, and where it lies in there."""
    size = image.shape[1:]
    gaps = [max(0, p - n) for p, n in zip(patch, size, strict=True)]
    inside = tuple(slice(gap // 2, gap // 2 + n) for gap, n in zip(gaps, size, strict=True))
    last_axis_first = [side for gap in reversed(gaps) for side in (gap // 2, gap - gap // 2)]
    return F.pad(image, last_axis_first), inside


def _weights(patch: int, blend: Blend, device: torch.device) -> Tensor:
    """(patch,) weights along one axis; the Gaussian's smallest is exp(-8) > 0."""
    if blend == "uniform":
        return torch.ones(patch, device=device)
    distance = torch.arange(patch, device=device) - (patch - 1) / 2
    return torch.exp(-0.5 * (distance / (patch / 8)) ** 2)


def _cover(size: int, first: Sequence[int], weights: Tensor) -> Tensor:
    """(size,) sum of the weights of all windows along one axis."""
    total = torch.zeros(size, device=weights.device)
    for a in first:
        total[a : a + len(weights)] += weights
    return total


def _outer(axes: Sequence[Tensor]) -> Tensor:
    """The product of 1-D factors over all axes, shape (len(axes[0]), len(axes[1]), ...)."""
    product = axes[0]
    for factor in axes[1:]:
        product = product[..., None] * factor
    return product


def _chunks(items: list[tuple[int, ...]], size: int) -> list[list[tuple[int, ...]]]:
    return [items[i : i + size] for i in range(0, len(items), size)]
