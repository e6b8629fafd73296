"""Dense losses against plain loops in float64, with and without ignored pixels."""

import math

import numpy as np
import pytest
import torch
from torch.nn import functional as F

from cclmpc_dist.losses import certainty
from cclmpc_dist.losses.consistency import squared
from cclmpc_dist.losses.segmentation import EPSILON, IGNORE, cross_entropy, dice, seg
from cclmpc_dist.losses.terms import Additive, Part

SHAPES = [((2, 2, 3, 4, 5), 0.5), ((3, 4, 5, 6), 0.5), ((2, 3, 4, 4), 0.0)]


def _case(shape: tuple[int, ...], ignored: float) -> tuple[torch.Tensor, torch.Tensor]:
    random = torch.Generator().manual_seed(len(shape))
    logits = torch.randn(shape, dtype=torch.float64, generator=random, requires_grad=True)
    y = torch.randint(0, shape[1], (shape[0], *shape[2:]), generator=random)
    return logits, torch.where(torch.rand(y.shape, generator=random) < ignored, IGNORE, y)


def _value(part: Additive) -> torch.Tensor:
    return part.sum / part.count if part.count > 0 else part.sum


def _total(parts: list[Part]) -> torch.Tensor:
    values = [c * (_value(v) if isinstance(v, Additive) else v.finish(v.sums)) for c, v in parts]
    return torch.stack(values).sum()


def _pixels(log_p: torch.Tensor, y: torch.Tensor) -> list[tuple[np.ndarray, int]]:
    rows = log_p.detach().movedim(1, -1).reshape(-1, log_p.shape[1]).numpy()
    return [(row, label) for row, label in zip(rows, y.flatten().tolist(), strict=True) if label != IGNORE]


def _dice_loop(pixels: list[tuple[np.ndarray, int]], classes: int) -> float:
    losses = []
    for k in range(1, classes):
        overlap = sum(math.exp(row[k]) for row, label in pixels if label == k)
        squares = sum(math.exp(row[k]) ** 2 for row, _ in pixels)
        size = sum(label == k for _, label in pixels)
        losses.append(1 - (2 * overlap + EPSILON) / (squares + size + EPSILON))
    return sum(losses) / len(losses)


@pytest.mark.parametrize(("shape", "ignored"), SHAPES)
def test_segmentation_against_a_plain_loop(shape, ignored):
    logits, y = _case(shape, ignored)
    log_p = logits.log_softmax(1)
    pixels = _pixels(log_p, y)
    entropy = -sum(row[label] for row, label in pixels) / len(pixels)
    overlap = _dice_loop(pixels, shape[1])
    part = cross_entropy(log_p, y)
    assert part.count == len(pixels)
    assert _value(part).item() == pytest.approx(entropy, rel=1e-12)
    ratio = dice(log_p.exp(), y)
    assert ratio.sums.shape == (3 * (shape[1] - 1),)
    assert ratio.finish(ratio.sums).item() == pytest.approx(overlap, rel=1e-12)
    assert _total(seg(log_p, y)).item() == pytest.approx(0.5 * entropy + 0.5 * overlap, rel=1e-12)


@pytest.mark.parametrize(("shape", "ignored"), SHAPES)
def test_segmentation_gradient_by_differences(shape, ignored):
    logits, y = _case(shape, ignored)
    assert torch.autograd.gradcheck(lambda x: _total(seg(x.log_softmax(1), y)), logits)


def test_dice_of_a_split_batch_is_that_of_the_whole():
    logits, y = _case((4, 3, 5, 5), 0.3)
    p = logits.softmax(1)
    whole, first, rest = dice(p, y), dice(p[:1], y[:1]), dice(p[1:], y[1:])
    torch.testing.assert_close(first.sums + rest.sums, whole.sums)


def test_nothing_labelled_is_exactly_zero_with_a_finite_gradient():
    logits, y = _case((2, 3, 4, 4), 0.0)
    value = _total(seg(logits.log_softmax(1), torch.full_like(y, IGNORE)))
    assert value.item() == 0.0
    value.backward()
    assert torch.equal(logits.grad, torch.zeros_like(logits))


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_what_lies_under_the_mask_does_not_leak(bad):
    logits, y = _case((2, 3, 4, 4), 0.5)
    clean = logits.log_softmax(1).detach().requires_grad_()
    dirty = torch.where((y == IGNORE)[:, None], bad, clean.detach()).requires_grad_()
    losses = [_total(seg(x, y)) for x in (clean, dirty)]
    for loss in losses:
        loss.backward()
    assert torch.equal(*losses)
    assert torch.equal(clean.grad, dirty.grad)
    parts = [cross_entropy(dirty, y), dice(dirty, y)]
    assert torch.isfinite(parts[0].sum)
    assert torch.isfinite(parts[1].sums).all()


def test_sums_are_wide():
    logits, y = _case((2, 2, 4, 4), 0.2)
    half = logits.detach().log_softmax(1).bfloat16()
    assert cross_entropy(half, y).sum.dtype == torch.float32
    assert dice(half.exp(), y).sums.dtype == torch.float32
    assert squared(half, half).sum.dtype == torch.float32
    assert certainty.entropy(half).dtype == torch.float32


def test_squared_is_the_mean_over_all_elements():
    p, q = torch.rand(2, 3, 4, 5, dtype=torch.float64), torch.rand(2, 3, 4, 5, dtype=torch.float64)
    part = squared(p, q)
    assert part.count == 120
    assert _value(part).item() == pytest.approx(((p - q).numpy() ** 2).mean(), rel=1e-12)


def test_rampup_and_gamma():
    assert certainty.rampup(0.0) == pytest.approx(math.exp(-5))
    assert certainty.rampup(0.5) == pytest.approx(math.exp(-1.25))
    assert certainty.rampup(1.0) == certainty.rampup(3.0) == 1.0
    assert certainty.gamma(1.0, 0.75, 0.95) == pytest.approx(0.95)
    assert certainty.gamma(0.0, 0.75, 0.95) == pytest.approx(0.75 + 0.2 * math.exp(-5))


@pytest.mark.parametrize("classes", [2, 5])
def test_entropy_and_partition_against_a_plain_loop(classes):
    logits, _ = _case((2, classes, 4, 5), 0.0)
    log_p = logits.mul(2).log_softmax(1)
    got, y = certainty.entropy(log_p).detach(), certainty.partition(log_p, 0.6)
    assert not y.requires_grad
    assert y.dtype == torch.int64
    for b, i, j in np.ndindex(2, 4, 5):
        p = log_p[b, :, i, j].exp().tolist()
        h = -sum(x * math.log(x) for x in p) / math.log(classes)
        assert got[b, i, j].item() == pytest.approx(h, rel=1e-10)
        assert y[b, i, j].item() == (int(np.argmax(p)) if h <= 0.6 else IGNORE)
    assert 0 < (y != IGNORE).sum() < y.numel()


def test_entropy_at_its_ends_and_partition_of_nan():
    log_p = torch.tensor([[0.0, -math.inf], [math.log(0.5)] * 2, [math.nan] * 2], dtype=torch.float64)
    log_p = log_p.T[None]  # (1, 2, 3)
    torch.testing.assert_close(certainty.entropy(log_p)[0, :2], torch.tensor([0.0, 1.0], dtype=torch.float64))
    assert certainty.partition(log_p, 0.9).tolist() == [[0, IGNORE, IGNORE]]


def test_mean_log_is_the_log_of_the_mean_even_far_out():
    a, b = torch.tensor([-1.0, -800.0]).double(), torch.tensor([-3.0, -801.0]).double()
    want = [math.log((math.exp(-1) + math.exp(-3)) / 2), -800 + math.log((1 + math.exp(-1)) / 2)]
    torch.testing.assert_close(certainty.mean_log(a, b), torch.tensor(want).double())


@pytest.mark.parametrize(("old", "new"), [((16, 24, 8), (2, 3, 1)), ((9, 10), (4, 7)), ((5, 6), (11, 12))])
def test_nearest_is_torchs_nearest_exact(old, new):
    labels = torch.randint(-1, 4, (2, *old), generator=torch.Generator().manual_seed(0))
    want = F.interpolate(labels[:, None].double(), size=new, mode="nearest-exact")[:, 0].long()
    assert torch.equal(certainty.nearest(labels, new), want)
