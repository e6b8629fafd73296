"""Contrast in linear memory: log-sum-exp over keys and softplus over positives, visited tile by tile.

Layout: N anchors, M keys, F features. No N x M tensor is ever built: one buffer of at most LOGITS numbers
holds the logits of some anchors and a tile of keys (two for the positives), is masked and exponentiated in
place, and is computed anew in backward. The gradient of the anchors is linear in the incoming one, so forward
collects it at once (an average of keys, as flash attention does) and backward visits the keys again only where
they need a gradient. Everything is at least float32, under autocast too; float64 stays float64.
"""

from collections.abc import Iterator

import torch
from jaxtyping import Bool, Float, Int64
from torch import Tensor
from torch.autograd.function import once_differentiable

from cclmpc_dist.distributed.exchange import finite
from cclmpc_dist.losses.segmentation import wide

UNKNOWN = -1  # a class that is not certain
LOGITS = 1 << 23  # numbers in a buffer of logits: 32 MiB of float32, however many anchors there are


def full_precision(x: Tensor) -> torch.amp.autocast:
    """A region without autocast on x's device."""
    return torch.amp.autocast(x.device.type, enabled=False)


def at_least_float32(x: Tensor) -> Tensor:
    return x.to(wide(x))


def softplus(x: Tensor) -> Tensor:
    """log(1 + exp(x)), exact in both tails; 0 with gradient 0 at -inf."""
    return torch.logaddexp(x, x.new_zeros(()))


def same_class(anchor_class_N: Tensor, key_class_M: Tensor) -> Tensor:
    """(N, M) bool: both known and equal."""
    return (anchor_class_N[:, None] == key_class_M) & (key_class_M > UNKNOWN)


def _tiles(anchors_NF: Tensor, keys_MF: Tensor, tile: int) -> Iterator[tuple[slice, list[slice]]]:
    """Rows of anchors, and the tiles of keys that they visit."""
    keys = _slices(len(keys_MF), tile)
    return ((rows, keys) for rows in _slices(len(anchors_NF), max(1, LOGITS // tile)))


def _slices(length: int, step: int) -> list[slice]:
    return [slice(start, min(start + step, length)) for start in range(0, length, step)]


def _buffer(anchors_NF: Tensor, keys_MF: Tensor, tile: int) -> Tensor:
    rows, width = min(len(anchors_NF), max(1, LOGITS // tile)), min(tile, len(keys_MF))
    return anchors_NF.new_empty(rows * width)


def _product(anchors_NF: Tensor, keys_TF: Tensor, buffer: Tensor) -> Tensor:
    """(N, T) dot products in the buffer."""
    n, t = len(anchors_NF), len(keys_TF)
    return torch.mm(anchors_NF, keys_TF.T, out=buffer[: n * t].view(n, t))


class _LSE(torch.autograd.Function):
    @staticmethod
    def forward(ctx, anchors, keys, key_valid, anchor_class, key_class, temperature, tile):  # type: ignore
        masks = key_valid, anchor_class, key_class
        with full_precision(anchors):
            scaled = anchors / temperature
            lse = anchors.new_empty(len(anchors))
            mean = torch.zeros_like(anchors) if ctx.needs_input_grad[0] else None
            buffer = _buffer(anchors, keys, tile)
            for rows, tiles in _tiles(anchors, keys, tile):
                part = None if mean is None else mean[rows]
                lse[rows] = _lse_of_rows(scaled, keys, rows, tiles, masks, buffer, part)
        ctx.save_for_backward(anchors, keys, *masks, lse, mean)
        ctx.temperature, ctx.tile = temperature, tile
        return lse

    @staticmethod
    @once_differentiable
    def backward(ctx, grad):  # type: ignore
        anchors, keys, *masks, lse, mean = ctx.saved_tensors
        grad_anchors = grad_keys = None
        with full_precision(anchors):
            weight = (torch.where(lse > -torch.inf, grad, 0.0) / ctx.temperature)[:, None]
            if ctx.needs_input_grad[0]:
                grad_anchors = weight * mean
            if ctx.needs_input_grad[1]:
                scaled, weighted, base = anchors / ctx.temperature, weight * anchors, finite(lse)[:, None]
                grad_keys = torch.zeros_like(keys)
                buffer = _buffer(anchors, keys, ctx.tile)
                for rows, tiles in _tiles(anchors, keys, ctx.tile):
                    for at in tiles:
                        share = _masked_logits(scaled, keys, rows, at, masks, buffer).sub_(base[rows]).exp_()
                        grad_keys[at].addmm_(share.T, weighted[rows])
        return grad_anchors, grad_keys, None, None, None, None, None


def _lse_of_rows(
    scaled: Tensor, keys: Tensor, rows: slice, tiles: list[slice], masks: tuple, buffer: Tensor, mean: Tensor | None
) -> Tensor:
    """LSE of some anchors over all keys; `mean`, zeros, takes the keys' average by softmax."""
    total = scaled.new_zeros(rows.stop - rows.start)
    peak = torch.full_like(total, -torch.inf)
    for at in tiles:
        logits = _masked_logits(scaled, keys, rows, at, masks, buffer)
        higher = torch.maximum(peak, logits.amax(1))
        base = finite(higher)
        logits.sub_(base[:, None]).exp_()
        shrink = (peak - base).exp_()
        total.mul_(shrink).add_(logits.sum(1))
        if mean is not None:
            mean.mul_(shrink[:, None]).addmm_(logits, keys[at])
        peak = higher
    if mean is not None:
        mean /= torch.where(total > 0, total, 1.0)[:, None]
    return total.log() + finite(peak)


def _masked_logits(scaled: Tensor, keys: Tensor, rows: slice, at: slice, masks: tuple | list, buffer: Tensor) -> Tensor:
    key_valid, anchor_class, key_class = masks
    logits = _product(scaled[rows], keys[at], buffer)
    if key_valid is not None:
        logits.masked_fill_(~key_valid[at], -torch.inf)
    if key_class is not None:
        logits.masked_fill_(same_class(anchor_class[rows], key_class[at]), -torch.inf)
    return logits


class _Positives(torch.autograd.Function):
    @staticmethod
    def forward(ctx, anchors, lse, keys, key_valid, anchor_id, key_id, temperature, tile):  # type: ignore
        masks = key_valid, anchor_id, key_id
        with full_precision(anchors):
            scaled = anchors / -temperature
            total, count, slope = (torch.zeros_like(lse) for _ in range(3))
            pull = torch.zeros_like(anchors) if ctx.needs_input_grad[0] else None
            buffer, sigmoid = _buffer(anchors, keys, tile), _buffer(anchors, keys, tile)
            for rows, tiles in _tiles(anchors, keys, tile):
                for at in tiles:
                    margin, kept = _masked_margin(scaled, lse, keys, rows, at, masks, buffer)
                    share = torch.sigmoid(margin, out=sigmoid[: margin.numel()].view_as(margin))
                    slope[rows] += share.sum(1)
                    if pull is not None:
                        pull[rows].addmm_(share, keys[at])
                    total[rows] += torch.logaddexp(margin, margin.new_zeros(()), out=margin).sum(1)
                    count[rows] += kept
        ctx.save_for_backward(anchors, lse, keys, *masks, slope, pull)
        ctx.temperature, ctx.tile = temperature, tile
        ctx.mark_non_differentiable(count)
        return total, count

    @staticmethod
    @once_differentiable
    def backward(ctx, grad, _):  # type: ignore
        anchors, lse, keys, *masks, slope, pull = ctx.saved_tensors
        grad_anchors = grad_keys = None
        with full_precision(anchors):
            weight = (grad / -ctx.temperature)[:, None]
            if ctx.needs_input_grad[0]:
                grad_anchors = weight * pull
            if ctx.needs_input_grad[2]:
                scaled, weighted = anchors / -ctx.temperature, weight * anchors
                grad_keys = torch.zeros_like(keys)
                buffer = _buffer(anchors, keys, ctx.tile)
                for rows, tiles in _tiles(anchors, keys, ctx.tile):
                    for at in tiles:
                        margin, _ = _masked_margin(scaled, lse, keys, rows, at, masks, buffer)
                        grad_keys[at].addmm_(margin.sigmoid_().T, weighted[rows])
        return grad_anchors, grad * slope, grad_keys, None, None, None, None, None


def _masked_margin(
    scaled: Tensor, lse: Tensor, keys: Tensor, rows: slice, at: slice, masks: tuple | list, buffer: Tensor
) -> tuple[Tensor, Tensor]:
    """(N, T) LSE - logit, -inf where the key is no positive; (N,) or () number of positives in the tile."""
    key_valid, anchor_id, key_id = masks
    margin = _product(scaled[rows], keys[at], buffer).add_(lse[rows, None])
    count = lse.new_full((), margin.shape[1])
    if key_valid is not None:
        margin.masked_fill_(~key_valid[at], -torch.inf)
        count = key_valid[at].sum()
    if key_id is not None:
        own = anchor_id[rows, None] == key_id[at]
        margin.masked_fill_(own, -torch.inf)
        count = count - (own if key_valid is None else own & key_valid[at]).sum(1)
    return margin, count


def lse(
    anchors: Float[Tensor, "N F"],
    keys: Float[Tensor, "M F"],
    key_valid: Bool[Tensor, " M"] | None,
    temperature: float,
    tile: int,
    anchor_class: Int64[Tensor, " N"] | None = None,
    key_class: Int64[Tensor, " M"] | None = None,
) -> Float[Tensor, " N"]:
    """log sum_m exp(a_n . k_m / temperature) over valid keys, differentiable in anchors and keys.

    With classes given, a key whose class is known and the anchor's is left out. An anchor without any key has
    -inf, and gets and gives gradient 0. Memory beyond the result and its gradients: 2 N·F + LOGITS numbers.
    """
    assert (anchor_class is None) == (key_class is None)
    return _LSE.apply(anchors, keys, key_valid, anchor_class, key_class, temperature, tile)


def positives(
    anchors: Float[Tensor, "N F"],
    lse: Float[Tensor, " N"],
    keys: Float[Tensor, "M F"],
    key_valid: Bool[Tensor, " M"] | None,
    temperature: float,
    tile: int,
    anchor_id: Int64[Tensor, " N"] | None = None,
    key_id: Int64[Tensor, " M"] | None = None,
) -> tuple[Float[Tensor, " N"], Float[Tensor, " N"]]:
    """Sum over positives of softplus(lse_n - a_n . k_m / temperature), and their number, without gradient.

    All keys are of the anchors' class; valid ones count, but for the one with the anchor's own id where ids
    are given. Differentiable in anchors, lse and keys; lse may be -inf, whose softplus and gradient are 0.
    Memory beyond the result and its gradients: 2 N·F + 2 LOGITS numbers.
    """
    assert (anchor_id is None) == (key_id is None)
    return _Positives.apply(anchors, lse, keys, key_valid, anchor_id, key_id, temperature, tile)
