"""How many crops a second one process makes: from the source's gzip HDF5 files, and from shards."""

import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np
import torch

from cclmpc_dist.data import phantom, shards
from cclmpc_dist.data.case import Case
from cclmpc_dist.data.encode import Compression
from cclmpc_dist.data.formats.h5 import LA_FILE, la_h5
from cclmpc_dist.data.index import select
from cclmpc_dist.data.loader import Batch, Stream


def bench_loader(
    folder: str | Path | None = None,
    list_file: str | Path | None = None,
    *,
    patch: tuple[int, int, int] = (112, 112, 80),
    batch: int = 4,
    cases: int = 16,
    repeats: int = 7,
    steps: int = 100,
    size: int = 128,
) -> list[dict[str, Any]]:
    """Crops (image and label) a second, four ways in turn, the median of `repeats`; one thread, files in the
    page cache.

    gzip_h5: UA-MT's way, one whole volume read, turned and flipped for a crop. shards, shards_zstd: `batch`
    crops by Stream.batch, all draws and the collation included, as stored (normalisation happens on the
    device). memcpy: the copy of that same batch and nothing else. folder: an la-h5 corpus, its first `cases`
    are used; unset, phantoms of about
    `size` voxels an axis.
    """
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as work:
        name = "LA" if folder else "phantom"
        files = _files(Path(work), folder, list_file, cases, size)
        ways = _ways(Path(work), files, patch, batch)
        rates: dict[str, list[float]] = {variant: [] for variant in ways}
        for _ in range(repeats):
            for variant, (make, crops, share) in ways.items():
                rates[variant].append(crops * _rate(make, max(2, steps // share)))
    torch.set_num_threads(threads)
    case = f"{name} {'x'.join(map(str, patch))} batch {batch}"
    return _records(case, {variant: median(values) for variant, values in rates.items()})


def _records(case: str, rates: dict[str, float]) -> list[dict[str, Any]]:
    """Crops a second of each variant, and the ratio to the two it is compared with."""
    records = []
    for variant, rate in rates.items():
        for metric, value, unit in (
            ("rate", rate, "crops/s"),
            ("over gzip_h5", rate / rates["gzip_h5"], "x"),
            ("share of memcpy", rate / rates["memcpy"], "fraction"),
        ):
            record = {"bench": "loader", "case": case, "variant": variant, "metric": metric}
            records.append(record | {"value": value, "unit": unit})
    return records


def _rate(make: Callable[[int], object], steps: int) -> float:
    make(0)
    begin = time.perf_counter()
    for step in range(steps):
        make(step)
    return steps / (time.perf_counter() - begin)


def _ways(
    work: Path, files: list[Path], patch: tuple[int, int, int], batch: int
) -> dict[str, tuple[Callable[[int], object], int, int]]:
    """By variant: what makes crops at a step, how many, and by how much it is slower, so takes fewer
    steps."""
    raw, packed = (_stream(work / compress, files, patch, batch, compress) for compress in ("none", "zstd"))
    rng = np.random.default_rng(0)
    source = raw.batch(0, range(batch))
    target = {name: source[name].clone() for name in ("image", "label")}
    return {
        "gzip_h5": (lambda step: h5_crop(files[step % len(files)], patch, rng), 1, 10),
        "shards": (lambda step: raw.batch(step, range(batch)), batch, 1),
        "shards_zstd": (lambda step: packed.batch(step, range(batch)), batch, 10),
        "memcpy": (lambda step: _copy(source, target), batch, 1),
    }


def _copy(source: Batch, target: Batch) -> None:
    for name, tensor in target.items():
        tensor.copy_(source[name])


def _stream(out: Path, files: list[Path], patch: tuple[int, ...], batch: int, compress: Compression) -> Stream:
    keys = out.with_name(out.name + ".list")
    keys.write_text("\n".join(file.parent.name for file in files))
    cases = la_h5(files[0].parent.parent, keys)
    index = shards.write(cases, out, source="bench", compress=compress)
    return Stream(index, "labelled", select(index, None)["labelled"], batch, 0, patch, with_label=True)


def _files(work: Path, folder: str | Path | None, list_file: str | Path | None, count: int, size: int) -> list[Path]:
    if folder is not None:
        keys = [file.key for file in la_h5(folder, list_file)[:count]]
        return [Path(folder) / key / LA_FILE for key in keys]
    return [_write_h5(work / "h5", phantom.case(number, size=size)) for number in range(count)]


def _write_h5(folder: Path, case: Case) -> Path:
    """A case as UA-MT stores one: chunked, gzip."""
    import h5py

    path = folder / case.key / LA_FILE
    path.parent.mkdir(parents=True)
    with h5py.File(path, "w") as file:
        file.create_dataset("image", data=case.image[0], compression="gzip")
        file.create_dataset("label", data=case.label, compression="gzip")
    return path


def h5_crop(path: Path, patch: tuple[int, ...], rng: np.random.Generator) -> tuple[torch.Tensor, torch.Tensor]:
    """One crop as UA-MT's loader makes it (Yu et al., MICCAI 2019): read the file, quarter turns, a flip of
    axis 0 or 1, pad with zeros, crop, tensors."""
    import h5py

    with h5py.File(path, "r") as file:
        arrays = [file["image"][:], file["label"][:]]
    turns, axis = int(rng.integers(4)), int(rng.integers(2))
    arrays = [np.flip(np.rot90(values, turns), axis).copy() for values in arrays]
    short = [max(0, size - full) for size, full in zip(patch, arrays[0].shape, strict=True)]
    arrays = [np.pad(values, [(s // 2, s - s // 2) for s in short]) for values in arrays]
    start = [int(rng.integers(full - size + 1)) for size, full in zip(patch, arrays[0].shape, strict=True)]
    part = tuple(slice(a, a + size) for a, size in zip(start, patch, strict=True))
    image, label = (values[part] for values in arrays)
    return torch.from_numpy(image[None].astype(np.float32)), torch.from_numpy(label.astype(np.int64))
