"""The two contrastive terms of CCL-MPC, over the keys of all ranks.

SBCL: symmetric bidirectional contrast between images [P, figure 2a]. CGCL: certainty-guided contrast between
classes [P, figure 2b]. The formulas where the paper is silent are [F]: docs/method.md, losses 4 and 5. N
anchors, M keys, F features, K classes, W ranks. Inputs are L2-normalised; values are at least float32. Keys
are gathered over the ranks with their gradient, so all ranks call alike and with equal shapes. `exchange`
picks how, same numbers either way: "naive" builds all logits with plain autograd, "keys" streams them in
tiles (streaming.py).
"""

from typing import Literal

import torch
from jaxtyping import Bool, Float, Int64
from torch import Tensor

from cclmpc_dist.distributed.exchange import Group, gather, gather_detached
from cclmpc_dist.losses import streaming
from cclmpc_dist.losses.streaming import at_least_float32, full_precision, same_class, softplus
from cclmpc_dist.losses.terms import Additive

Exchange = Literal["naive", "keys"]


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
    group: Group = None,
) -> Additive:
    """SBCL: softplus(LSE_N - a.b / temperature), LSE_N over all ranks' negatives.

    The sum is over this rank's anchors, each of which counts. Give both directions at once, anchors [z1, z2]
    and positives [z2, z1]: the negatives then travel once. With classes given, both or none, a negative is
    dropped where its class is known (>= 0) and the anchor's. An anchor with no negative left has loss 0.
    """
    if (anchor_class is None) != (negative_class is None):
        raise ValueError("sbcl: give the classes of anchors and negatives, or of neither")
    with full_precision(anchors):
        a_NF, b_NF, local_MF = (at_least_float32(x) for x in (anchors, positives, negatives))
        keys_MF = gather(local_MF, group)
        key_class = None if negative_class is None else gather_detached(negative_class, group)
        if exchange == "naive":
            lse_N = _sbcl_naive(a_NF, keys_MF, temperature, anchor_class, key_class)
        else:
            lse_N = streaming.lse(a_NF, keys_MF, None, temperature, tile, anchor_class, key_class)
        loss_N = softplus(lse_N - (a_NF * b_NF).sum(1) / temperature)
    return Additive(loss_N.sum(), loss_N.new_full((), len(loss_N)))


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
    group: Group = None,
) -> Additive:
    """CGCL: mean over positives p of softplus(LSE_Q - v.p / temperature), LSE_Q over the other classes' keys.

    The sum is over this rank's anchors, which lie sorted by class. Keys are all ranks' valid anchors and the
    bank's valid keys, which carry no gradient; positives are those of the anchor's class without the anchor
    itself, known by its id, unique over ranks and views. An anchor without positives counts nowhere, one
    without negatives has loss 0 and counts. Where nothing counts, the sum is 0 and still attached to the
    graph.
    """
    with full_precision(anchors):
        v_KNF = at_least_float32(anchors)
        # Class in the middle: the gathered rows of a class are then a strided view, no copy.
        keys_MKF = gather(v_KNF.transpose(0, 1), group)
        valid_KM = gather_detached(anchor_valid.T, group).T.contiguous()
        id_KM = gather_detached(anchor_id.T, group).T.contiguous()
        bank = None
        if bank_keys is not None:
            assert bank_valid is not None
            bank = bank_keys.detach().to(v_KNF.dtype), bank_valid
        pairs = v_KNF, anchor_id, keys_MKF, valid_KM, id_KM, bank, temperature
        sum_KN, count_KN = _cgcl_naive(*pairs) if exchange == "naive" else _cgcl_streamed(*pairs, tile)
        counts_KN = anchor_valid & (count_KN > 0)
        loss_KN = torch.where(counts_KN, sum_KN / count_KN.clamp(min=1), 0.0)
    return Additive(loss_KN.sum(), counts_KN.sum().to(loss_KN.dtype))


Bank = tuple[Tensor, Tensor] | None  # keys (K, M, F), valid (K, M)


def _cgcl_streamed(
    v_KNF: Tensor,
    own_KN: Tensor,
    keys_MKF: Tensor,
    valid_KM: Tensor,
    id_KM: Tensor,
    bank: Bank,
    temperature: float,
    tile: int,
) -> tuple[Tensor, Tensor]:
    """(K, N) sums over positives and their numbers; every pair of anchor and key is visited once."""
    live = list(zip(keys_MKF.unbind(1), valid_KM, strict=True))
    stored = [] if bank is None else list(zip(*bank, strict=True))
    sums, counts = [], []
    for c, v_NF in enumerate(v_KNF.unbind()):
        others = [pair for keys in (live, stored) for pair in keys[:c] + keys[c + 1 :]]
        lses = [streaming.lse(v_NF, keys_MF, valid_M, temperature, tile) for keys_MF, valid_M in others]
        lse_N = merge_lse(torch.stack(lses))
        total, count = streaming.positives(v_NF, lse_N, *live[c], temperature, tile, own_KN[c], id_KM[c])
        if stored:
            more, more_count = streaming.positives(v_NF, lse_N, *stored[c], temperature, tile)
            total, count = total + more, count + more_count
        sums.append(total)
        counts.append(count)
    return torch.stack(sums), torch.stack(counts)


def _cgcl_naive(
    v_KNF: Tensor,
    own_KN: Tensor,
    keys_MKF: Tensor,
    valid_KM: Tensor,
    id_KM: Tensor,
    bank: Bank,
    temperature: float,
) -> tuple[Tensor, Tensor]:
    """The same from one logits matrix of all anchors and all keys."""
    keys_KMF = keys_MKF.transpose(0, 1)
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


def _sbcl_naive(
    a_NF: Tensor, keys_MF: Tensor, temperature: float, anchor_class: Tensor | None, key_class: Tensor | None
) -> Tensor:
    logits_NM = a_NF @ keys_MF.T / temperature
    if anchor_class is None or key_class is None:
        return logits_NM.logsumexp(1)
    return _lse_naive(logits_NM, ~same_class(anchor_class, key_class))


def _lse_naive(logits_NM: Tensor, keep_NM: Tensor) -> Tensor:
    """logsumexp over what is kept, -inf with gradient 0 in a row without any."""
    some_N = keep_NM.any(1)
    lse_N = logits_NM.masked_fill(~keep_NM & some_N[:, None], -torch.inf).logsumexp(1)
    return lse_N.masked_fill(~some_N, -torch.inf)


def merge_lse(parts_PN: Float[Tensor, "P N"]) -> Float[Tensor, " N"]:
    """logsumexp of partial LSEs, -inf with gradient 0 (torch's own has NaN) where all parts are -inf."""
    empty_N = (parts_PN == -torch.inf).all(0)
    return torch.where(empty_N, 0.0, parts_PN).logsumexp(0).masked_fill(empty_N, -torch.inf)
