"""The two contrastive terms of CCL-MPC, over the keys of all ranks.

SBCL: symmetric bidirectional contrast between images [P, figure 2a]. CGCL: certainty-guided contrast between
classes [P, figure 2b]. The formulas where the paper is silent are [F]: docs/method.md, losses 4 and 5. N
anchors, M keys, F features, K classes, W ranks. Inputs are L2-normalised; values are at least float32. All
ranks call alike and with equal shapes. `exchange` picks how anchors and keys of different ranks meet, same
numbers all: "naive" gathers the keys and builds all logits with plain autograd, "keys" gathers them and
streams tiles (streaming.py), "anchors" gathers the anchors, which meet the keys where they lie. Detached keys
get no gradient, on any rank.
"""

from collections.abc import Callable
from functools import partial
from typing import Literal

import torch
from jaxtyping import Bool, Float, Int64
from torch import Tensor

from cclmpc_dist.distributed import exchange as ranks
from cclmpc_dist.distributed.exchange import Group, gather, gather_detached, own_part, scatter_sum
from cclmpc_dist.losses import streaming
from cclmpc_dist.losses.streaming import Keys, at_least_float32, full_precision, same_label, softplus
from cclmpc_dist.losses.terms import Additive

Exchange = Literal["naive", "keys", "anchors"]


def sbcl(
    anchors: Float[Tensor, "N F"],
    positives: Float[Tensor, "N F"],
    negatives: Float[Tensor, "M F"],
    *,
    temperature: float,
    exchange: Exchange,
    tile: int,
    anchor_class: Int64[Tensor, " N"] | None = None,
    negative_class: Int64[Tensor, " M"] | None = None,
    detached: bool = False,
    group: Group = None,
) -> Additive:
    """SBCL: softplus(LSE_N - a.b / temperature), LSE_N over all ranks' negatives.

    The sum is over this rank's anchors, each of which counts. Give both directions at once, anchors [z1, z2]
    and positives [z2, z1]: the negatives then travel once. With classes given, both or none, a negative is
    dropped where its class is known (>= 0) and the anchor's. An anchor with no negative left has loss 0.
    `detached` stops the gradient of negatives and positives. Raises ValueError where widths differ or the
    temperature is not positive.
    """
    if (anchor_class is None) != (negative_class is None):
        raise ValueError("sbcl: give the classes of anchors and negatives, or of neither")
    _check("sbcl", temperature, anchors, positives, negatives)
    with full_precision(anchors):
        a_NF, b_NF, keys_MF = (at_least_float32(x) for x in (anchors, positives, negatives))
        if detached:
            b_NF, keys_MF = b_NF.detach(), keys_MF.detach()
        positive_N = (a_NF * b_NF).sum(1) / temperature
        if exchange == "anchors":
            lse_N = _sbcl_anchors(a_NF, keys_MF, temperature, tile, anchor_class, negative_class, group)
            loss = softplus(lse_N - positive_N).sum()
        else:
            keys_MF = _gather_keys(keys_MF, detached, group)
            key_class = None if negative_class is None else gather_detached(negative_class, group)
            if exchange == "naive":
                lse_N = _sbcl_naive(a_NF, keys_MF, temperature, anchor_class, key_class)
                loss = softplus(lse_N - positive_N).sum()
            else:
                block = Keys(keys_MF, label=key_class)
                loss = streaming.softplus_lse(a_NF, positive_N, block, temperature, tile, anchor_class)
    return Additive(loss, loss.new_full((), len(a_NF)))


def cgcl(
    anchors: Float[Tensor, "K N F"],
    anchor_valid: Bool[Tensor, "K N"],
    anchor_id: Int64[Tensor, "K N"],
    *,
    bank_keys: Float[Tensor, "K M F"] | None,
    bank_valid: Bool[Tensor, "K M"] | None,
    temperature: float,
    exchange: Exchange,
    tile: int,
    detached: bool = False,
    sharded: bool = False,
    group: Group = None,
) -> Additive:
    """CGCL: mean over positives p of softplus(LSE_Q - v.p / temperature), LSE_Q over the other classes' keys.

    The sum is over this rank's anchors, which lie sorted by class. Keys are all ranks' valid anchors and the
    bank's valid keys, which carry no gradient; positives are those of the anchor's class without the anchor
    itself, known by its id, unique over ranks and views. The bank is the same on all ranks, or `sharded`: each
    rank has keys of its own, and only exchange "anchors" reaches them. An anchor without positives counts
    nowhere, one without negatives has loss 0 and counts. Where nothing counts, the sum is 0 and still attached
    to the graph. Raises ValueError where widths differ, the temperature is not positive, there is but one class,
    or a sharded bank meets another exchange.
    """
    if sharded and exchange != "anchors":
        raise ValueError(f'cgcl: exchange "{exchange}" does not reach the keys of a sharded bank: take "anchors"')
    if len(anchors) < 2:
        raise ValueError("cgcl: one class has no other to be told from: give two or more")
    _check("cgcl", temperature, anchors, bank_keys)
    with full_precision(anchors):
        v_KNF = at_least_float32(anchors)
        live_KNF = v_KNF.detach() if detached else v_KNF
        bank = None
        if bank_keys is not None:
            assert bank_valid is not None
            bank = bank_keys.detach().to(v_KNF.dtype), bank_valid
        if exchange == "anchors":
            live = live_KNF, anchor_valid, anchor_id
            bank = bank if sharded or bank is None else _share_of(bank, group)
            sum_KN, count_KN = _cgcl_anchors(v_KNF, anchor_id, live, bank, temperature, tile, group)
        else:
            live = (
                _class_first(_gather_keys(live_KNF.transpose(0, 1), detached, group)),
                _class_first(gather_detached(anchor_valid.T, group)).contiguous(),
                _class_first(gather_detached(anchor_id.T, group)).contiguous(),
            )
            if exchange == "naive":
                sum_KN, count_KN = _cgcl_naive(v_KNF, anchor_id, live, bank, temperature)
            else:
                sum_KN, count_KN = _cgcl_streamed(v_KNF, anchor_id, live, bank, temperature, tile)
        counts_KN = anchor_valid & (count_KN > 0)
        loss_KN = torch.where(counts_KN, sum_KN / count_KN.clamp(min=1), 0.0)
    return Additive(loss_KN.sum(), counts_KN.sum().to(loss_KN.dtype))


def _check(term: str, temperature: float, anchors: Tensor, *others: Tensor | None) -> None:
    if not temperature > 0:
        raise ValueError(f"{term}: temperature {temperature} is not positive: take 0.07 or so")
    for keys in others:
        if keys is not None and keys.shape[-1] != anchors.shape[-1]:
            raise ValueError(f"{term}: anchors have {anchors.shape[-1]} features, keys {keys.shape[-1]}: use one width")


def _gather_keys(keys: Tensor, detached: bool, group: Group) -> Tensor:
    return gather_detached(keys, group) if detached else gather(keys, group)


def _class_first(x_NK: Tensor) -> Tensor:
    """Gathered along N with the class in the middle: a class's rows are a strided view, no copy."""
    return x_NK.transpose(0, 1)


Live = tuple[Tensor, Tensor, Tensor]  # this step's keys (K, M, F), valid (K, M), id (K, M)
Bank = tuple[Tensor, Tensor] | None  # keys (K, M, F), valid (K, M)


def _share_of(bank: tuple[Tensor, Tensor], group: Group) -> tuple[Tensor, Tensor]:
    """This rank's part of a bank that all hold, by slot modulo group size: then no key counts twice."""
    slots = slice(ranks.group_rank(group), None, ranks.group_size(group))
    return bank[0][:, slots], bank[1][:, slots]


def _cgcl_anchors(
    v_KNF: Tensor, own_KN: Tensor, live: Live, bank: Bank, temperature: float, tile: int, group: Group
) -> tuple[Tensor, Tensor]:
    """(K, N) sums over positives and their numbers: all ranks' anchors meet the keys that lie on this one."""
    every_KNF = _class_first(gather(v_KNF.transpose(0, 1), group))
    own_KN = _class_first(gather_detached(own_KN.T, group)).contiguous()
    sums_counts = _cgcl_streamed(
        every_KNF, own_KN, live, bank, temperature, tile, partial(ranks.merge_lse, group=group)
    )
    both_NK2 = scatter_sum(torch.stack(sums_counts).permute(2, 1, 0), group)
    return both_NK2[..., 0].T, both_NK2[..., 1].T.detach()


def _cgcl_streamed(
    v_KNF: Tensor,
    own_KN: Tensor,
    live: Live,
    bank: Bank,
    temperature: float,
    tile: int,
    merge: Callable[[Tensor], Tensor] | None = None,
) -> tuple[Tensor, Tensor]:
    """(K, N) sums over positives and their numbers; every pair of anchor and key is visited once.

    `merge` makes the denominators over the keys here those over all ranks' keys.
    """
    classes = range(len(v_KNF))
    keys = [[Keys(*block)] for block in zip(*live, strict=True)]
    if bank is not None:
        for blocks, block in zip(keys, zip(*bank, strict=True), strict=True):
            blocks.append(Keys(*block))
    lses = []
    for c in classes:
        others = [block._replace(label=None) for q in classes if q != c for block in keys[q]]
        lses.append(streaming.lse(v_KNF[c], others, temperature, tile))
    lse_KN = torch.stack(lses)
    if merge is not None:
        lse_KN = merge(lse_KN)
    near = [streaming.positives(v_KNF[c], lse_KN[c], keys[c], temperature, tile, own_KN[c]) for c in classes]
    sums, counts = zip(*near, strict=True)
    return torch.stack(sums), torch.stack(counts)


def _cgcl_naive(v_KNF: Tensor, own_KN: Tensor, live: Live, bank: Bank, temperature: float) -> tuple[Tensor, Tensor]:
    """The same from one logits matrix of all anchors and all keys."""
    keys_KMF, valid_KM, id_KM = live
    if bank is not None:
        keys_KMF, valid_KM = torch.cat([keys_KMF, bank[0]], 1), torch.cat([valid_KM, bank[1]], 1)
        id_KM = torch.cat([id_KM, id_KM.new_full(bank[1].shape, torch.iinfo(torch.int64).min)], 1)
    classes, n, m = len(v_KNF), v_KNF.shape[1], keys_KMF.shape[1]
    logits = v_KNF.flatten(0, 1) @ keys_KMF.flatten(0, 1).T / temperature
    number = torch.arange(classes, device=logits.device)
    same = number.repeat_interleave(n)[:, None] == number.repeat_interleave(m)
    lse = _lse_naive(logits, valid_KM.flatten() & ~same)
    positive = valid_KM.flatten() & same & (own_KN.flatten()[:, None] != id_KM.flatten())
    pairs = torch.where(positive, softplus(lse[:, None] - logits), 0.0)
    return pairs.sum(1).view(classes, n), positive.sum(1).view(classes, n).to(logits.dtype)


def _sbcl_anchors(
    a_NF: Tensor,
    keys_MF: Tensor,
    temperature: float,
    tile: int,
    anchor_class: Tensor | None,
    key_class: Tensor | None,
    group: Group,
) -> Tensor:
    """LSE of this rank's anchors over all ranks' keys: the anchors travel, and what each rank's keys gave is merged."""
    every_NF = gather(a_NF, group)
    if anchor_class is not None:
        anchor_class = gather_detached(anchor_class, group)
    part_N = streaming.lse(every_NF, [Keys(keys_MF, label=key_class)], temperature, tile, anchor_class)
    return own_part(ranks.merge_lse(part_N, group), group)


def _sbcl_naive(
    a_NF: Tensor, keys_MF: Tensor, temperature: float, anchor_class: Tensor | None, key_class: Tensor | None
) -> Tensor:
    logits_NM = a_NF @ keys_MF.T / temperature
    if anchor_class is None or key_class is None:
        return logits_NM.logsumexp(1)
    return _lse_naive(logits_NM, ~same_label(anchor_class, key_class))


def _lse_naive(logits_NM: Tensor, keep_NM: Tensor) -> Tensor:
    """logsumexp over what is kept, -inf with gradient 0 in a row without any."""
    some_N = keep_NM.any(1)
    lse_N = logits_NM.masked_fill(~keep_NM & some_N[:, None], -torch.inf).logsumexp(1)
    return lse_N.masked_fill(~some_N, -torch.inf)
