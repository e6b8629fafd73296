"""Activation checkpointing: a stage keeps its inputs alone, and backward computes the rest anew."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.utils.checkpoint import checkpoint


def recomputed(stage: Callable[..., Tensor], owner: nn.Module, *inputs: Tensor) -> Tensor:
    """stage(*inputs), and the same gradient bit for bit; the stage draws nothing at random.

    owner: holds the stage's layers. Their batch norms count each batch once.
    """
    if not torch.is_grad_enabled():
        return stage(*inputs)
    found: Tensor = checkpoint(
        stage,
        *inputs,
        use_reentrant=False,
        preserve_rng_state=False,
        context_fn=lambda: (nullcontext(), _without_statistics(owner)),
    )
    return found


@contextmanager
def _without_statistics(owner: nn.Module) -> Iterator[None]:
    norms = [module for module in owner.modules() if isinstance(module, _BatchNorm)]
    before = [(norm.momentum, norm.num_batches_tracked) for norm in norms]
    for norm in norms:
        norm.momentum, norm.num_batches_tracked = 0.0, torch.tensor(0)  # thrown away, but SyncBatchNorm must count
    try:
        yield
    finally:
        for norm, (momentum, count) in zip(norms, before, strict=True):
            norm.momentum, norm.num_batches_tracked = momentum, count
