"""Each rule of "across ranks" (docs/method.md), broken on purpose, must show: or the exactness tests prove nothing."""

from typing import Any

import pytest
import torch
import torch.distributed as dist
from ranks import run_ranks
from torch import Tensor
from torch.nn.functional import normalize

from cclmpc_dist.distributed.exchange import gather_detached, own_group
from cclmpc_dist.losses import contrast, segmentation
from cclmpc_dist.losses.terms import Additive
from cclmpc_dist.training import objective as room

WORLD, GROUP, N, INPUT, K, F = 4, 2, 6, 5, 2, 3
WEIGHTS = {"sup": 1.0, "cgcl": 1.0}


def inputs() -> dict[str, Tensor]:
    """All ranks' pixels and labels; on later ranks more pixels are unlabelled and more anchors valid."""
    generator = torch.Generator().manual_seed(2)
    share = torch.linspace(0.1, 0.8, WORLD)
    unlabelled = torch.rand(WORLD, N, generator=generator) < share[:, None]
    labels = torch.randint(0, K, (WORLD, N), generator=generator)
    return {
        "pixels": torch.randn(WORLD, N, INPUT, generator=generator, dtype=torch.float64),
        "labels": torch.where(unlabelled, segmentation.IGNORE, labels),
        "valid": torch.rand(WORLD, K, N, generator=generator) < share.flip(0)[:, None, None].sqrt(),
        "ids": torch.arange(WORLD * N).view(WORLD, N),
    }


def terms(weights: Tensor, part: dict[str, Tensor], group: Any) -> dict[str, Any]:
    """Cross-entropy, Dice and CGCL of a linear map."""
    features = part["pixels"] @ weights
    log_p = segmentation.log_softmax(features[None, :, :K].transpose(1, 2))
    ids = torch.stack([part["ids"] + 1000 * label for label in range(K)])
    anchors = normalize(features, dim=-1).expand(K, -1, -1)
    options: dict[str, Any] = {"temperature": 0.5, "exchange": "keys", "tile": 4, "group": group}
    near = contrast.cgcl(anchors, part["valid"], ids, bank_keys=None, bank_valid=None, **options)
    return {"sup": segmentation.seg(log_p, part["labels"][None]), "cgcl": [(1.0, near)]}


def gradient(part: dict[str, Tensor], group: Any = None) -> Tensor:
    weights = torch.linspace(-1, 1, INPUT * F, dtype=torch.float64).view(INPUT, F).requires_grad_()
    loss, _ = room.objective(terms(weights, part, group), WEIGHTS, {})
    return torch.autograd.grad(loss, weights)[0]


def one_process() -> Tensor:
    """Supervised over all; CGCL of each group by itself, one mean over all anchors."""
    data = inputs()
    weights = torch.linspace(-1, 1, INPUT * F, dtype=torch.float64).view(INPUT, F).requires_grad_()
    found = []
    for ranks in [range(WORLD), *(range(first, first + GROUP) for first in range(0, WORLD, GROUP))]:
        part = {name: value[ranks.start : ranks.stop].flatten(0, 1) for name, value in data.items() if name != "valid"}
        part["valid"] = data["valid"][ranks.start : ranks.stop].transpose(0, 1).flatten(1)
        found.append(terms(weights, part, None))
    groups = [value for term in found[1:] for _, value in term["cgcl"]]
    near = Additive(sum(value.sum for value in groups), sum(value.count for value in groups))
    loss, _ = room.objective({"sup": found[0]["sup"], "cgcl": [(1.0, near)]}, WEIGHTS, {})
    return torch.autograd.grad(loss, weights)[0]


# What is broken: (room, name, broken version of what is there, given this rank's group) ----------------------------


def _no_factor(_: Any, __: Any) -> Any:
    return lambda: 1


def _factor_on_dice(original: Any, _: Any) -> Any:
    return lambda sums: WORLD * original(sums)


def _gather_without_gradient(_: Any, group: Any) -> Any:
    def gather(x: Tensor, __: Any) -> Tensor:
        parts = list(gather_detached(x, group).chunk(GROUP))
        parts[dist.get_rank(group)] = x  # the local slice is put back, as is often done
        return torch.cat(parts)

    return gather


def _local_mean(_: Any, __: Any) -> Any:
    return lambda total, count: Additive(total / count.clamp(min=1), torch.ones_like(count))


def _count_of_group(_: Any, group: Any) -> Any:
    def additive(total: Tensor, count: Tensor) -> Additive:
        reduced = count.clone()
        dist.all_reduce(reduced, group=group)
        return Additive(total / reduced.clamp(min=1), torch.full_like(count, 1 / GROUP))

    return additive


MUTATIONS = {
    "no factor W": (room, "world_size", _no_factor),
    "factor W on Dice": (segmentation, "_dice", _factor_on_dice),
    "gather without gradient": (contrast, "gather", _gather_without_gradient),
    "local mean": (contrast, "Additive", _local_mean),
    "the group's count": (contrast, "Additive", _count_of_group),
}


def mutated(rank: int, world: int) -> dict[str, Tensor]:
    """DDP's mean of the gradients, as the code is and under each mutation."""
    part, group = {name: value[rank] for name, value in inputs().items()}, own_group(GROUP)
    found = {"": gradient(part, group)}
    for name, (where, attribute, broken) in MUTATIONS.items():
        original = getattr(where, attribute)
        setattr(where, attribute, broken(original, group))
        found[name] = gradient(part, group)
        setattr(where, attribute, original)
    for value in found.values():
        dist.all_reduce(value)
    return {name: value / world for name, value in found.items()}


@pytest.fixture(scope="module")
def gradients() -> dict[str, Tensor]:
    return run_ranks(mutated, WORLD)[0]


def test_unbroken_is_exact(gradients: dict[str, Tensor]) -> None:
    expected = one_process()
    assert (gradients[""] - expected).norm() <= 1e-12 * expected.norm()


@pytest.mark.parametrize("name", MUTATIONS)
def test_a_broken_rule_shows(name: str, gradients: dict[str, Tensor]) -> None:
    expected = one_process()
    assert (gradients[name] - expected).norm() > 1e-3 * expected.norm()


def one_rank_skips_a_collective(rank: int, world: int) -> None:
    weights = torch.ones(INPUT, F, dtype=torch.float64, requires_grad=True)
    part = {name: value[rank] for name, value in inputs().items()}
    if rank == 0:
        terms(weights, part, None)  # gathers; the others are at the next step's sums
    room.objective({"sup": terms(weights, part, None)["sup"]}, WEIGHTS, {})


def test_a_mismatch_cannot_hang() -> None:
    with pytest.raises(AssertionError, match=r"failed|exit codes"):
        run_ranks(one_rank_skips_a_collective, 2, timeout=8)
