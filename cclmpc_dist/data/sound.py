"""Can the columns of an index be true, before anything believes them."""

from collections.abc import Mapping
from typing import Any

import numpy as np

from cclmpc_dist.data.columns import chunks
from cclmpc_dist.data.seen import Seen

Columns = Mapping[str, np.ndarray]

_TYPES = {
    "shard": "<i4", "image_at": "<i8", "image_bytes": "<i8", "label_at": "<i8", "label_bytes": "<i8", "json_at": "<i8",
    "json_bytes": "<i8", "dtype": "u1", "shape": "<i4", "scale": "<f8", "offset": "<f8", "low": "<f4", "high": "<f4",
    "spacing": "<f8", "labelled": "u1", "split": "u1", "key_bytes": "u1", "key_at": "<i8", "key_order": "<i8",
    "voxel_at": "<i8", "voxels": "<i4",
}  # fmt: skip
_FLOAT32 = np.finfo(np.float32)
_NAMES = np.zeros(256, bool)
_NAMES[[*b"0123456789ABCDEFGHIJKLMNOPQRSTUVWXYZ_abcdefghijklmnopqrstuvwxyz-"]] = True


def structure(columns: Columns) -> str:
    """What cannot be of columns, their types and sizes; empty where all is well. Reads one column."""
    for name, dtype in _TYPES.items():
        if name not in columns or columns[name].dtype != np.dtype(dtype) or not columns[name].ndim:
            return f"column {name} is missing or of another type"
    n, shape = len(columns["shard"]), columns["shape"].shape
    if n == 0 or len(shape) != 2 or shape[1] < 2:
        return "no samples, or no shape"
    expected: dict[str, tuple[int, ...]] = dict.fromkeys(_TYPES, (n,))
    width = columns["scale"].shape[1:]
    expected |= {"shape": (n, shape[1]), "spacing": (n, shape[1] - 1), "key_at": (n + 1,)}
    expected |= {name: columns[name].shape[:1] for name in ("key_bytes", "voxel_at")}
    expected |= dict.fromkeys(Seen._fields, (n, *width))
    expected["voxels"] = (*columns["voxels"].shape[:1], shape[1] - 1)
    for name, size in expected.items():
        if columns[name].shape != size:
            return f"column {name} is of shape {columns[name].shape}, not {size}"
    if width not in ((1,), (columns["shape"][0, 0],)):
        return "column scale does not fit the channels"
    if len(columns["voxel_at"]) < n + 1 or (len(columns["voxel_at"]) - 1) % n:
        return "column voxel_at does not fit the samples"
    if not 0 <= columns["shard"].min() <= columns["shard"].max() < n:
        return "column shard numbers more shards than samples"
    return ""


def values(columns: Columns, manifest: dict[str, Any], itemsize: np.ndarray) -> str:
    """What cannot be of the values, for columns of sound structure; empty where all is well. Reads everything.

    itemsize: bytes a voxel by code of the stored type.
    """
    if columns["shard"].max() >= len(manifest["shards"]):
        return "column shard names others than the manifest"
    n, channels = len(columns["shard"]), columns["shape"][0, 0]
    sizes = np.array([shard["bytes"] for shard in manifest["shards"]])
    for rows in chunks(n):
        part = {name: columns[name][rows] for name in _TYPES if len(columns[name]) == n}
        found = _rows(part, sizes, channels, itemsize, manifest["compress"])
        if found:
            return found
    return _names(columns) or _steps(columns["voxel_at"], len(columns["voxels"]), "voxel_at")


def _rows(columns: Columns, sizes: np.ndarray, channels: int, itemsize: np.ndarray, compress: str) -> str:
    """What cannot be of some samples; sizes: bytes of the shards."""
    shape, size = columns["shape"].astype(np.int64), sizes[columns["shard"]]
    if columns["dtype"].max() >= len(itemsize) or shape.min() < 1 or shape.max() > 1 << 24:
        return "column dtype or shape names what no sample has"
    if (shape[:, 0] != channels).any():
        return "column shape names samples of other channels than the first"
    for part in ("image", "label", "json"):
        at, length = columns[f"{part}_at"], columns[f"{part}_bytes"]
        if at.min() < 0 or length.min() < 0 or (at > size).any() or (length > size - at).any():
            return f"column {part}_at or {part}_bytes leaves the shards"
    voxels = shape[:, 1:].astype(float).prod(axis=1)
    least = {"image": voxels * channels * itemsize[columns["dtype"]], "label": voxels}
    for part, needed in least.items() if compress == "none" else ():
        if ((columns[f"{part}_bytes"] > 0) & (columns[f"{part}_bytes"] < needed)).any():
            return f"column {part}_bytes holds less than column shape asks for"
    if not (columns["image_bytes"].all() and columns["json_bytes"].all()):
        return "column image_bytes or json_bytes is 0"
    if max(columns["split"].max(), columns["labelled"].max()) > 1:
        return "column split or labelled holds others than 0 and 1"
    return _numbers(columns)


def _numbers(columns: Columns) -> str:
    numbers = np.concatenate([columns[name].ravel() for name in ("scale", "offset", "spacing")])
    scale = np.abs(columns["scale"])
    with np.errstate(over="ignore"):
        largest = np.abs(columns["offset"]) + scale * 2**16
    beyond = (largest > _FLOAT32.max) | (scale < _FLOAT32.tiny)  # samples are float32 once they are scaled
    if not np.isfinite(numbers).all() or beyond.any() or (columns["spacing"] <= 0).any():
        return "column scale, offset or spacing holds what cannot be"
    low, high = columns["low"], columns["high"]
    if not ((low <= high) & (low < np.inf) & (high > -np.inf)).all():
        return "column low or high bounds nothing"
    return ""


def _names(columns: Columns) -> str:
    letters, at, order = columns["key_bytes"], columns["key_at"], columns["key_order"]
    if not all(_NAMES[letters[part]].all() for part in chunks(len(letters))) or not _rises(at, 1):
        return "column key_bytes holds others than names"
    held = np.zeros(len(order), bool)
    if order.min() >= 0 and order.max() < len(order):
        for part in chunks(len(order)):
            held[order[part]] = True
    if not held.all():
        return "column key_order is no order"
    return _steps(at, len(letters), "key_at")


def _steps(at: np.ndarray, end: int, name: str) -> str:
    rising = at[0] == 0 and at[-1] == end and _rises(at, 0)
    return "" if rising else f"column {name} does not rise from 0 to {end}"


def _rises(at: np.ndarray, least: int) -> bool:
    return all((np.diff(at[part.start : part.stop + 1]) >= least).all() for part in chunks(len(at)))
