"""How many crops a second and core: from shards, and from what others keep their volumes in."""

import tempfile
import time
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from statistics import median
from typing import Any

import torch

from cclmpc_dist.benching.loader_clock import Gate, Usage, forget, remember
from cclmpc_dist.benching.loader_files import blosc2, lay_out
from cclmpc_dist.benching.loader_sides import Memcpy, Run, Side, sides
from cclmpc_dist.errors import InputError

RIVALS = ("gzip_h5", "webdataset", "blosc2")
OURS = "shards"
UNIT, CORE = "crops/s", "crops/CPU s"
Taken = dict[str, list[tuple[int, Usage]]]  # side: of each round the crops, and what they took
ENDLESS = 1 << 20  # passes
WARM_UP = 0.3  # seconds
MB = 1e6


def bench_loader(
    folder: str | Path | None = None,
    list_file: str | Path | None = None,
    *,
    rivals: Sequence[str] = RIVALS,
    workers: Sequence[int] = (0, 1, 2),
    patch: tuple[int, int, int] = (112, 112, 80),
    batch: int = 4,
    cases: int = 24,
    repeats: int = 3,
    seconds: float = 1.0,
    size: int = 128,
    shard_bytes: int = 16 << 20,
) -> list[dict[str, Any]]:
    """Crops (image and label) of every side in turn, the median of `repeats` rounds; torch computes in one thread.

    Sides are those of loader_sides: `rivals` and this project's. warm: files in the page cache; whole passes over the
    corpus, `seconds` long at least. cold: one pass with the files dropped from the page cache before. folder: an
    la-h5 corpus, its first `cases` are used; unset, phantoms of about `size` voxels an axis. Raises InputError.
    """
    if unknown := set(rivals) - set(RIVALS):
        raise InputError(f"--rivals {','.join(sorted(unknown))}: there are {', '.join(RIVALS)}: name some of these")
    if "blosc2" in rivals:
        blosc2()
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as work:
        files = lay_out(Path(work), folder, list_file, cases, size, patch, shard_bytes, "blosc2" in rivals)
        ways = sides(files, rivals, patch, batch)
        found = _rounds(ways, len(files.h5), workers, repeats, seconds)
    torch.set_num_threads(threads)
    return records(f"{'LA' if folder else 'phantom'} {'x'.join(map(str, patch))} batch {batch}", found)


def _rounds(
    ways: dict[str, Side], samples: int, workers: Sequence[int], repeats: int, seconds: float
) -> dict[tuple[str, int], Taken]:
    """What every side took, by state of the page cache and number of workers."""
    found: dict[tuple[str, int], Taken] = {}
    for _ in range(repeats):
        for count in workers:
            for state, window in (("cold", None), ("warm", seconds)):
                taken = found.setdefault((state, count), {})
                for name, side in ways.items():
                    if not (isinstance(side, Memcpy) and (count or state == "cold")):
                        taken.setdefault(name, []).append(take(side, count, samples, window))
    return found


def take(side: Side, workers: int, samples: int, seconds: float | None) -> tuple[int, Usage]:
    """Crops, and what they took: whole passes over `samples` samples, `seconds` long after a warm-up, the files in the
    page cache; without seconds one pass, the files not there."""
    with tempfile.TemporaryDirectory() as folder:
        gate = Gate(Path(folder))
        opening = gate.open(max(1, workers), partial(forget if seconds is None else remember, side.files))
        batches = side.batches(workers, gate, 1 if seconds is None else ENDLESS)
        if seconds is not None:
            _consume(batches, samples, WARM_UP)
        begin = Usage.now()
        crops = _consume(batches, samples, seconds or 0.0)
        taken = Usage.now().since(opening.usage if seconds is None else begin)
        batches.close()
    return crops, taken


def _consume(batches: Run, samples: int, seconds: float) -> int:
    """Crops of whole passes, `seconds` long at least."""
    crops, end = 0, time.perf_counter() + seconds
    for image, _ in batches:
        before, crops = crops, crops + len(image)
        if crops // samples > before // samples and time.perf_counter() >= end:
            break
    return crops


def records(corpus: str, found: dict[tuple[str, int], Taken]) -> list[dict[str, Any]]:
    """Of every side crops a second, crops a CPU second and the MB a crop that the disk gave, median and samples; of
    this project's loader both rates over those of the rivals and of copying."""
    made = []
    for (state, workers), taken in found.items():
        head = {"bench": "loader", "case": f"{corpus}, {state}, {workers} workers"}
        wall, core, disk = (
            {name: [measure(*one) for one in rounds] for name, rounds in taken.items()}
            for measure in (
                lambda n, used: n / used.wall,
                lambda n, used: n / used.cpu,
                lambda n, used: used.read / MB / n,
            )
        )
        for metric, values, unit in (("rate", wall, UNIT), ("core rate", core, CORE), ("disk", disk, "MB/crop")):
            for name, samples in values.items():
                record = {"variant": name, "metric": metric, "value": median(samples), "unit": unit}
                made.append(head | record | {"samples": samples})
        for rival in [name for name in taken if name != OURS]:
            for metric, values in (("over", wall), ("core over", core)):
                ratio = median(values[OURS]) / median(values[rival])
                made.append(head | {"variant": OURS, "metric": f"{metric} {rival}", "value": ratio, "unit": "x"})
    return made
