"""SBCL and CGCL on W ranks against one process on everything, in float64: value 1e-10, gradient 1e-8 by norm."""

import math
import weakref
from collections import Counter
from itertools import product
from typing import Any

import pytest
import torch
import torch.distributed as dist
from ranks import run_ranks
from torch import Tensor
from torch.nn.functional import normalize
from torch.utils._python_dispatch import TorchDispatchMode

from cclmpc_dist.distributed import exchange as ranks_room
from cclmpc_dist.distributed.exchange import all_reduce_sum, own_group
from cclmpc_dist.losses import costs, streaming
from cclmpc_dist.losses.contrast import cgcl, sbcl
from cclmpc_dist.losses.memory_bank import gather_offers

TAU, TILE = 0.07, 3
K, N, M, SLOTS, INPUT, F = 3, 4, 5, 6, 6, 4
KINDS = ("uneven", "a rank without", "no rank with any")
WAYS = [(how, "replicated") for how in ("naive", "keys", "anchors")] + [("anchors", "sharded")]
BARE = [(how, "no bank") for how in ("naive", "keys", "anchors")]  # nor classes for SBCL
CASES = [(*way, detached, kind) for way, detached, kind in product(WAYS, (False, True), KINDS)]
CASES += [(*way, detached, "uneven") for way, detached in product(BARE, (False, True))]
Results = dict[str, tuple[Tensor, Tensor]]  # value and gradient by the shared weights


def everything(world: int, kind: str) -> dict[str, Tensor]:
    """All ranks' inputs, along the first axis: features before a shared linear map, validity, ids, classes, banks."""
    generator = torch.Generator().manual_seed(world)

    def random(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator, dtype=torch.float64)

    valid = torch.rand(world, K, N, generator=generator) < torch.linspace(0.3, 0.9, world)[:, None, None]
    valid[0, 0, :2] = True  # an anchor with a positive, whatever the draw
    if kind != "uneven":
        valid[-1 if kind == "a rank without" and world > 1 else slice(None)] = kind == "a rank without" and world == 1
    return {
        "weights": random(INPUT, F),
        "cells": random(world, K, N, INPUT),
        "valid": valid,
        "ids": torch.randperm(world * K * N, generator=generator).view(world, K, N),
        "negatives": random(world, M, INPUT),
        "anchor_class": torch.randint(-1, K, (world, N), generator=generator),
        "negative_class": torch.randint(-1, K, (world, M), generator=generator),
        "bank": normalize(random(world, K, SLOTS, F), dim=-1),
        "bank_valid": torch.rand(world, K, SLOTS, generator=generator) < 0.6,
    }


def of_rank(data: dict[str, Tensor], rank: int, layout: str) -> dict[str, Tensor]:
    """A rank's inputs: its own bank where it is sharded, rank 0's where all have the same, or none, nor classes."""
    mine = {name: value[rank] for name, value in data.items() if name != "weights"}
    if layout == "replicated":
        mine |= {name: data[name][0] for name in ("bank", "bank_valid")}
    return _bare(mine) if layout == "no bank" else mine


def _bare(data: dict[str, Tensor]) -> dict[str, Tensor]:
    return {name: value for name, value in data.items() if "bank" not in name and "class" not in name}


def losses(data: dict[str, Tensor], weights: Tensor, **options: Any) -> dict[str, Any]:
    """SBCL of class 0's cells towards class 1's, and CGCL, or `only` one of them, of one process's inputs."""
    anchors = normalize(data["cells"] @ weights, dim=-1)
    sharded, only = options.pop("sharded"), options.pop("only", None)
    known = {name: data.get(name) for name in ("anchor_class", "negative_class")}
    negatives = normalize(data["negatives"] @ weights, dim=-1)
    bank = {"bank_keys": data.get("bank"), "bank_valid": data.get("bank_valid"), "sharded": sharded}
    options |= {"temperature": TAU, "tile": TILE}
    found = {}
    if only != "cgcl":
        found["sbcl"] = sbcl(anchors[0], anchors[1], negatives, **known, **options)
    if only != "sbcl":
        found["cgcl"] = cgcl(anchors, data["valid"], data["ids"], **bank, **options)
    return found


def concatenated(data: dict[str, Tensor], members: range, layout: str) -> dict[str, Tensor]:
    """The inputs of some ranks as those of one process: classes stay in front, ranks follow one another."""
    part = {name: data[name][members.start : members.stop] for name in data if name != "weights"}
    joined = {name: part[name].transpose(0, 1).flatten(1, 2) for name in ("cells", "valid", "ids")}
    joined |= {name: part[name].flatten(0, 1) for name in ("negatives", "anchor_class", "negative_class")}
    if layout == "no bank":
        return _bare(joined)
    if layout == "sharded":
        return joined | {name: part[name].transpose(0, 1).flatten(1, 2) for name in ("bank", "bank_valid")}
    return joined | {name: data[name][0] for name in ("bank", "bank_valid")}


def one_process(world: int, size: int, layout: str, detached: bool, kind: str) -> Results:
    """The mean over the anchors of all groups of `size` ranks, each group with its own keys."""
    data = everything(world, kind)
    weights = data["weights"].clone().requires_grad_()
    parts = [
        losses(concatenated(data, range(first, first + size), layout), weights, exchange="naive", detached=detached,
               sharded=False)
        for first in range(0, world, size)
    ]  # fmt: skip
    found = {}
    for name in ("sbcl", "cgcl"):
        value = sum(part[name].sum for part in parts) / sum(part[name].count for part in parts).clamp(min=1)
        found[name] = value.detach(), torch.autograd.grad(value, weights, retain_graph=True)[0]
    return found


def many(rank: int, world: int, size: int, device: str = "cpu") -> dict[str, Results]:
    """W * local sum / world's count and its gradient, for every case."""
    group, found = own_group(size), {}
    for how, layout, detached, kind in CASES:
        data = {name: value.to(device) for name, value in everything(world, kind).items()}
        weights = data["weights"].clone().requires_grad_()
        mine = of_rank(data, rank, layout)
        options = {"exchange": how, "detached": detached, "sharded": layout == "sharded", "group": group}
        results = {}
        for name, part in losses(mine, weights, **options).items():
            value = world * part.sum / all_reduce_sum(part.count).clamp(min=1)
            gradient = torch.autograd.grad(value, weights, retain_graph=True)[0]
            results[name] = value.detach().cpu(), gradient.cpu()
        found[f"{how} {layout} {detached} {kind}"] = results
    return found


@pytest.mark.parametrize(("world", "size"), [(1, 1), (2, 2), (3, 3), (4, 4), (4, 2)])
def test_ranks_equal_one_process(world: int, size: int) -> None:
    _equal(world, size, [many(0, 1, 1)] if world == 1 else run_ranks(many, world, size))


@pytest.mark.gpu
@pytest.mark.parametrize(("world", "size"), [(1, 1), (2, 2), (4, 4), (4, 2)])
def test_gpus_equal_one_process(world: int, size: int) -> None:
    if torch.cuda.device_count() < world:
        pytest.skip(f"needs {world} CUDA devices")
    _equal(world, size, run_ranks(many, world, size, "cuda", backend="nccl", timeout=180))


def _equal(world: int, size: int, ranks: list[dict[str, Results]]) -> None:
    for how, layout, detached, kind in CASES:
        for name, (value, gradient) in one_process(world, size, layout, detached, kind).items():
            got = [rank[f"{how} {layout} {detached} {kind}"][name] for rank in ranks]
            case = f"{name}: {how}, {layout}, detached {detached}, {kind}"
            assert sum(v for v, _ in got).item() / world == pytest.approx(value.item(), rel=1e-10, abs=0), case
            mean = sum(g for _, g in got) / world  # what DDP does
            assert (mean - gradient).norm() <= 1e-8 * gradient.norm(), case
            if name == "cgcl" and kind == "no rank with any":
                assert value == 0
                assert (mean == 0).all(), case
            else:
                assert gradient.norm() > 0, case


def with_one_that_is_not_finite(rank: int, world: int) -> list[tuple[str, float, float]]:
    """Each case's world value, and its gradient's norm after DDP's average, where the last rank's first cell is NaN."""
    data = everything(world, "uneven")
    data["cells"][-1, 0, 0] = float("nan")
    data["valid"][-1, 0, 0] = True
    found = []
    for how, layout in WAYS:
        weights = data["weights"].clone().requires_grad_()
        mine = of_rank(data, rank, layout)
        for name, part in losses(mine, weights, exchange=how, sharded=layout == "sharded").items():
            value = all_reduce_sum(torch.stack([part.sum, part.count.to(part.sum)]))[0]
            gradient = torch.autograd.grad(part.sum, weights, retain_graph=True)[0]
            norm = all_reduce_sum(gradient).norm()
            found.append((f"{name}: {how}, {layout}", value.item(), norm.item()))
    return found


def test_what_is_not_finite_on_one_rank_is_told_to_all() -> None:
    one, other = run_ranks(with_one_that_is_not_finite, 2)
    for (case, *numbers), (_, *others) in zip(one, other, strict=True):
        assert not math.isfinite(numbers[0]), case
        assert not math.isfinite(numbers[1]), case
        assert [str(number) for number in numbers] == [str(number) for number in others], case


# What it costs -----------------------------------------------------------------------------------------------------


def received(rank: int, world: int) -> dict[str, int]:
    """Bytes that a ring brings this rank in one forward and backward, counted at the collectives themselves."""
    seen: Counter[str] = Counter()
    counting = ""

    def count(wire: str, original: Any) -> Any:
        def call(first: Tensor, *rest: Any, **options: Any) -> Any:
            size = first.nbytes  # the output of gather and reduce-scatter, the tensor of all-reduce
            seen[counting] += {
                "gather": size * (world - 1) // world,
                "scatter": size * (world - 1),
                "reduce": 2 * size * (world - 1) // world,
            }[wire]
            return original(first, *rest, **options)

        return call

    ranks_room._all_gather = count("gather", ranks_room._all_gather)
    ranks_room._reduce_scatter = count("scatter", ranks_room._reduce_scatter)
    dist.all_reduce = count("reduce", dist.all_reduce)
    data = {name: v.float() if v.is_floating_point() else v for name, v in everything(world, "uneven").items()}
    mine = {name: value[rank] for name, value in data.items() if name != "weights"}
    for how, layout in WAYS:
        for live in (True, False):
            for name in ("sbcl", "cgcl"):
                options = {"exchange": how, "detached": not live, "sharded": layout == "sharded"}
                counting = f"{name} {how} {layout} {live}"
                weights = data["weights"].clone().requires_grad_()
                term = losses(mine, weights, only=name, **options)[name]
                torch.autograd.grad(term.sum, weights)
    counting = "bank"
    offers = torch.zeros(2, K, 5, F)
    gather_offers(offers, torch.ones(offers.shape[:3], dtype=torch.bool))
    return dict(seen)


@pytest.mark.parametrize("world", [2, 4])
def test_bytes_on_the_wire_are_those_of_the_formulas(world: int) -> None:
    for seen in run_ranks(received, world):
        for (how, layout), live in product(WAYS, (True, False)):
            sbcl_cost = costs.sbcl(how, N, M, F, world, classes=True, live=live)
            cgcl_cost = costs.cgcl(how, N, K, F, world, stored=SLOTS, sharded=layout == "sharded", live=live)
            assert seen[f"sbcl {how} {layout} {live}"] == sbcl_cost.received
            assert seen[f"cgcl {how} {layout} {live}"] == cgcl_cost.received
        assert seen["bank"] == costs.bank(2, K, 5, F, world).received


class Products(TorchDispatchMode):
    """FLOPs of the matrix products, those that add in place among them."""

    flops = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func.overloadpacket in (torch.ops.aten.mm, torch.ops.aten.addmm, torch.ops.aten.addmm_):
            left, right = args[-2:]
            self.flops += 2 * left.numel() * right.shape[1]
        return func(*args, **(kwargs or {}))


def multiplied(rank: int, world: int) -> dict[str, int]:
    """FLOPs of one forward and backward, for every way and term."""
    data, found = everything(world, "uneven"), {}
    for (how, layout), detached, name in product(WAYS + BARE, (False, True), ("sbcl", "cgcl")):
        mine = of_rank(data, rank, layout)
        cells, negatives = (normalize(mine[x][..., :F], dim=-1).requires_grad_() for x in ("cells", "negatives"))
        options = {"temperature": TAU, "tile": TILE, "exchange": how, "detached": detached}
        with Products() as made:
            if name == "sbcl":
                term = sbcl(cells[0], cells[1], negatives, **options)
            else:
                bank = {"bank_keys": mine.get("bank"), "bank_valid": mine.get("bank_valid")}
                term = cgcl(cells, mine["valid"], mine["ids"], **bank, **options, sharded=layout == "sharded")
            torch.autograd.grad(term.sum, [cells, negatives], allow_unused=True)
        found[f"{name} {how} {layout} {detached}"] = made.flops
    return found


@pytest.mark.parametrize(("world", "room"), [(1, streaming.KEPT), (1, 0), (2, streaming.KEPT)])
def test_flops_are_those_of_the_formulas(world: int, room: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(streaming, "KEPT", room)  # none: too many keys to visit each pair once
    for seen in [multiplied(0, 1)] if world == 1 else run_ranks(multiplied, world):
        for (how, layout), detached in product(WAYS + BARE, (False, True)):
            stored, case = (0 if layout == "no bank" else SLOTS), f"{how} {layout} {detached}"
            banked = {"stored": stored, "sharded": layout == "sharded"}
            assert seen[f"sbcl {case}"] == costs.sbcl(how, N, M, F, world, live=not detached).flops, case
            assert seen[f"cgcl {case}"] == costs.cgcl(how, N, K, F, world, live=not detached, **banked).flops, case


class Alive(TorchDispatchMode):
    """Bytes of the tensors that are alive at once, at the peak; `given`, and views of them, do not count."""

    def __init__(self, given: list[Tensor]) -> None:
        super().__init__()
        self.now = self.peak = 0
        for x in given:
            x.untyped_storage().seen = True

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        for x in out if isinstance(out, tuple | list) else [out]:
            if isinstance(x, Tensor) and not hasattr(x.untyped_storage(), "seen"):
                storage = x.untyped_storage()
                storage.seen = True
                self.now += storage.nbytes()
                self.peak = max(self.peak, self.now)
                weakref.finalize(storage, self.free, storage.nbytes())
        return out

    def free(self, size: int) -> None:
        self.now -= size


WIDE = [  # anchors and keys outweigh the logits
    {"n": 128, "m": 256, "f": 512, "tile": 16},
    {"n": 192, "m": 64, "f": 384, "tile": 8},
]


def held(rank: int, world: int, n: int, m: int, f: int, tile: int) -> dict[str, tuple[int, int]]:
    """Peak bytes beyond inputs and their gradients, and what the formula says."""
    generator = torch.Generator().manual_seed(rank)

    def leaf(*shape: int) -> Tensor:
        return normalize(torch.randn(*shape, generator=generator), dim=-1).requires_grad_()

    found = {}
    for how, live, classes in product(("keys", "anchors"), (True, False), (1, 2, 8)):
        options = {"temperature": TAU, "tile": tile, "exchange": how, "detached": not live}
        if classes == 1:
            leaves = [leaf(n, f), leaf(n, f), leaf(m, f)]
            predicted = costs.sbcl(how, n, m, f, world, tile=tile, live=live).held
        else:
            leaves = [leaf(classes, n // classes, f)]
            valid = torch.ones(classes, n // classes, dtype=torch.bool)
            options |= {"anchor_valid": valid, "anchor_id": torch.arange(n).view_as(valid) + n * rank}
            options |= {"bank_keys": None, "bank_valid": None}
            predicted = costs.cgcl(how, n // classes, classes, f, world, tile=tile, live=live).held
        given = [*leaves, *(x for x in options.values() if isinstance(x, Tensor))]
        with Alive(given) as alive:
            term = (sbcl if classes == 1 else cgcl)(*leaves, **options)
            gradients = torch.autograd.grad(term.sum, leaves, allow_unused=True)
        mine = sum(x.nbytes for x in gradients if x is not None)
        found[f"{how}, live {live}, {classes} classes"] = alive.peak - mine, predicted
    return found


@pytest.mark.parametrize("world", [1, 2, 4])
@pytest.mark.parametrize(
    "wide",
    [pytest.param(WIDE[0], id="more keys"), pytest.param(WIDE[1], id="more anchors", marks=pytest.mark.slow)],
)
def test_memory_is_that_of_the_formulas(world: int, wide: dict[str, int]) -> None:
    """A formula that forgets one copy of the anchors is off by more than this."""
    for rank in [held(0, 1, **wide)] if world == 1 else run_ranks(held, world, *wide.values()):
        for case, (measured, predicted) in rank.items():
            assert measured == pytest.approx(predicted, rel=0.05), case
