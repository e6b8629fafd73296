"""Normalisation is written down and applied on the device: bit for bit what the host would have made of it."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from corpora import numbered, rewrite, told, write

from cclmpc_dist.data.case import Case
from cclmpc_dist.data.formats.normalise import Normalised, normalise, parse_rule
from cclmpc_dist.data.index import Index
from cclmpc_dist.data.loader import Mixture, Stream, to_device
from cclmpc_dist.data.reader import Reader
from cclmpc_dist.data.seen import AS_STORED, Seen
from cclmpc_dist.data.verify import inspect, verify
from cclmpc_dist.errors import InputError
from cclmpc_dist.evaluation.cases import whole

WINDOW, PERCENTILE = "window:-160,240", "percentile:5,95"


def scans(kinds: str) -> list[np.ndarray]:
    """Six images of several sizes: i is CT in int16, f the same with fractions."""
    found = []
    for number in range(6):
        rng = np.random.default_rng(number)
        image = rng.integers(-1024, 3000, (1, 9 + number % 3, 8, 7)).astype(np.int16)
        noise = rng.standard_normal(image.shape).astype(np.float32)
        found.append(image + noise if kinds[number % len(kinds)] == "f" else image)
    return found


def corpus(folder: Path, found: list[Normalised], clipped: bool) -> Index:
    """The images as they are, with their bounds; or clipped before, without any."""
    cases = []
    for number, one in enumerate(found):
        label = (one.image[0] > 900).astype(np.uint8)
        image, seen = one.image, one.seen
        if clipped:
            image = np.clip(one.image, seen.low[0], seen.high[0]).astype(one.image.dtype)
            seen = seen._replace(low=AS_STORED.low, high=AS_STORED.high)
        cases.append(Case(f"case-{number}", image, label, (1.0, 1.0, 1.0), seen=seen))
    return write(folder, cases)


def plain(image: np.ndarray, seen: Seen) -> np.ndarray:
    """offset + scale * clip(image, low, high) in float64, a channel at a time."""
    out = np.empty(image.shape)
    for channel, values in enumerate(image):
        scale, offset, low, high = (numbers[channel % len(numbers)] for numbers in seen)
        out[channel] = offset + scale * np.minimum(np.maximum(values.astype(float), low), high)
    return out


def batches(index: Index, patch: tuple[int, ...]) -> list[dict]:
    stream = Mixture([Stream(index, "labelled", np.arange(len(index)), 3, 7, patch, with_label=True)])
    return [stream.batch(step, range(3)) for step in range(6)]


@pytest.mark.parametrize("rule", [WINDOW, PERCENTILE])
@pytest.mark.parametrize("kinds", ["i", "f", "if"])
def test_batches_are_those_of_an_image_clipped_before(tmp_path: Path, rule: str, kinds: str) -> None:
    found = [normalise(image, parse_rule(rule), Path("f")) for image in scans(kinds)]
    kept, host = (corpus(tmp_path / str(clipped), found, clipped) for clipped in (False, True))
    assert kept["dtype"].tolist() == host["dtype"].tolist() == [{"i": 1, "f": 2}[kind] for kind in (kinds * 6)[:6]]
    outside, mixed = 0, 0
    for patch in ((5, 6, 4), (12, 12, 12)):
        for mine, theirs in zip(batches(kept, patch), batches(host, patch), strict=True):
            low, high = (mine[name].view(-1, 1, 1, 1, 1) for name in ("low", "high"))
            outside += int(((mine["image"] < low) | (mine["image"] > high)).sum())
            mixed += bool((low == -np.inf).all())
            with torch.autocast("cpu", torch.bfloat16):
                mine = to_device(mine, "cpu")
            theirs = to_device(theirs, "cpu")
            assert mine.keys() == theirs.keys()
            for name, value in theirs.items():
                assert value.dtype == mine[name].dtype if torch.is_tensor(value) else True
                assert torch.equal(value, mine[name]) if torch.is_tensor(value) else value == mine[name], name
    assert mixed == (12 if kinds == "if" else 0)
    assert outside > 1000 or mixed, "nothing was there to clip"
    for row, one in enumerate(found):
        seen = whole(Reader(kept), row, "cpu")
        assert torch.equal(seen, whole(Reader(host), row, "cpu"))
        np.testing.assert_array_equal(seen, Reader(kept).normalised(row))
        np.testing.assert_allclose(seen, plain(one.image, one.seen), atol=1e-5)
    assert verify(kept.path) == []
    assert inspect(kept)["percentiles"] == inspect(host)["percentiles"]


def test_what_is_stored_is_the_file_and_its_bounds(tmp_path: Path) -> None:
    """In stored units, where they are others than the file's."""
    images = [np.array([[[-1000, -160, 240, 3000]]], np.int16), np.array([[[0, 500, 40000, 65535]]], np.uint16)]
    found = [normalise(image, parse_rule(WINDOW), Path("f")) for image in images]
    index = corpus(tmp_path / "out", [Normalised(one.image[None], one.said, one.seen) for one in found], False)
    assert index["dtype"].tolist() == [1, 1]
    assert Reader(index).image(0).tolist() == images[0][None].tolist()
    np.testing.assert_array_equal(index["offset"], [[0.4], [0.4 + 32768 / 400]])
    assert np.hstack([index["low"], index["high"]]).tolist() == [[-160, 240], [-160 - 32768, 240 - 32768]]
    np.testing.assert_allclose(Reader(index).normalised(1)[0, 0], [[0.4, 1, 1, 1]], atol=1e-5)
    at, size = int(index["json_at"][0]), int(index["json_bytes"][0])
    said = json.loads(index.shard_path(0).read_bytes()[at : at + size])
    assert (said["low"], said["high"], said["scale"]) == (-160, 240, 1 / 400)


def test_without_a_clip_nothing_is_done_but_scale_and_offset(tmp_path: Path) -> None:
    index = write(tmp_path / "out", numbered(6, kind="scaled"))
    assert (index["low"] == -np.inf).all()
    assert (index["high"] == np.inf).all()
    for batch in batches(index, (5, 6, 4)):
        scale, offset = (batch[name].view(-1, 1, 1, 1, 1) for name in ("scale", "offset"))
        expected = batch["image"].float() * scale + offset
        assert torch.equal(to_device(batch, "cpu")["image"], expected)


def flat(index: Index, *names: str) -> dict[str, np.ndarray]:
    return {name: index[name][:, 0].copy() for name in names}


def test_version_1_is_read_as_one_without_a_clip(tmp_path: Path) -> None:
    index = write(tmp_path / "out", numbered(6))
    expected = [to_device(batch, "cpu")["image"] for batch in batches(index, (5, 6, 4))]
    rewrite(index, low=None, high=None, **flat(index, "scale", "offset"))
    told(index, version=1)
    before = Index.open(index.path)
    assert (before["low"].tolist(), before["high"].tolist()) == ([[-np.inf]] * 6, [[np.inf]] * 6)
    for image, batch in zip(expected, batches(before, (5, 6, 4)), strict=True):
        assert torch.equal(image, to_device(batch, "cpu")["image"])
    assert verify(index.path) == []
    told(index, version=2)
    with pytest.raises(InputError, match="column low is missing or of another type"):
        Index.open(index.path)


def test_version_2_has_one_number_for_all_channels(tmp_path: Path) -> None:
    found = [normalise(image, parse_rule(PERCENTILE), Path("f")) for image in scans("if")]
    cases = [
        Case(f"case-{n}", np.tile(one.image, (2, 1, 1, 1)), None, (1.0,) * 3, seen=one.seen)
        for n, one in enumerate(found)
    ]
    index = write(tmp_path / "out", cases)
    expected = [Reader(index).normalised(row) for row in range(6)]
    rewrite(index, **flat(index, *Seen._fields))
    with pytest.raises(InputError, match="column scale does not fit the channels"):
        Index.open(index.path)
    told(index, version=2)
    before = Index.open(index.path)
    for row, image in enumerate(expected):
        np.testing.assert_array_equal(Reader(before).normalised(row), image)
        assert torch.equal(whole(Reader(before), row, "cpu"), torch.from_numpy(image))
    assert verify(index.path) == []


@pytest.mark.parametrize(("low", "high"), [(3, 2), (np.nan, 2), (np.inf, np.inf), (-np.inf, -np.inf)])
def test_bounds_that_cannot_be(tmp_path: Path, low: float, high: float) -> None:
    index = write(tmp_path / "out", numbered(2))
    rewrite(index, low=np.full((2, 1), low, np.float32), high=np.full((2, 1), high, np.float32))
    with pytest.raises(InputError, match="column low or high bounds nothing: damaged, shard again"):
        Index.open(index.path)
    assert ["bounds nothing" in line for line in verify(index.path)] == [True]
