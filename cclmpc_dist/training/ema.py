"""Averaged weights for evaluation."""

import copy

import torch
from torch import nn


class Ema:
    """Exponential moving average of a module's parameters AND floating buffers (norm statistics); integers are copied.

    After update n (from 0) the decay is min(decay, (1 + n) / (10 + n)) [F], so that the first steps are soon forgotten.
    """

    def __init__(self, module: nn.Module, decay: float) -> None:
        self.decay = decay
        self.module = copy.deepcopy(module).requires_grad_(False).eval()

    @torch.no_grad()
    def update(self, module: nn.Module, updates: int) -> None:
        """Move towards `module`; updates: how many updates came before."""
        rate = 1.0 - min(self.decay, (1 + updates) / (10 + updates))
        mine, theirs = self.module.state_dict(), module.state_dict()
        floating = [name for name, value in mine.items() if value.is_floating_point()]
        torch._foreach_lerp_([mine[name] for name in floating], [theirs[name] for name in floating], rate)
        for name in mine.keys() - set(floating):
            mine[name].copy_(theirs[name])
