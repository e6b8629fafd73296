"""Cases -> WebDataset shards and their index. Two builds of the same cases are the same bytes.

A sample is `<key>.image.npy` (C, *S), `<key>.label.npy` (*S) where there is a label, and `<key>.json`;
compressed shards hold `.npy.zst`. Images are stored as uint8 or int16 where value = offset + scale * stored
gives them back, else as float32.
"""

import hashlib
import io
import json
import os
import re
from array import array
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, BinaryIO, Literal

import numpy as np

from cclmpc_dist.data.case import Case
from cclmpc_dist.data.index import DTYPES, FOREGROUND, TRAIN, VAL, VERSION, Index, save, summary
from cclmpc_dist.errors import InputError

TOLERANCE = 1e-3  # of a step between stored values; LA's float32 rounding stays below 2e-5
MIB = 1 << 20
TAR_BLOCK = 512
ZSTD_LEVEL = 3
Compression = Literal["none", "zstd"]


def write(
    cases: Iterable[Case],
    out: str | Path,
    *,
    source: str,
    classes: int | None = None,
    labelled: int | None = None,
    val_last: int = 0,
    shard_bytes: int = 64 * MIB,
    compress: Compression = "none",
) -> Index:
    """Write a corpus to the empty or new folder `out` and open its index.

    classes: labels lie in [0, classes); unset is the largest label + 1, at least 2. labelled: the first N
    training cases count as labelled, unset every one that has a label; runs can choose otherwise. val_last:
    the last N cases are for reports only. A shard closes before it would exceed `shard_bytes`. Raises
    InputError naming the case; a build that fails leaves nothing.
    """
    out = Path(out)
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise InputError(f"{out}: exists and is not empty: remove it or choose another folder")
    with _whole(out):
        corpus = _Columns(classes)
        with _Shards(out, shard_bytes) as shards:
            for case in cases:
                corpus.check(case)
                stored, scale, offset = quantise(case.image)
                members = _members(case, stored, scale, offset, compress)
                corpus.add(case, stored, scale, offset, *shards.add(case.key, members))
        columns = corpus.finish(labelled, val_last)
        manifest = {
            "version": VERSION, "format": "webdataset", "source": source, "compress": compress,
            "cropped_by_label": corpus.cropped_by_label, "shards": shards.done,
        }  # fmt: skip
        return save(out, columns, manifest | summary(columns))


@contextmanager
def _whole(out: Path) -> Iterator[None]:
    """Make the folder `out`, in which nothing lies, and take back what was made if the block fails."""
    made = [folder for folder in (out, *out.parents) if not folder.exists()]
    out.mkdir(parents=True, exist_ok=True)
    try:
        yield
    except BaseException:
        for file in out.iterdir():
            file.unlink()
        for folder in made:
            if not any(folder.iterdir()):
                folder.rmdir()
        raise


def quantise(image: np.ndarray) -> tuple[np.ndarray, float, float]:
    """(stored, scale, offset): stored is uint8 or int16 where offset + scale * stored gives `image` back to
    TOLERANCE of a step, else float32 with scale 1 and offset 0."""
    values = _distinct(image)
    if values is None:
        return image.astype("<f4"), 1.0, 0.0
    if image.dtype.kind in "iub" or np.array_equal(values, np.round(values)):
        for dtype in DTYPES[:2]:
            if values[0] >= np.iinfo(dtype).min and values[-1] <= np.iinfo(dtype).max:
                return image.astype(dtype), 1.0, 0.0
    scale = _step(values)
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


def _members(case: Case, stored: np.ndarray, scale: float, offset: float, compress: Compression) -> dict[str, bytes]:
    """Tar members by extension. The JSON tells all that is needed to use a volume without the index."""
    spacing = [float(size) for size in case.spacing]
    meta = {
        "normalisation": "none", "cropped_by_label": False, "patient": case.key,
        "affine": np.diag([*spacing, *[1.0] * (4 - len(spacing))]).tolist(), **case.meta,
        "key": case.key, "scale": scale, "offset": offset, "spacing": spacing,
    }  # fmt: skip
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


class _Hashing:
    """The file that a tar is written to, hashed on the way."""

    def __init__(self, file: BinaryIO) -> None:
        self.file = file
        self.hash = hashlib.sha256()
        self.bytes = 0

    def write(self, data: bytes) -> int:
        self.hash.update(data)
        self.bytes += len(data)
        return self.file.write(data)


class _Shards:
    """Tar files of at most `limit` bytes, each under a temporary name until it is complete."""

    def __init__(self, out: Path, limit: int) -> None:
        self.out, self.limit = out, limit
        self.done: list[dict[str, Any]] = []
        self._tar: Any = None

    def __enter__(self) -> "_Shards":
        return self

    def __exit__(self, kind: type | None, *_: object) -> None:
        if kind is None:
            self.close()
        elif self._tar is not None:
            self._tar.close()
            self._file.close()

    def add(self, key: str, members: dict[str, bytes]) -> tuple[int, dict[str, tuple[int, int]]]:
        """Write a sample. Returns its shard and each member's (offset, bytes) by the first word of its
        extension."""
        size = sum(TAR_BLOCK + _padded(len(data)) for data in members.values())
        if self._tar is not None and self._tar.tarstream.offset + size + 2 * TAR_BLOCK > self.limit:
            self.close()
        if self._tar is None:
            self._begin()
        places, at = {}, self._tar.tarstream.offset
        for name in sorted(members):  # the order in which TarWriter writes them
            places[name.partition(".")[0]] = (at + TAR_BLOCK, len(members[name]))
            at += TAR_BLOCK + _padded(len(members[name]))
        self._tar.write({"__key__": key, **members})
        assert self._tar.tarstream.offset == at, "a member's header is not one tar block"
        self._tar.tarstream.members.clear()  # tarfile keeps them all
        self._samples += 1
        return len(self.done), places

    def close(self) -> None:
        """Complete the open shard: end of archive, flush to disk, its final name."""
        if self._tar is None:
            return
        self._tar.close()
        self._file.flush()
        os.fsync(self._file.fileno())
        self._file.close()
        self._part.rename(self._part.with_suffix(""))
        digest = self._sink.hash.hexdigest()
        entry = {
            "name": self._part.stem,
            "bytes": self._sink.bytes,
            "samples": self._samples,
            "sha256": digest,
        }
        self.done.append(entry)
        self._tar = None

    def _begin(self) -> None:
        from webdataset import TarWriter

        self._part = self.out / f"shard-{len(self.done):06d}.tar.part"
        self._file = open(self._part, "wb")  # noqa: SIM115 (closed when the shard is full)
        self._sink, self._samples = _Hashing(self._file), 0
        self._tar = TarWriter(self._sink, mtime=0, encoder=False, compress=False)


def _padded(size: int) -> int:
    return -(-size // TAR_BLOCK) * TAR_BLOCK


class _Columns:
    """The index while it grows: one machine array a column."""

    INTEGERS = (
        "shard",
        "image_at",
        "image_bytes",
        "label_at",
        "label_bytes",
        "json_at",
        "json_bytes",
        "dtype",
    )

    def __init__(self, classes: int | None) -> None:
        self.limit = classes
        self.classes = classes or 2
        self.form = (0, 0)  # channels, dims
        self.cropped_by_label = False
        self.integers = {name: array("q") for name in self.INTEGERS}
        self.shape, self.spacing, self.scale, self.offset = array("q"), array("d"), array("d"), array("d")
        self.keys: dict[str, None] = {}
        self.voxels: list[tuple[int, int, np.ndarray]] = []  # row, class, (v, dims)

    def check(self, case: Case) -> None:
        """Refuse what no run could use, naming the case."""
        form = (case.image.shape[0], case.image.ndim - 1)
        if not re.fullmatch(r"[\w\-]{1,80}", case.key, re.ASCII):
            raise InputError(f"case {case.key!r}: names have up to 80 letters, digits, - and _, no dots: rename it")
        if case.key in self.keys:
            raise InputError(f"case {case.key}: comes twice: rename one")
        if self.keys and form != self.form:
            raise InputError(
                f"case {case.key}: (channels, axes) are {form}, those before have {self.form}: make them alike"
            )
        if not np.isfinite(case.image).all():
            raise InputError(f"case {case.key}: the image holds NaN or infinity: repair it or leave it out")
        if case.label is not None:
            self._check_label(case)
        self.form = form

    def _check_label(self, case: Case) -> None:
        assert case.label is not None
        if case.label.shape != case.image.shape[1:]:
            shapes = f"{case.label.shape} and the image {case.image.shape[1:]}"
            raise InputError(f"case {case.key}: the label has shape {shapes}: they must be the same")
        low, high = int(case.label.min()), int(case.label.max())
        if low < 0 or high > 255 or (self.limit and high >= self.limit):
            top = self.limit or 256
            raise InputError(
                f"case {case.key}: label {high if low >= 0 else low} is not in 0..{top - 1}: "
                "repair it or raise --classes"
            )
        self.classes = max(self.classes, high + 1)

    def add(
        self,
        case: Case,
        stored: np.ndarray,
        scale: float,
        offset: float,
        shard: int,
        places: dict[str, tuple[int, int]],
    ) -> None:
        row = {"shard": shard, "dtype": DTYPES.index(stored.dtype)}
        for part in ("image", "label", "json"):
            row[f"{part}_at"], row[f"{part}_bytes"] = places.get(part, (0, 0))
        for name, column in self.integers.items():
            column.append(row[name])
        self.shape.extend(stored.shape)
        self.spacing.extend(case.spacing)
        self.scale.append(scale)
        self.offset.append(offset)
        self.cropped_by_label |= bool(case.meta.get("cropped_by_label", False))
        if case.label is not None:
            self.voxels += [(len(self.keys), c, v) for c, v in foreground(case.label)]
        self.keys[case.key] = None

    def finish(self, labelled: int | None, val_last: int) -> dict[str, np.ndarray]:
        """The arrays of index.py's docstring."""
        n, dims = len(self.keys), self.form[1]
        if not n:
            raise InputError("the corpus holds no cases: nothing to write")
        if val_last >= n:
            raise InputError(f"--val-last {val_last} leaves none of {n} cases to train on: lower it")
        split = np.where(np.arange(n) < n - val_last, TRAIN, VAL).astype(np.uint8)
        columns: dict[str, np.ndarray] = {name: np.array(column, np.int64) for name, column in self.integers.items()}
        columns["dtype"] = columns["dtype"].astype(np.uint8)
        columns["shard"] = columns["shard"].astype(np.int32)
        columns["shape"] = np.array(self.shape, np.int32).reshape(n, 1 + dims)
        columns["spacing"] = np.array(self.spacing).reshape(n, dims)
        columns |= {"scale": np.array(self.scale), "offset": np.array(self.offset), "split": split}
        columns["labelled"] = _labelled(columns["label_bytes"] > 0, split, labelled)
        return columns | self._key_columns() | self._voxel_columns(n, dims)

    def _key_columns(self) -> dict[str, np.ndarray]:
        names = list(self.keys)
        at = np.concatenate([[0], np.cumsum([len(name) for name in names])])
        order = sorted(range(len(names)), key=names.__getitem__)
        data = np.frombuffer("".join(names).encode(), np.uint8)
        return {"key_bytes": data, "key_at": at.astype(np.int64), "key_order": np.array(order, np.int64)}

    def _voxel_columns(self, n: int, dims: int) -> dict[str, np.ndarray]:
        foregrounds = self.classes - 1
        counts = np.zeros(n * foregrounds + 1, np.int64)
        for row, label, voxels in self.voxels:
            counts[row * foregrounds + label] = len(voxels)  # label 1 is the first: one later than its start
        taken = [np.empty((0, dims), np.int32), *[voxels for _, _, voxels in self.voxels]]
        return {"voxel_at": np.cumsum(counts), "voxels": np.concatenate(taken).astype(np.int32)}


def foreground(label: np.ndarray) -> list[tuple[int, np.ndarray]]:
    """(class, (v, dims) voxels) of each class from 1 on, at most FOREGROUND of them, evenly taken in memory
    order."""
    result = []
    for value in np.unique(label[label > 0]):
        at = np.flatnonzero(label == value)
        picked = at[np.linspace(0, len(at) - 1, min(FOREGROUND, len(at))).round().astype(np.int64)]
        result.append((int(value), np.stack(np.unravel_index(picked, label.shape), axis=1)))
    return result


def _labelled(has_label: np.ndarray, split: np.ndarray, count: int | None) -> np.ndarray:
    candidates = np.flatnonzero(has_label & (split == TRAIN))
    if count is not None and count > len(candidates):
        raise InputError(f"--labelled {count}: only {len(candidates)} training cases have a label: lower it")
    flags = np.zeros(len(split), np.uint8)
    flags[candidates[:count]] = 1
    return flags
