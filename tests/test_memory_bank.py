"""The bank against a ring in plain Python, and equal on all ranks."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from ranks import run_ranks
from torch._subclasses.fake_tensor import FakeTensorMode

from cclmpc_dist.errors import InputError
from cclmpc_dist.losses.memory_bank import MemoryBank, gather_offers

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
    with pytest.raises(InputError, match=r"holds \(2, 7, 3\).*the run \(2, 9, 3\): set ccl_mpc.contrast.bank"):
        MemoryBank(K, 9, F).load_state_dict(MemoryBank(K, CAPACITY, F).state_dict())


def test_nothing_waits_for_the_device():
    with FakeTensorMode():
        bank = MemoryBank(K, CAPACITY, F)
        bank.enqueue(torch.zeros(K, 4, F), torch.zeros(K, 4, dtype=torch.bool))
        assert bank.valid().shape == (K, CAPACITY)


def streams() -> list[tuple[torch.Tensor, torch.Tensor]]:
    """Two streams' offers of the global batch: 2 and 4 images, up to 2 offers a class."""
    generator = torch.Generator().manual_seed(5)
    return [
        (torch.randn(b, K, 2, F, generator=generator), torch.rand(b, K, 2, generator=generator) < 0.5) for b in (2, 4)
    ]


def banked(rank: int, world: int) -> dict:
    bank = MemoryBank(K, 16, F)
    for _ in range(2):
        parts = [gather_offers(*(x.chunk(world)[rank] for x in stream)) for stream in streams()]
        bank.enqueue(*(torch.cat(column, dim=1) for column in zip(*parts, strict=True)))
    return bank.state_dict()


def test_all_ranks_hold_the_bank_of_one_process():
    alone = banked(0, 1)
    assert alone["count"].max() > 0
    for state in run_ranks(banked, 2):
        assert all(torch.equal(state[name], alone[name]) for name in alone)
