"""Seg(p, y, m): half cross-entropy, half Dice, over the pixels whose label is not IGNORE (docs/method.md, Losses).

Layout: log_p and p (B, K, *S), y (B, *S) int64 in [0, K) or IGNORE. Sums are taken in at least float32. Masked
values are replaced before any product: NaN or infinity under the mask reaches neither value nor gradient.
"""

import torch
from jaxtyping import Float, Int
from torch import Tensor

from cclmpc_dist.dtypes import wide
from cclmpc_dist.losses.terms import Additive, Part, Ratio

IGNORE = -1
EPSILON = 1e-5  # [F]


def cross_entropy(log_p: Float[Tensor, "B K *S"], y: Int[Tensor, " B *S"]) -> Additive:
    """Mean of -log p_y over the labelled pixels; 0 where there are none."""
    keep = y != IGNORE
    picked = log_p.gather(1, y.clamp_min(0)[:, None])[:, 0]
    total = torch.where(keep, -picked, 0.0).sum(dtype=wide(log_p))
    return Additive(total, keep.sum().to(torch.float64))


def dice(p: Float[Tensor, "B K *S"], y: Int[Tensor, " B *S"]) -> Ratio:
    """Mean over foreground classes of 1 - (2 Σ p y + ε) / (Σ p² + Σ y + ε), over the labelled pixels of all ranks.

    The sums are (2 Σ p y, Σ p², Σ y), each over K - 1 classes, 3 (K - 1) numbers. No labelled pixel: exactly 0.
    """
    keep = y != IGNORE
    overlap, squares, sizes = [], [], []
    for label in range(1, p.shape[1]):
        p_label = torch.where(keep, p[:, label], 0.0).to(wide(p))
        inside = y == label
        overlap.append(2 * torch.where(inside, p_label, 0.0).sum())
        squares.append(p_label.square().sum())
        sizes.append(inside.sum().to(wide(p)))
    return Ratio(torch.stack(overlap + squares + sizes), _dice)


def _dice(sums: Tensor) -> Tensor:
    overlap, squares, sizes = sums.chunk(3)
    return (1 - (overlap + EPSILON) / (squares + sizes + EPSILON)).mean()


def seg(log_p: Float[Tensor, "B K *S"], y: Int[Tensor, " B *S"]) -> list[Part]:
    """0.5 CE + 0.5 Dice, p being exp(log_p)."""
    log_p = torch.where((y != IGNORE)[:, None], log_p, 0.0)
    return [(0.5, cross_entropy(log_p, y)), (0.5, dice(log_p.exp(), y))]


def log_softmax(logits: Float[Tensor, "B K *S"]) -> Float[Tensor, "B K *S"]:
    """Class log-probabilities in at least float32."""
    return logits.log_softmax(1, dtype=wide(logits))


def softmax(logits: Float[Tensor, "B K *S"]) -> Float[Tensor, "B K *S"]:
    """Class probabilities in at least float32."""
    return logits.softmax(1, dtype=wide(logits))
