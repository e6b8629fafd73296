"""The file of an index: one column an array, in safetensors, memory-mapped.

Columns of `index.safetensors` (n samples in corpus order; offsets in bytes from the start of the shard's
file):
    shard (n)                 number of the shard
    image_at, image_bytes (n) the image's .npy or .npy.zst
    label_at, label_bytes (n) the label's; bytes 0 where there is none
    json_at, json_bytes (n)   the sample's JSON
    dtype (n)                 code of the stored image, see index.DTYPES
    shape (n, 1 + dims)       C and S
    scale, offset (n, w)      the network sees offset + scale * clip(stored, low, high)
    low, high (n, w)          bounds in stored units; -inf, inf where nothing is clipped
                              w: C, or 1 where no sample's channels differ in any of the four
    spacing (n, dims)         mm
    labelled (n)              1: labelled unless the run's configuration says otherwise;  split (n)  0 train, 1 val
    key_bytes, key_at (n+1)   UTF-8 names end to end;  key_order (n)  rows sorted by name
    voxel_at (n * (classes - 1) + 1), voxels (v, dims)  up to FOREGROUND voxels of each sample and class from 1 on
"""

import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from cclmpc_dist.data.seen import AS_STORED, Seen
from cclmpc_dist.errors import InputError

INDEX = "index.safetensors"
VERSION = 3
UNCLIPPED = 1  # the version that knows no low and high; up to 2, one number is that of all channels
CHUNK = 1 << 18  # rows
_TYPES = {"I64": "<i8", "F64": "<f8", "F32": "<f4", "I32": "<i4", "U8": "<u1"}  # in safetensors' order


def chunks(n: int) -> Iterator[slice]:
    """n rows, so many at a time that what is computed of them is small beside the index."""
    return (slice(start, start + CHUNK) for start in range(0, n, CHUNK))


def mapped(file: Path, version: int) -> dict[str, np.ndarray]:
    """Views into the file, an 8-byte length, a JSON header, the arrays' bytes; what an earlier version lacks is made
    up. Raises InputError."""
    try:
        data = np.memmap(file, np.uint8, "r").view(np.ndarray)
        length = int(data[:8].view("<u8")[0])
        header = json.loads(data[8 : 8 + length].tobytes())
        header.pop("__metadata__", None)
        body = data[8 + length :]
        columns = {name: _view(body, entry) for name, entry in header.items()}
    except (ValueError, KeyError, IndexError, TypeError, AttributeError, OverflowError, RecursionError):
        raise InputError(f"{file}: not an index: shard again") from None
    return columns if version == VERSION else _as_today(columns, version)


def _as_today(columns: dict[str, np.ndarray], version: int) -> dict[str, np.ndarray]:
    if version == UNCLIPPED and "shard" in columns:
        n = columns["shard"].shape[:1]
        none = {name: np.broadcast_to(getattr(AS_STORED, name)[0].astype("<f4"), n) for name in ("low", "high")}
        columns = none | columns
    return {name: values.reshape(-1, 1) if name in Seen._fields else values for name, values in columns.items()}


def create(path: Path, layout: Mapping[str, tuple[str, tuple[int, ...]]]) -> dict[str, np.ndarray]:
    """Columns of zeros for a new index, mapped for writing: they need not fit into memory. `index.seal` gives the file
    its name. layout: safetensors' type and the shape of each."""
    header: dict[str, dict[str, Any]] = {}
    at = 0
    for name in sorted(layout, key=lambda name: ([*_TYPES].index(layout[name][0]), name)):
        code, shape = layout[name]
        stop = at + int(np.prod(shape)) * np.dtype(_TYPES[code]).itemsize
        header[name] = {"dtype": code, "shape": shape, "data_offsets": [at, stop]}
        at = stop
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    file = path / f"{INDEX}.part"
    with open(file, "wb") as new:
        new.write(len(text).to_bytes(8, "little") + text)
        new.truncate(8 + len(text) + at)
    body = np.memmap(file, np.uint8, "r+").view(np.ndarray)[8 + len(text) :]
    return {name: _view(body, entry) for name, entry in header.items()}


def _view(body: np.ndarray, entry: dict[str, Any]) -> np.ndarray:
    start, stop = entry["data_offsets"]
    return body[start:stop].view(_TYPES[entry["dtype"]]).reshape(entry["shape"])
