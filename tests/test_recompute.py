"""Activation checkpointing: less is kept, and every number stays as it was, bit for bit."""

from math import prod
from pathlib import Path
from typing import Any

import pytest
import torch
import toy
from ranks import run_ranks
from torch import nn
from torch.autograd.graph import saved_tensors_hooks

from cclmpc_dist.config import Model, Swin, parse
from cclmpc_dist.distributed import runtime
from cclmpc_dist.models.dual_branch import DualBranch
from cclmpc_dist.training.trainer import Trainer


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


def train(rank: int, world: int, raw: dict[str, Any]) -> dict[str, torch.Tensor]:
    trainer = Trainer(parse(raw, "toy"), runtime.start("fp32"))
    trainer.fit()
    return dict(trainer.module.state_dict())


@pytest.mark.slow
def test_two_ranks_end_with_the_same_weights_bit_for_bit(toy_corpus: Path, tmp_path: Path) -> None:
    """Microbatches that DDP does not reduce, too. The checkpoints hold averages, so each rank's statistics here."""
    ends = []
    for strides in ([], [1, 2, 4, 8, 16]):
        raw = toy.settings(toy_corpus, tmp_path, name=f"run{len(strides)}", budget__images=72, accumulate=2,
                           ccl_mpc__t_contrast=0.0, model__recompute=strides)  # fmt: skip
        ends.append(run_ranks(train, 2, raw))
    for plain, again in zip(*ends, strict=True):
        toy.assert_same(plain, again)
