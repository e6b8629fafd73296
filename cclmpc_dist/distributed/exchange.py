"""Collectives with gradients, exact under DDP's averaging: every backward SUMS over the ranks.

A loss on rank r depends on the inputs of all ranks; their gradients from all ranks' losses add up. Torch's
own differentiable collectives are deprecated or refuse torch.compile, hence these Functions over plain
collectives that gloo and NCCL both have. All ranks of the group call them alike and with EQUAL shapes (fixed
capacities plus validity masks); a rank with nothing valid still calls. Parts lie in rank order, which is lane
order. Without an initialised process group, or in a group of one, all are the identity.
"""

from datetime import timedelta

import torch
import torch.distributed as dist
from jaxtyping import Float, Shaped
from torch import Tensor
from torch.profiler import record_function

COLLECTIVE_TIMEOUT = timedelta(minutes=10)

Group = dist.ProcessGroup | None  # None is the world

# torch 2.13 renamed both and warns at the old names.
_all_gather = getattr(dist, "all_gather_single", None) or dist.all_gather_into_tensor
_reduce_scatter = getattr(dist, "reduce_scatter_single", None) or dist.reduce_scatter_tensor


def group_size(group: Group = None) -> int:
    """Ranks in the group; 1 where torch.distributed is not initialised."""
    return dist.get_world_size(group) if dist.is_initialized() else 1


def group_rank(group: Group = None) -> int:
    """This process's number in the group; 0 where torch.distributed is not initialised."""
    return dist.get_rank(group) if dist.is_initialized() else 0


def own_group(size: int | None) -> Group:
    """A process group of its own for the exchange: `size` neighbouring ranks, or all. Collective over the world.

    Apart from DDP's group, so that the order of its collectives and theirs never matters. size divides the world.
    """
    world = group_size()
    if world == 1:
        return None
    size = size or world
    assert world % size == 0, "setup.check_world has made sure"
    return dist.new_subgroups(size, timeout=COLLECTIVE_TIMEOUT)[0]


def finite(x: Tensor) -> Tensor:
    """x with 0 for -inf, so that exp(-inf - x) is 0 and never NaN."""
    return torch.where(x == -torch.inf, 0.0, x)


@record_function("exchange")
def _gather(x: Tensor, group: Group) -> Tensor:
    out = x.new_empty(group_size(group) * x.shape[0], *x.shape[1:])
    _all_gather(out, x.contiguous(), group=group)
    return out


@record_function("exchange")
def _scatter_sum(x: Tensor, group: Group) -> Tensor:
    out = x.new_empty(x.shape[0] // group_size(group), *x.shape[1:])
    _reduce_scatter(out, x.contiguous(), group=group)
    return out


@record_function("exchange")
def _all_reduce(x: Tensor, group: Group, op: dist.ReduceOp.RedOpType = dist.ReduceOp.SUM) -> None:
    dist.all_reduce(x, op, group=group)


class _Gather(torch.autograd.Function):
    @staticmethod
    def forward(x: Tensor, group: Group) -> Tensor:
        return _gather(x, group)

    @staticmethod
    def setup_context(ctx, inputs, output) -> None:  # type: ignore
        ctx.group = inputs[1]

    @staticmethod
    def backward(ctx, grad):  # type: ignore
        return _scatter_sum(grad, ctx.group), None


class _ScatterSum(torch.autograd.Function):
    @staticmethod
    def forward(x: Tensor, group: Group) -> Tensor:
        return _scatter_sum(x, group)

    @staticmethod
    def setup_context(ctx, inputs, output) -> None:  # type: ignore
        ctx.group = inputs[1]

    @staticmethod
    def backward(ctx, grad):  # type: ignore
        return _gather(grad, ctx.group), None


class _MergeLSE(torch.autograd.Function):
    @staticmethod
    def forward(ctx, part: Tensor, group: Group) -> Tensor:  # type: ignore
        peak = part.clone(memory_format=torch.contiguous_format)
        _all_reduce(peak, group, dist.ReduceOp.MAX)
        base = finite(peak)
        total = (part - base).exp_()
        _all_reduce(total, group)
        merged = total.log_().add_(base)
        ctx.group = group
        ctx.save_for_backward(part, merged)
        return merged

    @staticmethod
    def backward(ctx, grad):  # type: ignore
        part, merged = ctx.saved_tensors
        grad = grad.clone(memory_format=torch.contiguous_format)
        _all_reduce(grad, ctx.group)
        share = torch.where(part == -torch.inf, 0.0, (part - finite(merged)).exp())
        return share * torch.where(merged == -torch.inf, 0.0, grad), None


class _AllReduceSum(torch.autograd.Function):
    @staticmethod
    def forward(x: Tensor, group: Group) -> Tensor:
        out = x.clone(memory_format=torch.contiguous_format)
        _all_reduce(out, group)
        return out

    @staticmethod
    def setup_context(ctx, inputs, output) -> None:  # type: ignore
        ctx.group = inputs[1]

    @staticmethod
    def backward(ctx, grad):  # type: ignore
        return _AllReduceSum.forward(grad, ctx.group), None


def gather(x: Shaped[Tensor, " n *rest"], group: Group = None) -> Shaped[Tensor, " Wn *rest"]:
    """All ranks' x along dim 0, differentiable: backward reduce-scatters the SUM of the ranks' gradients."""
    return x if group_size(group) == 1 else _Gather.apply(x, group)


def gather_detached(x: Shaped[Tensor, " n *rest"], group: Group = None) -> Shaped[Tensor, " Wn *rest"]:
    """All ranks' x along dim 0 without gradient, of any type (ids, labels, masks)."""
    x = x.detach()
    if group_size(group) == 1:
        return x
    if x.dtype == torch.bool:  # gloo knows no bool
        return _gather(x.to(torch.uint8), group).bool()
    return _gather(x, group)


def scatter_sum(x: Shaped[Tensor, " Wn *rest"], group: Group = None) -> Shaped[Tensor, " n *rest"]:
    """This rank's part, along dim 0, of the sum of all ranks' x; differentiable: backward gathers."""
    return x if group_size(group) == 1 else _ScatterSum.apply(x, group)


def merge_lse(part: Float[Tensor, "*shape"], group: Group = None) -> Float[Tensor, "*shape"]:
    """log of the sum of exp(x) over all ranks' x, differentiable; backward sums the ranks' gradients.

    A rank without a term has -inf; where all have, the result is -inf and the gradient 0.
    """
    return part if group_size(group) == 1 else _MergeLSE.apply(part, group)


def own_part(x: Shaped[Tensor, " Wn *rest"], group: Group = None) -> Shaped[Tensor, " n *rest"]:
    """This rank's part, along dim 0, of what `gather` made."""
    size = x.shape[0] // group_size(group)
    return x.narrow(0, group_rank(group) * size, size)


def all_reduce_sum(x: Shaped[Tensor, "*shape"], group: Group = None) -> Shaped[Tensor, "*shape"]:
    """The sum of all ranks' x, differentiable; backward sums the ranks' gradients too."""
    return x if group_size(group) == 1 else _AllReduceSum.apply(x, group)
