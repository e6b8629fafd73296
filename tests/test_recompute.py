"""Activation checkpointing: less is kept, and every number stays as it was, bit for bit."""

from math import prod

import pytest
import torch
from torch import nn
from torch.autograd.graph import saved_tensors_hooks

from cclmpc_dist.config import Model, Swin
from cclmpc_dist.models.dual_branch import DualBranch


def _step(norm: str, recompute: tuple[int, ...]) -> tuple[DualBranch, int]:
    """The network with gradients after a step, and how many numbers its graph kept outside of recomputed stages."""
    torch.manual_seed(0)
    swin = Swin(depth=2, window=(3, 3, 2), head_width=8)
    sync = norm == "sync_batch"  # which needs CUDA; converted and in one process, torch's takes CPU tensors too
    built = "batch" if sync else norm
    network = DualBranch(Model(filters=4, norm=built, dropout=0.5, recompute=recompute, swin=swin), 3, 1, 2)
    network = nn.SyncBatchNorm.convert_sync_batchnorm(network) if sync else network
    network.to(memory_format=torch.channels_last_3d)
    kept = []

    def keep(x: torch.Tensor) -> torch.Tensor:
        kept.append(prod(x.shape))
        return x

    with saved_tensors_hooks(keep, lambda x: x), torch.autocast("cpu", torch.bfloat16):
        out = network(torch.randn(2, 1, 32, 32, 32), torch.randn(1, 1, 32, 32, 32), embed=True,
                      original_positions=torch.zeros(1, 4, dtype=torch.int64))  # fmt: skip
    sum(value.float().square().mean() for value in out.values()).backward()
    return network, sum(kept)


@pytest.mark.parametrize("norm", ["batch", "instance", "sync_batch"])
def test_gradients_and_statistics_are_the_same_bit_for_bit(norm):
    plain, _ = _step(norm, ())
    again, _ = _step(norm, (1, 2, 4, 8, 16))
    for name, parameter in again.named_parameters():
        other = plain.get_parameter(name).grad
        assert (parameter.grad is None) == (other is None)
        assert other is None or torch.equal(parameter.grad, other), name
    for name, buffer in again.named_buffers():
        assert torch.equal(buffer, plain.get_buffer(name)), name


def test_each_further_stage_keeps_less():
    kept = [_step("batch", strides)[1] for strides in ((), (1,), (1, 2), (1, 2, 4, 8, 16))]
    assert kept == sorted(kept, reverse=True)
    assert len(set(kept)) == len(kept)
    assert kept[-1] < 0.5 * kept[0]
