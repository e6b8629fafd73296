"""Collectives against one process: values, and gradients of losses that mix all ranks' inputs."""

import pytest
import torch
import torch.distributed as dist
from ranks import run_ranks

from cclmpc_dist.distributed.exchange import all_reduce_sum, gather, gather_detached

N, F = 3, 2


def inputs(world: int) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(world)
    return [torch.randn(N, F, generator=generator, dtype=torch.float64) for _ in range(world)]


def mixing_loss(rank: int, x: torch.Tensor, everyone: torch.Tensor, total: torch.Tensor) -> torch.Tensor:
    """Differs from rank to rank and is non-linear in every rank's rows and in their sum."""
    return (rank + 1) * (x @ everyone.T).sin().sum() + (total**2).sum() / (rank + 2)


def exchanged(rank: int, world: int) -> dict:
    x = inputs(world)[rank].T.contiguous().T.requires_grad_()  # not contiguous
    everyone, total = gather(x), all_reduce_sum(x)
    loss = mixing_loss(rank, x, everyone, total)
    loss.backward()
    numbers = torch.arange(2) + 10 * rank
    return {
        "gathered": everyone.detach(),
        "grad": x.grad,
        "loss": loss.detach(),
        "ids": gather_detached(numbers),
        "mask": gather_detached(numbers % 2 == rank % 2),
        "detached": gather_detached(x).requires_grad,
        "pair": in_a_pair(rank, world),
    }


def in_a_pair(rank: int, world: int) -> dict:
    """The first and the last rank exchange, the others stay out of it."""
    pair = dist.new_group([0, world - 1])
    if 0 < rank < world - 1:
        return {}
    x = torch.tensor([[float(rank)]], requires_grad=True)
    seen = gather(x, pair)
    (seen * (rank + 1)).sum().backward()
    return {"seen": seen.detach(), "sum": all_reduce_sum(x.detach(), pair), "grad": x.grad}


@pytest.fixture(scope="module", params=[2, 3])
def ranks(request) -> list[dict]:
    return run_ranks(exchanged, request.param)


def test_value_and_gradient_equal_one_process(ranks):
    world = len(ranks)
    parts = [x.requires_grad_() for x in inputs(world)]
    everyone, total = torch.cat(parts), torch.stack(parts).sum(0)
    losses = [mixing_loss(rank, x, everyone, total) for rank, x in enumerate(parts)]
    expected = torch.autograd.grad(sum(losses), parts)
    for rank, got in enumerate(ranks):
        torch.testing.assert_close(got["gathered"], everyone.detach(), rtol=0, atol=0)
        torch.testing.assert_close(got["loss"], losses[rank].detach(), rtol=1e-12, atol=0)
        torch.testing.assert_close(got["grad"], expected[rank], rtol=1e-12, atol=1e-12)
        ids = torch.cat([torch.arange(2) + 10 * r for r in range(world)])
        assert torch.equal(got["ids"], ids)
        assert torch.equal(got["mask"], torch.cat([(torch.arange(2) + 10 * r) % 2 == r % 2 for r in range(world)]))
        assert not got["detached"]


def test_a_group_sees_only_itself(ranks):
    last = len(ranks) - 1
    for got in (ranks[0]["pair"], ranks[last]["pair"]):
        assert got["seen"].flatten().tolist() == [0, last]
        assert got["sum"].item() == last
        assert got["grad"].item() == 1 + (last + 1)


def test_identity_without_a_process_group():
    x = torch.randn(3, 2, requires_grad=True)
    assert gather(x) is x
    assert all_reduce_sum(x) is x
    assert torch.equal(gather_detached(x), x)
    assert not gather_detached(x).requires_grad


def fails_on_rank_one(rank: int, world: int) -> None:
    if rank == 1:
        raise ValueError("told on purpose")
    dist.barrier()  # would wait for rank 1 for ever


def test_a_failing_rank_ends_the_others_and_is_named():
    with pytest.raises(AssertionError, match=r"rank 1 of 2 failed[\s\S]*told on purpose"):
        run_ranks(fails_on_rank_one, 2)
