"""Squared differences between predictions: l_hdc between decoders [P], l_av between views [P]."""

import torch
from jaxtyping import Float
from torch import Tensor

from cclmpc_dist.dtypes import wide
from cclmpc_dist.losses.terms import Additive


def squared(p: Float[Tensor, "*shape"], q: Float[Tensor, "*shape"]) -> Additive:
    """Mean over all elements of (p - q)²."""
    total = (p - q).square().sum(dtype=wide(p))
    return Additive(total, p.new_full((), p.numel(), dtype=torch.float64))
