"""Volumes and crops out of the shards. Layout: C channels, S spatial."""

import errno
import io
import json
import math
import mmap
import threading
from collections import OrderedDict
from collections.abc import Callable, Collection, Hashable, Sequence
from functools import lru_cache
from typing import Any, TypeVar

import numpy as np

from cclmpc_dist.data.index import DTYPES, Index
from cclmpc_dist.errors import InputError, NoFilesLeft

MAPPED = 64  # shards kept mapped at a time
LABEL = len(DTYPES)  # dtype code of labels, beside those of images
V = TypeVar("V")


def recent(cache: "OrderedDict[Any, V]", key: Hashable, make: Callable[[], V], limit: int) -> V:
    """cache[key], made where it is missing; the least recently used entry above `limit` goes."""
    if key in cache:
        cache.move_to_end(key)
        return cache[key]
    value = cache[key] = make()
    if len(cache) > limit:
        cache.popitem(last=False)
    return value


@lru_cache(maxsize=4096)
def npy_header(code: int, shape: tuple[int, ...]) -> bytes:
    """The bytes before the first voxel of a .npy file of stored type `code` (an index into DTYPES, or
    LABEL)."""
    file = io.BytesIO()
    dtype = np.dtype("u1") if code == LABEL else DTYPES[code]
    header = {"descr": np.lib.format.dtype_to_descr(dtype), "fortran_order": False, "shape": shape}
    np.lib.format.write_array_header_1_0(file, header)
    return file.getvalue()


class Reader:
    """Reads samples through memory maps. One a thread. stop: once set, Stopped is raised instead of waiting for a
    store."""

    def __init__(self, index: Index, stop: threading.Event | None = None) -> None:
        self.index, self.stop = index, stop
        self._maps: OrderedDict[int, mmap.mmap] = OrderedDict()

    def image(self, row: int) -> np.ndarray:
        """Stored image (C, *S), a read-only view of the map unless the shards are compressed. Raises
        InputError."""
        shape = tuple(self.index["shape"][row].tolist())
        return self._array(row, "image", int(self.index["dtype"][row]), shape)

    def label(self, row: int) -> np.ndarray:
        """Label (*S), uint8. Raises InputError, also where the sample has none."""
        if not self.index["label_bytes"][row]:
            raise InputError(f"{self._where(row)} has no label")
        return self._array(row, "label", LABEL, tuple(self.index["shape"][row, 1:].tolist()))

    def volume(self, row: int) -> tuple[np.ndarray, np.ndarray | None]:
        """Stored image (C, *S) and label (*S), None where there is none. Raises InputError naming shard and
        key."""
        return self.image(row), self.label(row) if self.index["label_bytes"][row] else None

    def normalised(self, row: int) -> np.ndarray:
        """Image (C, *S) float32 as the network sees it, bit for bit as loader.to_device makes it of a batch."""
        return self.index.seen(row).applied(self.image(row))

    def meta(self, row: int) -> dict[str, Any]:
        """The sample's JSON. Raises InputError."""
        try:
            return dict(json.loads(bytes(self._bytes(row, "json"))))
        except (ValueError, TypeError):
            raise InputError(f"{self._where(row)}: its JSON cannot be read: copy the shard again") from None

    def unit(self, row: int) -> str:
        """What the spacing is in: mm; voxel or pixel where the source tells none. Raises InputError."""
        return str(self.meta(row).get("unit", "mm"))

    def background(self, row: int) -> list[float]:
        """The stored value nearest to normalised 0, of each channel or of all."""
        dtype = DTYPES[self.index["dtype"][row]]
        offset, scale = self.index["offset"][row].tolist(), self.index["scale"][row].tolist()
        values = [-zero / step for zero, step in zip(offset, scale, strict=True)]
        if dtype.kind == "f":
            return values
        lowest, highest = (0, 255) if dtype == np.uint8 else (-32768, 32767)
        return [min(max(round(value), lowest), highest) for value in values]

    def keep(self, shards: Collection[int]) -> None:
        """Let go of the maps of all other shards."""
        for shard in self._maps.keys() - set(shards):
            del self._maps[shard]

    def _where(self, row: int) -> str:
        return f"{self.index.shard_name(int(self.index['shard'][row]))}: case {self.index.key(row)}"

    def _map(self, shard: int) -> mmap.mmap:
        return recent(self._maps, shard, lambda: self._open(shard), MAPPED)

    def _open(self, shard: int) -> mmap.mmap:
        try:
            with self.index.open_shard(shard, self.stop) as file:
                return mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)  # holds the file open, and its lock with it
        except OSError as error:
            if error.errno != errno.EMFILE:
                raise
            raise NoFilesLeft(f"{self.index.shard_name(shard)}: this process may open no more files: raise the limit "
                              "(ulimit -n), or lower data.workers") from None  # fmt: skip

    def _bytes(self, row: int, part: str) -> memoryview:
        """A view of the map, which stays open with it: copying a map's bytes would hold Python's lock while a disk is
        waited for."""
        start = int(self.index[f"{part}_at"][row])
        view = memoryview(self._map(int(self.index["shard"][row])))
        return view[start : start + int(self.index[f"{part}_bytes"][row])]

    def _array(self, row: int, part: str, code: int, shape: tuple[int, ...]) -> np.ndarray:
        head = npy_header(code, shape)
        if self.index.compress == "zstd":
            buffer: Any = self._decompress(row, part)
            start = 0
        else:
            buffer, start = self._map(int(self.index["shard"][row])), int(self.index[f"{part}_at"][row])
        dtype = np.dtype(np.uint8) if code == LABEL else DTYPES[code]
        short = len(buffer) - start - len(head) < math.prod(shape) * dtype.itemsize
        if short or buffer[start : start + len(head)] != head:
            raise InputError(f"{self._where(row)}: its {part} is damaged: copy the shard again")
        return np.ndarray(shape, dtype, buffer, start + len(head))

    def _decompress(self, row: int, part: str) -> bytes:
        import zstandard

        try:
            return zstandard.ZstdDecompressor().decompress(self._bytes(row, part))
        except zstandard.ZstdError as error:
            raise InputError(
                f"{self._where(row)}: its {part} cannot be decompressed ({error}): copy the shard again"
            ) from None


def region(volume: np.ndarray, start: Sequence[int], size: Sequence[int], fill: float | Sequence[float]) -> np.ndarray:
    """`size` voxels of `volume` from `start` on, leading axes beyond those taken whole.

    A view where it lies inside the volume, else a new array that holds `fill`, a number or one a channel, outside.
    """
    lead = volume.shape[: volume.ndim - len(size)]
    spans = [(max(a, 0), min(a + n, limit)) for a, n, limit in zip(start, size, volume.shape[len(lead) :], strict=True)]
    inside: tuple[Any, ...] = (..., *[slice(low, max(low, high)) for low, high in spans])
    inner = volume[inside]
    if inner.shape[len(lead) :] == tuple(size):
        return inner
    out = np.full((*lead, *size), np.reshape(fill, np.shape(fill) + (1,) * len(size)), volume.dtype)
    moved: tuple[Any, ...] = (
        ...,
        *[slice(low - a, max(low, high) - a) for a, (low, high) in zip(start, spans, strict=True)],
    )
    out[moved] = inner
    return out


def copy_rows(out: np.ndarray, view: np.ndarray) -> None:
    """out[...] = view. Where the last axis of both is contiguous it is copied as one item, which is twice as
    fast."""
    if out.dtype == view.dtype and out.strides[-1] == view.strides[-1] == view.itemsize:
        row = f"V{view.shape[-1] * view.itemsize}"
        out, view = out.view(row), view.view(row)
    np.copyto(out, view)
