"""Keys of earlier steps, per class, for CGCL: a ring of fixed capacity that holds only real keys [F].

Replicated, every rank enqueues the same gathered offers and so holds the same bits; sharded, each rank keeps
the offers of its own images, and W ranks hold W times the capacity. It belongs in the checkpoint and is never a
DDP buffer. K classes, F features, B images, k offers of an image and class.
"""

import torch
from torch import Tensor

from cclmpc_dist.distributed.exchange import gather_detached
from cclmpc_dist.errors import InputError


class MemoryBank:
    """keys (K, capacity, F) float32; count (K,) real keys; pointer (K,) the next slot to write."""

    def __init__(self, classes: int, capacity: int, features: int, device: torch.device | str = "cpu") -> None:
        self.capacity = capacity
        # One row more than the capacity: what is not valid is written there and never read.
        self._rows = torch.zeros(classes, capacity + 1, features, device=device)
        self.count = torch.zeros(classes, dtype=torch.int64, device=device)
        self.pointer = torch.zeros(classes, dtype=torch.int64, device=device)

    @property
    def keys(self) -> Tensor:
        return self._rows[:, : self.capacity]

    def valid(self) -> Tensor:
        """(K, capacity) bool: slots that hold a real key."""
        return torch.arange(self.capacity, device=self.count.device) < self.count[:, None]

    @torch.no_grad()
    def enqueue(self, offers_KnF: Tensor, valid_Kn: Tensor) -> None:
        """Writes the valid offers in their order over the oldest keys. ValueError where n exceeds the capacity."""
        if offers_KnF.shape[1] > self.capacity:
            raise ValueError(f"{offers_KnF.shape[1]} offers a class exceed the bank's capacity of {self.capacity}")
        slot_Kn = (self.pointer[:, None] + valid_Kn.cumsum(1) - 1) % self.capacity
        slot_Kn = torch.where(valid_Kn, slot_Kn, self.capacity)
        self._rows.scatter_(1, slot_Kn[..., None].expand_as(offers_KnF), offers_KnF.to(self._rows.dtype))
        written_K = valid_Kn.sum(1)
        self.pointer = (self.pointer + written_K) % self.capacity
        self.count = (self.count + written_K).clamp(max=self.capacity)

    def state_dict(self) -> dict[str, Tensor]:
        return {"keys": self.keys.clone(), "count": self.count.clone(), "pointer": self.pointer.clone()}

    def load_state_dict(self, state: dict[str, Tensor]) -> None:
        """Raises InputError where the state is of a bank of another shape."""
        if state["keys"].shape != self.keys.shape:
            raise InputError(
                f"memory bank: the checkpoint holds {list(state['keys'].shape)} (classes, capacity, features), "
                f"the run {list(self.keys.shape)}: set ccl_mpc.contrast.bank and model.embedding as they were"
            )
        self.keys.copy_(state["keys"])
        self.count.copy_(state["count"])
        self.pointer.copy_(state["pointer"])

    def deal(self, states: list[dict[str, Tensor]], rank: int, world: int) -> int:
        """Takes rank's share of the shards of a run at another world size; returns how many keys none could take.

        The keys go round the ranks from the newest on, so that the oldest are dropped where there is no room.
        """
        dropped = 0
        for c in range(len(self.count)):
            ages = [(age, source) for source, state in enumerate(states) for age in range(int(state["count"][c]))]
            mine = sorted(ages)[rank::world][: self.capacity][::-1]
            keys = [_by_age(states[source], c, age) for age, source in mine]
            if keys:
                self._rows[c, : len(keys)] = torch.stack(keys).to(self._rows)
            self.count[c], self.pointer[c] = len(keys), len(keys) % self.capacity
            dropped += max(0, len(ages) - world * self.capacity)
        return dropped


def _by_age(state: dict[str, Tensor], c: int, age: int) -> Tensor:
    """(F,) key of class c, 0 the newest."""
    return state["keys"][c, (int(state["pointer"][c]) - 1 - age) % state["keys"].shape[1]]


def gather_offers(offers_BKkF: Tensor, valid_BKk: Tensor) -> tuple[Tensor, Tensor]:
    """All ranks' offers of one stream, image after image in lane order: (K, W·B·k, F) and their (K, W·B·k)
    validity.

    One call a stream, joined along dim 1: with two streams in one call the order would depend on the world
    size.
    """
    return by_class(gather_detached(offers_BKkF), gather_detached(valid_BKk))


def by_class(offers_BKkF: Tensor, valid_BKk: Tensor) -> tuple[Tensor, Tensor]:
    """(K, B·k, F) and (K, B·k): the offers as `enqueue` takes them, image after image."""
    return offers_BKkF.transpose(0, 1).flatten(1, 2), valid_BKk.transpose(0, 1).flatten(1, 2)
