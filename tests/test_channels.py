"""Channels of different statistics are stored as they are, and normalised on the device, each by its own numbers."""

from pathlib import Path
from typing import Any

import inputs
import numpy as np
import pytest
import torch
from corpora import numbered, rewrite, write
from test_data_loader import PATCH, drawn, joined, oracle, same, stream
from test_normalise import plain

from cclmpc_dist.data import shards, sources
from cclmpc_dist.data.encode import encode
from cclmpc_dist.data.formats.normalise import parse_rule
from cclmpc_dist.data.formats.options import AXIS, Options
from cclmpc_dist.data.index import Index
from cclmpc_dist.data.loader import Mixture, Stream, to_device
from cclmpc_dist.data.merge import merge
from cclmpc_dist.data.parts import Settings
from cclmpc_dist.data.reader import Reader
from cclmpc_dist.data.seen import Seen
from cclmpc_dist.data.verify import verify
from cclmpc_dist.errors import InputError
from cclmpc_dist.evaluation.cases import whole

EPS = np.finfo(np.float32).eps


def corpus(name: str, folder: Path, out: Path, **options: Any) -> Index:
    return shards.write(sources.cases(name, folder, None, Options(**options)), out, source=name, shard_bytes=20_000)


def normalised(channel: np.ndarray, rule: str) -> np.ndarray:
    """Of a channel's own values, in float64."""
    values = channel.astype(np.float64)
    if rule.startswith("percentile"):
        ordered = np.sort(values.ravel())
        low, high = (ordered[round(share * (values.size - 1))] for share in (0.05, 0.95))
        values = np.where(values < low, low, np.where(values > high, high, values))
    return (values - values.mean()) / np.sqrt(((values - values.mean()) ** 2).mean())


def assert_rounded(found: torch.Tensor, expected: np.ndarray, index: Index, row: int) -> None:
    """Within float32's rounding of the two numbers, the product and the sum."""
    seen = [numbers.reshape(-1, *(1,) * (expected.ndim - 1)) for numbers in index.seen(row)]
    size = np.abs(seen[0] * Reader(index).image(row).astype(float)) + np.abs(seen[1])
    assert (np.abs(found.numpy() - expected) <= 3 * EPS * size).all()


@pytest.mark.parametrize("rule", ["zscore", "percentile:5,95"])
@pytest.mark.parametrize("form", ["axis", "files", "steps"])
def test_channels_of_a_nifti_are_stored_as_they_are(tmp_path: Path, form: str, rule: str) -> None:
    """On a fourth axis, or a file each; `steps`: in fractions, of which each file has its own."""
    options: dict[str, Any] = {"normalise": parse_rule(rule), "channels": (AXIS,) if form == "axis" else ("_0", "_1")}
    images = []
    for number in range(3):
        pair = [inputs.volume(number), np.random.default_rng(number).integers(40, 90, inputs.SHAPE).astype(np.int16)]
        pair = [0.25 * pair[0], np.sqrt(2) * pair[1] + 0.1] if form == "steps" else pair
        images.append(np.stack(pair))
        if form == "axis":
            inputs.nifti(tmp_path / f"in/c{number}.nii", np.stack(pair, axis=-1))
        for channel, values in enumerate(pair) if form != "axis" else ():
            inputs.nifti(tmp_path / f"in/c{number}_{channel}.nii", values)
    index = corpus("nifti", tmp_path / "in", tmp_path / "out", **options)
    assert index["dtype"].tolist() == [1, 1, 1]
    assert index["scale"].shape == index["low"].shape == (3, 2)
    for row, image in enumerate(images):
        found = whole(Reader(index), row, "cpu")
        assert_rounded(found, np.stack([normalised(channel, rule) for channel in image]), index, row)
        np.testing.assert_array_equal(found, Reader(index).normalised(row))
    assert verify(index.path) == []


def test_photographs_stay_bytes_with_one_number_for_their_colours(tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    photos = [rng.integers(0, (250, 120, 30), (12, 10, 3)).astype(np.uint8) for _ in range(3)]
    for number, photo in enumerate(photos):
        inputs.picture(tmp_path / f"in/p{number}.png", photo)
    index = corpus("images", tmp_path / "in", tmp_path / "out")
    assert index["dtype"].tolist() == [0, 0, 0]
    assert index["scale"].shape == (3, 1)
    for row, photo in enumerate(photos):
        expected = normalised(photo.transpose(2, 0, 1), "zscore")
        assert_rounded(whole(Reader(index), row, "cpu"), expected, index, row)


def test_whole_numbers_keep_their_type_where_a_channel_has_no_fractions(tmp_path: Path) -> None:
    case = numbered(1, channels=2)[0]
    noise = np.random.default_rng(0).standard_normal(case.image.shape[1:]).astype(np.float32)
    case.image = np.stack([case.image[0], noise])
    assert encode(case, None, "none").dtype == 2, "one type a sample"
    index = write(tmp_path / "out", [case])
    np.testing.assert_array_equal(Reader(index).normalised(0), case.image)


@pytest.fixture(scope="module")
def unlike(tmp_path_factory: pytest.TempPathFactory) -> Index:
    return write(tmp_path_factory.mktemp("channels") / "out", numbered(8, channels=2, kind="unlike"))


@pytest.mark.parametrize("patch", [PATCH, (12, 3, 9), (16, 16, 16)])
def test_crops_and_what_is_beyond_the_image(unlike: Index, patch: tuple[int, ...]) -> None:
    """Outside is what is nearest to 0 in each channel."""
    data, reader = stream(unlike, patch=patch), Reader(unlike)
    for step in range(8):
        batch = data.batch(step, range(4))
        assert batch["scale"].shape == batch["low"].shape == (4, 2)
        found = to_device(dict(batch), "cpu")["image"]
        for lane in range(4):
            row, crop = drawn(data, step, lane)
            seen, image = unlike.seen(row), reader.image(row)
            levels = plain(np.tile(np.arange(256.0), (2, 1)), seen._replace(low=[-np.inf], high=[np.inf]))
            fill = np.abs(levels).argmin(axis=1)
            assert len(set(fill)) == 2
            np.testing.assert_array_equal(batch["image"][lane], oracle(image, crop, patch, fill))
            expected = plain(oracle(image, crop, patch, fill), seen)
            np.testing.assert_allclose(found[lane], expected, rtol=1e-5, atol=1e-5)


def test_corpora_of_several_types_and_channels_seen_alike_or_not_mix(tmp_path: Path, unlike: Index) -> None:
    indexes = [unlike, *(write(tmp_path / kind, numbered(4, channels=2, kind=kind)) for kind in ("scaled", "float32"))]
    parts = [Stream(index, f"u{k}", np.arange(4), 2, 3, (12, 9, 5)) for k, index in enumerate(indexes)]
    for chosen, dtype in ((parts[:2], torch.uint8), (parts, torch.float32)):
        for step in range(4):
            batch = Mixture(chosen).batch(step, range(2 * len(chosen)))
            assert batch["image"].dtype == dtype
            alone = joined([to_device(Mixture([part]).batch(step, range(2)), "cpu") for part in chosen])
            same(to_device(batch, "cpu"), alone | {"lane": torch.arange(2 * len(chosen))})


def test_parts_of_which_one_has_unlike_channels_are_merged_to_the_same(tmp_path: Path) -> None:
    cases = numbered(4, channels=2) + numbered(9, channels=2, kind="unlike")[4:]
    for number in (1, 2, 3):
        shards.write_part(cases, tmp_path / "parts", Settings("test", shard_bytes=12000, parts=3), number)
    many, one = merge(tmp_path / "parts"), write(tmp_path / "one", cases)
    for name in Seen._fields:
        np.testing.assert_array_equal(many[name], one[name])
    assert (one["scale"][:4] == 1).all()
    assert verify(many.path) == verify(one.path) == []
    widths = [index["scale"].shape[1] for index in (one, write(tmp_path / "like", cases[:4]))]
    assert widths == [2, 1], "8 bytes a number, and as few numbers as do"


def test_json_says_a_number_or_one_a_channel(tmp_path: Path, unlike: Index) -> None:
    said = Reader(unlike).meta(1)
    assert (said["scale"], said["offset"]) == ([0.01, 0.02], [-0.75, -3])
    assert (said["low"], said["high"]) == ([0, 20], 190)
    alike = Reader(write(tmp_path / "out", numbered(1, channels=2))).meta(0)
    assert [alike[name] for name in Seen._fields] == [1, 0, None, None]
    index = write(tmp_path / "unlike", numbered(2, channels=2, kind="unlike"))
    offset = index["offset"].copy()
    offset[1, 1] = 7
    rewrite(index, offset=offset)
    (line,) = verify(index.path)
    assert line.endswith("case case-001: its JSON says offset = [-0.75, -3.0], the index [-0.75, 7.0]: shard again")


def test_columns_of_other_channels_than_the_images(tmp_path: Path) -> None:
    index = write(tmp_path / "out", numbered(2, channels=2, kind="unlike"))
    rewrite(index, **{name: np.hstack([index[name], index[name]]) for name in Seen._fields})
    with pytest.raises(InputError, match="column scale does not fit the channels"):
        Index.open(index.path)
    assert ["does not fit" in line for line in verify(index.path)] == [True]
