"""Which pixels are certain, and what they then say (docs/method.md, Losses 3).

h = -Σ p log p / log K in [0, 1]; a pixel is certain where h <= γ(t) [P]; γ's ramp is [F: UGPCL].
"""

import math
from collections.abc import Sequence

import torch
from jaxtyping import Float, Int, Shaped
from torch import Tensor

from cclmpc_dist.dtypes import wide
from cclmpc_dist.losses.segmentation import IGNORE


def rampup(r: float) -> float:
    """exp(-5 (1 - min(r, 1))²): from 0.0067 at r = 0 to 1 at r >= 1."""
    return math.exp(-5 * (1 - min(r, 1.0)) ** 2)


def gamma(r: float, start: float, end: float) -> float:
    """The entropy below which a pixel is certain, after a share r of the steps."""
    return start + (end - start) * rampup(r)


def mean_log(log_p_c: Float[Tensor, "*shape"], log_p_t: Float[Tensor, "*shape"]) -> Float[Tensor, "*shape"]:
    """log of the mean of two predictions given as logarithms."""
    return torch.logaddexp(log_p_c, log_p_t) - math.log(2)


def entropy(log_p: Float[Tensor, "B K *S"]) -> Float[Tensor, " B *S"]:
    """Entropy over log K, in [0, 1]. A class of probability 0 adds 0."""
    log_p = log_p.to(wide(log_p))
    finite = log_p.clamp_min(torch.finfo(log_p.dtype).min)
    return (finite.exp() * finite).sum(1) / -math.log(log_p.shape[1])


@torch.no_grad()
def partition(log_p: Float[Tensor, "B K *S"], threshold: float) -> Int[Tensor, " B *S"]:
    """The likeliest class where the entropy is at most `threshold`, else IGNORE. No gradient."""
    return torch.where(entropy(log_p) <= threshold, likeliest(log_p), IGNORE)


def likeliest(log_p: Float[Tensor, "B K *S"]) -> Int[Tensor, " B *S"]:
    """argmax over the classes, the first where equal; on a CPU torch's own is some ten times slower along this axis."""
    best, winner = log_p[:, 0], torch.zeros_like(log_p[:, 0], dtype=torch.int64)
    for number, challenger in enumerate(log_p.unbind(1)):
        better = challenger > best
        best, winner = torch.where(better, challenger, best), torch.where(better, number, winner)
    return winner


def nearest(values: Shaped[Tensor, "..."], size: Sequence[int]) -> Shaped[Tensor, "..."]:
    """(..., *S) on a map of another size (..., *size): each position takes the value at its centre (nearest-exact)."""
    for axis, new in enumerate(size, start=values.dim() - len(size)):
        old = values.shape[axis]
        centre = (2 * torch.arange(new, device=values.device) + 1) * old // (2 * new)
        values = values.index_select(axis, centre)
    return values
