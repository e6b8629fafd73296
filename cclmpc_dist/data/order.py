"""Which sample when: a pure function of (samples, seed, G, step), whatever the ranks, the workers and the
restarts.

A stream of n samples is cut into G lanes, G the global batch. An epoch is L = ceil(n / G) steps; at its step
t lane j takes pi[p mod n] with p = j L + t, pi the epoch's permutation. So each sample comes floor(GL/n) or
ceil(GL/n) times an epoch, exactly once where G divides n, and a rank, which owns neighbouring lanes, reads
its own run of shards. pi shuffles the shards, takes them in blocks and shuffles the samples of each block; a
block is computed when it is first needed.
"""

import hashlib
from collections import OrderedDict
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from cclmpc_dist.data.columns import chunks
from cclmpc_dist.data.draws import philox
from cclmpc_dist.data.reader import recent
from cclmpc_dist.errors import InputError

VERSION = 1
EPOCHS = 2  # epochs whose shard order is kept


def permutation(n: int, *parts: int | str) -> np.ndarray:
    """A permutation of n from Philox's raw words, so that it stays the same under any version of numpy."""
    return ranked(philox(*parts).random_raw(n))


def ranked(words: np.ndarray) -> np.ndarray:
    """The stable order of random 64-bit words, int64.

    A sort of the words alone, with their places in the lowest bits, takes a fifth of the stable sort's time. It is the
    same order unless two words are alike in all other bits, which for few words is next to never.
    """
    low = np.uint64((1 << len(words).bit_length()) - 1)
    packed = words & ~low
    packed |= np.arange(len(words), dtype=np.uint64)
    packed.sort()
    alike = (packed[1:] ^ packed[:-1]) <= low
    if alike.any():
        return np.argsort(words, kind="stable")
    packed &= low
    return packed.view(np.int64)


def rank_lanes(batch: int, rank: int, world: int, group: int = 1) -> range:
    """Lanes of a rank. Neighbours of one `group` (BCP's pairs) stay together. Raises InputError where it
    cannot be."""
    if batch % (world * group):
        groups = f" in groups of {group}" if group > 1 else ""
        raise InputError(f"a global batch of {batch} does not divide over {world} ranks{groups}: change one of them")
    return range(rank * batch // world, (rank + 1) * batch // world)


class Order:
    """The order of one stream, or of one corpus of a stream over several.

    samples: index rows, ascending. shard_of_sample: their shards, which may not fall. batch: G. block: shards
    shuffled together. corpus: identity of the index, kept in the state. Memory is the samples, two numbers a
    shard and a few blocks.
    """

    def __init__(
        self, samples: np.ndarray, shard_of_sample: np.ndarray, batch: int, seed: int, stream: str,
        block: int = 16, corpus: str = "",
    ) -> None:  # fmt: skip
        if not len(samples):
            raise InputError(f"the {stream} stream holds no samples: shard more cases, or change data.labelled")
        assert (shard_of_sample[1:] >= shard_of_sample[:-1]).all(), "samples must lie in the order of their shards"
        self.samples = samples
        self.n, self.batch_size, self.seed, self.stream, self.block = len(samples), batch, seed, stream, block
        self.steps = -(-self.n // batch)
        self.corpus = corpus
        self.selection = _digest(samples)
        self._first = np.concatenate([[0], np.flatnonzero(shard_of_sample[1:] != shard_of_sample[:-1]) + 1])
        self._count = np.diff(self._first, append=self.n)
        self._layouts: OrderedDict[int, tuple[np.ndarray, np.ndarray]] = OrderedDict()
        self._blocks: OrderedDict[tuple[int, int], np.ndarray] = OrderedDict()

    @property
    def repeats(self) -> int:
        """Samples that come once more than others in an epoch, summed: G L - n."""
        return self.batch_size * self.steps - self.n

    @property
    def firsts(self) -> np.ndarray:
        """Index row of the first sample in each shard that holds any."""
        return self.samples[self._first]

    def place(self, step: int) -> tuple[int, int]:
        """(epoch, step within it) of a global step."""
        return divmod(step, self.steps)

    def lane(self, epoch: int, t: int, j: int) -> tuple[int, int]:
        """(index row, p) of lane j at step t of an epoch."""
        p = j * self.steps + t
        at = p % self.n
        _, ends = self._layout(epoch)
        number = int(np.searchsorted(ends, at, side="right"))
        begin = int(ends[number - 1]) if number else 0
        return int(self.samples[self._block(epoch, number)[at - begin]]), p

    def stay(self, step: int, j: int) -> tuple[np.ndarray, int]:
        """Index rows of lane j from a global step on until it leaves its block or the epoch ends, and the step after
        the last of them."""
        epoch, t = self.place(step)
        at = (j * self.steps + t) % self.n
        _, ends = self._layout(epoch)
        number = int(np.searchsorted(ends, at, side="right"))
        begin = int(ends[number - 1]) if number else 0
        count = min(int(ends[number]) - at, self.steps - t)
        return self.samples[self._block(epoch, number)[at - begin : at - begin + count]], step + count

    def batch(self, step: int, lanes: Sequence[int]) -> tuple[np.ndarray, np.ndarray]:
        """Index rows and positions p of some lanes at a global step, int64 each."""
        epoch, t = self.place(step)
        pairs = [self.lane(epoch, t, j) for j in lanes]
        return np.array([row for row, _ in pairs], np.int64), np.array([p for _, p in pairs], np.int64)

    def state(self, step: int) -> dict[str, Any]:
        """What a checkpoint keeps so that `position` can find the way back before global step `step`."""
        epoch, t = self.place(step)
        return {"version": VERSION, "epoch": epoch, "t": t, **self._fixed()}

    def position(self, state: Mapping[str, Any]) -> int:
        """The global step of a state. Raises InputError in words where it belongs to another order."""
        if state["version"] != VERSION:
            found = state["version"]
            raise InputError(
                f"{self.stream} order: version {found} in the checkpoint, {VERSION} here: use the release that wrote it"
            )
        for name, value in self._fixed().items():
            if state[name] != value:
                raise InputError(
                    f"{self.stream} order: {name} is {_short(state[name])} in the checkpoint and {_short(value)} here: "
                    "go on with the settings and shards of the checkpoint, or start a new run"
                )
        return state["epoch"] * self.steps + state["t"]

    def _fixed(self) -> dict[str, Any]:
        return {
            "stream": self.stream, "seed": self.seed, "batch": self.batch_size, "block": self.block, "samples": self.n,
            "corpus": self.corpus, "selection": self.selection,
        }  # fmt: skip

    def _layout(self, epoch: int) -> tuple[np.ndarray, np.ndarray]:
        """The epoch's order of shards, and where each of its blocks ends in pi."""

        def make() -> tuple[np.ndarray, np.ndarray]:
            shards = permutation(len(self._first), self.seed, self.stream, "shards", epoch)
            last = np.minimum(np.arange(self.block, len(shards) + self.block, self.block), len(shards)) - 1
            return shards, np.cumsum(self._count[shards])[last]

        return recent(self._layouts, epoch, make, EPOCHS)

    def _block(self, epoch: int, number: int) -> np.ndarray:
        """Positions in `samples` of one block of pi."""

        def make() -> np.ndarray:
            shards = self._layout(epoch)[0][number * self.block : (number + 1) * self.block]
            count = self._count[shards]
            ends = np.cumsum(count)
            members = np.repeat(self._first[shards] - ends + count, count) + np.arange(ends[-1])
            return members[permutation(len(members), self.seed, self.stream, "block", epoch, number)]

        return recent(self._blocks, (epoch, number), make, 2 * self.batch_size + 2)


def _digest(samples: np.ndarray) -> str:
    digest = hashlib.sha256()
    for rows in chunks(len(samples)):
        digest.update(samples[rows].astype("<i8").tobytes())
    return digest.hexdigest()


def _short(value: object) -> str:
    return value[:12] if isinstance(value, str) else str(value)
