"""Shards of a remote corpus fetched ahead of the lanes that will read them.

A lane goes through one block of shards after another (order.py). What it needs of its current block and of the next is
fetched in the order of first use and held in the cache until the lane has left the block: the current block's shards
beyond the cache's limit if need be, the next's within it.
"""

import resource
import sys
import threading
import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import BinaryIO

import numpy as np

from cclmpc_dist.data.index import Index
from cclmpc_dist.data.order import Order
from cclmpc_dist.data.remote import RemoteIndex
from cclmpc_dist.data.store import Stopped
from cclmpc_dist.errors import InputError

THREADS = 4  # files fetched at a time, a stream and rank
PAGE = 4096  # bytes that a file takes of a disk are a multiple of this
AGAIN = 1.0  # seconds until a file for which there was no room is tried again


@dataclass(frozen=True)
class Stay:
    """A lane's steps begin .. end - 1 in one block, and the step at which it first needs each of its shards."""

    begin: int
    end: int
    first: dict[int, int]


class Course:
    """The stays of some lanes: `depth` of each, from the current step on; from step `end` on nothing is needed."""

    def __init__(self, order: Order, index: Index, depth: int, end: int = sys.maxsize) -> None:
        self.order, self.index, self.depth, self.end = order, index, depth, end
        self.stays: dict[int, deque[Stay]] = {}

    def move(self, step: int, lanes: Sequence[int]) -> bool:
        """Go to a step. Whether any stay is another than before."""
        before = {lane: list(stays) for lane, stays in self.stays.items()}
        self.stays = {lane: self._moved(self.stays.get(lane, deque()), step, lane) for lane in lanes}
        return {lane: list(stays) for lane, stays in self.stays.items()} != before

    def _moved(self, stays: deque[Stay], step: int, lane: int) -> deque[Stay]:
        while stays and not stays[0].begin <= step < stays[0].end:
            stays.popleft()
        while len(stays) < self.depth:
            stays.append(self._stay(stays[-1].end if stays else step, lane))
        return stays

    def _stay(self, step: int, lane: int) -> Stay:
        rows, end = self.order.stay(step, lane)
        shards, first = np.unique(self.index["shard"][rows[: max(0, self.end - step)]], return_index=True)
        return Stay(step, end, dict(zip(shards.tolist(), (step + first).tolist(), strict=True)))

    def needed(self, number: int) -> list[int]:
        """Shards of every lane's stay `number`, 0 the current, in the order of first use."""
        return _in_order(stays[number] for stays in self.stays.values())


def _in_order(stays: Iterable[Stay]) -> list[int]:
    first: dict[int, int] = {}
    for stay in stays:
        for shard, step in stay.first.items():
            first[shard] = min(step, first.get(shard, step))
    return sorted(first, key=first.__getitem__)


def blocks(index: Index, order: Order) -> int:
    """Bytes of the blocks in use at most, as a disk holds them: one for each lane of all ranks."""
    sizes = sorted(_sizes(index, order).values(), reverse=True)
    return sum(sizes[: order.batch_size * order.block])


def in_use(streams: Iterable[tuple[Index, Order]]) -> int:
    """The same of several streams; a shard that two of them read is held once."""
    held: dict[str, dict[int, int]] = {}  # corpus: bytes of each of its shards
    most: dict[str, int] = {}
    for index, order in streams:
        held.setdefault(index.identity, {}).update(_sizes(index, order))
        most[index.identity] = most.get(index.identity, 0) + blocks(index, order)
    return sum(min(most[corpus], sum(sizes.values())) for corpus, sizes in held.items())


def _sizes(index: Index, order: Order) -> dict[int, int]:
    """Bytes of each shard that holds a sample of the order."""
    entries = index.manifest["shards"]
    return {shard: -(-entries[shard]["bytes"] // PAGE) * PAGE for shard in index["shard"][order.firsts].tolist()}


@contextmanager
def ahead(index: Index, order: Order, lanes: Sequence[int], step: int, end: int) -> Iterator[Callable[[int], None]]:
    """Fetch for steps step .. end - 1 of these lanes, in threads that end with the block, if the corpus is remote.
    Yields what is to be called when all before a step is read."""
    if not isinstance(index, RemoteIndex):
        yield lambda step: None
        return
    with files(2 * len(lanes) * order.block):
        fetcher = Fetcher(index, order, lanes, step, end)
        try:
            yield fetcher.move
        finally:
            fetcher.stop()


@dataclass
class _Given:
    """Files that are given to whoever is inside `files`."""

    now: int = 0
    most: int = 0


_given = _Given()


class Fetcher:
    """THREADS threads and the files that they hold."""

    def __init__(self, index: RemoteIndex, order: Order, lanes: Sequence[int], step: int, end: int) -> None:
        self._index, self._lanes = index, lanes
        self._course = Course(order, index, 2, end)
        self._blocks = blocks(index, order)
        index.cache.spare += self._blocks
        self._wanted: dict[int, bool] = {}  # shard: whether it is of a current block; first come first
        self._held: dict[int, BinaryIO] = {}
        self._busy: dict[int, bool] = {}  # as it was wanted when it was begun
        self._failed: set[int] = set()
        self._no_room_until = 0.0
        self._stop, self._changed = threading.Event(), threading.Condition()
        self.move(step)
        for _ in range(THREADS):
            threading.Thread(target=self._work, daemon=True).start()

    def move(self, step: int) -> None:
        """All before `step` is read: hold what the lanes need from now on."""
        if not self._course.move(step, self._lanes):
            return
        later, now = dict.fromkeys(self._course.needed(1), False), dict.fromkeys(self._course.needed(0), True)
        with self._changed:
            before, self._wanted = self._wanted, now | {shard: False for shard in later if shard not in now}
            for shard in [shard for shard in self._held if not self._stays(shard, before[shard])]:
                self._held.pop(shard).close()
            self._failed.clear()
            self._no_room_until = 0.0
            self._changed.notify_all()
            # A thread may just be opening what was read without it; that is held for no longer than it takes.
            self._changed.wait_for(lambda: all(self._stays(*task) for task in self._busy.items()), timeout=AGAIN)

    def _stays(self, shard: int, was: bool) -> bool:
        """Whether what was wanted, `was` now or later, is to be held on. One that a lane needed may be another's next:
        it must find its place within the limit like the rest."""
        return shard in self._wanted and (self._wanted[shard] or not was)

    def stop(self) -> None:
        """Let everything go. A thread that waits for a server ends after it."""
        self._stop.set()
        self._index.cache.spare -= self._blocks
        with self._changed:
            for file in self._held.values():
                file.close()
            self._held.clear()
            self._changed.notify_all()

    def _work(self) -> None:
        while (task := self._next()) is not None:
            shard, now = task
            file, failed = None, False
            try:
                file = self._index.fetch(shard, now, self._stop)
            except InputError:
                failed = True  # told by whoever reads it
            except Stopped:
                return
            self._take(shard, file, failed)

    def _next(self) -> tuple[int, bool] | None:
        """What to fetch, as soon as there is something; None to stop."""
        with self._changed:
            while not self._stop.is_set():
                for shard, now in self._wanted.items():
                    if shard in self._held or shard in self._busy or shard in self._failed:
                        continue
                    if now or time.monotonic() >= self._no_room_until:
                        self._busy[shard] = now
                        return shard, now
                self._changed.wait(AGAIN)
        return None

    def _take(self, shard: int, file: BinaryIO | None, failed: bool) -> None:
        with self._changed:
            was = self._busy.pop(shard)
            self._changed.notify_all()
            if failed:
                self._failed.add(shard)
            elif file is None:
                self._no_room_until = time.monotonic() + AGAIN
            elif self._stays(shard, was) and not self._stop.is_set():
                self._held[shard] = file
            else:
                file.close()


@contextmanager
def files(count: int) -> Iterator[None]:
    """Inside, this process may have `count` files open besides what others were given that are inside too: its limit is
    raised for the most there ever were at a time, as far as it may be, and not lowered again."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    _given.now += count
    missing = _given.now - _given.most
    if missing > 0 and soft != resource.RLIM_INFINITY:
        wanted = soft + missing if hard == resource.RLIM_INFINITY else min(soft + missing, hard)
        resource.setrlimit(resource.RLIMIT_NOFILE, (wanted, hard))
    _given.most = max(_given.now, _given.most)
    try:
        yield
    finally:
        _given.now -= count
