"""Batches: the same at any world size, any number of workers and after any restart; crops against a plain oracle."""

import gc
import os
import resource
import subprocess
import sys
import threading
from pathlib import Path

import numpy as np
import pytest
import torch
from corpora import numbered, write

from cclmpc_dist.data import draws
from cclmpc_dist.data.ahead import _Given
from cclmpc_dist.data.case import Case
from cclmpc_dist.data.index import Index, select
from cclmpc_dist.data.loader import AHEAD, Mixture, Stream, loader, to_device
from cclmpc_dist.data.order import rank_lanes
from cclmpc_dist.data.reader import MAPPED, Reader
from cclmpc_dist.errors import InputError

PATCH = (6, 4, 5)


@pytest.fixture(scope="module")
def corpus(tmp_path_factory):
    return write(tmp_path_factory.mktemp("data") / "corpus", numbered(14, channels=2, kind="scaled"))


def stream(index, rows=None, patch=PATCH, batch=4, seed=3, **options):
    rows = np.arange(len(index)) if rows is None else np.array(rows)
    part = Stream(index, "labelled", rows, batch, seed, patch, **({"with_label": True, "block": 2} | options))
    return Mixture([part])


def drawn(data, step, lane):
    """Index row and crop of one lane, where no sample is passed over."""
    (part,) = data.parts
    epoch, t = part.order.place(step)
    row, p = part.order.lane(epoch, t, lane)
    key = draws.key(part.seed, part.name, epoch, p)
    return row, part._crop(row, part._numbers([key])[0])


def same(a, b):
    assert a.keys() == b.keys()
    for name, value in a.items():
        assert torch.equal(value, b[name]) if torch.is_tensor(value) else value == b[name], name


def joined(parts):
    return {
        name: torch.cat([part[name] for part in parts]) if torch.is_tensor(value) else sum(part[name] for part in parts)
        for name, value in parts[0].items()
    }


def oracle(volume, crop, patch, fill):
    """Turn and flip the whole padded volume, then cut the patch out: by coordinates, a voxel at a time."""
    out = np.empty((*volume.shape[: volume.ndim - len(patch)], *patch), volume.dtype)
    for at in np.ndindex(*patch):
        place = [patch[axis] - 1 - x if axis in crop.flips else x for axis, x in enumerate(at)]
        x, y = place[:2]
        for quarter in range(crop.turns):  # rot90 of (n, m): out[x, y] = in[y, m - 1 - x]
            width = crop.size[1] if (crop.turns - quarter) % 2 else crop.size[0]
            x, y = y, width - 1 - x
        place[:2] = x, y
        place = [x + first for x, first in zip(place, crop.start, strict=True)]
        inside = all(0 <= x < n for x, n in zip(place, volume.shape[-len(patch) :], strict=True))
        out[(..., *at)] = volume[(..., *place)] if inside else fill
    return out


@pytest.mark.parametrize("patch", [PATCH, (12, 3, 9), (16, 16, 16)])
def test_crops_against_the_oracle(corpus, patch):
    data, reader = stream(corpus, patch=patch, flip=(0, 1, 2)), Reader(corpus)
    seen = set()
    for step in range(12):
        batch = data.batch(step, range(4))
        for lane in range(4):
            row, crop = drawn(data, step, lane)
            seen.add((crop.turns, crop.flips))
            image, label = reader.volume(row)
            np.testing.assert_array_equal(batch["image"][lane], oracle(image, crop, patch, reader.background(row)))
            np.testing.assert_array_equal(batch["label"][lane], oracle(label, crop, patch, 0))
    assert {turns for turns, _ in seen} == {0, 1, 2, 3}
    assert len({flips for _, flips in seen}) == 8


def test_a_turned_crop_is_the_crop_of_the_turned_volume(corpus):
    """numpy's own rot90 and flip of the whole volume, then a plain slice somewhere."""
    data, reader = stream(corpus), Reader(corpus)
    for step in range(8):
        row, crop = drawn(data, step, 0)
        whole = np.rot90(reader.image(row), crop.turns, (1, 2))
        whole = np.flip(whole, tuple(axis + 1 for axis in crop.flips))
        found = data.batch(step, [0])["image"][0].numpy()
        windows = np.lib.stride_tricks.sliding_window_view(whole, found.shape)
        assert (windows == found).all(axis=(-1, -2, -3, -4)).any()


def test_two_axes(tmp_path):
    index = write(tmp_path / "out", numbered(5, shape=(12, 9), channels=3))
    data, reader = stream(index, patch=(6, 8)), Reader(index)
    for step in range(6):
        batch = data.batch(step, range(4))
        assert batch["image"].shape == (4, 3, 6, 8)
        for lane in range(4):
            row, crop = drawn(data, step, lane)
            np.testing.assert_array_equal(batch["image"][lane], oracle(reader.image(row), crop, (6, 8), 0))


def test_memory_is_used_again_only_when_nothing_refers_to_it(corpus):
    data = stream(corpus)
    batches = [data.batch(step, range(4)) for step in range(6)]
    for step, batch in enumerate(batches):
        same(batch, stream(corpus).batch(step, range(4)))
    kept = batches[1]["image"][2, 0, 1:].flatten(0)[3:]
    values = kept.clone()
    del batch, batches
    blocks = sum(map(len, data._buffers._free.values()))
    assert blocks == 11, "all but the one that a view is left of"
    for step in range(20, 40):
        data.batch(step, range(4))
    assert torch.equal(kept, values)
    assert sum(map(len, data._buffers._free.values())) == blocks


def test_patch_of_another_number_of_axes_is_refused(corpus):
    with pytest.raises(InputError, match=r"data\.patch has 2 numbers"):
        stream(corpus, patch=(4, 4))


def test_crops_reach_every_place(corpus):
    data = stream(corpus, rows=[0], patch=(7, 7, 7), batch=1, rotate=False, flip=())
    starts = {drawn(data, step, 0)[1].start for step in range(200)}
    assert starts == {(x, y, 0) for x in range(3) for y in range(2)}


def test_a_small_volume_lies_in_the_middle(corpus):
    data = stream(corpus, rows=[0], patch=(12, 10, 7), batch=1, rotate=False)
    row, crop = drawn(data, 0, 0)
    assert corpus["shape"][row].tolist() == [2, 9, 8, 7]
    assert crop.start == (-1, -1, 0)


def test_foreground_oversampling(tmp_path):
    image = np.zeros((1, 20, 20, 20), np.float32)
    label = np.zeros((20, 20, 20), np.uint8)
    label[0, 10, 19] = 1
    label[10:12, 3, 3] = 2
    index = write(tmp_path / "out", [Case("a", image, label, (1.0,) * 3)])

    def share(oversample):
        data = stream(index, patch=(4, 3, 5), batch=1, oversample=oversample)
        found = [set(np.unique(data.batch(step, [0])["label"])) - {0} for step in range(120)]
        return [np.mean([c in classes for classes in found]) for c in (1, 2)]

    assert sum(share(1.0)) == 1
    assert min(share(1.0)) > 0.3, "each class alike, however small"
    assert 0.3 < sum(share(0.5)) < 0.7
    assert sum(share(0.0)) < 0.2


def test_a_stream_without_labels_may_not_use_them(corpus):
    data = stream(corpus, with_label=False)
    assert "label" not in data.batch(0, range(4))
    with pytest.raises(AssertionError):
        stream(corpus, with_label=False, oversample=0.1)


def test_keys_are_those_of_seed_stream_epoch_and_position(corpus):
    data = stream(corpus)
    epoch, t = 2, 1
    batch = data.batch(epoch * data.steps + t, [1, 3])
    expected = [draws.key(3, "labelled", epoch, lane * data.steps + t) for lane in (1, 3)]
    assert batch["key"].tolist() == expected
    assert batch["lane"].tolist() == [1, 3]
    assert batch["skipped"] == 0


@pytest.mark.parametrize("world", [2, 4])
def test_the_global_batch_is_the_same_at_any_world_size(corpus, world):
    one = list(loader(stream(corpus), 0, 9, workers=0))
    ranks = [list(loader(stream(corpus), 0, 9, rank, world, workers=0)) for rank in range(world)]
    for step, whole in enumerate(one):
        same(joined([rank[step] for rank in ranks]), whole)


def test_a_restart_at_another_world_size_goes_on(corpus):
    whole = list(loader(stream(corpus), 0, 12, workers=0))
    first = stream(corpus)
    done = [joined([first.batch(step, rank_lanes(4, rank, 2)) for rank in range(2)]) for step in range(5)]
    state = first.parts[0].order.state(5)
    second = stream(Index.open(corpus.path))
    start = second.parts[0].order.position(state)
    ranks = [list(loader(second, start, 7, rank, 4, workers=0)) for rank in range(4)]
    rest = [joined(parts) for parts in zip(*ranks, strict=True)]
    for found, expected in zip(done + rest, whole, strict=True):
        same(found, expected)


@pytest.mark.parametrize("workers", [1, 3])
def test_workers_give_the_same_batches(corpus, workers):
    before = torch.get_rng_state()
    found = list(loader(stream(corpus), 2, 40, 1, 2, workers=workers))
    assert torch.equal(torch.get_rng_state(), before), "dropout's generator belongs to the model"
    expected = list(loader(stream(corpus), 2, 40, 1, 2, workers=0))
    assert len(found) == 40
    for a, b in zip(found, expected, strict=True):
        same(a, b)


def test_workers_hold_few_batches(corpus):
    data = stream(corpus)
    assert sum(1 for _ in loader(data, 0, 100, workers=2)) == 100
    for blocks in data._buffers._free.values():
        assert len(blocks) <= 2 + AHEAD * 2, "beside those read ahead, the last one given and the next"


@pytest.fixture
def few_files(tmp_path, monkeypatch):
    """A corpus of a case a shard, and a soft limit that leaves room for half of its shards."""
    index = write(tmp_path / "out", numbered(30), shard_bytes=1)
    before = resource.getrlimit(resource.RLIMIT_NOFILE)
    gc.collect()
    free = sorted(set(range(1000)) - set(map(int, os.listdir("/proc/self/fd"))))
    resource.setrlimit(resource.RLIMIT_NOFILE, (free[15], before[1]))
    monkeypatch.setattr("cclmpc_dist.data.ahead._given", _Given())
    yield index
    resource.setrlimit(resource.RLIMIT_NOFILE, before)


def test_a_loader_raises_the_limit_of_open_files(few_files):
    assert sum(1 for _ in loader(stream(few_files), 0, 60, workers=3)) == 60


def test_loaders_raise_the_limit_once_for_those_that_live_at_a_time(few_files):
    def limit():
        return resource.getrlimit(resource.RLIMIT_NOFILE)[0]

    before = limit()
    for _ in range(3):
        next(loader(stream(few_files), 0, 60, workers=0))
    assert limit() == before + MAPPED
    two = [loader(stream(few_files), 0, 60, workers=0) for _ in range(2)]
    assert len([next(one) for one in two]) == 2
    assert limit() == before + 2 * MAPPED


def test_a_limit_of_open_files_is_told_as_what_it_is(few_files):
    data = stream(few_files, on_error="skip")
    with pytest.raises(InputError, match=r"^[^:]*: this process may open no more files: raise the limit [^:]*$"):
        [data.batch(step, range(4)) for step in range(60)]


def test_threads_take_the_current_gpu_of_who_starts_them(corpus, monkeypatch):
    """What CUDA would be told on a machine with two."""
    told = []
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 1)
    monkeypatch.setattr(torch.cuda, "set_device", lambda device: told.append((device, threading.get_ident())))
    monkeypatch.setattr(torch.Tensor, "pin_memory", lambda tensor: pinned.append(threading.get_ident()) or tensor)
    pinned = []
    assert len(list(loader(stream(corpus), 0, 6, workers=2))) == 6
    assert {device for device, _ in told} == {1}
    assert set(pinned) <= {thread for _, thread in told} - {threading.get_ident()}


def test_threads_end_with_the_loader(corpus):
    before = threading.active_count()
    batches = loader(stream(corpus), 0, 10**6, workers=2)
    next(batches)
    assert threading.active_count() > before
    batches.close()
    assert threading.active_count() == before


FAILED = """
import sys
import numpy as np
from cclmpc_dist.data.index import Index
from cclmpc_dist.data.loader import Mixture, Stream, loader

stream = Stream(Index.open(sys.argv[1]), "u", np.arange(4), 2, 1, (4, 4, 4))
batches = loader(Mixture([stream]), 0, 10**6, workers=2)
next(batches)
raise ValueError
"""


def test_an_error_in_the_process_ends_it(corpus, tmp_path):
    (tmp_path / "failed.py").write_text(FAILED)
    command = [sys.executable, tmp_path / "failed.py", corpus.path]
    environment = os.environ | {"PYTHONPATH": str(Path(__file__).parents[1])}
    ended = subprocess.run(command, capture_output=True, text=True, env=environment, timeout=60, check=False)
    assert ended.stderr.endswith("\nValueError\n"), ended.stderr


def damaged(tmp_path, rows, count=6):
    index = write(tmp_path / "out", numbered(count))
    for row in rows:
        with open(index.shard_path(int(index["shard"][row])), "r+b") as file:
            file.seek(int(index["image_at"][row]))
            file.write(b"XXXX")
    return index


@pytest.mark.parametrize("workers", [0, 1])
def test_a_damaged_sample_ends_the_run_in_one_line(tmp_path, workers):
    index = damaged(tmp_path, [2])
    with pytest.raises(InputError) as error:
        list(loader(stream(index), 0, 10, workers=workers))
    assert str(error.value).startswith(
        f"{index.shard_path(int(index['shard'][2]))}: case case-002: its image is damaged"
    )
    assert str(error.value).endswith("copy the shard again, or set data.on_error=skip")
    assert "\n" not in str(error.value)
    assert "Traceback" not in str(error.value)


def test_a_damaged_sample_is_passed_over(tmp_path):
    index = damaged(tmp_path, [2])
    data, whole = stream(index, batch=2, on_error="skip"), stream(index, batch=2)
    passed = 0
    for step in range(2 * data.steps):
        batch = data.batch(step, range(2))
        rows = [drawn(whole, step, lane)[0] for lane in range(2)]
        epoch, t = data.parts[0].order.place(step)
        passed += batch["skipped"]
        assert batch["skipped"] == rows.count(2)
        for lane, row in enumerate(rows):
            u = data.parts[0]._numbers([int(batch["key"][lane])])[0]
            taken = row if row != 2 else data.parts[0].order.lane(epoch, (t + 1) % data.steps, lane)[0]
            crop = data.parts[0]._crop(taken, u)
            expected = oracle(Reader(index).image(taken), crop, PATCH, 0)
            np.testing.assert_array_equal(batch["image"][lane], expected)
    assert passed == 2


def test_a_lane_with_nothing_readable(tmp_path):
    index = damaged(tmp_path, range(4), count=4)
    with pytest.raises(InputError, match=r"no readable sample is left in lane 0 of the labelled stream.*case-00"):
        stream(index, batch=2, on_error="skip").batch(0, range(2))


def test_to_device_gives_normalised_float32_and_int64(corpus):
    data, reader = stream(corpus), Reader(corpus)
    batch = to_device(data.batch(0, range(4)), "cpu")
    assert (batch["image"].dtype, batch["label"].dtype) == (torch.float32, torch.int64)
    assert "scale" not in batch
    for lane in range(4):
        row, crop = drawn(data, 0, lane)
        expected = oracle(reader.normalised(row), crop, PATCH, 0)
        np.testing.assert_array_equal(batch["image"][lane], expected)


def test_stored_types_may_mix(tmp_path):
    cases = numbered(2, kind="scaled") + [
        Case(f"x-{case.key}", case.image, case.label, case.spacing) for case in numbered(2, kind="float32")
    ]
    index = write(tmp_path / "out", cases)
    assert sorted(index["dtype"]) == [0, 0, 2, 2]
    data, reader = stream(index), Reader(index)
    batch = data.batch(0, range(4))
    assert batch["image"].dtype == torch.float32
    assert batch["scale"].tolist() == [[1]] * 4
    for lane, values in enumerate(to_device(batch, "cpu")["image"]):
        row, crop = drawn(data, 0, lane)
        np.testing.assert_array_equal(values, oracle(reader.normalised(row), crop, PATCH, 0))


def test_compressed_shards_give_the_same_batches(tmp_path):
    plain, packed = (write(tmp_path / name, numbered(6), compress=name) for name in ("none", "zstd"))
    for step in range(4):
        same(stream(plain).batch(step, range(4)), stream(packed).batch(step, range(4)))


def test_streams_of_a_selection_do_not_meet(corpus):
    rows = select(corpus, 4, 1)
    labelled, unlabelled = stream(corpus, rows["labelled"]), stream(corpus, rows["unlabelled"], with_label=False)
    lanes = [(step, lane) for step in range(12) for lane in range(4)]
    rows = [{drawn(data, *place)[0] for place in lanes} for data in (labelled, unlabelled)]
    assert rows == [{0, 1, 2}, set(range(4, 14))]
