"""The files that `cclmpc bench loader` reads: one corpus as UA-MT, as nnU-Net and as this project keep it."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from cclmpc_dist.data import phantom, shards
from cclmpc_dist.data.case import Case
from cclmpc_dist.data.encode import Compression
from cclmpc_dist.data.formats.h5 import LA_FILE, LaFile, la_h5
from cclmpc_dist.data.index import Index
from cclmpc_dist.data.reader import Reader
from cclmpc_dist.errors import InputError

BLOSC2_BLOCK, BLOSC2_CHUNK = 128 << 10, 6 << 20  # bytes, nnU-Net's limits
BLOSC2_REACH = 1.5  # patches that a chunk is long at most, the mean of its axes
Pair = tuple[Path, Path]  # image and label


@dataclass(frozen=True)
class Files:
    """One corpus, several times. blosc2: None where it is not asked for."""

    h5: list[Path]
    shards: Index
    shards_zstd: Index
    blosc2: list[Pair] | None
    blosc2_stored: list[Pair] | None


def lay_out(
    work: Path, folder: str | Path | None, list_file: str | Path | None, cases: int, size: int, patch: Sequence[int],
    shard_bytes: int, with_blosc2: bool,
) -> Files:  # fmt: skip
    """Write to `work` what is not there yet: the first `cases` of an la-h5 folder, else phantoms of about `size`
    voxels an axis. Raises InputError."""
    if folder is None:
        for number in range(cases):
            write_h5(work / "h5", phantom.case(number, size=size))
        folder, list_file = work / "h5", None
    handles = la_h5(folder, list_file)[:cases]
    raw, packed = (_shards(work / name, handles, name, shard_bytes) for name in ("none", "zstd"))
    if not with_blosc2:
        return Files([handle.images[0] for handle in handles], raw, packed, None, None)
    reader = Reader(raw)
    pairs: dict[str, list[Pair]] = {"blosc2": [], "stored": []}
    for row, handle in enumerate(handles):
        case = handle.read()
        assert case.label is not None, "LA has labels everywhere"
        for name, image in (("blosc2", case.image.astype(np.float32)), ("stored", reader.image(row))):
            pairs[name].append(write_blosc2(work / name / case.key, image, case.label[None], patch))
    return Files([handle.images[0] for handle in handles], raw, packed, pairs["blosc2"], pairs["stored"])


def _shards(out: Path, handles: Sequence[LaFile], compress: Compression, shard_bytes: int) -> Index:
    return shards.write(handles, out, source="bench", compress=compress, shard_bytes=shard_bytes)


def write_h5(folder: Path, case: Case) -> Path:
    """A case as UA-MT stores one: chunked, gzip."""
    import h5py

    path = folder / case.key / LA_FILE
    path.parent.mkdir(parents=True)
    with h5py.File(path, "w") as file:
        file.create_dataset("image", data=case.image[0], compression="gzip")
        file.create_dataset("label", data=case.label, compression="gzip")
    return path


def blosc2() -> Any:
    """The module. Raises InputError where it is not installed."""
    try:
        import blosc2 as module
    except ImportError:
        raise InputError("bench loader: the rival blosc2 needs the extra `bench`: pip install '.[bench]', or "
                         "leave it out with --rivals gzip_h5,webdataset") from None  # fmt: skip
    return module


def write_blosc2(stem: Path, image: np.ndarray, label: np.ndarray, patch: Sequence[int]) -> Pair:
    """A case (C, *S) as nnU-Net v2 stores one: .b2nd files of image and label (int8), LZ4HC at level 5, both in the
    image's chunks and blocks."""
    module = blosc2()
    stem.parent.mkdir(parents=True, exist_ok=True)
    chunks, blocks = partitions(image.shape, patch, image.itemsize)
    packing = {"codec": module.Codec.LZ4HC, "clevel": 5, "nthreads": 1}
    pair = stem.with_name(f"{stem.name}.b2nd"), stem.with_name(f"{stem.name}_seg.b2nd")
    for path, values in zip(pair, (image, label.astype(np.int8)), strict=True):
        module.asarray(np.ascontiguousarray(values), urlpath=str(path), chunks=chunks, blocks=blocks, cparams=packing)
    return pair


def partitions(shape: Sequence[int], patch: Sequence[int], itemsize: int) -> tuple[list[int], list[int]]:
    """Chunks and blocks (C, *S) by nnU-Net's rule.

    A block begins as the patch, each axis rounded up to a power of two; the axis that is longest beside the patch is
    halved until BLOSC2_BLOCK holds it. A chunk grows by a block at a time, along the axis with the fewest blocks, as
    far as the volume, BLOSC2_CHUNK and BLOSC2_REACH let it.
    """
    channels, volume, axes = shape[0], shape[1:], range(len(patch))
    block = [1 << (side - 1).bit_length() for side in patch]
    while channels * math.prod(block) * itemsize > BLOSC2_BLOCK:
        block[max(axes, key=lambda axis: block[axis] / patch[axis])] //= 2
    block = [min(sides) for sides in zip(block, volume, strict=True)]
    chunk = block
    while open_axes := [axis for axis in axes if chunk[axis] < volume[axis]]:
        longer = list(chunk)
        axis = min(open_axes, key=lambda axis: chunk[axis] / block[axis])
        longer[axis] = min(chunk[axis] + block[axis], volume[axis])
        reach = sum(longer[axis] / patch[axis] for axis in axes) / len(patch)
        if channels * math.prod(longer) * itemsize > BLOSC2_CHUNK or reach > BLOSC2_REACH:
            break
        chunk = longer
    return [channels, *chunk], [channels, *block]
