"""The two intensity views of an image [P]; the operations and their order are [F]: gamma, contrast and brightness,
blur, noise.

All is batched, of fixed shape and on the image's device, and each image is treated alone: its view is a function of
its own key, bit for bit, whatever batch it is in. Pixel i of every view is the same tissue: no geometry here.
Strengths refer to the image's own statistics, those of each channel before any operation.
"""

import math

import torch
from torch import Tensor
from torch.nn import functional as F

from cclmpc_dist.config import Views
from cclmpc_dist.data import draws


@torch.no_grad()
def views(image: Tensor, keys: Tensor, view: int, settings: Views) -> Tensor:
    """View 1 or 2 of images (B, C, *S) float32, with int64 keys (B,): a new tensor of the same shape.

    Each operation is applied with `settings.probability`, by its own draw; one of strength 0 is left out.
    """
    draw = _Draws(keys, view, settings.probability, image.dim())
    axes = tuple(range(2, image.dim()))
    mean, std = _moments(image, axes)
    x = image.clone()
    if settings.gamma > 0:
        apply, u = draw("gamma")
        x = torch.where(apply, _gamma(x, torch.exp(settings.gamma * (2 * u - 1)), axes), x)
    if settings.contrast > 0 or settings.brightness > 0:
        x = _affine(x, mean, std, draw, settings)
    if settings.blur > 0:
        apply, u = draw("blur")
        x = torch.where(apply, _blur(x, settings.blur * u, settings.blur), x)
    if settings.noise > 0:
        apply, u = draw("noise")
        scale = torch.where(apply, settings.noise * u, 0.0) * std
        normal = draws.normal(keys, f"view{view}.noise.field", image[0].numel()).reshape(image.shape)
        x = x.addcmul(scale, normal)
    return x


class _Draws:
    """Whether an operation is applied to each image, and a uniform number in [0, 1): both (B, 1, 1, ...)."""

    def __init__(self, keys: Tensor, view: int, probability: float, ndim: int) -> None:
        self.keys, self.view, self.probability, self.ndim = keys, view, probability, ndim

    def __call__(self, operation: str) -> tuple[Tensor, Tensor]:
        pair = draws.uniform(self.keys, f"view{self.view}.{operation}", 2)
        chance, strength = pair.T.reshape(2, -1, *[1] * (self.ndim - 1))
        return chance < self.probability, strength


def _moments(image: Tensor, axes: tuple[int, ...]) -> tuple[Tensor, Tensor]:
    """Mean and deviation of each channel, summed in float64: how float32 sums round depends on the batch."""
    mean = image.mean(axes, keepdim=True, dtype=torch.float64).to(image.dtype)
    variance = (image - mean).square_().mean(axes, keepdim=True, dtype=torch.float64)
    return mean, variance.sqrt().to(image.dtype)


def _gamma(x: Tensor, exponent: Tensor, axes: tuple[int, ...]) -> Tensor:
    """x scaled to [0, 1] by its own extremes, raised to the exponent, scaled back."""
    low, high = x.amin(axes, keepdim=True), x.amax(axes, keepdim=True)
    span = (high - low).clamp_min(torch.finfo(x.dtype).tiny)
    return (x - low).div_(span).pow_(exponent).mul_(span).add_(low)


def _affine(x: Tensor, mean: Tensor, std: Tensor, draw: _Draws, settings: Views) -> Tensor:
    """Contrast about the image's mean and brightness in its standard deviations, in one pass."""
    apply, u = draw("contrast")
    factor = torch.where(apply, 1 + settings.contrast * (2 * u - 1), 1.0)
    apply, u = draw("brightness")
    offset = torch.where(apply, settings.brightness * (2 * u - 1), 0.0) * std
    return x.mul_(factor).add_(mean * (1 - factor) + offset)


def _blur(x: Tensor, sigma: Tensor, largest: float) -> Tensor:
    """Gaussian blur of each image by its own sigma (B, 1, 1, ...), edges repeated.

    Taps reach three times the largest sigma. They are shifted sums and not a convolution: cuDNN picks its
    algorithm, and so its rounding, by the size of the batch.
    """
    radius = math.ceil(3 * largest)
    taps = [torch.exp(-0.5 * (step / sigma.clamp_min(1e-3)) ** 2) for step in range(radius + 1)]
    total = taps[0] + 2 * sum(taps[1:])
    taps = [tap / total for tap in taps]
    for axis in range(2, x.dim()):
        sides = [0, 0] * (x.dim() - 1 - axis) + [radius, radius] + [0, 0] * (axis - 2)
        size, padded = x.shape[axis], F.pad(x, sides, mode="replicate")
        x = x * taps[0]
        for step, tap in enumerate(taps[1:], start=1):
            x.addcmul_(padded.narrow(axis, radius - step, size), tap)
            x.addcmul_(padded.narrow(axis, radius + step, size), tap)
    return x
