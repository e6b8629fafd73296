"""Samples -> batches: crops, turns and flips on the host, intensities on the device.

Layout: B batch (b a rank's part of it), C channels, S spatial.
"""

import copy
import ctypes
import math
import mmap
import sys
import threading
import weakref
from collections.abc import Generator, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, closing
from dataclasses import dataclass, replace
from functools import partial
from queue import SimpleQueue
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor

from cclmpc_dist.data import draws
from cclmpc_dist.data.ahead import Course, ahead, files
from cclmpc_dist.data.index import Index
from cclmpc_dist.data.order import Order, rank_lanes
from cclmpc_dist.data.reader import MAPPED, Reader, copy_rows, region
from cclmpc_dist.data.remote import RemoteIndex
from cclmpc_dist.data.seen import AS_STORED, Seen
from cclmpc_dist.data.workers import AHEAD, in_order
from cclmpc_dist.errors import InputError, NoFilesLeft

Batch = dict[str, Any]


@dataclass(frozen=True)
class Crop:
    """Where a crop lies, and how it is turned.

    It takes `size` voxels from voxel `start` of the stored volume, turns them by `turns` quarters in the first
    two axes (from the first towards the second, as numpy.rot90), then flips the axes `flips`.
    """

    start: tuple[int, ...]
    size: tuple[int, ...]
    turns: int
    flips: tuple[int, ...]

    def turned(self, region: np.ndarray) -> np.ndarray:
        """A view (..., *patch) of a stored region (..., *size): turned, then flipped."""
        lead = region.ndim - len(self.size)
        if self.turns:
            region = np.rot90(region, self.turns, (lead, lead + 1))
        return np.flip(region, tuple(lead + axis for axis in self.flips)) if self.flips else region


class Buffers:
    """Memory for batches, used again once nothing refers to a batch: fresh pages cost more than the crops in them.
    Threads may share it."""

    def __init__(self) -> None:
        self._free: dict[int, list[mmap.mmap]] = {}

    def empty(self, shape: tuple[int, ...], dtype: np.dtype) -> np.ndarray:
        size = math.prod(shape) * dtype.itemsize
        free = self._free.setdefault(size, [])
        try:
            block = free.pop()
        except IndexError:
            block = mmap.mmap(-1, size)
        lease = (ctypes.c_char * size).from_buffer(block)  # arrays and tensors over it keep it alive
        weakref.finalize(lease, free.append, block).atexit = False
        return np.frombuffer(memoryview(lease), dtype).reshape(shape)


class Mixture:
    """One endless stream of crops over one corpus or several, the labelled or the unlabelled.

    parts: a stream for each corpus, with its own n, L and epoch. Their lanes lie side by side: corpus k owns the G_k
    lanes behind those of the corpora before it, so what a lane holds at a step depends on the step alone.
    """

    def __init__(self, parts: "Sequence[Stream]") -> None:
        self.parts, self._buffers = list(parts), Buffers()

    @property
    def batch_size(self) -> int:
        """G, over all ranks and corpora."""
        return sum(part.order.batch_size for part in self.parts)

    @property
    def steps(self) -> int:
        """Of an epoch of the corpus that needs the most, so that no sample of any is left out."""
        return max(part.order.steps for part in self.parts)

    def split(self, lanes: Sequence[int]) -> "list[tuple[Stream, list[int]]]":
        """The parts that own some of these lanes, and the lanes as the part counts them."""
        found, first = [], 0
        for part in self.parts:
            own = [lane - first for lane in lanes if 0 <= lane - first < part.order.batch_size]
            found += [(part, own)] if own else []
            first += part.order.batch_size
        return found

    def batch(self, step: int, lanes: Sequence[int]) -> Batch:
        """The crops of some lanes, ascending, at a global step.

        image: (b, C, *patch) as stored, or float32 as the network sees it where stored types differ; scale, offset,
        low, high: (b, C) float32, what `to_device` makes of it; label: (b, *patch) uint8, with_label only; key: (b,)
        int64 for draws; lane: (b,) int64; skipped: int, samples passed over. Raises InputError naming shard and case.
        """
        shares = self.split(lanes)
        samples = [sample for part, own in shares for sample in part.take(step, own)]
        batch = _joined(samples, self._buffers)
        del samples  # they hold maps
        for part, own in shares:
            part.leave(step, own)
        return batch | {"lane": torch.tensor(list(lanes))}

    def twin(self, stop: threading.Event) -> "Mixture":
        """The same with maps of its own, for another thread. Corpora, samples and memory for batches are shared. stop:
        the reader's."""
        shared: list[object] = [self._buffers]
        for part in self.parts:
            shared += [part.index, part.order.samples, part.told]
        readers = {id(part._reader): Reader(part.index, stop) for part in self.parts}
        return copy.deepcopy(self, {id(one): one for one in shared} | readers)


class Stream:
    """The lanes of one corpus, a part of a Mixture.

    index: the corpus. name: part of every draw's key. samples: index rows, ascending. batch: G, over all
    ranks. patch: voxels an axis. oversample: share of crops centred on a foreground voxel of the index, for
    labelled streams only. rotate: quarter turns in the first two axes (patches of unequal sides take the
    region that fills them). flip: axes, each flipped with chance 1/2. on_error: "skip" replaces an unreadable
    sample by its lane's next readable one, keeping its draws.
    """

    def __init__(
        self, index: Index, name: str, samples: np.ndarray, batch: int, seed: int, patch: Sequence[int], *,
        block: int = 16, oversample: float = 0.0, rotate: bool = True, flip: Sequence[int] = (0, 1),
        with_label: bool = False, on_error: Literal["fail", "skip"] = "fail",
    ) -> None:  # fmt: skip
        if len(patch) != index.dims:
            raise InputError(
                f"data.patch has {len(patch)} numbers, {index.path} has {index.dims} axes: give one an axis"
            )
        assert with_label or not oversample, "foreground voxels come from labels, which this stream may not use"
        self.index, self.name, self.seed, self.patch = index, name, seed, tuple(patch)
        self.oversample, self.rotate, self.flip = oversample, rotate, tuple(flip)
        self.with_label, self.on_error = with_label, on_error
        self.order = Order(samples, index.of("shard", samples), batch, seed, name, block, index.identity)
        self._reader, self._course = Reader(index), Course(self.order, index, depth=1)
        self.told: set[str] = set()  # problems of samples that were passed over

    def take(self, step: int, lanes: Sequence[int]) -> "list[_Sample]":
        """The crops of some lanes at a global step, not yet copied. Raises InputError naming shard and case."""
        epoch, t = self.order.place(step)
        places = [self.order.lane(epoch, t, lane) for lane in lanes]
        keys = [draws.key(self.seed, self.name, epoch, p) for _, p in places]
        numbers = self._numbers(keys)
        return [
            self._sample(self._read(row, epoch, t, lane), key, u)
            for (row, _), lane, key, u in zip(places, lanes, keys, numbers, strict=True)
        ]

    def leave(self, step: int, lanes: Sequence[int]) -> None:
        """The crops of these lanes at a step are copied: the cache may let go of the shards that they leave."""
        if isinstance(self.index, RemoteIndex) and self._course.move(step + 1, lanes):
            self._reader.keep(self._course.needed(0))

    def _numbers(self, keys: Sequence[int]) -> list[list[float]]:
        """All draws of a batch in one call: turn; flip and start of each axis; foreground or not, class, voxel."""
        return draws.host_uniform(keys, "geometry", 4 + 2 * self.index.dims).tolist()

    def _crop(self, row: int, u: list[float]) -> Crop:
        dims = self.index.dims
        turns = int(4 * u[0]) if self.rotate else 0
        size = (self.patch[1], self.patch[0], *self.patch[2:]) if turns % 2 else self.patch
        flips = tuple(axis for axis in self.flip if u[1 + axis] < 0.5)
        slack = [int(full) - part for full, part in zip(self.index["shape"][row, 1:], size, strict=True)]
        target = self._target(row, u[-3:])
        if target is None:
            wanted = [int(v * (s + 1)) for v, s in zip(u[1 + dims : 1 + 2 * dims], slack, strict=True)]
        else:
            wanted = [int(v) - part // 2 for v, part in zip(target, size, strict=True)]
        start = tuple(min(max(w, 0), s) if s >= 0 else -(-s // 2) for w, s in zip(wanted, slack, strict=True))
        return Crop(start, size, turns, flips)

    def _target(self, row: int, u: list[float]) -> np.ndarray | None:
        """The foreground voxel to centre on, each class alike, or None."""
        if u[0] >= self.oversample:
            return None
        classes = self.index.foreground(row)
        if not classes:
            return None
        voxels = classes[int(u[1] * len(classes))]
        return voxels[int(u[2] * len(voxels))]

    def _read(self, row: int, epoch: int, t: int, lane: int) -> "_Volume":
        """The sample, or with on_error "skip" the lane's next one that can be read."""
        for passed in range(self.order.steps):
            row = self.order.lane(epoch, (t + passed) % self.order.steps, lane)[0] if passed else row
            try:
                label = self._reader.label(row) if self.with_label else None
                return _Volume(row, self._reader.image(row), label, passed)
            except NoFilesLeft:
                raise
            except InputError as error:
                if self.on_error == "fail":
                    raise InputError(f"{error}, or set data.on_error=skip") from None
                problem = error
                self._tell(str(error))
        raise InputError(f"no readable sample is left in lane {lane} of the {self.name} stream; the last: {problem}")

    def _tell(self, problem: str) -> None:
        """Name what is passed over, once a process: a shard that is missing does so for each of its samples."""
        if problem not in self.told:
            self.told.add(problem)
            print(f"cclmpc: {self.name}: passed over: {problem}", file=sys.stderr, flush=True)

    def _sample(self, volume: "_Volume", key: int, u: list[float]) -> "_Sample":
        row, crop = volume.row, self._crop(volume.row, u)
        image = crop.turned(region(volume.image, crop.start, crop.size, self._reader.background(row)))
        label = None if volume.label is None else crop.turned(region(volume.label, crop.start, crop.size, 0))
        return _Sample(key, image, label, self.index.seen(row), volume.passed)


@dataclass(frozen=True)
class _Volume:
    """A sample as read: image (C, *S) as stored, label (*S), how many unreadable ones were passed over."""

    row: int
    image: np.ndarray
    label: np.ndarray | None
    passed: int


@dataclass(frozen=True)
class _Sample:
    """A crop as a view of what was read: image (C, *patch) as stored, label (*patch)."""

    key: int
    image: np.ndarray
    label: np.ndarray | None
    seen: Seen
    passed: int

    def normalised(self) -> "_Sample":
        """With float32 values, bit for bit as `to_device` computes them."""
        return replace(self, image=self.seen.applied(self.image), seen=AS_STORED)


def _joined(samples: list[_Sample], buffers: Buffers) -> Batch:
    """Copy each crop once, from the map into the batch."""
    if len({sample.image.dtype for sample in samples}) > 1:
        samples = [sample.normalised() for sample in samples]
    batch: Batch = {"image": _stacked([sample.image for sample in samples], buffers)}
    labels = [sample.label for sample in samples if sample.label is not None]
    batch |= {"label": _stacked(labels, buffers)} if labels else {}
    batch |= _seen([sample.seen for sample in samples], channels=batch["image"].shape[1])
    keys = torch.tensor([sample.key for sample in samples])
    return batch | {"key": keys, "skipped": sum(sample.passed for sample in samples)}


def _seen(samples: list[Seen], channels: int) -> Batch:
    batch = [np.empty((len(samples), channels), np.float32) for _ in Seen._fields]
    for row, sample in enumerate(samples):
        for numbers, own in zip(batch, sample, strict=True):
            numbers[row] = own
    return {name: torch.from_numpy(numbers) for name, numbers in zip(Seen._fields, batch, strict=True)}


def _stacked(views: list[np.ndarray], buffers: Buffers) -> Tensor:
    out = buffers.empty((len(views), *views[0].shape), views[0].dtype)
    for row, view in zip(out, views, strict=True):
        copy_rows(row, view)
    return torch.from_numpy(out)


def loader(
    stream: Mixture,
    start_step: int,
    steps: int,
    rank: int = 0,
    world: int = 1,
    workers: int = 1,
    group: int = 1,
) -> Iterator[Batch]:
    """Batches of global steps start_step .. start_step + steps - 1 for one rank, in order, as Mixture.batch
    gives them, in pinned memory where there is a GPU.

    workers: threads that read up to AHEAD batches each ahead; 0 reads when a batch is asked for. Threads suffice, since
    copying and decompressing hold no lock of Python's. A batch stays as it is for as long as anything refers to it.
    Each thread holds up to MAPPED shards of each corpus open, for which the process's limit of open files is raised.
    Closing the iterator ends the threads: they finish the batch that they are at, unless it waits for a store. Raises
    InputError.
    """
    assert group == 1 or len(stream.parts) == 1, "lanes that stay together lie in one corpus"
    lanes = rank_lanes(stream.batch_size, rank, world, group)
    wanted = range(start_step, start_step + steps)
    with ExitStack() as stack:
        stack.enter_context(files(max(1, workers) * len(stream.parts) * MAPPED))
        moves = [
            stack.enter_context(ahead(part.index, part.order, own, start_step, start_step + steps))
            for part, own in stream.split(lanes)
        ]
        batches = stack.enter_context(closing(_batches(stream, lanes, wanted, workers)))
        for next_step, batch in enumerate(batches, start_step + 1):
            for move in moves:
                move(next_step)
            yield batch


def _batches(stream: Mixture, lanes: range, steps: range, workers: int) -> Generator[Batch, None, None]:
    if not workers:
        yield from map(partial(_pinned, stream, lanes), steps)
        return
    stop, idle = threading.Event(), SimpleQueue[Mixture]()
    for _ in range(workers):
        idle.put(stream.twin(stop))

    def make(step: int) -> Batch:
        own = idle.get()
        try:
            return _pinned(own, lanes, step)
        finally:
            idle.put(own)

    yield from in_order(_threads(workers), make, steps, AHEAD * workers, stop)


def _threads(count: int) -> ThreadPoolExecutor:
    """A thread's current GPU is the first unless it is told: it would pin memory with a context there on every rank."""
    if torch.cuda.is_available():
        return ThreadPoolExecutor(count, initializer=torch.cuda.set_device, initargs=(torch.cuda.current_device(),))
    return ThreadPoolExecutor(count)


def _pinned(stream: Mixture, lanes: range, step: int) -> Batch:
    batch = stream.batch(step, lanes)
    if torch.cuda.is_available():
        return {name: value.pin_memory() if isinstance(value, Tensor) else value for name, value in batch.items()}
    return batch


def to_device(batch: Batch, device: torch.device | str) -> Batch:
    """The batch on `device`: image float32 (b, C, *patch) = offset + scale * clip(stored, low, high), label int64;
    these four, (b, C) or (b, 1), are used up. Under autocast too, all of it is float32."""
    moved = {
        name: value.to(device, non_blocking=True) if isinstance(value, Tensor) else value
        for name, value in batch.items()
    }
    image = moved["image"]
    axes = (len(image), -1) + (1,) * (image.ndim - 2)
    scale, offset, low, high = (moved.pop(name).view(axes) for name in Seen._fields)
    values = image.to(torch.float32, copy=True)
    torch.maximum(values, low, out=values)  # a clamp by tensors takes ten times as long on a CPU
    torch.minimum(values, high, out=values)
    # Two roundings: a fused multiply-add is used for parts of a tensor only, and values would depend on the batch.
    moved["image"] = values.mul_(scale).add_(offset)
    if "label" in moved:
        moved["label"] = moved["label"].long()
    return moved
