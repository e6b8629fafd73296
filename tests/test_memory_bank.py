"""The bank against a ring in plain Python, and equal on all ranks."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from ranks import run_ranks
from torch._subclasses.fake_tensor import FakeTensorMode

from cclmpc_dist.errors import InputError
from cclmpc_dist.losses.memory_bank import MemoryBank, by_class, gather_offers

K, CAPACITY, F = 2, 7, 3


class Ring:
    """One class's bank, a slot at a time."""

    def __init__(self) -> None:
        self.slots: list[list[float] | None] = [None] * CAPACITY
        self.pointer = 0

    def put(self, key: torch.Tensor) -> None:
        self.slots[self.pointer] = key.tolist()
        self.pointer = (self.pointer + 1) % CAPACITY


def random_offers(seed: int, n: int) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    share = torch.rand((), generator=generator)  # from none valid to all
    return torch.randn(K, n, F, generator=generator), torch.rand(K, n, generator=generator) < share


@settings(max_examples=60, deadline=None)
@given(sizes=st.lists(st.integers(1, CAPACITY), max_size=8), seed=st.integers(0, 10**6), restart=st.integers(0, 8))
def test_bank_is_a_ring_of_real_keys(sizes, seed, restart):
    bank, rings = MemoryBank(K, CAPACITY, F), [Ring() for _ in range(K)]
    for step, n in enumerate(sizes):
        if step == restart:  # a checkpoint in between changes nothing
            state, bank = bank.state_dict(), MemoryBank(K, CAPACITY, F)
            bank.load_state_dict(state)
        offers, valid = random_offers(seed + step, n)
        bank.enqueue(offers, valid)
        for c, ring in enumerate(rings):
            for key in offers[c][valid[c]]:
                ring.put(key)
        assert bank.pointer.tolist() == [ring.pointer for ring in rings]
        for c, ring in enumerate(rings):
            assert bank.valid()[c].tolist() == [slot is not None for slot in ring.slots]
            for slot, key in zip(ring.slots, bank.keys[c].tolist(), strict=True):
                assert slot is None or slot == key


def test_a_new_bank_has_no_key():
    bank = MemoryBank(K, CAPACITY, F)
    assert bank.keys.shape == (K, CAPACITY, F)
    assert not bank.valid().any()


def test_offers_leave_no_graph_and_later_writes_leave_no_trace_in_a_state():
    bank = MemoryBank(K, CAPACITY, F)
    offers, valid = torch.randn(K, CAPACITY, F, requires_grad=True), torch.ones(K, CAPACITY, dtype=torch.bool)
    bank.enqueue(offers, valid)
    state = bank.state_dict()
    bank.enqueue(offers + 1, valid)
    assert not bank.keys.requires_grad
    assert torch.equal(state["keys"], offers)
    assert state["count"].tolist() == [CAPACITY] * K


def test_more_offers_than_the_capacity_are_refused():
    with pytest.raises(ValueError, match="8 offers a class exceed the bank's capacity of 7"):
        MemoryBank(K, CAPACITY, F).enqueue(torch.zeros(K, 8, F), torch.zeros(K, 8, dtype=torch.bool))


def test_a_state_of_another_shape_is_refused_in_words():
    with pytest.raises(InputError, match=r"holds \[2, 7, 3\].*the run \[2, 9, 3\]: set ccl_mpc.contrast.bank"):
        MemoryBank(K, 9, F).load_state_dict(MemoryBank(K, CAPACITY, F).state_dict())


def test_nothing_waits_for_the_device():
    with FakeTensorMode():
        bank = MemoryBank(K, CAPACITY, F)
        bank.enqueue(torch.zeros(K, 4, F), torch.zeros(K, 4, dtype=torch.bool))
        assert bank.valid().shape == (K, CAPACITY)


def streams(step: int) -> list[tuple[torch.Tensor, torch.Tensor]]:
    """Two streams' offers of the global batch of a step: 2 and 4 images, up to 2 offers a class."""
    generator = torch.Generator().manual_seed(step)
    return [
        (torch.randn(b, K, 2, F, generator=generator), torch.rand(b, K, 2, generator=generator) < 0.5) for b in (2, 4)
    ]


def banked(rank: int, world: int) -> dict:
    bank = MemoryBank(K, 16, F)
    for step in range(50):
        for stream in streams(step):
            bank.enqueue(*gather_offers(*(x.chunk(world)[rank] for x in stream)))
    return bank.state_dict()


def test_all_ranks_hold_the_bank_of_one_process_after_50_steps():
    alone = banked(0, 1)
    assert alone["count"].tolist() == [16] * K
    for state in run_ranks(banked, 2):
        assert all(torch.equal(state[name], alone[name]) for name in alone)


# A bank in shards ---------------------------------------------------------------------------------------------------


def numbered(world: int, capacity: int, written: list[int]) -> list[dict]:
    """Shards of W ranks; a key is its (class, rank, time of writing)."""
    states = []
    for rank in range(world):
        bank = MemoryBank(K, capacity, F)
        for time in range(written[rank]):
            keys = torch.tensor([[[c, rank, time]] for c in range(K)], dtype=torch.float32)
            valid = torch.tensor([[True], [time % 2 == 0]])  # class 1 gets every second key
            bank.enqueue(keys, valid)
        states.append(bank.state_dict())
    return states


@settings(max_examples=60, deadline=None)
@given(
    before=st.integers(1, 4),
    after=st.integers(1, 5),
    capacity=st.integers(1, 6),
    written=st.lists(st.integers(0, 20), min_size=4, max_size=4),
)
def test_shards_are_dealt_out_anew(before, after, capacity, written):
    states = numbered(before, capacity, written)
    banks = [MemoryBank(K, capacity, F) for _ in range(after)]
    dropped = [bank.deal(states, rank, after) for rank, bank in enumerate(banks)]
    assert len(set(dropped)) == 1
    lost = 0
    for c in range(K):
        there = {tuple(key.tolist()) for state in states for key in state["keys"][c, : state["count"][c]]}
        kept = [tuple(key.tolist()) for bank in banks for key in bank.keys[c][bank.valid()[c]]]
        assert len(kept) == len(set(kept)) == min(len(there), after * capacity)
        assert set(kept) <= there
        assert max((bank.count[c].item() for bank in banks), default=0) - min(b.count[c].item() for b in banks) <= 1
        for rank in range(before):  # of a rank's keys the newest are kept
            mine = sorted(time for _, owner, time in there if owner == rank)
            left = sorted(time for _, owner, time in kept if owner == rank)
            assert left == mine[len(mine) - len(left) :]
        lost += len(there) - len(kept)
    assert dropped[0] == lost


def test_a_dealt_shard_goes_on_as_a_ring():
    """The next key overwrites the oldest one."""
    bank = MemoryBank(K, 3, F)
    bank.deal(numbered(2, 3, [3, 3]), 0, 2)
    times = bank.keys[0, :, 2].tolist()
    bank.enqueue(torch.full((K, 1, F), 9.0), torch.ones(K, 1, dtype=torch.bool))
    assert bank.keys[0, :, 2].tolist() == [9.0, *times[1:]]
    assert times[0] == min(times)


def sharded(rank: int, world: int) -> dict:
    bank = MemoryBank(K, 16, F)
    for step in range(50):
        for stream in streams(step):
            bank.enqueue(*by_class(*(x.chunk(world)[rank] for x in stream)))
    return bank.state_dict()


def test_shards_hold_w_times_the_capacity():
    """Each rank the last keys of its own images, none of another's."""
    states = [sharded(rank, 2) for rank in range(2)]
    assert sum(state["count"] for state in states).tolist() == [2 * 16] * K
    everything = [keys for step in range(50) for keys, _ in streams(step)]
    for rank in range(2):
        for c in range(K):
            mine = {tuple(key.tolist()) for key in states[rank]["keys"][c]}
            assert len(mine) == 16
            offered = [keys.chunk(2)[rank][:, c].flatten(0, 1) for keys in everything]
            assert mine <= {tuple(key.tolist()) for key in torch.cat(offered)}
