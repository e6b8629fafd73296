"""SBCL and CGCL on W ranks against one process on everything, in float64: value 1e-10, gradient 1e-8 by norm."""

from collections import Counter
from itertools import product
from typing import Any

import pytest
import torch
import torch.distributed as dist
from ranks import run_ranks
from torch import Tensor
from torch.nn.functional import normalize

from cclmpc_dist.distributed import exchange as ranks_room
from cclmpc_dist.distributed.exchange import all_reduce_sum, own_group
from cclmpc_dist.losses import costs
from cclmpc_dist.losses.contrast import cgcl, sbcl

TAU, TILE = 0.07, 3
K, N, M, SLOTS, INPUT, F = 3, 4, 5, 6, 6, 4
KINDS = ("uneven", "a rank without", "no rank with any")
WAYS = [(how, "replicated") for how in ("naive", "keys", "anchors")] + [("anchors", "sharded")]
CASES = [(*way, detached, kind) for way, detached, kind in product(WAYS, (False, True), KINDS)]
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


def losses(data: dict[str, Tensor], weights: Tensor, **options: Any) -> dict[str, Any]:
    """SBCL of class 0's cells towards class 1's, and CGCL, of one process's inputs."""
    anchors = normalize(data["cells"] @ weights, dim=-1)
    sharded = options.pop("sharded")
    known = {name: data[name] for name in ("anchor_class", "negative_class")}
    negatives = normalize(data["negatives"] @ weights, dim=-1)
    bank = {"bank_keys": data["bank"], "bank_valid": data["bank_valid"], "sharded": sharded}
    options |= {"temperature": TAU, "tile": TILE}
    return {
        "sbcl": sbcl(anchors[0], anchors[1], negatives, **known, **options),
        "cgcl": cgcl(anchors, data["valid"], data["ids"], **bank, **options),
    }


def concatenated(data: dict[str, Tensor], members: range, layout: str) -> dict[str, Tensor]:
    """The inputs of some ranks as those of one process: classes stay in front, ranks follow one another."""
    part = {name: data[name][members.start : members.stop] for name in data if name != "weights"}
    joined = {name: part[name].transpose(0, 1).flatten(1, 2) for name in ("cells", "valid", "ids")}
    joined |= {name: part[name].flatten(0, 1) for name in ("negatives", "anchor_class", "negative_class")}
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


def many(rank: int, world: int, size: int) -> dict[str, Results]:
    """W * local sum / world's count and its gradient, for every case."""
    group, found = own_group(size), {}
    for how, layout, detached, kind in CASES:
        data = everything(world, kind)
        weights = data["weights"].clone().requires_grad_()
        mine = {name: value[rank] for name, value in data.items() if name != "weights"}
        if layout == "replicated":
            mine |= {name: data[name][0] for name in ("bank", "bank_valid")}
        options = {"exchange": how, "detached": detached, "sharded": layout == "sharded", "group": group}
        results = {}
        for name, part in losses(mine, weights, **options).items():
            value = world * part.sum / all_reduce_sum(part.count).clamp(min=1)
            results[name] = value.detach(), torch.autograd.grad(value, weights, retain_graph=True)[0]
        found[f"{how} {layout} {detached} {kind}"] = results
    return found


@pytest.mark.parametrize(("world", "size"), [(1, 1), (2, 2), (3, 3), (4, 4), (4, 2)])
def test_ranks_equal_one_process(world: int, size: int) -> None:
    ranks = [many(0, 1, 1)] if world == 1 else run_ranks(many, world, size)
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


# Bytes on the wire -------------------------------------------------------------------------------------------------


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
            options = {"exchange": how, "detached": not live, "sharded": layout == "sharded"}
            for name in ("sbcl", "cgcl"):
                weights = data["weights"].clone().requires_grad_()
                counting = f"both {name} {how} {layout} {live}"
                terms = losses(mine, weights, **options)
                counting = f"{name} {how} {layout} {live}"
                torch.autograd.grad(terms[name].sum, weights)
    return dict(seen)


@pytest.mark.parametrize("world", [2, 4])
def test_bytes_on_the_wire_are_those_of_the_formulas(world: int) -> None:
    for seen in run_ranks(received, world):
        for (how, layout), live in product(WAYS, (True, False)):
            known = {"live": live}
            expected = {
                "sbcl": costs.sbcl(how, N, M, F, world, classes=True, **known).received,
                "cgcl": costs.cgcl(how, N, K, F, world, stored=SLOTS, sharded=layout == "sharded", **known).received,
            }
            case = f"{how} {layout} {live}"
            forward = {name: seen[f"both {name} {case}"] for name in expected}
            assert forward["sbcl"] == forward["cgcl"]  # the forward of both terms, counted twice
            backward = sum(seen.get(f"{name} {case}", 0) for name in expected)
            assert forward["sbcl"] + backward == sum(expected.values()), case
