"""Types of numbers, for models and losses alike."""

import torch
from torch import Tensor


def wide(x: Tensor) -> torch.dtype:
    """x's type, or float32 where it is narrower."""
    return torch.promote_types(x.dtype, torch.float32)
