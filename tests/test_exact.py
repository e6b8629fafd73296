"""W ranks compute the loss and the gradient of one process on the whole batch, in float64."""

from pathlib import Path
from typing import Any

import pytest
import torch
import toy
from ranks import run_ranks
from torch import Tensor
from torch.nn.parallel import DistributedDataParallel

from cclmpc_dist.data.index import Index, select
from cclmpc_dist.data.loader import Mixture, Stream, loader, to_device
from cclmpc_dist.losses import certainty
from cclmpc_dist.losses.segmentation import IGNORE
from cclmpc_dist.methods.method import Corpus
from cclmpc_dist.methods.registry import create
from cclmpc_dist.training.objective import objective

STEPS = 2  # the second meets a filled bank


def train_float64(rank: int, world: int, raw: dict[str, Any], hollow: int | None = None) -> dict[str, Tensor]:
    """Losses, gradients of every step and the bank after STEPS steps of plain gradient descent.

    The labelled image of lane `hollow` has no label anywhere, with -1 none has. "own." is of each rank by itself:
    the anchors of CGCL that count.
    """
    config = toy.parse(raw, "exact")
    index = Index.open(config.data.path)
    cases = select(index, config.data.labelled, 0)
    method = create(config, Corpus(index.channels, index.classes))
    batches = {name: config.batch(name, world) for name in method.phases[0].streams}
    torch.manual_seed(0)
    module = method.build().double()
    model = DistributedDataParallel(module, find_unused_parameters=True) if world > 1 else module
    method.enter(method.phases[0], 10, module, batches)
    streams = [
        loader(
            Mixture([Stream(index, name, cases[name], size, 0, config.data.patch, with_label=name == "labelled")]),
            0, STEPS, rank, world, 0,
        )
        for name, size in batches.items()
    ]  # fmt: skip
    out: dict[str, Tensor] = {}
    for step, parts in enumerate(zip(*streams, strict=True)):
        batch = {name: _double(to_device(part, "cpu")) for name, part in zip(batches, parts, strict=True)}
        if hollow is not None:
            batch["labelled"]["label"][(batch["labelled"]["lane"] == hollow) | (hollow < 0)] = IGNORE
        at = 5 + step  # the contrast is on, the consistency ramps
        terms, metrics = method.terms(model, batch, at)
        if "cgcl" in terms:
            out[f"own.{step}.anchors"] = terms["cgcl"][0][1].count.detach()
        loss, logged = objective(terms, method.weights(at), metrics)
        loss.backward()
        out |= {f"{step}.{name}": value for name, value in logged.items()}
        gradients = [p.grad for p in module.parameters() if p.grad is not None]
        out[f"{step}.gradient"] = torch.cat([gradient.flatten() for gradient in gradients])
        with torch.no_grad():
            for parameter in module.parameters():
                if parameter.grad is not None:
                    parameter -= 0.1 * parameter.grad
        module.zero_grad()
        method.after_step(module)
    return out | method.state_dict() | method.rank_state_dict()


def _double(batch: dict[str, Any]) -> dict[str, Any]:
    return batch | {"image": batch["image"].double()}


def _settings(corpus: Path, **changes: Any) -> dict[str, Any]:
    return toy.settings(
        corpus, Path("runs"), data__patch=[32, 32, 32], model__norm="instance", model__dropout=0.0, **changes
    )


def _ccl_mpc(corpus: Path, world: int, exchange: str, layout: str, keys: str, bank: int) -> dict[str, Any]:
    contrast = {"n_sbcl": 8, "n_negatives": 8, "n_cgcl": 8, "bank": bank, "bank_offer": 4, "negatives": "other_class"}
    contrast |= {"exchange": exchange, "bank_layout": layout, "keys": keys}
    return _settings(corpus, ccl_mpc__contrast=contrast, data__batch_labelled=world, data__batch_unlabelled=2 * world)


def _corner(corpus: Path, world: int, **changes: Any) -> dict[str, Any]:
    contrast = {"n_sbcl": 8, "n_negatives": 8, "n_cgcl": 8, "bank": 128, "bank_offer": 4}
    own = {name: changes.pop(name) for name in ("gamma_start", "gamma_end") if name in changes}
    batches = {"data__batch_labelled": world, "data__batch_unlabelled": world}
    return _settings(corpus, ccl_mpc=own | {"contrast": contrast | changes}, **batches)


def train_each(
    rank: int, world: int, settings: list[dict[str, Any]], hollow: int | None = None
) -> list[dict[str, Tensor]]:
    return [train_float64(rank, world, raw, hollow) for raw in settings]


MODES = [("naive", "replicated"), ("keys", "replicated"), ("anchors", "replicated"), ("anchors", "sharded")]
ALL = [(*mode, keys) for mode in MODES for keys in ("live", "detached")]
SOME = {
    2: [("naive", "replicated", "live"), ("anchors", "replicated", "detached")],
    3: [("keys", "replicated", "live"), ("anchors", "sharded", "detached")],
    4: [("anchors", "sharded", "live")],
}


@pytest.mark.parametrize("world", [2, *(pytest.param(world, marks=pytest.mark.slow) for world in (3, 4))])
def test_ccl_mpc_is_exact(world: int, toy_corpus: Path) -> None:
    _equal_one_process(world, SOME[world], toy_corpus)


@pytest.mark.slow
@pytest.mark.timeout(900)
@pytest.mark.parametrize("world", SOME)
def test_ccl_mpc_is_exact_in_every_mode(world: int, toy_corpus: Path) -> None:
    _equal_one_process(world, ALL, toy_corpus)


def _equal_one_process(world: int, cases: list[tuple[str, str, str]], corpus: Path) -> None:
    ranks = run_ranks(train_each, world, [_ccl_mpc(corpus, world, *case, 128) for case in cases], timeout=800)
    for layout, keys in {case[1:] for case in cases}:
        # Nothing is overwritten in two steps: W shards hold what one bank of W times the capacity does.
        capacity = 128 * (world if layout == "sharded" else 1)
        one = train_float64(0, 1, _ccl_mpc(corpus, world, "naive", "replicated", keys, capacity))
        assert one["0.loss/cgcl"] > 0
        assert one["0.train/certain_fraction"] > 0
        for number, case in enumerate(cases):
            if case[1:] == (layout, keys):
                for rank in ranks:
                    _compare(one, rank[number], f"{case}")
                if layout == "sharded":
                    assert torch.equal(sum(rank[number]["bank.count"] for rank in ranks), one["bank.count"])


@pytest.mark.slow
def test_ccl_mpc_is_exact_without_bank_and_without_certain_pixels(toy_corpus: Path) -> None:
    corners = [
        _corner(toy_corpus, 3, bank=0, negatives="all"),
        _corner(toy_corpus, 3, exchange="anchors", gamma_start=0.0, gamma_end=0.0),
    ]
    ranks = run_ranks(train_each, 3, corners, timeout=200)
    for number, raw in enumerate(corners):
        one = train_float64(0, 1, raw)
        for rank in ranks:
            _compare(one, rank[number], f"corner {number}")
    assert one["1.train/certain_fraction"] == 0
    assert one["1.loss/cp"] == 0


@pytest.mark.slow
def test_a_step_in_which_no_rank_has_any_is_exact(toy_corpus: Path) -> None:
    """No label and no certain pixel anywhere: nothing supervises, and CGCL has no anchor."""
    raw = _corner(toy_corpus, 3, exchange="anchors", gamma_start=0.0, gamma_end=0.0)
    one = train_float64(0, 1, raw, -1)
    assert one["1.loss/sup"] == one["1.loss/cp"] == one["1.loss/cgcl"] == 0
    assert one["1.loss/sbcl"] > 0
    assert (one["bank.count"] == 0).all()
    for rank in run_ranks(train_float64, 3, raw, -1, timeout=200):
        _compare(one, rank, "no rank with any")


def smallest_entropies(corpus: Path, world: int) -> Tensor:
    """(b_U,) the smallest entropy in each unlabelled image at the first step, by lane."""
    with pytest.MonkeyPatch.context() as patch:
        seen: list[Tensor] = []
        partition = certainty.partition

        def watched(log_p: Tensor, threshold: float) -> Tensor:
            seen.append(certainty.entropy(log_p).flatten(1).amin(1))
            return partition(log_p, threshold)

        patch.setattr(certainty, "partition", watched)
        train_float64(0, 1, _corner(corpus, world))
    return seen[0]


def _equal_where_a_rank_has_none(corpus: Path, world: int, ways: list[dict[str, Any]]) -> None:
    """One rank's labelled image has no label and its unlabelled one no certain pixel: gamma lies between the two images
    that are least certain. No anchor, no offer to the bank, no pixel of l_sup and l_cp; only SBCL has something."""
    entropies = smallest_entropies(corpus, world)
    (largest, hollow), (second, _) = zip(*(x.tolist() for x in entropies.topk(2)), strict=True)
    gamma = (largest + second) / 2
    assert largest - second > 1e-6
    gammas = {"gamma_start": gamma, "gamma_end": gamma, "negatives": "other_class"}
    settings = [_corner(corpus, world, **gammas, **way) for way in ways]
    ranks = run_ranks(train_each, world, settings, hollow, timeout=800)
    for number, way in enumerate(ways):
        one = train_float64(0, 1, settings[number] | _one_bank(settings[number], world), hollow)
        assert 0 < one["0.train/certain_fraction"] < 1
        assert one["0.loss/cgcl"] > 0
        for rank, results in enumerate(ranks):
            assert (results[number]["own.0.anchors"] == 0) == (rank == hollow)
            _compare(one, results[number], f"a rank with none, {way}")


def _one_bank(raw: dict[str, Any], world: int) -> dict[str, Any]:
    """The settings of one process that holds all shards, where the bank is sharded."""
    contrast = raw["ccl_mpc"]["contrast"]
    if contrast.get("bank_layout") != "sharded":
        return {}
    contrast = contrast | {"bank_layout": "replicated", "exchange": "naive", "bank": world * contrast["bank"]}
    return {"ccl_mpc": raw["ccl_mpc"] | {"contrast": contrast}}


@pytest.mark.slow
@pytest.mark.timeout(900)
@pytest.mark.parametrize("world", [2, 3])
def test_a_rank_with_none_is_exact(world: int, toy_corpus: Path) -> None:
    ways = [{"exchange": how, "bank_layout": layout, "keys": keys} for how, layout, keys in ALL]
    _equal_where_a_rank_has_none(toy_corpus, world, ways)


@pytest.mark.slow
def test_groups_of_ranks_share_keys(toy_corpus: Path) -> None:
    """Every exchange the same numbers, and others than without groups; each group's terms by themselves are tested
    in test_contrast_ranks.py."""
    ways = ("naive", "keys", "anchors")
    settings = [_corner(toy_corpus, 4, exchange=way, group=2, negatives="other_class") for way in ways]
    ranks = run_ranks(train_each, 4, settings, timeout=200)
    alone = train_float64(0, 1, _corner(toy_corpus, 4, negatives="other_class"))
    for rank in ranks:
        for number, way in enumerate(ways):
            _compare(ranks[0][0], rank[number], f"group of 2, {way}")
        for name in ("0.loss/sbcl", "0.loss/cgcl"):
            assert abs(rank[1][name] - alone[name]) > 1e-3 * alone[name]
        assert abs(rank[1]["0.loss/sup"] - alone["0.loss/sup"]) < 1e-10


def test_supervised_is_exact(toy_corpus: Path) -> None:
    raw = _settings(toy_corpus, method="supervised")
    one = train_float64(0, 1, raw)
    for other in run_ranks(train_float64, 2, raw):
        _compare(one, other, "supervised")


def _compare(one: dict[str, Tensor], other: dict[str, Tensor], case: str) -> None:
    assert {name for name in one if "bank" not in name} == {name for name in other if "bank" not in name}
    for name, expected in one.items():
        if name.startswith("own"):
            continue
        if name.startswith("bank") and "sharded" in case:
            continue  # each rank has its own keys
        tolerance = 1e-8 if name.endswith("gradient") else 1e-10
        if name == "bank.keys":
            tolerance = 1e-6  # kept in float32
        difference = (other[name].double() - expected.double()).norm() / expected.double().norm().clamp(min=1e-12)
        assert difference <= tolerance, f"{case}: {name}: {difference:.2e}"
