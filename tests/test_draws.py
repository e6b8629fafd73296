"""Counter-based draws: known bits, moments, and independence of batch and purpose."""

import math

import torch

from cclmpc_dist.data import draws

KEYS = torch.tensor([3, -7, 1 << 60, 0])


def _splitmix(word: int) -> int:
    """The finaliser on Python's whole numbers."""
    word %= 1 << 64
    word = ((word ^ (word >> 30)) * 0xBF58476D1CE4E5B9) % (1 << 64)
    word = ((word ^ (word >> 27)) * 0x94D049BB133111EB) % (1 << 64)
    return word ^ (word >> 31)


def test_words_are_those_of_whole_number_arithmetic():
    got = draws.words(KEYS, "crop", 5)
    for row, key in zip(got.tolist(), KEYS.tolist(), strict=True):
        folded = _splitmix(key ^ draws.key("crop"))
        assert [word % (1 << 64) for word in row] == [_splitmix(folded + i * 0x9E3779B97F4A7C15) for i in range(1, 6)]


def test_the_host_draws_the_same_bits():
    found = torch.from_numpy(draws.host_uniform(KEYS.tolist(), "crop", 1000))
    assert torch.equal(found, draws.uniform(KEYS, "crop", 1000))


def test_key_tells_types_and_parts_apart_and_does_not_change():
    keys = [draws.key(1, 2), draws.key(12), draws.key("1", 2), draws.key(2, 1)]
    assert len(set(keys)) == 4
    assert draws.key("crop", 7) == 525768678723247511


def test_draws_leave_the_keys_alone():
    keys = KEYS.clone()
    draws.normal(keys, "a", 3)
    assert torch.equal(keys, KEYS)


def test_uniform_is_uniform():
    u = draws.uniform(KEYS, "u", 40_000).double()
    assert u.min() >= 0
    assert u.max() < 1
    counts = torch.histc(u.flatten(), 64, 0, 1)
    chi2 = ((counts - 2500) ** 2 / 2500).sum()
    assert chi2 < 63 + 5 * math.sqrt(2 * 63)
    assert abs((u[:, 1:] * u[:, :-1]).mean() - 0.25) < 5 * 0.25 / 400  # neighbours are uncorrelated


def test_normal_is_normal():
    z = draws.normal(KEYS, "z", 40_001).double()
    assert z.shape == (4, 40_001)
    error = 5 / math.sqrt(z.numel())
    assert abs(z.mean()) < error
    assert abs(z.var() - 1) < error * math.sqrt(2)
    assert abs((z**4).mean() - 3) < error * math.sqrt(96)
    assert abs((z.abs() < 1.0).double().mean() - 0.682689) < error * 0.5
    halves = z[:, :20_000] * z[:, 20_001:]  # cosine and sine of the same angle
    assert abs(halves.mean()) < 5 / math.sqrt(halves.numel())


def test_draws_do_not_depend_on_the_batch_or_the_number_drawn():
    for draw in (draws.uniform, draws.words):
        whole = draw(KEYS, "p", 100)
        assert torch.equal(whole[2:3, :17], draw(KEYS[2:3], "p", 17))
        assert torch.equal(whole.flip(0), draw(KEYS.flip(0), "p", 100))
    assert torch.equal(draws.normal(KEYS, "p", 1000)[1:2], draws.normal(KEYS[1:2], "p", 1000))


def test_purposes_and_keys_share_nothing():
    drawn = torch.stack([draws.words(KEYS, purpose, 1000) for purpose in ("view1.noise", "view2.noise", "crop")])
    assert drawn.unique().numel() == drawn.numel()


def test_subset_has_no_repetition_and_every_position_is_as_likely():
    keys = torch.arange(4000)
    chosen = draws.subset(keys, "s", 10, 3)
    assert all(len(set(row)) == 3 for row in chosen.tolist())
    counts = torch.bincount(chosen.flatten(), minlength=10).double()
    assert ((counts - 1200).abs() < 5 * math.sqrt(1200 * 0.9)).all()
