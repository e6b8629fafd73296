"""Learning rate over the steps of a phase, and the length of training."""

import math

from cclmpc_dist.config import Config, Optim


def rate(optim: Optim, step: int, total: int, images: int) -> float:
    """Learning rate of `step` in [0, total). images: global batch of all streams and accumulated microbatches.

    poly: lr (1 - t/T)^power; warm-up is linear from lr / warmup.
    """
    scale = {"none": 1.0, "linear": images / optim.lr_batch, "sqrt": math.sqrt(images / optim.lr_batch)}[optim.lr_rule]
    decay = (1.0 - step / total) ** optim.power if optim.schedule == "poly" else 1.0
    warm = min(1.0, (step + 1) / optim.warmup) if optim.warmup else 1.0
    return optim.lr * scale * decay * warm


def total_steps(config: Config, batches: dict[str, int], epoch_lengths: dict[str, int]) -> int:
    """Optimiser steps of the budget; batches: global batch of each stream, epoch_lengths: microbatches an epoch."""
    if config.budget.images is not None:
        return max(1, config.budget.images // (sum(batches.values()) * config.accumulate))
    assert config.budget.epochs is not None
    length = epoch_lengths.get("unlabelled", epoch_lengths.get("labelled", 0))
    return max(1, config.budget.epochs * length // config.accumulate)
