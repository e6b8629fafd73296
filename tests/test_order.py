"""The order is a pure function of (samples, seed, G, step): exact, complete, resumable at any world size."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from cclmpc_dist.data import draws
from cclmpc_dist.data.order import Order, permutation, rank_lanes, ranked
from cclmpc_dist.errors import InputError


def make(counts, batch, seed=1, block=3, stream="u", skip=2):
    """An order over shards of `counts` samples; the index rows are every `skip`th one."""
    shards = np.repeat(np.arange(len(counts)), counts)
    return Order(np.arange(len(shards)) * skip, shards, batch, seed, stream, block, "corpus")


def epoch_rows(order, epoch):
    steps = range(epoch * order.steps, (epoch + 1) * order.steps)
    return np.stack([order.batch(step, range(order.batch_size))[0] for step in steps])


@settings(max_examples=60, deadline=None)
@given(
    counts=st.lists(st.integers(1, 7), min_size=1, max_size=12),
    batch=st.integers(1, 13),
    seed=st.integers(0, 2**31),
    block=st.integers(1, 5),
    epoch=st.integers(0, 3),
)
def test_every_sample_comes_evenly(counts, batch, seed, block, epoch):
    order = make(counts, batch, seed, block)
    n = sum(counts)
    rows, times = np.unique(epoch_rows(order, epoch), return_counts=True)
    np.testing.assert_array_equal(rows, np.arange(n) * 2)
    slots = order.batch_size * order.steps
    assert set(times) <= {slots // n, -(-slots // n)}
    assert times.sum() - n == order.repeats
    if n % batch == 0:
        assert (times == 1).all()


@settings(max_examples=40, deadline=None)
@given(
    counts=st.lists(st.integers(1, 7), min_size=1, max_size=12), batch=st.integers(1, 13), block=st.integers(1, 5),
    start=st.integers(0, 60), data=st.data(),
)  # fmt: skip
def test_a_stay_is_what_the_lane_reads_of_one_block(counts, batch, block, start, data):
    order, lane = make(counts, batch, block=block), data.draw(st.integers(0, batch - 1))
    rows, end = order.stay(start, lane)
    assert rows.tolist() == [order.batch(step, [lane])[0][0] for step in range(start, end)]
    shards = np.repeat(np.arange(len(counts)), counts)[rows // 2]
    assert len(set(shards)) <= block
    assert order.place(start)[0] == order.place(end - 1)[0]


def test_permutation_against_its_definition():
    """Shards shuffled, blocks of them, samples shuffled in their block: by a plain loop."""
    counts, block = [3, 1, 4, 2, 5], 2
    order = make(counts, 1, seed=9, block=block, stream="s", skip=1)
    starts = np.cumsum([0, *counts])
    expected = []
    shards = permutation(5, 9, "s", "shards", 4)
    for number in range(3):
        members = [r for s in shards[number * block : (number + 1) * block] for r in range(starts[s], starts[s + 1])]
        expected += [members[i] for i in permutation(len(members), 9, "s", "block", 4, number)]
    assert [order.lane(4, t, 0)[0] for t in range(15)] == expected


def test_permutation_is_pinned():
    """The order of a seed may never change: runs resume by it."""
    assert permutation(8, 1337, "labelled", "shards", 0).tolist() == PINNED


PINNED = [6, 0, 3, 7, 5, 4, 1, 2]


@pytest.mark.parametrize("alike", [0, 20, 40, 63])
@pytest.mark.parametrize("n", [0, 1, 2, 255, 256, 5000])
def test_words_are_ranked_as_a_stable_sort_does(n, alike):
    """Also where their upper bits are all that differ, or next to nothing."""
    words = draws.philox(n, alike).random_raw(n) >> np.uint64(alike) << np.uint64(alike)
    np.testing.assert_array_equal(ranked(words), np.argsort(words, kind="stable"))


@pytest.mark.parametrize("group", [1, 2])
@pytest.mark.parametrize("world", [1, 2, 4])
def test_global_batch_is_the_same_at_any_world_size(world, group):
    one, many = make([4] * 10, 8), make([4] * 10, 8)
    for step in range(17):
        parts = [many.batch(step, rank_lanes(8, rank, world, group)) for rank in range(world)]
        rows, p = one.batch(step, range(8))
        np.testing.assert_array_equal(np.concatenate([part[0] for part in parts]), rows)
        np.testing.assert_array_equal(np.concatenate([part[1] for part in parts]), p)


def test_epochs_seeds_and_streams_differ():
    base = epoch_rows(make([4] * 10, 8), 0)
    for other in (make([4] * 10, 8, seed=2), make([4] * 10, 8, stream="l")):
        assert not np.array_equal(epoch_rows(other, 0), base)
    assert not np.array_equal(epoch_rows(make([4] * 10, 8), 1), base)


def test_fewer_samples_than_lanes():
    order = make([2, 1], 8)
    assert order.steps == 1
    assert order.repeats == 5
    rows, p = order.batch(0, range(8))
    assert sorted(np.unique(rows, return_counts=True)[1]) == [2, 3, 3]
    assert p.tolist() == list(range(8)), "repeats have positions, and so draws, of their own"


def test_the_way_back_is_found_after_a_restart():
    order, again = make([4] * 10, 8), make([4] * 10, 8)
    for step in (0, 4, 5, 123):
        state = order.state(step)
        assert again.position(state) == step
        np.testing.assert_array_equal(again.batch(step, range(8))[0], order.batch(step, range(8))[0])


@pytest.mark.parametrize(
    ("other", "field"),
    [
        (make([4] * 10, 4), "batch is 8 in the checkpoint and 4 here"),
        (make([4] * 10, 8, seed=2), "seed is 1 in the checkpoint and 2 here"),
        (make([4] * 10, 8, block=4), "block is 3 in the checkpoint and 4 here"),
        (make([4] * 9, 8), "samples is 40 in the checkpoint and 36 here"),
        (make([4] * 10, 8, skip=3), "selection is"),
        (make([4] * 10, 8, stream="labelled"), "stream is u in the checkpoint and labelled here"),
        (Order(np.arange(40) * 2, np.repeat(np.arange(10), 4), 8, 1, "u", 3, "another"), "corpus is corpus in"),
    ],
)
def test_another_order_is_refused_in_words(other, field):
    with pytest.raises(InputError, match=field) as error:
        other.position(make([4] * 10, 8).state(3))
    assert "\n" not in str(error.value)


def test_another_version_is_refused():
    order = make([4] * 10, 8)
    with pytest.raises(InputError, match="version 9 in the checkpoint, 1 here"):
        order.position(order.state(3) | {"version": 9})


def test_ranks_read_their_own_run_of_shards():
    shards, block, world = 640, 4, 32
    order = make([5] * shards, 64, block=block, skip=1)
    for rank in range(0, world, 5):
        lanes = rank_lanes(64, rank, world)
        rows = np.concatenate([order.batch(step, lanes)[0] for step in range(order.steps)])
        assert len(np.unique(rows // 5)) <= shards / world + 2 * block
        assert len(rows) == shards * 5 / world


def test_memory_is_a_few_blocks():
    order = make([5] * 640, 8, block=4)
    for step in range(0, 2 * order.steps, 3):
        order.batch(step, range(8))
    assert len(order._blocks) <= 18
    assert len(order._layouts) <= 2


@pytest.mark.parametrize(("batch", "world", "group"), [(6, 4, 1), (4, 4, 2), (3, 2, 1)])
def test_lanes_that_do_not_divide_are_refused(batch, world, group):
    with pytest.raises(InputError, match=f"batch of {batch} does not divide over {world} ranks"):
        rank_lanes(batch, 0, world, group)


def test_an_empty_stream_is_refused():
    with pytest.raises(InputError, match="the u stream holds no samples"):
        make([], 4)
