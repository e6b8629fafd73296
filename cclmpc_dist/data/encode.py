"""One case -> the bytes of its sample, and what the index says of it. Depends on nothing but the case.

Images are stored as uint8 or int16 where value = offset + scale * stored gives them back, else as float32. A clip is
never applied here, only written down in stored units.
"""

import io
import json
import re
from dataclasses import dataclass
from typing import Literal

import numpy as np

from cclmpc_dist.data.case import Case, Handle
from cclmpc_dist.data.index import DTYPES, FOREGROUND
from cclmpc_dist.data.seen import Seen
from cclmpc_dist.errors import InputError

TOLERANCE = 1e-3  # of a step between stored values; LA's float32 rounding stays below 2e-5
ZSTD_LEVEL = 3
Compression = Literal["none", "zstd"]


@dataclass
class Sample:
    """What a shard and its index take of a case.

    members: tar members by extension. shape: C and S as stored. top: the largest label, 0 without one.
    voxels: (class, (v, dims)) as `foreground` gives them.
    """

    key: str
    patient: str
    members: dict[str, bytes]
    shape: tuple[int, ...]
    spacing: tuple[float, ...]
    dtype: int
    seen: Seen
    cropped_by_label: bool
    top: int
    voxels: list[tuple[int, np.ndarray]]


def encode(handle: Handle, classes: int | None, compress: Compression) -> Sample:
    """Read a case, check it and encode it. Raises InputError naming it."""
    case = handle.read()
    check(case, classes)
    stored, step, zero = _stored(case.image)
    seen = Seen(
        case.seen.scale * step, case.seen.offset + case.seen.scale * zero,
        *(((bound - zero) / step).astype(np.float32).astype(float) for bound in (case.seen.low, case.seen.high)),
    )  # fmt: skip
    meta = _meta(case, seen)
    return Sample(
        case.key, str(meta["patient"]), _members(case, stored, meta, compress), stored.shape, case.spacing,
        DTYPES.index(stored.dtype), seen, cropped_by_label=bool(meta["cropped_by_label"]),
        top=0 if case.label is None else int(case.label.max()),
        voxels=[] if case.label is None else foreground(case.label),
    )  # fmt: skip


def check(case: Case, classes: int | None = None) -> None:
    """Refuse what no run could use, naming the case. Labels must lie in [0, classes)."""
    if not re.fullmatch(r"[\w\-]{1,80}", case.key, re.ASCII):
        raise InputError(f"case {case.key!r}: names have up to 80 letters, digits, - and _, no dots: rename it")
    if not np.isfinite(case.image).all():
        raise InputError(f"case {case.key}: the image holds NaN or infinity: repair it or leave it out")
    if case.label is None:
        return
    if case.label.shape != case.image.shape[1:]:
        shapes = f"{case.label.shape} and the image {case.image.shape[1:]}"
        raise InputError(f"case {case.key}: the label has shape {shapes}: they must be the same")
    low, high = int(case.label.min()), int(case.label.max())
    if low < 0 or high > 255 or (classes and high >= classes):
        top = classes or 256
        raise InputError(
            f"case {case.key}: label {high if low >= 0 else low} is not in 0..{top - 1}: repair it or raise --classes"
        )


def _stored(image: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """(stored, scale, offset) as `quantise` has it, scale and offset (1,) where one fits all channels of an image
    (C, *S), else (C,)."""
    together = quantise(image)
    apart = [quantise(channel) for channel in image] if len(image) > 1 and together[0].dtype.kind == "f" else []
    if any(channel.dtype.kind == "f" for channel, _, _ in apart) or not apart:
        return together[0], np.array([together[1]]), np.array([together[2]])
    channels, scales, offsets = zip(*apart, strict=True)
    return np.stack(channels), np.array(scales), np.array(offsets)


def quantise(image: np.ndarray) -> tuple[np.ndarray, float, float]:
    """(stored, scale, offset): stored is uint8 or int16 where offset + scale * stored gives `image` back to
    TOLERANCE of a step, else float32 with scale 1 and offset 0."""
    values = _distinct(image)
    if values is None:
        return image.astype("<f4"), 1.0, 0.0
    whole = image.dtype.kind in "iub" or np.array_equal(values, np.round(values))
    if whole:
        for dtype in DTYPES[:2]:
            if values[0] >= np.iinfo(dtype).min and values[-1] <= np.iinfo(dtype).max:
                return image.astype(dtype), 1.0, 0.0
    scale = 1.0 if whole and values[-1] - values[0] < 1 << 16 else _step(values)
    if scale is None:
        return image.astype("<f4"), 1.0, 0.0
    offset, levels = float(values[0]), round((values[-1] - values[0]) / scale)
    dtype = DTYPES[0] if levels < 256 else DTYPES[1]
    offset -= np.iinfo(dtype).min * scale  # level 0 is the type's smallest value
    return np.round((image - offset) / scale).astype(dtype), float(scale), float(offset)


def _distinct(image: np.ndarray) -> np.ndarray | None:
    """The sorted distinct values, float64, or None where they cannot fit 16 bits. A sample of them tells most
    noise apart."""
    if len(np.unique(image.reshape(-1)[: 1 << 18])) > 1 << 16:
        return None
    values = np.unique(image)
    return None if len(values) > 1 << 16 else values.astype(np.float64)


def _step(values: np.ndarray) -> float | None:
    """The spacing of evenly spaced values (gaps allowed), None where there is none of at most 65536
    levels."""
    if len(values) < 2:
        return 1.0
    span, smallest = values[-1] - values[0], np.diff(values).min()
    for part in (1, 2, 3, 4):  # the smallest gap may itself be a few steps
        if not span * part / smallest < 1 << 16:
            return None
        scale = span / max(1, round(span * part / smallest))
        for _ in range(3):  # rounding of the smallest gap: refit to the whole span
            level = np.round((values - values[0]) / scale)
            scale = span / level[-1]
        if level[-1] < 1 << 16 and np.abs(values[0] + scale * level - values).max() <= TOLERANCE * scale:
            return float(scale)
    return None


def _meta(case: Case, seen: Seen) -> dict[str, object]:
    """The sample's JSON: all that is needed to use a volume without the index. `seen`: of what is stored."""
    spacing = [float(size) for size in case.spacing]
    return {
        "normalisation": "none", "cropped_by_label": False, "patient": case.key,
        "affine": np.diag([*spacing, *[1.0] * (4 - len(spacing))]).tolist(), **case.meta,
        "key": case.key, "spacing": spacing, **seen.said(),
    }  # fmt: skip


def _members(case: Case, stored: np.ndarray, meta: dict[str, object], compress: Compression) -> dict[str, bytes]:
    arrays = {"image.npy": _npy(stored)} | (
        {} if case.label is None else {"label.npy": _npy(case.label.astype(np.uint8))}
    )
    if compress == "zstd":
        import zstandard

        packer = zstandard.ZstdCompressor(level=ZSTD_LEVEL)
        arrays = {f"{name}.zst": packer.compress(data) for name, data in arrays.items()}
    return arrays | {"json": json.dumps(meta, sort_keys=True, allow_nan=False).encode()}


def _npy(values: np.ndarray) -> bytes:
    file = io.BytesIO()
    np.lib.format.write_array(file, np.ascontiguousarray(values), version=(1, 0), allow_pickle=False)
    return file.getvalue()


def foreground(label: np.ndarray) -> list[tuple[int, np.ndarray]]:
    """(class, (v, dims) voxels) of each class from 1 on, at most FOREGROUND of them, evenly taken in memory
    order."""
    result = []
    for value in np.unique(label[label > 0]):
        at = np.flatnonzero(label == value)
        picked = at[np.linspace(0, len(at) - 1, min(FOREGROUND, len(at))).round().astype(np.int64)]
        result.append((int(value), np.stack(np.unravel_index(picked, label.shape), axis=1)))
    return result
