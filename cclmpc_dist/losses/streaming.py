"""Contrast in linear memory: log-sum-exp over keys and softplus over positives, visited tile by tile.

Layout: N anchors, M keys, F features. No N x M tensor is ever built: one buffer of at most LOGITS numbers
holds the logits of some anchors and a tile of keys (two for the positives), is masked and exponentiated in
place, and is computed anew in backward. The gradient of the anchors is linear in the incoming one, so forward
collects it at once (an average of keys, as flash attention does) and backward visits the keys again only where
they need a gradient. Where the loss is known as soon as an anchor has met all keys, as SBCL's is, some rows of
exponentiated logits are kept until then and the keys' gradient is collected at once too: every pair is visited
once. The powers are of base 2, whose function is four times as fast on a CPU. Everything is at least float32,
under autocast too; float64 stays float64.
"""

import math
from collections.abc import Sequence
from typing import NamedTuple

import torch
from jaxtyping import Float, Int64
from torch import Tensor
from torch.autograd.function import once_differentiable

from cclmpc_dist.distributed.exchange import finite
from cclmpc_dist.dtypes import wide

UNKNOWN = -1  # a class that is not certain
LOGITS = 1 << 23  # numbers in a buffer of logits: 32 MiB of float32, however many anchors there are
ROWS = 128  # anchors whose exponentiated logits over all keys are kept at a time
KEPT = 1 << 26  # numbers that may be kept: 256 MiB of float32
LOG2_E = math.log2(math.e)


class Keys(NamedTuple):
    """Keys that lie together. keys (M, F); valid (M,) bool, None for all; label (M,) int64: a class or an id, None
    for none."""

    keys: Tensor
    valid: Tensor | None = None
    label: Tensor | None = None


def full_precision(x: Tensor) -> torch.amp.autocast:
    """A region without autocast on x's device."""
    return torch.amp.autocast(x.device.type, enabled=False)


def at_least_float32(x: Tensor) -> Tensor:
    return x.to(wide(x))


def softplus(x: Tensor) -> Tensor:
    """log(1 + exp(x)), exact in both tails; 0 with gradient 0 at -inf."""
    return torch.logaddexp(x, x.new_zeros(()))


def same_label(anchor_label_N: Tensor, key_label_M: Tensor) -> Tensor:
    """(N, M) bool: both known and equal."""
    return (anchor_label_N[:, None] == key_label_M) & (key_label_M > UNKNOWN)


class _Tile(NamedTuple):
    """Some keys of block number `block`, at `at`."""

    block: int
    at: slice
    keys: Tensor
    valid: Tensor | None
    label: Tensor | None


def _fitting(tile: int, anchors_NF: Tensor, keys: Sequence[Tensor]) -> int:
    """Keys of a tile, no more than the longest block has: wider ones would leave rows no room. A GPU pays for every
    launch, and no cache wants small tiles: there one fills the buffer."""
    wanted = tile if anchors_NF.device.type == "cpu" else max(tile, LOGITS // max(1, len(anchors_NF)))
    return max(1, min(wanted, max(map(len, keys), default=0)))


def _tiles(keys: Sequence[Tensor], masks: list[tuple[Tensor | None, Tensor | None]], tile: int) -> list[_Tile]:
    def part(x: Tensor | None, at: slice) -> Tensor | None:
        return None if x is None else x[at]

    return [
        _Tile(block, at, keys_MF[at], part(valid, at), part(label, at))
        for block, (keys_MF, (valid, label)) in enumerate(zip(keys, masks, strict=True))
        for at in _slices(len(keys_MF), tile)
    ]


def _rows(anchors_NF: Tensor, tile: int) -> list[slice]:
    """Anchors that fill a buffer with a tile."""
    return _slices(len(anchors_NF), max(1, LOGITS // tile))


def _slices(length: int, step: int) -> list[slice]:
    return [slice(start, min(start + step, length)) for start in range(0, length, step)]


def _buffer(anchors_NF: Tensor, tile: int) -> Tensor:
    return anchors_NF.new_empty(min(len(anchors_NF), max(1, LOGITS // tile)) * tile)


def _product(anchors_NF: Tensor, keys_TF: Tensor, buffer: Tensor) -> Tensor:
    """(N, T) dot products in the buffer."""
    n, t = len(anchors_NF), len(keys_TF)
    return torch.mm(anchors_NF, keys_TF.T, out=buffer[: n * t].view(n, t))


class _LSE(torch.autograd.Function):
    @staticmethod
    def forward(ctx, anchors, anchor_label, masks, temperature, tile, *keys):  # type: ignore
        with full_precision(anchors):
            scaled = anchors * (LOG2_E / temperature)
            lse = anchors.new_empty(len(anchors))
            mean = torch.zeros_like(anchors) if ctx.needs_input_grad[0] else None
            tiles, buffer = _tiles(keys, masks, tile), _buffer(anchors, tile)
            for rows in _rows(anchors, tile):
                part = None if mean is None else mean[rows]
                lse[rows] = _lse_of_rows(scaled, anchor_label, rows, tiles, buffer, part)
        ctx.save_for_backward(anchors, anchor_label, lse, mean, *keys)
        ctx.masks, ctx.temperature, ctx.tile = masks, temperature, tile
        return lse

    @staticmethod
    @once_differentiable
    def backward(ctx, grad):  # type: ignore
        anchors, anchor_label, lse, mean, *keys = ctx.saved_tensors
        wanted = ctx.needs_input_grad[5:]
        with full_precision(anchors):
            weight = (torch.where(lse > -torch.inf, grad, 0.0) / ctx.temperature)[:, None]
            grad_anchors = weight * mean if ctx.needs_input_grad[0] else None
            grads = [torch.zeros_like(x) if want else None for x, want in zip(keys, wanted, strict=True)]
            if any(wanted):
                scaled, weighted = anchors * (LOG2_E / ctx.temperature), weight * anchors
                base = finite(lse)[:, None] * LOG2_E
                tiles = [tile for tile in _tiles(keys, ctx.masks, ctx.tile) if wanted[tile.block]]
                buffer = _buffer(anchors, ctx.tile)
                for rows in _rows(anchors, ctx.tile):
                    for tile in tiles:
                        share = _masked_logits(scaled, anchor_label, rows, tile, buffer).sub_(base[rows]).exp2_()
                        grads[tile.block][tile.at].addmm_(share.T, weighted[rows])  # type: ignore[index]
        return grad_anchors, None, None, None, None, *grads


class _SoftplusLSE(torch.autograd.Function):
    """Sum of softplus(lse - positive), and in forward already its gradients, which wait for the incoming one."""

    @staticmethod
    def forward(ctx, anchors, positive, anchor_label, mask, temperature, tile, keys):  # type: ignore
        with full_precision(anchors):
            scaled, loss = anchors * (LOG2_E / temperature), anchors.new_zeros(())
            slope, pulled, pushed = (torch.zeros_like(x) for x in (positive, anchors, keys))
            tiles, height = _tiles([keys], [mask], tile), rows_kept(len(anchors), len(keys))
            buffer = anchors.new_empty(height * len(keys))
            for rows in _slices(len(anchors), height):
                kept: list[_Kept] = []
                lse = _lse_of_rows(scaled, anchor_label, rows, tiles, buffer, pulled[rows], kept)
                margin = lse - positive[rows]
                loss += softplus(margin).sum()
                slope[rows] = weight = margin.sigmoid_()
                _push(pushed, kept, anchors[rows] * (weight / temperature)[:, None], finite(lse) * LOG2_E)
            pulled.mul_((slope / temperature)[:, None])
        ctx.gradients = pulled, slope.neg_(), pushed
        return loss

    @staticmethod
    @once_differentiable
    def backward(ctx, grad):  # type: ignore
        if ctx.gradients is None:
            raise RuntimeError(
                "softplus_lse: its gradients were taken before: compute the loss anew to take them again"
            )
        # Scaled where they lie: the keys' may be the largest tensor of a step.
        (pulled, slope, pushed), ctx.gradients = ctx.gradients, None
        return pulled.mul_(grad), slope.mul_(grad), None, None, None, None, pushed.mul_(grad)


class _Kept(NamedTuple):
    """exp2(logits - finite(peak)) of some anchors (N,) and a tile."""

    tile: _Tile
    powers: Tensor
    peak: Tensor


def rows_kept(anchors: int, keys: int) -> int:
    """Anchors that are visited once, together; 0 where the room is too small for all keys."""
    rows = min(anchors, ROWS)
    return rows if rows * keys <= KEPT else 0


def _push(pushed: Tensor, kept: list[_Kept], weighted: Tensor, lse: Tensor) -> None:
    """Add some anchors' part of the keys' gradient: their softmax, times the weighted anchors. lse in base 2."""
    for tile, powers, peak in kept:
        pushed[tile.at].addmm_(powers.T, weighted * (peak - lse).exp2_()[:, None])


def _lse_of_rows(
    scaled: Tensor,
    label: Tensor | None,
    rows: slice,
    tiles: list[_Tile],
    buffer: Tensor,
    mean: Tensor | None,
    kept: list[_Kept] | None = None,
) -> Tensor:
    """LSE of some anchors, scaled to base 2, over all keys; `mean`, zeros, takes the keys' average by softmax.

    Where `kept` is given, it takes what each tile gave, and the buffer has room for all tiles.
    """
    total = scaled.new_zeros(rows.stop - rows.start)
    peak = torch.full_like(total, -torch.inf)
    for tile in tiles:
        room = buffer if kept is None else buffer[len(total) * tile.at.start :]
        logits = _masked_logits(scaled, label, rows, tile, room)
        higher = torch.maximum(peak, logits.amax(1))
        base = finite(higher)
        logits.sub_(base[:, None]).exp2_()
        shrink = (peak - base).exp2_()
        total.mul_(shrink).add_(logits.sum(1))
        if mean is not None:
            mean.mul_(shrink[:, None]).addmm_(logits, tile.keys)
        if kept is not None:
            kept.append(_Kept(tile, logits, higher))
        peak = higher
    if mean is not None:
        mean /= torch.where(total > 0, total, 1.0)[:, None]
    return (total.log2() + finite(peak)) / LOG2_E


def _masked_logits(scaled: Tensor, label: Tensor | None, rows: slice, tile: _Tile, buffer: Tensor) -> Tensor:
    logits = _product(scaled[rows], tile.keys, buffer)
    if tile.valid is not None:
        logits.masked_fill_(~tile.valid, -torch.inf)
    if label is not None and tile.label is not None:
        logits.masked_fill_(same_label(label[rows], tile.label), -torch.inf)
    return logits


class _Positives(torch.autograd.Function):
    @staticmethod
    def forward(ctx, anchors, lse, anchor_label, masks, temperature, tile, *keys):  # type: ignore
        with full_precision(anchors):
            scaled = anchors / -temperature
            total, count, slope = (torch.zeros_like(lse) for _ in range(3))
            pull = torch.zeros_like(anchors) if ctx.needs_input_grad[0] else None
            buffer, sigmoid = _buffer(anchors, tile), _buffer(anchors, tile)
            tiles = _tiles(keys, masks, tile)
            for rows in _rows(anchors, tile):
                for part in tiles:
                    margin, kept = _masked_margin(scaled, lse, anchor_label, rows, part, buffer)
                    share = torch.sigmoid(margin, out=sigmoid[: margin.numel()].view_as(margin))
                    slope[rows] += share.sum(1)
                    if pull is not None:
                        pull[rows].addmm_(share, part.keys)
                    total[rows] += torch.logaddexp(margin, margin.new_zeros(()), out=margin).sum(1)
                    count[rows] += kept
        ctx.save_for_backward(anchors, lse, anchor_label, slope, pull, *keys)
        ctx.masks, ctx.temperature, ctx.tile = masks, temperature, tile
        ctx.mark_non_differentiable(count)
        return total, count

    @staticmethod
    @once_differentiable
    def backward(ctx, grad, _):  # type: ignore
        anchors, lse, anchor_label, slope, pull, *keys = ctx.saved_tensors
        wanted = ctx.needs_input_grad[6:]
        with full_precision(anchors):
            weight = (grad / -ctx.temperature)[:, None]
            grad_anchors = weight * pull if ctx.needs_input_grad[0] else None
            grads = [torch.zeros_like(x) if want else None for x, want in zip(keys, wanted, strict=True)]
            if any(wanted):
                scaled, weighted = anchors / -ctx.temperature, weight * anchors
                tiles = [tile for tile in _tiles(keys, ctx.masks, ctx.tile) if wanted[tile.block]]
                buffer = _buffer(anchors, ctx.tile)
                for rows in _rows(anchors, ctx.tile):
                    for tile in tiles:
                        margin, _ = _masked_margin(scaled, lse, anchor_label, rows, tile, buffer)
                        grads[tile.block][tile.at].addmm_(margin.sigmoid_().T, weighted[rows])  # type: ignore[index]
        return grad_anchors, grad * slope, None, None, None, None, *grads


def _masked_margin(
    scaled: Tensor, lse: Tensor, label: Tensor | None, rows: slice, tile: _Tile, buffer: Tensor
) -> tuple[Tensor, Tensor]:
    """(N, T) LSE - logit, -inf where the key is no positive; (N,) or () number of positives in the tile."""
    margin = _product(scaled[rows], tile.keys, buffer).add_(lse[rows, None])
    count = lse.new_full((), margin.shape[1])
    if tile.valid is not None:
        margin.masked_fill_(~tile.valid, -torch.inf)
        count = tile.valid.sum()
    if label is not None and tile.label is not None:
        own = same_label(label[rows], tile.label)
        margin.masked_fill_(own, -torch.inf)
        count = count - (own if tile.valid is None else own & tile.valid).sum(1)
    return margin, count


def lse(
    anchors: Float[Tensor, "N F"],
    blocks: Sequence[Keys],
    temperature: float,
    tile: int,
    anchor_label: Int64[Tensor, " N"] | None = None,
) -> Float[Tensor, " N"]:
    """log sum_m exp(a_n . k_m / temperature) over all blocks' valid keys, differentiable in anchors and keys.

    Where a block has labels, a key whose label is known (>= 0) and the anchor's is left out. An anchor without
    any key has -inf, and gets and gives gradient 0. Kept for backward: N·F numbers; at work besides: 2 N·F and
    LOGITS.
    """
    masks, tile = (
        [(block.valid, block.label) for block in blocks],
        _fitting(tile, anchors, [block.keys for block in blocks]),
    )
    return _LSE.apply(anchors, anchor_label, masks, temperature, tile, *(block.keys for block in blocks))


def softplus_lse(
    anchors: Float[Tensor, "N F"],
    positive: Float[Tensor, " N"],
    block: Keys,
    temperature: float,
    tile: int,
    anchor_label: Int64[Tensor, " N"] | None = None,
) -> Float[Tensor, ""]:
    """sum_n softplus(lse_n - positive_n), lse as in `lse`, differentiable once in anchors, positive and keys.

    Where keys need a gradient every pair is visited once: forward collects all gradients, N·F and M·F numbers that
    wait for one backward pass, and works with N·F and rows_kept(N, M)·M besides. With more keys than leave room for
    that, and where keys need none, as `lse`.
    """
    kept = block.keys.requires_grad and torch.is_grad_enabled() and rows_kept(len(anchors), len(block.keys))
    if not kept:
        return softplus(lse(anchors, [block], temperature, tile, anchor_label) - positive).sum()
    mask = block.valid, block.label
    tile = _fitting(tile, anchors[:ROWS], [block.keys])
    return _SoftplusLSE.apply(anchors, positive, anchor_label, mask, temperature, tile, block.keys)


def positives(
    anchors: Float[Tensor, "N F"],
    lse: Float[Tensor, " N"],
    blocks: Sequence[Keys],
    temperature: float,
    tile: int,
    anchor_label: Int64[Tensor, " N"] | None = None,
) -> tuple[Float[Tensor, " N"], Float[Tensor, " N"]]:
    """Sum over positives of softplus(lse_n - a_n . k_m / temperature), and their number, without gradient.

    All keys are of the anchors' class; valid ones count, but for those with the anchor's own label (its id)
    where a block has labels. Differentiable in anchors, lse and keys; lse may be -inf, whose softplus and gradient
    are 0. Kept for backward: N·F numbers; at work besides: 2 N·F and 2 LOGITS.
    """
    masks, tile = (
        [(block.valid, block.label) for block in blocks],
        _fitting(tile, anchors, [block.keys for block in blocks]),
    )
    return _Positives.apply(anchors, lse, anchor_label, masks, temperature, tile, *(block.keys for block in blocks))
