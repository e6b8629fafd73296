"""Shards and their index: what is written can be read, by anyone, and damage is found."""

import gc
import json
import tarfile
import tracemalloc
import weakref

import numpy as np
import pytest
import webdataset
from corpora import numbered, patch, rehash, rewrite, write
from safetensors.numpy import load_file

from cclmpc_dist.data import index as index_file
from cclmpc_dist.data.case import Case
from cclmpc_dist.data.index import Index, select
from cclmpc_dist.data.reader import Reader, region
from cclmpc_dist.data.verify import inspect, verify
from cclmpc_dist.errors import InputError

KINDS = ("uint8", "scaled", "float32")


@pytest.fixture
def corpus(tmp_path):
    """Eight cases over several shards, two of them for validation, the last training case without a label."""
    cases = numbered(8)
    cases[5] = Case(cases[5].key, cases[5].image, None, cases[5].spacing)
    return write(tmp_path / "corpus", cases, labelled=2, val_last=2)


@pytest.mark.parametrize("compress", ["none", "zstd"])
@pytest.mark.parametrize("kind", KINDS)
def test_everything_comes_back(tmp_path, kind, compress):
    cases = numbered(5, channels=2, kind=kind)
    index = write(tmp_path / "out", cases, compress=compress)
    reader = Reader(Index.open(tmp_path / "out"))
    assert (len(index), index.channels, index.dims, index.classes) == (5, 2, 3, 3)
    assert {str(index_file.DTYPES[code]) for code in index["dtype"]} == {"float32" if kind == "float32" else "uint8"}
    for row, case in enumerate(cases):
        assert index.key(row) == case.key
        np.testing.assert_allclose(reader.normalised(row), case.image, rtol=0, atol=1e-6)
        np.testing.assert_array_equal(reader.label(row), case.label)
    assert verify(tmp_path / "out") == []


def test_two_builds_are_the_same_bytes(tmp_path):
    for compress in ("none", "zstd"):
        a, b = (write(tmp_path / f"{name}-{compress}", numbered(6), compress=compress) for name in "ab")
        files = sorted(path.name for path in a.path.iterdir())
        assert files == sorted(path.name for path in b.path.iterdir())
        assert len(files) > 3
        for name in files:
            assert (a.path / name).read_bytes() == (b.path / name).read_bytes(), name
        assert a.identity == b.identity


def test_shards_close_before_their_limit(tmp_path):
    index = write(tmp_path / "out", numbered(12), shard_bytes=12000)
    sizes = [shard["bytes"] for shard in index.manifest["shards"]]
    assert len(sizes) > 2
    assert all(size % 512 == 0 for size in sizes)
    assert all(shard["samples"] == (index["shard"] == n).sum() for n, shard in enumerate(index.manifest["shards"]))
    for number in range(len(sizes)):
        with tarfile.open(index.shard_path(number)) as tar:
            last = tar.getmembers()[-1]
        assert last.offset_data + last.size <= 12000


@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")  # webdataset leaves its files open
def test_plain_webdataset_reads_the_shards(corpus):
    urls = [str(corpus.shard_path(number)) for number in range(len(corpus.manifest["shards"]))]
    dataset = webdataset.WebDataset(urls, shardshuffle=False, nodesplitter=webdataset.single_node_only).decode()
    samples = list(dataset)
    gc.collect()
    assert [sample["__key__"] for sample in samples] == [corpus.key(row) for row in range(8)]
    for sample, case in zip(samples, numbered(8), strict=True):
        restored = sample["json"]["offset"] + sample["json"]["scale"] * sample["image.npy"]
        np.testing.assert_array_equal(restored, case.image)
        assert ("label.npy" in sample) == (case.key != "case-005")
        told = {name: sample["json"][name] for name in ("patient", "spacing", "cropped_by_label")}
        assert told == {"patient": case.key, "spacing": [1.0, 1.0, 1.0], "cropped_by_label": False}


def test_index_is_read_by_any_safetensors_reader_and_mapped_by_ours(corpus):
    arrays = load_file(corpus.path / index_file.INDEX)
    assert set(arrays) == set(corpus.columns)
    for name, values in arrays.items():
        np.testing.assert_array_equal(values, corpus[name])
        assert values.dtype == corpus[name].dtype
        assert not corpus[name].flags.owndata
        assert not corpus[name].flags.writeable


def test_foreground_voxels_lie_in_their_class(tmp_path):
    label = np.zeros((30, 20, 10), np.uint8)
    label[3:20, 2:15] = 1
    label[25, 5, 5] = 3
    empty = Case("empty", np.zeros((1, 4, 4, 4), np.float32), np.zeros((4, 4, 4), np.uint8), (1.0,) * 3)
    full = Case("full", np.zeros((1, *label.shape), np.float32), label, (1.0,) * 3)
    index = write(tmp_path / "out", [empty, full], classes=4)
    assert index.foreground(0) == []
    one, three = index.foreground(1)
    assert one.shape == (64, 3)
    assert len(np.unique(one, axis=0)) == 64
    assert (label[tuple(one.T)] == 1).all()
    assert set(one[:, 0]) == set(range(3, 20)), "they should reach over the whole object"
    np.testing.assert_array_equal(three, [[25, 5, 5]])


def test_select_by_default_by_number_and_by_name(corpus):
    def rows(*arguments):
        return {name: found.tolist() for name, found in select(corpus, *arguments).items()}

    assert rows(None) == {"labelled": [0, 1], "unlabelled": [2, 3, 4, 5], "select": [], "val": [6, 7]}
    assert rows(4, 1) == {"labelled": [0, 1, 2], "unlabelled": [4, 5], "select": [3], "val": [6, 7]}
    by_name = rows(["case-004", "case-002", "case-001"], 1)
    assert by_name == {"labelled": [2, 4], "unlabelled": [0, 3, 5], "select": [1], "val": [6, 7]}


@pytest.mark.parametrize(
    ("labelled", "held", "words"),
    [
        (0, 0, "no case is labelled"),
        (6, 0, "only 5 training cases"),
        (2, 2, "leaves none of 2"),
        (["case-0O1"], 0, "did you mean case-0"),
        (["case-006"], 0, "validation case"),
        (["case-005"], 0, "no label"),
        (["case-001", "case-001"], 0, "twice"),
    ],
)
def test_select_refuses(corpus, labelled, held, words):
    with pytest.raises(InputError, match=words):
        select(corpus, labelled, held)


def test_nothing_labelled_is_refused(tmp_path):
    index = write(tmp_path / "out", numbered(3, labels=False))
    with pytest.raises(InputError, match="no case is labelled"):
        select(index, None)


def test_find_returns_rows_in_the_order_asked_for(corpus):
    assert corpus.find(["case-007", "case-000", "case-003"]).tolist() == [7, 0, 3]


def test_a_region_matches_slicing_and_pads_around(corpus):
    image, label = Reader(corpus).volume(1)
    inside = region(image, (2, 1, 3), (4, 5, 3), 9)
    np.testing.assert_array_equal(inside, image[:, 2:6, 1:6, 3:6])
    assert np.shares_memory(inside, image)
    np.testing.assert_array_equal(region(label, (2, 1, 3), (4, 5, 3), 9), label[2:6, 1:6, 3:6])
    padded = region(image, (-2, 1, -1), (image.shape[1] + 5, 4, 3), 9)
    expected = np.full_like(padded, 9)
    expected[:, 2:-3, :, 1:] = image[:, :, 1:5, :2]
    np.testing.assert_array_equal(padded, expected)
    padded = region(label, (-2, 1, -1), (image.shape[1] + 5, 4, 3), 0)
    assert padded[:2].max() == 0
    np.testing.assert_array_equal(padded[2:-3, :, 1:], label[:, 1:5, :2])
    np.testing.assert_array_equal(region(label, (50, -20, 0), (3, 3, 3), 9), np.full((3, 3, 3), 9))


def test_padding_is_the_level_nearest_to_zero(tmp_path):
    case = numbered(1, kind="scaled")[0]
    index = write(tmp_path / "out", [case])
    (background,) = Reader(index).background(0)
    assert background in range(256)
    assert np.abs(index["offset"][0] + index["scale"][0] * background) <= 0.5 * index["scale"][0]


def test_a_bounded_number_of_shards_stays_mapped(corpus, monkeypatch):
    monkeypatch.setattr("cclmpc_dist.data.reader.MAPPED", 2)
    reader = Reader(corpus)
    images = [reader.image(row) for row in range(8)]
    assert len(reader._maps) == 2
    for row, case in enumerate(numbered(8)):
        np.testing.assert_array_equal(images[row], case.image)


def test_missing_shard(corpus):
    corpus.shard_path(1).unlink()
    with pytest.raises(InputError, match=r"shard-000001\.tar: missing"):
        Index.open(corpus.path)
    assert ["shard-000001.tar: missing" in line for line in verify(corpus.path)] == [True]


def test_shards_that_lack_are_told_together_up_to_a_number(tmp_path):
    index = write(tmp_path, numbered(12), shard_bytes=1)
    for number in range(1, 12):
        index.shard_path(number).unlink()
    with pytest.raises(InputError) as error:
        Index.open(tmp_path)
    *lines, last = str(error.value).splitlines()
    assert [line.partition(": missing")[0] for line in lines] == [str(index.shard_path(n)) for n in range(1, 9)]
    assert last == f"{tmp_path}: 3 more problems: `cclmpc verify {tmp_path}` tells them all"


def test_truncated_shard(corpus):
    path = corpus.shard_path(0)
    path.write_bytes(path.read_bytes()[:-2000])
    with pytest.raises(InputError, match=r"shard-000000\.tar.*truncated"):
        Index.open(corpus.path)
    assert ["truncated" in line for line in verify(corpus.path)] == [True]
    with pytest.raises(InputError, match=r"shard-000000\.tar.*truncated"):
        Reader(corpus).image(0)


def test_damaged_header_is_found_by_reader_and_verify(corpus):
    patch(corpus.shard_path(0), int(corpus["image_at"][0]), b"XXXX")
    with pytest.raises(InputError, match=r"shard-000000\.tar: case case-000: its image is damaged"):
        Reader(corpus).image(0)
    rehash(corpus, 0)
    assert any("case-000: its image cannot be read" in line for line in verify(corpus.path))


def test_damaged_zstd_member(tmp_path):
    index = write(tmp_path / "out", numbered(2), compress="zstd")
    patch(index.shard_path(0), int(index["label_at"][1]), b"XXXXXXXX")
    with pytest.raises(InputError, match=r"shard-000000\.tar: case case-001: its label cannot be decompressed"):
        Reader(index).label(1)
    rehash(index, 0)
    assert [line for line in verify(index.path) if "case-001: its label cannot be read" in line]


def test_a_zstd_member_that_holds_less_than_its_header_says(tmp_path):
    import zstandard

    index = write(tmp_path / "out", numbered(2), compress="zstd")
    at, size = int(index["image_at"][1]), int(index["image_bytes"][1])
    data = zstandard.decompress(index.shard_path(0).read_bytes()[at : at + size])
    short = zstandard.compress(data[:-1])
    patch(index.shard_path(0), at, short[:size])
    rewrite(index, image_bytes=np.array([index["image_bytes"][0], len(short)]))
    with pytest.raises(InputError, match=r"shard-000000\.tar: case case-001: its image is damaged"):
        Reader(Index.open(index.path)).image(1)


def test_a_zstd_member_is_decompressed_out_of_the_map(tmp_path):
    noise = np.random.default_rng(0).integers(256, size=(1, 64, 64, 64)).astype(np.float32)
    reader = Reader(write(tmp_path / "out", [Case("noise", noise, None, (1, 1, 1))], compress="zstd"))
    size, image = int(reader.index["image_bytes"][0]), reader.image(0)
    tracemalloc.start()
    try:
        reader.image(0)
        assert tracemalloc.get_traced_memory()[1] < image.nbytes + size / 2, "its bytes are not copied first"
    finally:
        tracemalloc.stop()
    (shard,) = reader._maps.values()
    reader.keep([])
    gone = weakref.ref(shard)
    del shard
    assert gone() is None, "no view keeps the map"


def test_wrong_shape_is_found(corpus):
    shape = corpus["shape"].copy()
    shape[2, 1] += 1
    rewrite(corpus, shape=shape)
    problems = verify(corpus.path)
    assert len(problems) == 2
    assert all("case-002" in line and "the index says" in line for line in problems)
    with pytest.raises(InputError, match="case-002: its image is damaged"):
        Reader(Index.open(corpus.path)).image(2)


@pytest.mark.parametrize(
    ("edit", "words"),
    [
        ({"classes": 5}, "classes = 5, written as 3: put 3 back"),
        ({"channels": 2}, "channels = 2, written as 1"),
        ({"dims": 2}, "dims = 2, written as 3"),
        ({"counts": {"samples": 8, "with_label": 8, "labelled": 2, "val": 2}}, '"with_label": 7'),
    ],
)
def test_manifest_that_the_index_contradicts(corpus, edit, words):
    (corpus.path / index_file.MANIFEST).write_text(json.dumps(corpus.manifest | edit))
    (problem,) = verify(corpus.path)
    assert words in problem
    assert "manifest.json" in problem
    with pytest.raises(InputError, match=r"put .* back, or shard again"):
        Index.open(corpus.path)


def test_manifest_that_miscounts_the_shards(corpus):
    shards = [dict(shard) for shard in corpus.manifest["shards"]]
    shards[1]["samples"] += 1
    (corpus.path / index_file.MANIFEST).write_text(json.dumps(corpus.manifest | {"shards": shards}))
    (problem,) = verify(corpus.path)
    assert f"shard-000001.tar: samples = {shards[1]['samples']}, written as" in problem
    (corpus.path / index_file.MANIFEST).write_text(json.dumps(corpus.manifest | {"shards": shards[:1]}))
    assert f"names 1 shards, the index {len(shards)}" in verify(corpus.path)[0]


@pytest.mark.parametrize("cropped", [True, False])
def test_manifest_that_hides_or_invents_the_crop_by_label(tmp_path, cropped):
    cases = [
        Case(case.key, case.image, case.label, case.spacing, {"cropped_by_label": cropped}) for case in numbered(2)
    ]
    index = write(tmp_path / "out", cases)
    assert verify(index.path) == []
    edited = index.manifest | {"cropped_by_label": not cropped}
    (index.path / index_file.MANIFEST).write_text(json.dumps(edited))
    (problem,) = verify(index.path)
    assert f"cropped_by_label = {json.dumps(not cropped)}, written as {json.dumps(cropped)}" in problem


@pytest.mark.parametrize("harm", [b"XXXX", b"\x93NUMPY\x01\x00\xff\xff", b"\x93NUMPY\x01\x00v\x00{'descr': (("])
def test_damage_is_told_in_one_line(corpus, harm):
    """numpy and tarfile have more to say."""
    patch(corpus.shard_path(0), int(corpus["image_at"][0]), harm)
    patch(corpus.shard_path(1), 0, b"X" * 512)
    rehash(corpus, 0)
    rehash(corpus, 1)
    assert verify(corpus.path) == [
        f"{corpus.shard_path(0)}: case case-000: its image cannot be read: copy the shard again",
        f"{corpus.shard_path(1)}: not a readable tar: copy it again or shard again",
    ]
    with pytest.raises(InputError) as error:
        inspect(corpus)
    assert str(error.value).endswith("case-000: its image is damaged: copy the shard again")


def test_index_of_another_corpus(corpus, tmp_path):
    other = write(tmp_path / "other", numbered(3))
    (corpus.path / index_file.INDEX).write_bytes((other.path / index_file.INDEX).read_bytes())
    with pytest.raises(InputError, match="another corpus"):
        Index.open(corpus.path)
    assert "another corpus" in verify(corpus.path)[0]


def test_index_that_is_none(corpus):
    (corpus.path / index_file.INDEX).write_bytes(b"no index")
    with pytest.raises(InputError, match="not an index"):
        Index.open(corpus.path, check=False)
    assert len(verify(corpus.path)) == 1


@pytest.mark.parametrize(
    ("text", "words"), [("{", "cannot be read"), ('{"version": 4}', "version 4"), ("[]", "version None")]
)
def test_manifest_that_cannot_be_used(corpus, text, words):
    (corpus.path / index_file.MANIFEST).write_text(text)
    with pytest.raises(InputError, match=words):
        Index.open(corpus.path)


def test_missing_index_and_missing_folder(corpus, tmp_path):
    (corpus.path / index_file.INDEX).unlink()
    with pytest.raises(InputError, match=r"index\.safetensors: missing"):
        Index.open(corpus.path)
    with pytest.raises(InputError, match="no corpus here"):
        Index.open(tmp_path / "nowhere")
    (tmp_path / "begun/parts").mkdir(parents=True)
    with pytest.raises(InputError, match="begun: not finished: give its `cclmpc shard` command again"):
        Index.open(tmp_path / "begun")


def test_inspect_tells_what_is_there(corpus):
    summary = inspect(corpus)
    json.dumps(summary)
    assert (summary["samples"], summary["with_label"], summary["labelled"], summary["val"]) == (8, 7, 2, 2)
    assert summary["size_min"] == [9, 8, 7]
    assert summary["size_max"] == [11, 10, 9]
    assert summary["spacing_unit"] == "mm"
    assert summary["stored_as"] == {"uint8": 8, "int16": 0, "float32": 0}
    assert summary["first_keys"][0] == "case-000"
    assert summary["percentiles"]["0"] == 0
    labels = np.concatenate([case.label.ravel() for n, case in enumerate(numbered(8)) if n != 5])
    expected = np.bincount(labels, minlength=3) / labels.size
    np.testing.assert_allclose(summary["class_fractions"], expected, atol=1e-6)


def test_the_same_image_in_both_splits_is_found(tmp_path):
    """Not empty ones, which are alike everywhere."""
    cases = numbered(4)
    cases[3].image, cases[3].label = cases[0].image, cases[0].label
    cases[1].image, cases[2].image = np.zeros_like(cases[1].image), np.zeros_like(cases[2].image)
    assert len(verify(write(tmp_path / "train", cases).path)) == 0
    (problem,) = verify(write(tmp_path / "both", cases, val_last=2).path)
    assert "case case-003: its image is that of case case-000 in the other split" in problem
