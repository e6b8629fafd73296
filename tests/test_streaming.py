"""The streaming loss: its gradients, one visit against two, its tiles, and that it never holds all logits."""

import pytest
import torch
from test_contrast import DOUBLE, TAU, sbcl_inputs, unit
from torch.utils._python_dispatch import TorchDispatchMode

from cclmpc_dist.losses import bench, streaming
from cclmpc_dist.losses.contrast import sbcl
from cclmpc_dist.losses.streaming import Keys


def test_streaming_gradients_are_the_numerical_ones():
    anchors, keys = unit(3, 4, seed=1).requires_grad_(), unit(5, 4, seed=2).requires_grad_()
    valid = torch.tensor([True, False, True, True, True])
    anchor_class, key_class = torch.tensor([0, 1, -1]), torch.tensor([0, 0, 1, -1, 0])
    base = torch.tensor([1.0, -2.0, 3.0], dtype=DOUBLE, requires_grad=True)
    ids = torch.tensor([7, 8, 9]), torch.tensor([7, 1, 2, 9, 3])
    assert torch.autograd.gradcheck(
        lambda a, k: streaming.lse(a, [Keys(k, valid, key_class), Keys(k[:2])], 0.5, 2, anchor_class), (anchors, keys)
    )
    assert torch.autograd.gradcheck(
        lambda a, b, k: streaming.positives(a, b, [Keys(k, valid, ids[1]), Keys(k[:2])], 0.5, 2, ids[0])[0],
        (anchors, base, keys),
    )


def test_positives_count_all_but_invalid_and_own():
    anchors, keys = unit(2, 4), unit(4, 4, seed=1)
    valid = torch.tensor([True, True, False, True])
    own, ids = torch.tensor([5, 6]), torch.tensor([5, 0, 6, 1])
    base = torch.zeros(2, dtype=DOUBLE)
    for tile in (2, 3, 4):
        for blocks, expected in (
            ([Keys(keys, valid, ids)], [2, 3]),
            ([Keys(keys, label=ids)], [3, 3]),
            ([Keys(keys, valid)], [3, 3]),
            ([Keys(keys)], [4, 4]),
            ([Keys(keys, valid, ids), Keys(keys[:1])], [3, 4]),
        ):
            assert streaming.positives(anchors, base, blocks, TAU, tile, own)[1].tolist() == expected


@pytest.mark.parametrize("scale", [1e-3, 1.0, 1e3])
def test_lse_survives_any_range_of_logits(scale):
    anchors, keys = unit(4, 8) * scale, unit(50, 8, seed=1)
    anchors, keys = anchors.float().requires_grad_(), keys.float().requires_grad_()
    got, expected = streaming.lse(anchors, [Keys(keys)], TAU, 7), (anchors @ keys.T / TAU).logsumexp(1)
    torch.testing.assert_close(got, expected, rtol=1e-6, atol=1e-5)
    grads = [torch.autograd.grad(x.sum(), (anchors, keys)) for x in (got, expected)]
    for ours, theirs in zip(*grads, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-3, atol=1e-4)


def test_lse_of_nothing():
    anchors, keys = unit(3, 4).requires_grad_(), unit(5, 4).requires_grad_()
    for blocks in ([Keys(keys, torch.zeros(5, dtype=torch.bool))], []):
        nothing = streaming.lse(anchors, blocks, TAU, 2)
        assert (nothing == -torch.inf).all()
    total, count = streaming.positives(anchors, nothing, [Keys(keys)], TAU, 2)
    assert total.tolist() == [0, 0, 0]
    assert count.tolist() == [5, 5, 5]
    assert all((grad == 0).all() for grad in torch.autograd.grad(total.sum(), (anchors, keys)))


def test_blocks_are_the_whole():
    anchors, keys = unit(3, 4).requires_grad_(), unit(6, 4, seed=1).requires_grad_()
    valid = torch.tensor([False, False, True, True, True, True])
    blocks = [Keys(keys[at], valid[at]) for at in (slice(0, 2), slice(2, 3), slice(3, 6))]
    got, expected = streaming.lse(anchors, blocks, TAU, 2), (anchors @ keys[2:].T / TAU).logsumexp(1)
    torch.testing.assert_close(got, expected, rtol=1e-12, atol=0)
    grads = [torch.autograd.grad((x**2).sum(), (anchors, keys)) for x in (got, expected)]
    for ours, theirs in zip(*grads, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-10, atol=1e-12)


def test_gradients_in_one_visit_can_be_taken_once():
    inputs = sbcl_inputs("some")
    inputs["negatives"].requires_grad_()
    out = sbcl(**inputs, temperature=TAU, exchange="keys", tile=4)
    out.sum.backward(retain_graph=True)
    with pytest.raises(RuntimeError, match="were taken before"):
        out.sum.backward()


@pytest.mark.parametrize("rows", [1, 2, 4, 5])
@pytest.mark.parametrize("classes", ["none", "some", "all alike"])
def test_one_visit_or_two_are_the_same(classes, rows, monkeypatch):
    """Rows that do and do not divide the anchors; then a room too small for one row."""
    found = {}
    for kept in (1 << 26, 8):
        monkeypatch.setattr(streaming, "ROWS", rows)
        monkeypatch.setattr(streaming, "KEPT", kept)
        leaves = {name: x.clone() for name, x in sbcl_inputs(classes).items()}
        three = [leaves[name].requires_grad_() for name in ("anchors", "positives", "negatives")]
        out = sbcl(**leaves, temperature=TAU, exchange="keys", tile=4).sum
        assert ("Softplus" in graph(out)) == (kept > 8)
        found[kept] = (out.detach(), *torch.autograd.grad(out, three))
    for once, twice in zip(*found.values(), strict=True):
        torch.testing.assert_close(once, twice, rtol=1e-11, atol=1e-13)


def graph(value: torch.Tensor) -> str:
    """Names of the functions that made a value."""
    names, todo = [], [value.grad_fn]
    while todo:
        node = todo.pop()
        names.append(node.name())
        todo += [parent for parent, _ in node.next_functions if parent is not None]
    return " ".join(names)


class Largest(TorchDispatchMode):
    """Remembers the most elements any operation's result had."""

    elements = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        for x in out if isinstance(out, tuple | list) else [out]:
            if isinstance(x, torch.Tensor):
                self.elements = max(self.elements, x.numel())
        return out


class Calls(TorchDispatchMode):
    """Counts operators: on a GPU each is a launch."""

    number = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.number += 1
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("case", bench.CASES)
def test_tiles_are_large_where_launches_cost(case, monkeypatch):
    real = torch.amp.autocast
    monkeypatch.setattr(torch.amp, "autocast", lambda _, **options: real("cpu", **options))  # it knows no "meta"
    inputs, number = bench._inputs(case, 512, 16384, 4, 2), {}
    for device in ("cpu", "meta"):
        moved = {name: x.detach().to(device).requires_grad_(x.requires_grad) for name, x in inputs.items()}
        with Calls() as calls:
            bench._step(case, "keys", 256, moved)
        number[device] = calls.number
    assert 5 * number["meta"] < number["cpu"]


def test_a_tile_wider_than_the_keys_leaves_rows_their_room():
    anchors, keys = torch.zeros(64, 4), torch.zeros(8, 4)
    number = {}
    for tile in (8, streaming.LOGITS):
        with Calls() as calls:
            streaming.lse(anchors, [Keys(keys)], 1.0, tile)
        number[tile] = calls.number
    assert number[streaming.LOGITS] == number[8]


@pytest.mark.parametrize("exchange", ["keys", "anchors"])
@pytest.mark.parametrize("case", ["sbcl", "cgcl"])
def test_streaming_never_holds_all_logits(case, exchange):
    n, m, features, tile = 4 * streaming.ROWS, 640, 4, 16
    inputs = bench._inputs(case, n, m, features, 2)
    with Largest() as largest:
        bench._step(case, exchange, tile, inputs)
    assert largest.elements <= max(n * tile, m * features, streaming.ROWS * m)
    with Largest() as largest:
        bench._step(case, "naive", tile, inputs)
    assert largest.elements >= 0.9 * n * m
