"""Which positions contrast looks at: fixed shapes with validity, no loop over images or pixels, no host sync.

B images, P positions of an image (both views pooled where there are two), K classes, n or k samples. Random
order comes from data/draws.py alone: the same keys give the same positions at any world size and after any
restart.
"""

import torch
from jaxtyping import Bool, Float, Int64
from torch import Tensor

from cclmpc_dist.data import draws
from cclmpc_dist.losses.streaming import at_least_float32, full_precision

_TIER = 1 << 61  # scores are tier * 2^61 plus 61 random bits: 4 tiers fill an int64, ties do not happen
_SHORTEST = 1e-6  # a mean of unit vectors below this has lost its direction to rounding


def sample_anchors(
    labels: Int64[Tensor, "B P"],
    hard: Bool[Tensor, "B P"],
    keys: Int64[Tensor, " B"],
    n: int,
    classes: int,
    purpose: str,
) -> tuple[Int64[Tensor, "B K n"], Bool[Tensor, "B K n"]]:
    """Up to n random positions per image and class, half of them hard [F], and which of them are real.

    n // 2 hard positions come first, then easy ones; where either kind lacks, the other fills up. A position
    is taken at most once; labels outside [0, K) (IGNORE) never. Where valid is False, index is some position
    in [0, P).
    """
    order_B1P = _random_order(labels, keys, purpose)
    member_BKP = _members(labels, classes)
    hard_BKP = member_BKP & hard[:, None]
    first_BKP = hard_BKP & _among_top(torch.where(hard_BKP, order_B1P, -1), n // 2)
    tier_BKP = member_BKP.long() + (member_BKP & ~hard_BKP).long() + 2 * first_BKP.long()
    return _take(tier_BKP, order_B1P, n)


def sample_offers(
    labels: Int64[Tensor, "B P"], keys: Int64[Tensor, " B"], k: int, classes: int, purpose: str
) -> tuple[Int64[Tensor, "B K k"], Bool[Tensor, "B K k"]]:
    """Up to k random positions per image and class, and which of them are real; index as in `sample_anchors`."""
    return _take(_members(labels, classes).long(), _random_order(labels, keys, purpose), k)


def class_means(
    embedding: Float[Tensor, "B P F"], labels: Int64[Tensor, "B P"], classes: int
) -> tuple[Float[Tensor, "B K F"], Bool[Tensor, "B K"]]:
    """The mean embedding of each image's class, scaled to length 1, at least float32; and where there is one.

    0 and not valid where the image lacks the class, or its embeddings all but cancel out [F].
    """
    with full_precision(embedding):
        embedding = at_least_float32(embedding)
        member_BKP = _members(labels, classes).to(embedding.dtype)
        mean_BKF = member_BKP @ embedding / member_BKP.sum(2, keepdim=True).clamp(min=1)
        length_BK1 = torch.linalg.vector_norm(mean_BKF, dim=2, keepdim=True)
        valid_BK1 = length_BK1 > _SHORTEST
        unit_BKF = torch.where(valid_BK1, mean_BKF / torch.where(valid_BK1, length_BK1, 1.0), 0.0)
    return unit_BKF, valid_BK1.squeeze(2)


def _members(labels_BP: Tensor, classes: int) -> Tensor:
    return labels_BP[:, None] == torch.arange(classes, device=labels_BP.device)[:, None]


def _random_order(labels_BP: Tensor, keys_B: Tensor, purpose: str) -> Tensor:
    """(B, 1, P) int64 in [0, 2^61)."""
    return draws.words(keys_B, purpose, labels_BP.shape[1])[:, None] & (_TIER - 1)


def _among_top(scores_BKP: Tensor, n: int) -> Tensor:
    """(B, K, P) bool: the n largest of a row."""
    if n == 0:
        return torch.zeros_like(scores_BKP, dtype=torch.bool)
    lowest = scores_BKP.topk(min(n, scores_BKP.shape[2]), dim=2).values[..., -1:]
    return scores_BKP >= lowest


def _take(tier_BKP: Tensor, order_B1P: Tensor, n: int) -> tuple[Tensor, Tensor]:
    """The n positions of highest tier, random within it; tier 0 is not valid."""
    score_BKP = tier_BKP * _TIER + order_B1P
    best, index = score_BKP.topk(min(n, score_BKP.shape[2]), dim=2)
    missing = (0, n - index.shape[2])
    return torch.nn.functional.pad(index, missing), torch.nn.functional.pad(best >= _TIER, missing)
