"""`cclmpc bench index`: what a corpus of millions of samples costs a rank at its start, what a step's order costs, and
what `cclmpc verify` holds.

The index is made as `cclmpc shard` makes one, of the pieces of its shards by `merge`; the shards are files of the right
size that hold nothing. Each measurement runs in a process of its own; memory is the process's largest resident set over
that after the imports, pages of the mapped index included, which private memory is without.
"""

import os
import tempfile
import threading
import time
from array import array
from collections.abc import Callable, Iterator, Sequence
from hashlib import sha256
from pathlib import Path
from typing import BinaryIO

import numpy as np

from cclmpc_dist.benching.alone import alone, answer, memory
from cclmpc_dist.config import Config, parse
from cclmpc_dist.data import verify
from cclmpc_dist.data.index import INDEX, MANIFEST, Index
from cclmpc_dist.data.loader import Mixture
from cclmpc_dist.data.merge import merge
from cclmpc_dist.data.order import rank_lanes
from cclmpc_dist.data.parts import PARTS, Part, Rows, Settings
from cclmpc_dist.records import Record
from cclmpc_dist.training import plan, setup

MIB = 2**20
SHAPE = (1, 256, 256)  # uint8
IMAGE, LABEL, JSON = 128 + 65536, 128 + 65536, 400  # bytes of a member
FLOATS = {"scale": 0.01, "offset": 0.0, "low": -np.inf, "high": np.inf}
HEADER = 512  # of a tar's member, whose bytes are padded to a multiple of it
WITH_LABEL = 100  # every so many-th shard holds labels
LABELLED = 1000  # of these samples
VAL = 1000  # of the others, the last ones
LOOK = 0.02  # seconds between looks at the memory
RANKS, LANES = 8, 4  # lanes of each rank


def bench_index(folder: Path, samples: int, a_shard: int, trials: int, repeats: int) -> list[Record]:
    """Records of one corpus, made below `folder`: `a_shard` samples a shard.

    merge: parts to index. start: from the opening to streams that can draw, as a rank does, with the index in the page
    cache and with it thrown out (as far as the system obeys); the median of `repeats`. order: one rank's LANES lanes of
    a step, median and 99th percentile of `trials`: `any step`, of an epoch that was not touched before; `any step of an
    epoch`, in blocks that were not; `next step`. plan: `cclmpc plan`. verify: `cclmpc verify`, but that no shard is
    read: it is told a name and a small image of each sample.
    """
    with tempfile.TemporaryDirectory(dir=folder) as place:
        path = str(Path(place) / "corpus")
        found = {"merge": alone(_merge, path=path, samples=samples, a_shard=a_shard)}
        found["start, cached"] = _median([alone(_start, path=path, cold=False) for _ in range(repeats)])
        found["start, from disk"] = _median([alone(_start, path=path, cold=True) for _ in range(repeats)])
        found |= alone(_order, path=path, trials=trials)
        found["plan"] = alone(_plan, path=path)
        found["verify, no shard read"] = alone(_verify, path=path)
        found["index"] = {"size": (Path(path) / INDEX).stat().st_size / MIB}
    case = f"{samples:,} samples in {-(-samples // a_shard):,} shards"
    return [
        {"bench": "index", "case": case, "variant": variant, "metric": metric, "value": value, "unit": _unit(metric)}
        for variant, values in found.items()
        for metric, value in values.items()
    ]


def _unit(metric: str) -> str:
    return "s" if metric == "seconds" else "ms" if metric.startswith("order") else "MiB"


def _peak_mib() -> float:
    return memory("VmHWM") / 2**20


def _median(runs: Sequence[dict[str, float]]) -> dict[str, float]:
    return {metric: float(np.median([run[metric] for run in runs])) for metric in runs[0]}


# ---- the corpus -----------------------------------------------------------------------------------------------------


def write_pieces(out: Path, samples: int, a_shard: int) -> None:
    """What `cclmpc shard` leaves for `merge`, with empty shards."""
    count = -(-samples // a_shard)
    part = Part(out, 1, 1, samples)
    (out / PARTS).mkdir(parents=True)
    for number in range(count):
        first = number * a_shard
        rows, size = _rows(first, min(a_shard, samples - first), labels=number % WITH_LABEL == 0)
        with open(part.shard(number), "wb") as file:
            file.truncate(size)
        name = part.shard(number).name
        entry = {"name": name, "bytes": size, "samples": len(rows.keys), "sha256": sha256(name.encode()).hexdigest()}
        rows.save(part.piece(number), shard=entry, stop=first + len(rows.keys), inputs="", settings={}, judged=[])
    settings = Settings("bench", labelled=LABELLED, val_last=VAL).of([]) | {"cases": samples, "keys": ""}
    part.write(settings, shards=count, skipped=[], inputs="")


def _rows(first: int, count: int, labels: bool) -> tuple[Rows, int]:
    """The rows of a shard, and its bytes."""
    rows = Rows(first)
    members = {"image": IMAGE, "json": JSON} | ({"label": LABEL} if labels else {})
    starts, size = {}, 0
    for name, length in members.items():
        starts[name] = size + HEADER
        size += HEADER + -(-length // HEADER) * HEADER
    at = np.arange(count) * size
    columns = {f"{name}_at": at + start for name, start in starts.items()}
    columns |= {f"{name}_bytes": np.full(count, length) for name, length in members.items()}
    columns |= {"case": first + np.arange(count)}
    if labels:
        columns |= {"voxel_row": np.arange(count), "voxel_class": np.full(count, 1), "voxel_count": np.full(count, 1)}
        rows.voxels = [np.full((count, len(SHAPE) - 1), 128, np.int32)]
        rows.top = 1
    for name in rows.integers:
        needed = name not in Rows.VOXELS or labels
        rows.integers[name] = array("q", columns.get(name, np.zeros(count * needed)).astype(np.int64).tobytes())
    for name in rows.floats:
        axes = len(SHAPE) - 1 if name == "spacing" else 1
        rows.floats[name] = array("d", np.full(count * axes, FLOATS.get(name, 1.0)).tobytes())
    rows.shape, rows.shapes = SHAPE, array("q", np.tile(np.array(SHAPE, np.int64), count).tobytes())
    rows.keys = [f"slice-{case:09d}" for case in range(first, first + count)]
    rows.patients = rows.keys
    return rows, count * size + 2 * HEADER


def _merge(path: str, samples: int, a_shard: int) -> dict[str, float]:
    write_pieces(Path(path), samples, a_shard)
    before, began = _peak_mib(), time.perf_counter()
    merge(path)
    return {"seconds": time.perf_counter() - began, "memory": _peak_mib() - before}


# ---- what a rank does -----------------------------------------------------------------------------------------------


def _config(path: str) -> Config:
    data = {"path": path, "patch": [256, 256], "batch_labelled": RANKS, "batch_unlabelled": RANKS * LANES}
    model = {"swin": {"window": [8, 8]}}
    raw = {"name": "bench", "data": data, "model": model, "budget": {"epochs": 1}}
    return parse(raw | {"ccl_mpc": {"contrast": {"bank": 0}}}, "bench index")


def _streams(config: Config) -> dict[str, Mixture]:
    return setup.streams(config, *setup.corpora(config), RANKS)


def _start(path: str, cold: bool) -> dict[str, float]:
    for name in (INDEX, MANIFEST) if cold else ():
        with open(Path(path) / name, "rb") as file:
            os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
    config = _config(path)
    before, began = _peak_mib(), time.perf_counter()
    streams = _streams(config)
    seconds = time.perf_counter() - began
    assert streams["unlabelled"].steps
    return {"seconds": seconds, "memory": _peak_mib() - before}


def _order(path: str, trials: int) -> dict[str, dict[str, float]]:
    before = _peak_mib()
    (part,) = _streams(_config(path))["unlabelled"].parts
    order, lanes = part.order, rank_lanes(part.order.batch_size, RANKS // 2, RANKS)
    rng = np.random.default_rng(0)
    times: dict[str, list[float]] = {"any step": [], "any step of an epoch": [], "next step": []}
    for epoch in range(trials):
        steps = epoch * order.steps + rng.integers(order.steps - 1, size=2)
        for kind, step in zip(times, (int(steps[0]), int(steps[1]), int(steps[1]) + 1), strict=True):
            began = time.perf_counter()
            order.batch(step, lanes)
            times[kind].append(1000 * (time.perf_counter() - began))
    found = {
        f"order, {kind}": {"order, median": float(np.median(values)), "order, p99": float(np.percentile(values, 99))}
        for kind, values in times.items()
    }
    return found | {"start and order": {"memory": _peak_mib() - before}}


def _plan(path: str) -> dict[str, float]:
    before, began = _peak_mib(), time.perf_counter()
    plan.plan(_config(path), RANKS)
    return {"seconds": time.perf_counter() - began, "memory": _peak_mib() - before}


# ---- what verify does -----------------------------------------------------------------------------------------------


def _verify(path: str) -> dict[str, float]:
    verify._shard = _told
    before, began = _peak_mib(), time.perf_counter()
    private = _most_private(lambda: verify.verify(path))
    return {"seconds": time.perf_counter() - began, "memory": _peak_mib() - before, "private memory": private}


def _told(index: Index, number: int, rows: np.ndarray, file: BinaryIO, told: verify._Told) -> Iterator[str]:
    """As verify reads a shard of sound samples, no two of them alike."""
    for row in rows.tolist():
        told.splits.patient(told.corpus, row, index.key(row))
        told.splits.image(told.corpus, row, np.array([row, row + 1], "<i4").view("<i2"))
    return iter(())


def _most_private(work: Callable[[], list[str]]) -> float:
    """MiB that no file stands behind while `work` is done, at most, over those before."""
    before, most, done = memory("RssAnon"), 0, threading.Event()

    def look() -> None:
        nonlocal most
        while not done.wait(LOOK):
            most = max(most, memory("RssAnon"))

    looking = threading.Thread(target=look)
    looking.start()
    try:
        assert work() == []
    finally:
        done.set()
        looking.join()
    return (most - before) / MIB


if __name__ == "__main__":
    answer(_merge, _start, _order, _plan, _verify)
