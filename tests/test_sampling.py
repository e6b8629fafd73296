"""The samplers' rules on random label maps, and that draws belong to images alone."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch._subclasses.fake_tensor import FakeTensorMode

from cclmpc_dist.losses.sampling import class_means, sample_anchors, sample_offers

IGNORE = -1


def random_maps(seed: int, images: int, positions: int, classes: int, hard_share: float) -> tuple[torch.Tensor, ...]:
    generator = torch.Generator().manual_seed(seed)
    labels = torch.randint(IGNORE, classes, (images, positions), generator=generator)
    hard = torch.rand(images, positions, generator=generator) < hard_share
    keys = torch.randint(-(2**62), 2**62, (images,), generator=generator)
    return labels, hard, keys


@settings(max_examples=60, deadline=None)
@given(
    seed=st.integers(0, 10**6),
    positions=st.integers(1, 40),
    classes=st.integers(1, 4),
    n=st.integers(1, 12),
    hard_share=st.sampled_from([0.0, 0.1, 0.5, 0.9, 1.0]),
)
def test_anchors_keep_the_rules(seed, positions, classes, n, hard_share):
    labels, hard, keys = random_maps(seed, 3, positions, classes, hard_share)
    index, valid = sample_anchors(labels, hard, keys, n, classes, "anchors")
    assert index.shape == valid.shape == (3, classes, n)
    assert index.min() >= 0
    assert index.max() < positions
    for b in range(3):
        for c in range(classes):
            chosen = index[b, c][valid[b, c]].tolist()
            members = [p for p in range(positions) if labels[b, p] == c]
            hard_members = [p for p in members if hard[b, p]]
            easy = len(members) - len(hard_members)
            assert len(set(chosen)) == len(chosen) == min(n, len(members))
            assert set(chosen) <= set(members)
            n_hard = min(len(hard_members), max(n // 2, n - easy))
            assert sum(bool(hard[b, p]) for p in chosen) == min(n_hard, n)


@settings(max_examples=30, deadline=None)
@given(seed=st.integers(0, 10**6), positions=st.integers(1, 40), k=st.integers(1, 12))
def test_offers_keep_the_rules(seed, positions, k):
    labels, _, keys = random_maps(seed, 3, positions, 3, 0.5)
    index, valid = sample_offers(labels, keys, k, 3, "offers")
    for b in range(3):
        for c in range(3):
            chosen = index[b, c][valid[b, c]].tolist()
            members = {p for p in range(positions) if labels[b, p] == c}
            assert len(set(chosen)) == len(chosen) == min(k, len(members))
            assert set(chosen) <= members


def test_an_image_draws_the_same_in_any_batch():
    labels, hard, keys = random_maps(1, 4, 500, 2, 0.3)
    whole = sample_anchors(labels, hard, keys, 16, 2, "anchors")
    alone = sample_anchors(labels[2:3], hard[2:3], keys[2:3], 16, 2, "anchors")
    assert torch.equal(whole[0][2:3], alone[0])
    assert not torch.equal(whole[0], sample_anchors(labels, hard, keys, 16, 2, "others")[0])
    assert not torch.equal(whole[0], sample_anchors(labels, hard, keys + 1, 16, 2, "anchors")[0])


@pytest.mark.parametrize("which", ["anchors", "offers"])
def test_every_member_is_equally_likely(which):
    images, positions = 4000, 12
    labels, hard = torch.zeros(images, positions, dtype=torch.int64), torch.zeros(images, positions, dtype=torch.bool)
    labels[:, 9:], hard[:, :3] = IGNORE, True
    keys = torch.arange(images)
    if which == "anchors":
        index, _ = sample_anchors(labels, hard, keys, 4, 1, "x")
        expected = torch.tensor([2 / 3] * 3 + [2 / 6] * 6 + [0.0] * 3)
    else:
        index, _ = sample_offers(labels, keys, 4, 1, "x")
        expected = torch.tensor([4 / 9] * 9 + [0.0] * 3)
    share = index.flatten().bincount(minlength=positions) / images
    assert (share - expected).abs().max() < 0.04  # five standard deviations


def test_class_means_are_unit_means_of_members():
    labels = torch.tensor([[0, 0, 1, IGNORE], [1, 1, 1, 1]])
    embedding = torch.randn(2, 4, 3, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    embedding[1, 2:] = -embedding[1, :2]  # cancels out
    means, valid = class_means(embedding, labels, 3)
    assert valid.tolist() == [[True, True, False], [False, False, False]]
    for c, members in {0: [0, 1], 1: [2]}.items():
        mean = embedding[0, members].mean(0)
        torch.testing.assert_close(means[0, c], mean / mean.norm(), rtol=1e-12, atol=0)
    assert (means[~valid] == 0).all()


def test_class_means_are_float32_under_autocast():
    with torch.autocast("cpu", torch.bfloat16):
        means, _ = class_means(torch.ones(1, 300, 1), torch.zeros(1, 300, dtype=torch.int64), 1)
    assert means.dtype == torch.float32
    assert means.item() == 1.0


def test_nothing_waits_for_the_device():
    """A fake tensor has no values: reading one, or a shape that depends on one, raises."""
    with FakeTensorMode():
        labels, hard = torch.zeros(2, 50, dtype=torch.int64), torch.zeros(2, 50, dtype=torch.bool)
        keys = torch.zeros(2, dtype=torch.int64)
        assert sample_anchors(labels, hard, keys, 8, 2, "x")[0].shape == (2, 2, 8)
        assert sample_offers(labels, keys, 8, 2, "x")[0].shape == (2, 2, 8)
        assert class_means(torch.zeros(2, 50, 4), labels, 2)[0].shape == (2, 2, 4)
