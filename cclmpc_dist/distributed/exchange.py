"""Collectives with gradients, exact under DDP's averaging: every backward SUMS over the ranks.

A loss on rank r depends on the inputs of all ranks; their gradients from all ranks' losses add up. Torch's
own differentiable collectives are deprecated or refuse torch.compile, hence these Functions over plain
collectives that gloo and NCCL both have. All ranks of the group call them alike and with EQUAL shapes (fixed
capacities plus validity masks); a rank with nothing valid still calls. Parts lie in rank order, which is lane
order. Without an initialised process group, or in a group of one, all are the identity.
"""

import torch
import torch.distributed as dist
from jaxtyping import Shaped
from torch import Tensor

Group = dist.ProcessGroup | None  # None is the world

# torch 2.13 renamed both and warns at the old names.
_all_gather = getattr(dist, "all_gather_single", None) or dist.all_gather_into_tensor
_reduce_scatter = getattr(dist, "reduce_scatter_single", None) or dist.reduce_scatter_tensor


def group_size(group: Group = None) -> int:
    """Ranks in the group; 1 where torch.distributed is not initialised."""
    return dist.get_world_size(group) if dist.is_initialized() else 1


def _gather(x: Tensor, group: Group) -> Tensor:
    out = x.new_empty(group_size(group) * x.shape[0], *x.shape[1:])
    _all_gather(out, x.contiguous(), group=group)
    return out


class _Gather(torch.autograd.Function):
    @staticmethod
    def forward(x: Tensor, group: Group) -> Tensor:
        return _gather(x, group)

    @staticmethod
    def setup_context(ctx, inputs, output) -> None:  # type: ignore
        ctx.group = inputs[1]

    @staticmethod
    def backward(ctx, grad):  # type: ignore
        out = grad.new_empty(grad.shape[0] // group_size(ctx.group), *grad.shape[1:])
        _reduce_scatter(out, grad.contiguous(), group=ctx.group)
        return out, None


class _AllReduceSum(torch.autograd.Function):
    @staticmethod
    def forward(x: Tensor, group: Group) -> Tensor:
        out = x.clone(memory_format=torch.contiguous_format)
        dist.all_reduce(out, group=group)
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


def all_reduce_sum(x: Shaped[Tensor, "*shape"], group: Group = None) -> Shaped[Tensor, "*shape"]:
    """The sum of all ranks' x, differentiable; backward sums the ranks' gradients too."""
    return x if group_size(group) == 1 else _AllReduceSum.apply(x, group)
