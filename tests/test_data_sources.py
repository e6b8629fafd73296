"""Corpora on disk: what they yield, and one line for each thing that can be wrong with them."""

from pathlib import Path

import numpy as np
import pytest
from corpora import numbered, write, write_h5

from cclmpc_dist.data import encode, phantom
from cclmpc_dist.data.case import Case
from cclmpc_dist.data.formats.h5 import la_h5
from cclmpc_dist.data.reader import Reader
from cclmpc_dist.errors import InputError

LA = Path(__file__).parents[1].parent / "shared/la"
IMAGE = np.arange(24, dtype=np.float32).reshape(2, 3, 4)
LABEL = (IMAGE > 20).astype(np.uint8)


@pytest.fixture
def folder(tmp_path):
    for key in ("b", "a"):
        write_h5(tmp_path / "la", key, image=IMAGE, label=LABEL)
    return tmp_path / "la"


def one_line(error, *words):
    message = str(error.value)
    assert "\n" not in message
    for word in words:
        assert word in message


def test_la_yields_image_label_and_spacing(folder):
    cases = [file.read() for file in la_h5(folder)]
    assert [case.key for case in cases] == ["a", "b"]
    np.testing.assert_array_equal(cases[0].image, IMAGE[None])
    np.testing.assert_array_equal(cases[0].label, LABEL)
    assert cases[0].spacing == (0.625, 0.625, 0.625)
    assert cases[0].meta["cropped_by_label"] is True


def test_la_follows_the_list(folder, tmp_path):
    (tmp_path / "list").write_text("b\n\na\n")
    assert [case.key for case in la_h5(folder, tmp_path / "list")] == ["b", "a"]


def test_la_without_label_is_unlabelled(tmp_path):
    write_h5(tmp_path, "a", image=IMAGE)
    assert la_h5(tmp_path)[0].read().label is None


def test_missing_folder(tmp_path):
    with pytest.raises(InputError) as error:
        la_h5(tmp_path / "nowhere")
    one_line(error, "nowhere", "no such folder")


@pytest.mark.parametrize("text", ["", "\n \n"])
def test_empty_list(folder, tmp_path, text):
    (tmp_path / "list").write_text(text)
    with pytest.raises(InputError) as error:
        la_h5(folder, tmp_path / "list")
    one_line(error, "list", "no cases")


def test_missing_list_and_empty_folder(folder, tmp_path):
    with pytest.raises(InputError, match="cannot read the list"):
        la_h5(folder, tmp_path / "no.list")
    (tmp_path / "empty").mkdir()
    with pytest.raises(InputError, match="no cases"):
        la_h5(tmp_path / "empty")


def test_listed_case_absent(folder, tmp_path):
    (tmp_path / "list").write_text("a\nzebra\nyak\n")
    with pytest.raises(InputError) as error:
        la_h5(folder, tmp_path / "list")
    one_line(error, "zebra", "1 more", "list")


@pytest.mark.parametrize(
    ("arrays", "words"),
    [
        ({"label": LABEL}, ["no `image`", "label"]),
        ({"image": IMAGE, "label": LABEL[:1]}, ["(1, 3, 4)", "(2, 3, 4)"]),
        ({"image": IMAGE[0]}, ["(3, 4)", "three axes"]),
    ],
)
def test_unfit_file(tmp_path, arrays, words):
    write_h5(tmp_path, "sick", **arrays)
    with pytest.raises(InputError) as error:
        la_h5(tmp_path)[0].read()
    one_line(error, "sick", *words)


def test_unreadable_file(folder):
    (folder / "a/mri_norm2.h5").write_bytes(b"not HDF5 at all")
    with pytest.raises(InputError) as error:
        la_h5(folder)[0].read()
    one_line(error, "a/mri_norm2.h5", "HDF5")


def test_truncated_file(folder):
    path = folder / "a/mri_norm2.h5"
    path.write_bytes(path.read_bytes()[:-500])
    with pytest.raises(InputError) as error:
        la_h5(folder)[0].read()
    one_line(error, "a/mri_norm2.h5")


BAD = {
    "NaN": (IMAGE * np.nan, LABEL, {}),
    "infinity": (np.full_like(IMAGE, np.inf), LABEL, {}),
    "label 2 is not in 0..1": (IMAGE, LABEL * 2, {"classes": 2}),
    "label -1": (IMAGE, -LABEL.astype(np.int16), {}),
    "label 300": (IMAGE, LABEL.astype(np.int16) * 300, {}),
    "the label has shape": (IMAGE, LABEL[..., 1:], {}),
}


@pytest.mark.parametrize("words", BAD)
def test_what_no_run_could_use_is_refused(tmp_path, words):
    image, label, options = BAD[words]
    with pytest.raises(InputError) as error:
        write(tmp_path / "out", [Case("sick", image[None], label, (1.0, 1.0, 1.0))], **options)
    one_line(error, "sick", words)


def test_corpus_wide_problems(tmp_path):
    cases = numbered(3)
    flat = Case("flat", cases[0].image[:, 0], None, (1.0, 1.0))
    for number, (bad, options, words) in enumerate([
        ([], {}, "no cases"),
        ([cases[0], cases[0]], {}, "comes twice"),
        ([cases[0], flat], {}, "make them alike"),
        ([Case("a.b", cases[0].image, None, (1.0,) * 3)], {}, "no dots"),
        (cases, {"val_last": 3}, "--val-last 3"),
    ]):  # fmt: skip
        with pytest.raises(InputError, match=words):
            write(tmp_path / str(number), bad, **options)
    assert not list(tmp_path.iterdir())


def test_output_folder_must_be_empty(tmp_path):
    (tmp_path / "note").write_text("mine")
    with pytest.raises(InputError) as error:
        write(tmp_path, numbered(1))
    one_line(error, str(tmp_path), "not empty")
    assert (tmp_path / "note").read_text() == "mine"


def test_a_build_that_failed_before_its_first_full_shard_leaves_nothing(tmp_path):
    """Nor folders that were made; one that was there stays."""
    bad = Case("sick", np.full((1, 2, 2, 2), np.nan, np.float32), None, (1.0,) * 3)
    (tmp_path / "mine").mkdir()
    for out in ("new/below/out", "mine", "mine/out"):
        with pytest.raises(InputError):
            write(tmp_path / out, [*numbered(5), bad], shard_bytes=1 << 20)
    assert list(tmp_path.rglob("*")) == [tmp_path / "mine"]
    assert len(write(tmp_path / "mine", numbered(5)).manifest["shards"]) > 1


def test_phantom_is_a_function_of_seed_and_number():
    again = [handle.read() for handle in phantom.cases(3, seed=5, size=32)]
    for number, case in enumerate(again):
        np.testing.assert_array_equal(case.image, phantom.case(number, 5, 32).image)
        np.testing.assert_array_equal(case.label, phantom.case(number, 5, 32).label)
    assert not np.array_equal(phantom.case(0, 6, 32).label, again[0].label)


def test_phantom_is_worth_segmenting():
    for case in (handle.read() for handle in phantom.cases(6, size=48)):
        image, inside = case.image[0], case.label > 0
        assert all(42 <= n <= 54 for n in image.shape)
        assert 0.01 < inside.mean() < 0.3
        assert abs(image.mean()) < 1e-3
        assert abs(image.std() - 1) < 1e-3
        thresholds = np.linspace(-1, 4, 26)
        dice = [2 * (inside & (image > t)).sum() / (inside.sum() + (image > t).sum()) for t in thresholds]
        assert 0.1 < max(dice) < 0.85, "brightness alone should help and not be enough"


@pytest.mark.parametrize("number", range(3))
def test_phantom_is_stored_without_loss(number):
    case = phantom.case(number, size=32)
    stored, scale, offset = encode.quantise(case.image)
    assert stored.dtype == np.uint8
    assert np.abs(offset + scale * stored - case.image).max() < encode.TOLERANCE * scale


@pytest.mark.parametrize(
    ("image", "dtype", "scale"),
    [
        (np.array([0, 7, 255], np.float32), "uint8", 1),
        (np.array([-1024, 0, 3071], np.float32), "int16", 1),
        (np.array([5, 5], np.int32), "uint8", 1),
        (np.array([0.5, 1.0, 2.0], np.float32), "uint8", 0.5),
        (np.array([0.25, 0.75, 1.5], np.float32), "uint8", 0.25),  # the smallest gap is two steps
        (np.arange(1000, dtype=np.float64) * 0.1 - 3, "int16", 0.1),
        (np.array([0.1], np.float32), "uint8", 1),
        (np.array([0, 1, np.pi], np.float32), "float32", 1),
        (np.array([0, 1, 70000], np.int32), "float32", 1),
        (np.random.default_rng(0).standard_normal(70000).astype(np.float32), "float32", 1),
    ],
)
def test_quantise_keeps_every_value(image, dtype, scale):
    stored, found, offset = encode.quantise(image)
    assert stored.dtype == dtype
    assert found == pytest.approx(scale)
    assert np.abs(offset + found * stored.astype(np.float64) - image).max() <= encode.TOLERANCE * found


@pytest.mark.skipif(not LA.is_dir(), reason="needs the LA volumes in ../shared/la")
def test_la_is_stored_without_loss(tmp_path):
    cases = [file.read() for file in la_h5(LA / "volumes", LA / "train.list")[:4]]
    index = write(tmp_path / "out", cases, labelled=2)
    reader = Reader(index)
    assert (index["dtype"] == 0).all()
    for row, case in enumerate(cases):
        assert np.abs(reader.normalised(row) - case.image).max() < 1e-4 * index["scale"][row]
        np.testing.assert_array_equal(reader.label(row), case.label)
