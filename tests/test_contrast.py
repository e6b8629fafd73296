"""SBCL and CGCL against plain loops, streamed against naive, many ranks against one process."""

import math
import subprocess
import sys

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.nn.functional import normalize

from cclmpc_dist.losses import bench
from cclmpc_dist.losses.contrast import cgcl, sbcl

TAU = 0.07
DOUBLE = torch.float64


def unit(*shape: int, seed: int = 0) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return normalize(torch.randn(*shape, generator=generator, dtype=DOUBLE), dim=-1)


def random_classes(n: int, classes: int, seed: int = 0) -> torch.Tensor:
    return torch.randint(-1, classes, (n,), generator=torch.Generator().manual_seed(seed))


def logit(a: torch.Tensor, b: torch.Tensor) -> float:
    return sum(float(x) * float(y) for x, y in zip(a, b, strict=True)) / TAU


def sbcl_loop(anchors, positives, negatives, anchor_class=None, negative_class=None) -> float:
    total = 0.0
    for i, (a, b) in enumerate(zip(anchors, positives, strict=True)):
        above = math.exp(logit(a, b))
        below = above
        for j, n in enumerate(negatives):
            if anchor_class is None or anchor_class[i] == -1 or anchor_class[i] != negative_class[j]:
                below += math.exp(logit(a, n))
        total -= math.log(above / below)
    return total


def cgcl_loop(anchors, valid, ids, bank, bank_valid) -> tuple[float, int]:
    """The definition: keys are (class, id or None, vector)."""
    classes, n = valid.shape
    keys = [(c, int(ids[c, i]), anchors[c, i]) for c in range(classes) for i in range(n) if valid[c, i]]
    if bank is not None:
        keys += [(c, None, bank[c, j]) for c in range(classes) for j in range(bank.shape[1]) if bank_valid[c, j]]
    total, count = 0.0, 0
    for own_class, own_id, v in (key for key in keys if key[1] is not None):
        below = sum(math.exp(logit(v, q)) for c, _, q in keys if c != own_class)
        pulls = [math.exp(logit(v, p)) for c, i, p in keys if c == own_class and i != own_id]
        if pulls:
            total += sum(-math.log(pull / (pull + below)) for pull in pulls) / len(pulls)
            count += 1
    return total, count


def cgcl_inputs(case: str, classes: int = 3, n: int = 5, m: int = 4, features: int = 4) -> dict:
    """Anchors of unequal numbers, a bank partly filled, and what `case` empties."""
    generator = torch.Generator().manual_seed(7)
    valid = torch.rand(classes, n, generator=generator) < 0.7
    bank_valid = torch.arange(m) < torch.tensor([3, 0, 4])[:, None]
    if case == "nothing valid":
        valid[:], bank_valid[:] = False, False
    if case == "no anchor but a bank":
        valid[:] = False
    if case == "one class alone":
        valid[1:], bank_valid[1:] = False, False
    if case == "an anchor without positives":
        valid[1], bank_valid[1] = torch.arange(n) == 2, False
    return {
        "anchors": unit(classes, n, features, seed=1),
        "anchor_valid": valid,
        "anchor_id": torch.randperm(classes * n, generator=generator).view(classes, n),
        "bank_keys": None if case == "no bank" else unit(classes, m, features, seed=2),
        "bank_valid": None if case == "no bank" else bank_valid,
    }


CASES = ["plain", "no bank", "nothing valid", "no anchor but a bank", "one class alone", "an anchor without positives"]


def graded(loss, inputs: dict, name: str, **options) -> tuple:
    """Sum, count and the gradient of the sum by inputs[name]."""
    leaf = inputs[name].clone().requires_grad_()
    out = loss(**{**inputs, name: leaf}, temperature=TAU, **options)
    return out.sum.detach(), out.count, torch.autograd.grad(out.sum, leaf)[0]


@pytest.mark.parametrize("exchange", ["naive", "keys", "anchors"])
@pytest.mark.parametrize("case", CASES)
def test_cgcl_is_its_definition(case, exchange):
    inputs = cgcl_inputs(case)
    value, count, gradient = graded(cgcl, inputs, "anchors", exchange=exchange, tile=3)
    expected, expected_count = cgcl_loop(*inputs.values())
    assert value.item() == pytest.approx(expected, rel=1e-12, abs=0)
    assert count.item() == expected_count
    assert gradient.isfinite().all()
    if case in ("nothing valid", "no anchor but a bank", "one class alone"):
        assert value.item() == 0.0
        assert (gradient == 0).all()
    if case == "one class alone":
        assert count.item() == inputs["anchor_valid"].sum()  # no negatives: loss 0, and it counts


@pytest.mark.parametrize("tile", [1, 3, 1000])
@pytest.mark.parametrize("case", CASES)
def test_cgcl_streamed_equals_naive(case, tile):
    inputs = cgcl_inputs(case)
    naive = graded(cgcl, inputs, "anchors", exchange="naive", tile=tile)
    streamed = graded(cgcl, inputs, "anchors", exchange="keys", tile=tile)
    for got, expected in zip(streamed, naive, strict=True):
        torch.testing.assert_close(got, expected, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("exchange", ["naive", "keys", "anchors"])
def test_gradients_through_anchors_and_keys_are_the_numerical_ones(exchange):
    inputs = cgcl_inputs("plain")
    anchors, rest = (
        inputs.pop("anchors").requires_grad_(),
        {**inputs, "temperature": 0.5, "exchange": exchange, "tile": 3},
    )
    assert torch.autograd.gradcheck(lambda v: cgcl(v, **rest).sum, anchors)
    three = [sbcl_inputs("none")[name].requires_grad_() for name in ("anchors", "positives", "negatives")]

    def loss(*x):
        return sbcl(*x, temperature=0.5, exchange=exchange, tile=4).sum

    if exchange != "keys":  # whose gradients can be taken once
        assert torch.autograd.gradcheck(loss, three)
    step = 1e-6
    for number, gradient in enumerate(torch.autograd.grad(3 * loss(*three), three)):
        for at in range(gradient.numel()):
            shift = torch.zeros_like(gradient).view(-1).index_fill(0, torch.tensor(at), step).view_as(gradient)
            up, down = ([x + sign * shift if i == number else x for i, x in enumerate(three)] for sign in (1, -1))
            assert gradient.view(-1)[at] == pytest.approx(3 * (loss(*up) - loss(*down)).item() / (2 * step), abs=1e-7)


def test_cgcl_gives_the_bank_no_gradient():
    inputs = cgcl_inputs("plain")
    bank = inputs["bank_keys"].requires_grad_()
    for exchange in ("naive", "keys"):
        anchors = inputs["anchors"].clone().requires_grad_()
        out = cgcl(**{**inputs, "anchors": anchors}, temperature=TAU, exchange=exchange, tile=2)
        assert torch.autograd.grad(out.sum, bank, allow_unused=True)[0] is None


def sbcl_inputs(classes: str) -> dict:
    inputs = {"anchors": unit(6, 4, seed=1), "positives": unit(6, 4, seed=2), "negatives": unit(9, 4, seed=3)}
    if classes == "none":
        return inputs
    anchor_class, negative_class = random_classes(6, 3, 1), random_classes(9, 3, 2)
    if classes == "all alike":
        anchor_class[1:], negative_class[:] = 1, 1
    return {**inputs, "anchor_class": anchor_class, "negative_class": negative_class}


@pytest.mark.parametrize("exchange", ["naive", "keys", "anchors"])
@pytest.mark.parametrize("classes", ["none", "some", "all alike"])
def test_sbcl_is_its_definition(classes, exchange):
    inputs = sbcl_inputs(classes)
    out = sbcl(**inputs, temperature=TAU, exchange=exchange, tile=4)
    assert out.sum.item() == pytest.approx(sbcl_loop(*inputs.values()), rel=1e-11)
    assert out.count.item() == 6


@pytest.mark.parametrize("name", ["anchors", "positives", "negatives"])
@pytest.mark.parametrize("classes", ["none", "some", "all alike"])
@pytest.mark.parametrize("tile", [1, 4, 1000])
def test_sbcl_streamed_equals_naive(classes, tile, name):
    inputs = sbcl_inputs(classes)
    naive = graded(sbcl, inputs, name, exchange="naive", tile=tile)
    streamed = graded(sbcl, inputs, name, exchange="keys", tile=tile)
    for got, expected in zip(streamed, naive, strict=True):
        torch.testing.assert_close(got, expected, rtol=1e-10, atol=1e-12)


def test_sbcl_wants_classes_of_both_sides():
    inputs = sbcl_inputs("some")
    del inputs["negative_class"]
    with pytest.raises(ValueError, match="or of neither"):
        sbcl(**inputs, temperature=TAU, exchange="keys", tile=4)


def test_inputs_that_do_not_fit_are_told_in_words():
    inputs, options = sbcl_inputs("none"), {"exchange": "keys", "tile": 4}
    for temperature in (0.0, -1.0, float("nan")):
        with pytest.raises(ValueError, match=f"temperature {temperature} is not positive"):
            sbcl(**inputs, temperature=temperature, **options)
    inputs = cgcl_inputs("plain")
    with pytest.raises(ValueError, match="cgcl: one class has no other to be told from"):
        cgcl(**{name: value[:1] for name, value in inputs.items()}, temperature=TAU, **options)
    with pytest.raises(ValueError, match='exchange "keys" does not reach the keys of a sharded bank: take "anchors"'):
        cgcl(**inputs, temperature=TAU, sharded=True, **options)


@pytest.mark.parametrize("exchange", ["naive", "keys", "anchors"])
def test_detached_keys_are_constants(exchange):
    """Keys, positives among them, that are other tensors of the same values."""
    options = {"temperature": TAU, "exchange": exchange, "tile": 3}
    inputs = sbcl_inputs("some")
    for name in ("anchors", "positives", "negatives"):
        leaf = inputs[name].clone().requires_grad_()
        out = sbcl(**inputs | {name: leaf}, detached=True, **options)
        found = torch.autograd.grad(out.sum, leaf, allow_unused=True)[0] if out.sum.requires_grad else None
        assert (found is None) == (name != "anchors")
    anchors = cgcl_inputs("plain")["anchors"].requires_grad_()
    inputs = {name: value for name, value in cgcl_inputs("plain").items() if name != "anchors"}
    found = torch.autograd.grad(cgcl(anchors, **inputs, detached=True, **options).sum, anchors)[0]
    expected = torch.autograd.grad(detached_cgcl(anchors, **inputs), anchors)[0]
    torch.testing.assert_close(found, expected, rtol=1e-10, atol=1e-12)


def detached_cgcl(anchors, anchor_valid, anchor_id, bank_keys, bank_valid):
    """The definition of CGCL's sum with constant keys, by autograd."""
    constant = anchors.detach()
    keys = [(c, int(anchor_id[c, i]), constant[c, i]) for c, i in anchor_valid.nonzero().tolist()]
    keys += [(c, None, bank_keys[c, j]) for c, j in bank_valid.nonzero().tolist()]
    total = anchors.new_zeros(())
    for c, i in anchor_valid.nonzero().tolist():
        others = torch.stack([anchors[c, i] @ key / TAU for q, _, key in keys if q != c]).logsumexp(0)
        own = [anchors[c, i] @ key / TAU for q, name, key in keys if q == c and name != int(anchor_id[c, i])]
        if own:
            total = total + torch.logaddexp(others - torch.stack(own), anchors.new_zeros(())).mean()
    return total


WIDTHS = """
import torch
from cclmpc_dist.losses.contrast import cgcl, sbcl
from cclmpc_dist.losses.streaming import Keys
options = {"temperature": 0.07, "exchange": "keys", "tile": 4}
rows, valid = torch.ones(2, 3, 4), torch.ones(2, 3, dtype=torch.bool)
for call in (
    lambda: sbcl(rows[0], rows[0], torch.ones(5, 3), **options),
    lambda: sbcl(rows[0], torch.ones(3, 1), rows[0], **options),
    lambda: cgcl(rows, valid, valid.long(), bank_keys=torch.ones(2, 3, 5), bank_valid=valid, **options),
):
    try:
        call()
    except ValueError as error:
        print(error)
"""


def test_features_of_another_width_are_told_in_words():
    """In a process of its own: under pytest the annotations refuse them first."""
    done = subprocess.run([sys.executable, "-c", WIDTHS], capture_output=True, text=True, check=True)
    assert done.stdout.splitlines() == [
        "sbcl: anchors have 4 features, keys 3: use one width",
        "sbcl: anchors have 4 features, keys 1: use one width",
        "cgcl: anchors have 4 features, keys 5: use one width",
    ]


@pytest.mark.parametrize("exchange", ["naive", "keys", "anchors"])
@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_what_is_not_finite_shows(value, exchange):
    inputs = cgcl_inputs("plain")
    inputs["anchors"][inputs["anchor_valid"].nonzero()[0].unbind()] = value
    out = cgcl(**inputs, temperature=TAU, exchange=exchange, tile=3)
    assert not out.sum.isfinite()


@pytest.mark.parametrize("exchange", ["naive", "keys", "anchors"])
def test_autocast_changes_nothing(exchange):
    inputs = {k: v.float() if v.is_floating_point() else v for k, v in cgcl_inputs("plain").items()}
    plain = graded(cgcl, inputs, "anchors", exchange=exchange, tile=3)
    with torch.autocast("cpu", torch.bfloat16):
        under = graded(cgcl, inputs, "anchors", exchange=exchange, tile=3)
    assert under[0].dtype == torch.float32
    if exchange != "naive":  # plain autograd in backward follows the caller's autocast
        torch.testing.assert_close(under, plain, rtol=0, atol=0)
    half = graded(cgcl, {**inputs, "anchors": inputs["anchors"].bfloat16()}, "anchors", exchange=exchange, tile=3)
    assert half[0].dtype == torch.float32
    torch.testing.assert_close(half[0], plain[0], rtol=0.05, atol=0)


@pytest.mark.parametrize("exchange", ["naive", "keys", "anchors"])
def test_nothing_waits_for_the_device(exchange):
    """A fake tensor has no values: reading one, or a shape that depends on one, raises."""
    real = cgcl_inputs("plain")
    with FakeTensorMode():
        inputs = {name: torch.zeros(x.shape, dtype=x.dtype) for name, x in real.items()}
        anchors = inputs["anchors"].requires_grad_()
        out = cgcl(**{**inputs, "anchors": anchors}, temperature=TAU, exchange=exchange, tile=3)
        rows, numbers = anchors[0], torch.zeros(5, dtype=torch.int64)
        known = {"anchor_class": numbers, "negative_class": numbers}
        more = sbcl(rows, rows, rows, **known, temperature=TAU, exchange=exchange, tile=3)
        assert torch.autograd.grad(out.sum + more.sum, anchors)[0].shape == anchors.shape


def test_bench_records_tell_what_was_compared(monkeypatch):
    monkeypatch.setattr(bench, "SWEEP", {"classes": (4,)})
    monkeypatch.setattr(bench, "CASES", ("sbcl", "cgcl"))
    records = bench.bench_contrast(anchors=32, keys=256, features=8, sweep=True, tile=64, repeats=1)
    assert all(set(r) - {"samples"} == {"bench", "case", "variant", "metric", "value", "unit"} for r in records)
    values = {(r["case"], r["variant"], r["metric"]): r["value"] for r in records}
    for case in bench.CASES:
        told = f"{case}: N=32 M=256 F=8 K=2"
        assert values[told, "keys", "seconds_over_naive"] == (
            values[told, "keys", "seconds"] / values[told, "naive", "seconds"]
        )
        assert values[told, "keys", "value_difference"] < 1e-5
        assert 0 < values[told, "keys", "gradient_difference"] < 1e-5
    assert ("cgcl: N=32 M=256 F=8 K=4", "naive", "seconds") in values
