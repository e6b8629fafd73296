"""What `cclmpc bench loader` compares: ways from files on a disk to batches of crops, image and label.

But for UA-MT's, each draws a uniform crop, quarter turns of the first two axes and a flip of each of these, and gives
the stored types: normalisation is the device's. Layout: b batch, C channels, S spatial.
"""

import math
from collections.abc import Generator, Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, IterableDataset

from cclmpc_dist.benching.loader_clock import Gate
from cclmpc_dist.benching.loader_files import Files, Pair, blosc2
from cclmpc_dist.data.index import Index
from cclmpc_dist.data.loader import Batch, Crop, Mixture, Stream, loader
from cclmpc_dist.data.reader import Reader, copy_rows, region

BUFFER = 100  # samples, and shards, that webdataset shuffles among
PRELOADED = [__name__, "h5py", "webdataset", "blosc2"]  # so that no worker spends its time on imports
Crops = tuple[Tensor, Tensor]  # image (b, C, *patch), label (b, *patch)
Run = Generator[Crops, None, None]


class Side(Protocol):
    """files: what it reads."""

    files: list[Path]

    def batches(self, workers: int, gate: Gate, passes: int) -> Run:
        """So many passes over the corpus, made by `workers` processes, of this project's loader threads; 0 by this one.
        Whoever makes them waits at the gate before it opens a file."""
        ...


def sides(files: Files, rivals: Sequence[str], patch: tuple[int, ...], batch: int) -> dict[str, Side]:
    """By name, in the order of the table."""
    found: dict[str, Side] = {
        "gzip_h5": H5(files.h5, patch, batch),
        "webdataset": WebDataset(shard_paths(files.shards), patch, batch),
    }
    if files.blosc2 is not None and files.blosc2_stored is not None:
        found["blosc2"] = Blosc2(files.blosc2, patch, batch)
        found["blosc2_stored"] = Blosc2(files.blosc2_stored, patch, batch)
    found = {name: side for name, side in found.items() if name.partition("_stored")[0] in rivals}
    return found | {
        "shards": Shards(files.shards, patch, batch),
        "shards_zstd": Shards(files.shards_zstd, patch, batch),
        "memcpy": Memcpy(files.shards, patch, batch),
        "rows": Rows(files.shards, patch, batch),
    }


def shard_paths(index: Index) -> list[Path]:
    return [Path(index.path) / shard["name"] for shard in index.manifest["shards"]]


def _loaded(data: Dataset | IterableDataset, batch: int | None, workers: int) -> DataLoader:
    if not workers:
        return DataLoader(data, batch_size=batch)
    context = torch.multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(PRELOADED)
    # Persistent, so that a worker that is done is still there when its CPU seconds are read.
    return DataLoader(
        data, batch_size=batch, num_workers=workers, multiprocessing_context=context, persistent_workers=True
    )


class _Items(Dataset):
    """item(number), of so many, behind the gate."""

    def __init__(self, side: "H5 | Blosc2", gate: Gate, count: int) -> None:
        self.side, self.gate, self.count = side, gate, count

    def __len__(self) -> int:
        return self.count

    def __getitem__(self, number: int) -> Crops:
        self.gate.wait()
        return self.side.item(number)


class _Held(IterableDataset):
    """A dataset behind the gate."""

    def __init__(self, data: Any, gate: Gate) -> None:
        self.data, self.gate = data, gate

    def __iter__(self) -> Iterator[Any]:
        self.gate.wait()
        return iter(self.data)


class H5:
    """UA-MT's way (Yu et al., MICCAI 2019): for each crop a whole gzip volume is read, turned and flipped."""

    def __init__(self, files: list[Path], patch: tuple[int, ...], batch: int) -> None:
        self.files, self.patch, self.batch = files, patch, batch

    def batches(self, workers: int, gate: Gate, passes: int) -> Run:
        yield from _loaded(_Items(self, gate, passes * len(self.files)), self.batch, workers)

    def item(self, number: int) -> Crops:
        return h5_crop(self.files[number % len(self.files)], self.patch, np.random.default_rng(number))


def h5_crop(path: Path, patch: tuple[int, ...], rng: np.random.Generator) -> Crops:
    """One crop as UA-MT's loader makes it: read the file, quarter turns, a flip of axis 0 or 1, pad with zeros, crop,
    tensors (C, *patch) float32 and (*patch) int64."""
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


def drawn(rng: np.random.Generator, shape: Sequence[int], patch: tuple[int, ...]) -> Crop:
    """A crop of a volume (*S) with the distribution of Stream's."""
    turns = int(rng.integers(4))
    size = (patch[1], patch[0], *patch[2:]) if turns % 2 else patch
    slack = [full - part for full, part in zip(shape, size, strict=True)]
    start = tuple(int(rng.integers(room + 1)) if room >= 0 else -(-room // 2) for room in slack)
    return Crop(start, size, turns, tuple(axis for axis in (0, 1) if rng.random() < 0.5))


def cut(volume: Any, crop: Crop) -> np.ndarray:
    """(C, *patch) of anything (C, *S) that slices as numpy does, zero outside; a view where it gives one."""
    low = [max(a, 0) for a in crop.start]
    high = [min(a + n, full) for a, n, full in zip(crop.start, crop.size, volume.shape[1:], strict=True)]
    inside = volume[(slice(None), *map(slice, low, high))]
    start = [a - b for a, b in zip(crop.start, low, strict=True)]
    return crop.turned(region(inside, start, crop.size, 0))


class WebDataset:
    """webdataset's usual pipeline on the shards, as its documentation has it: whole samples are read in turn, shuffled
    in a buffer, decoded, cropped, collated."""

    def __init__(self, files: list[Path], patch: tuple[int, ...], batch: int) -> None:
        self.files, self.patch, self.batch = files, patch, batch

    def batches(self, workers: int, gate: Gate, passes: int) -> Run:
        import webdataset

        shards = webdataset.WebDataset(list(map(str, self.files)), shardshuffle=BUFFER)
        samples = shards.shuffle(BUFFER).decode().map(Augment(self.patch)).to_tuple("image", "label")
        yield from _loaded(_Held(samples.batched(self.batch).repeat(passes), gate), None, workers)


class Augment:
    """A decoded sample -> its crop."""

    def __init__(self, patch: tuple[int, ...]) -> None:
        self.patch, self.rng = patch, np.random.default_rng(0)

    def __call__(self, sample: dict[str, Any]) -> dict[str, Tensor]:
        image, label = sample["image.npy"], sample["label.npy"][None]
        crop = drawn(self.rng, image.shape[1:], self.patch)
        image, label = (torch.from_numpy(np.ascontiguousarray(cut(values, crop))) for values in (image, label))
        return {"image": image, "label": label[0]}


class Blosc2:
    """nnU-Net v2's way: .b2nd files, memory-mapped, opened for each crop, which is read by slicing."""

    def __init__(self, pairs: list[Pair], patch: tuple[int, ...], batch: int) -> None:
        self.pairs, self.patch, self.batch = pairs, patch, batch
        self.files = [path for pair in pairs for path in pair]

    def batches(self, workers: int, gate: Gate, passes: int) -> Run:
        yield from _loaded(_Items(self, gate, passes * -(-len(self.pairs) // self.batch)), None, workers)

    def item(self, number: int) -> Crops:
        """A batch."""
        rng, crops = np.random.default_rng(number), []
        for place in range(number * self.batch, (number + 1) * self.batch):
            image, label = map(_opened, self.pairs[place % len(self.pairs)])
            crop = drawn(rng, image.shape[1:], self.patch)
            crops.append((cut(image, crop), cut(label, crop)[0]))
        image, label = (np.empty((self.batch, *part.shape), part.dtype) for part in crops[0])
        for place, (image_part, label_part) in enumerate(crops):
            image[place], label[place] = image_part, label_part
        return torch.from_numpy(image), torch.from_numpy(label)


def _opened(path: Path) -> Any:
    return blosc2().open(urlpath=str(path), mode="r", dparams={"nthreads": 1}, mmap_mode="r")


class Shards:
    """This project's loader."""

    def __init__(self, index: Index, patch: tuple[int, ...], batch: int) -> None:
        self.index, self.patch, self.batch, self.files = index, patch, batch, shard_paths(index)

    def batches(self, workers: int, gate: Gate, passes: int) -> Run:
        rows = np.arange(len(self.index))
        stream = Stream(self.index, "bench", rows, self.batch, 0, self.patch, with_label=True)
        for batch in loader(_HeldMixture(stream, gate), 0, passes * stream.order.steps, workers=workers):
            yield batch["image"], batch["label"]


class _HeldMixture(Mixture):
    """Behind the gate."""

    def __init__(self, stream: Stream, gate: Gate) -> None:
        super().__init__([stream])
        self.gate = gate

    def batch(self, step: int, lanes: Sequence[int]) -> Batch:
        self.gate.wait()
        return super().batch(step, lanes)


class Memcpy:
    """As many bytes as crops have, copied in one piece from the mapped shards into one batch's memory, all volumes in
    turn, and nothing else."""

    def __init__(self, index: Index, patch: tuple[int, ...], batch: int) -> None:
        self.index, self.patch, self.batch, self.files = index, patch, batch, shard_paths(index)

    def batches(self, workers: int, gate: Gate, passes: int) -> Run:
        assert workers == 0
        gate.wait()
        reader, rng = Reader(self.index), np.random.default_rng(0)
        volumes = [(reader.image(row), reader.label(row)[None]) for row in range(len(self.index))]
        sources = [[self.source(values, rng) for values in volume] for volume in volumes]
        out = [np.empty((self.batch, *source.shape), source.dtype) for source in sources[0]]
        given = [torch.from_numpy(values) for values in out]
        for step in range(passes * -(-len(sources) // self.batch)):
            for place in range(self.batch):
                for target, source in zip(out, sources[(step * self.batch + place) % len(sources)], strict=True):
                    copy_rows(target[place], source)
            yield given[0], given[1]

    def source(self, volume: np.ndarray, rng: np.random.Generator) -> np.ndarray:
        """What is copied of a volume (C, *S)."""
        return volume.reshape(-1)[: math.prod(self.patch)]


class Rows(Memcpy):
    """The bytes of crops, copied row by row from where they lie, neither turned nor flipped, and nothing else."""

    def source(self, volume: np.ndarray, rng: np.random.Generator) -> np.ndarray:
        return cut(volume, replace(drawn(rng, volume.shape[1:], self.patch), size=self.patch, turns=0, flips=()))
