"""A corpus behind a real nginx on this machine, read by two ranks through a cache a fifth as large, beside curl.

python benchmarks/served.py --gb 5 --folder /a/folder/on/a/disk --out benchmarks/results/served.json

Every voxel of a crop tells of which sample it is, so that what the ranks were given is counted without the order, and
then held against it. The folder needs room for the corpus, a copy of it (curl's) and the cache; nothing stays there.
"""

import argparse
import json
import shutil
import subprocess
import sys
import tempfile
import threading
import time
from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT / "tests"))
import stores  # noqa: E402

from cclmpc_dist.benching import files  # noqa: E402
from cclmpc_dist.benching.served import nginx  # noqa: E402
from cclmpc_dist.data import ahead, shards  # noqa: E402
from cclmpc_dist.data.case import Case  # noqa: E402
from cclmpc_dist.data.draws import philox  # noqa: E402
from cclmpc_dist.data.index import Index  # noqa: E402
from cclmpc_dist.data.loader import Mixture, Stream, loader  # noqa: E402
from cclmpc_dist.errors import InputError  # noqa: E402
from cclmpc_dist.training.run import environment  # noqa: E402

EPOCHS, RANKS, PATCH = 2, 2, 0.7  # the patch's sides, of the volume's
EVERY = 0.1  # seconds between looks at the cache and the ranks' memory
MB = 1e6


@dataclass(frozen=True)
class Numbered:
    """The handle of a case with its number in every second voxel along the last axis, and noise in the others."""

    number: int
    shape: tuple[int, int, int]

    @property
    def key(self) -> str:
        return f"case-{self.number:06d}"

    @property
    def fingerprint(self) -> str:
        return str(self.shape)

    def read(self) -> Case:
        rng = np.random.Generator(philox("served", self.number))
        image = rng.integers(-(1 << 15), 1 << 15, (1, *self.shape), np.int16)
        image[..., ::2] = self.number
        return Case(self.key, image, rng.integers(0, 2, self.shape, np.uint8), (1.0, 1.0, 1.0))


def number_of(image: np.ndarray) -> int:
    """The case of a crop, -1 where its voxels do not agree."""
    for half in (image[..., ::2], image[..., 1::2]):
        if (half == half.flat[0]).all():
            return int(half.flat[0])
    return -1


def stream(index: Index) -> Mixture:
    patch = [int(PATCH * side) for side in index["shape"][0, 1:]]
    rows = np.arange(len(index))
    return Mixture([Stream(index, "labelled", rows, stores.BATCH, 7, patch, block=stores.BLOCK, with_label=True)])


def rank(url: str, cache: str, limit: str, number: str) -> None:
    """One of the two ranks: a line of JSON with seconds of the system's clock and the cases of each step."""
    data = stream(stores.opened(url, Path(cache), int(limit)))
    begin, seen = time.monotonic(), []
    for batch in loader(data, 0, EPOCHS * data.steps, int(number), RANKS, workers=0):
        seen.append([number_of(image) for image in batch["image"].numpy()])
    print(json.dumps({"begin": begin, "end": time.monotonic(), "seen": seen}))


def expected(index: Index, number: int) -> list[list[int]]:
    """What a rank must be given, by the order."""
    order = stream(index).parts[0].order
    width = order.batch_size // RANKS
    lanes = range(number * width, (number + 1) * width)
    rows = [order.batch(step, lanes)[0] for step in range(EPOCHS * order.steps)]
    return [[int(index.key(int(row)).removeprefix("case-")) for row in step] for step in rows]


def curls(url: str, index: Index, work: Path) -> dict[str, float]:
    """MB/s of curl: one file after the other or four at a time, to nowhere and to files."""
    names = [shard["name"] for shard in index.manifest["shards"]]
    size = sum(shard["bytes"] for shard in index.manifest["shards"])
    rates = {}
    for variant, options, to_files in (
        ("curl", [], False),
        ("curl, four at a time", ["--parallel", "--parallel-max", str(ahead.THREADS)], False),
        ("curl to files", [], True),
        ("curl to files, four at a time", ["--parallel", "--parallel-max", str(ahead.THREADS)], True),
    ):
        with tempfile.TemporaryDirectory(dir=work) as folder:
            targets = [f"{folder}/{name}" if to_files else "/dev/null" for name in names]
            pairs = [word for name, to in zip(names, targets, strict=True) for word in ("-o", to, f"{url}/{name}")]
            begin = time.perf_counter()
            subprocess.run(["curl", "-sSf", "--no-progress-meter", *options, *pairs], check=True)
            rates[variant] = size / MB / (time.perf_counter() - begin)
    return rates


def watched(ranks: list[subprocess.Popen[str]], cache: Path) -> dict[str, list[float]]:
    """The cache's bytes and each rank's memory while they run, in MB."""
    series: dict[str, list[float]] = {"seconds": [], "cache": []}
    begin = time.monotonic()
    while all(process.poll() is None for process in ranks):
        try:
            look = {"cache": stores.held(cache) / MB} | {
                f"rank {number}, {name}": value
                for number, process in enumerate(ranks)
                for name, value in memory(process.pid).items()
            }
        except (FileNotFoundError, ProcessLookupError):  # no cache yet, or a rank has just ended
            time.sleep(EVERY)
            continue
        for name, value in (look | {"seconds": time.monotonic() - begin}).items():
            series.setdefault(name, []).append(value)
        time.sleep(EVERY)
    return series


def memory(pid: int) -> dict[str, float]:
    """MB of a process: all that is resident, and what no file stands behind."""
    lines = Path(f"/proc/{pid}/smaps_rollup").read_text().splitlines()[1:]
    sizes = {name: int(rest.split()[0]) * 1024 / MB for name, _, rest in (line.partition(":") for line in lines)}
    return {"resident": sizes["Rss"], "private": sizes["Anonymous"]}


def run(url: str, index: Index, cache: Path, limit: int) -> tuple[list[dict[str, Any]], dict[str, list[float]]]:
    """What the ranks printed, and what was seen of them."""
    command = [sys.executable, __file__, "--rank", url, str(cache), str(limit)]
    ranks = [subprocess.Popen([*command, str(number)], stdout=subprocess.PIPE, text=True) for number in range(RANKS)]
    said: dict[int, str] = {}

    def listen(number: int) -> None:
        said[number] = ranks[number].communicate()[0]

    listeners = [threading.Thread(target=listen, args=[number]) for number in range(RANKS)]
    for thread in listeners:
        thread.start()
    series = watched(ranks, cache)
    for thread in listeners:
        thread.join()
    if any(process.returncode for process in ranks):
        raise InputError("a rank failed: what it said stands above")
    return [json.loads(said[number]) for number in range(RANKS)], series


def sent(log: Path) -> int:
    """Bytes of bodies that nginx has sent."""
    return sum(int(line.split('"')[2].split()[1]) for line in log.read_text().splitlines())


def measure(work: Path, gb: float, edge: int, shard_bytes: int) -> dict[str, Any]:
    shape = (edge, edge, edge * 11 // 20)
    cases = [Numbered(number, shape) for number in range(round(gb * 1e9 / (3 * np.prod(shape))))]
    index = shards.write(cases, work / "shards", source="served", shard_bytes=shard_bytes, workers=2)
    size = sum(shard["bytes"] for shard in index.manifest["shards"])
    (work / "nginx").mkdir()
    with nginx(work / "shards", work / "nginx") as url:
        rounds = [curls(url, index, work)]
        before = sent(work / "nginx/access.log")
        told, series = run(url, index, work / "cache", size // 5)
        fetched = sent(work / "nginx/access.log") - before
        rounds.append(curls(url, index, work))
    seconds = max(rank["end"] for rank in told) - min(rank["begin"] for rank in told)
    rates = {name: median(one[name] for one in rounds) for name in rounds[0]}
    records = [
        *((name, "rate", rate, "MB/s") for name, rate in rates.items()),
        ("two ranks", "rate", fetched / MB / seconds, "MB/s"),
        *(("two ranks", f"over {name}", fetched / MB / seconds / rate, "x") for name, rate in rates.items()),
        ("two ranks", "seconds", seconds, "s"),
        ("two ranks", "fetched", fetched / MB, "MB"),
        *counted(index, told),
        *bounds(index, series, size // 5),
    ]
    case = f"{size / 1e9:.2f} GB in {len(index.manifest['shards'])} shards, {len(index)} samples, {EPOCHS} epochs"
    names = ("variant", "metric", "value", "unit")
    records = [{"bench": "served", "case": case} | dict(zip(names, one, strict=True)) for one in records]
    return {"meta": environment(1), "records": records, "series": series}


def counted(index: Index, told: list[dict[str, Any]]) -> list[tuple[str, str, float, str]]:
    """How often samples came, and how often a rank was given another than the order says."""
    wrong = sum(
        had != due
        for number, rank in enumerate(told)
        for step, order in zip(rank["seen"], expected(index, number), strict=True)
        for had, due in zip(step, order, strict=True)
    )
    times = Counter(case for rank in told for step in rank["seen"] for case in step)
    given = [times[number] for number in range(len(index))]
    due = Counter(case for number in range(RANKS) for step in expected(index, number) for case in step)
    return [
        ("samples", "given", float(sum(times.values())), "crops"),
        ("samples", "given least often", float(min(given)), "times"),
        ("samples", "given most often", float(max(given)), "times"),
        ("samples", "due least often", float(min(due.values())), "times"),
        ("samples", "due most often", float(max(due.values())), "times"),
        ("samples", "other than the order says", float(wrong), "crops"),
    ]


def bounds(index: Index, series: dict[str, list[float]], limit: int) -> list[tuple[str, str, float, str]]:
    """The cache's size against its bound, and each rank's memory at a quarter of the time and at most from then on."""
    blocks = ahead.blocks(index, stream(index).parts[0].order)
    found = [
        ("cache", "limit", limit / MB, "MB"),
        ("cache", "limit and blocks in use", (limit + blocks) / MB, "MB"),
        ("cache", "most on disk", max(series["cache"]), "MB"),
        ("cache", "looks", float(len(series["cache"])), "1"),
    ]
    for name, values in series.items():
        if name.startswith("rank"):
            later = values[len(values) // 4 :]
            found += [(name, "at a quarter", later[0], "MB"), (name, "most from then on", max(later), "MB")]
            found.append((name, "at the end", later[-1], "MB"))
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--gb", type=float, default=5.0)
    parser.add_argument("--edge", type=int, default=160, help="voxels of a volume's first two axes")
    parser.add_argument("--shard-mib", type=float, default=64.0)
    parser.add_argument("--folder", type=Path, default=Path("data"))
    parser.add_argument("--out", type=Path, default=Path("runs/served.json"))
    parser.add_argument("--rank", nargs=4, help=argparse.SUPPRESS)
    given = parser.parse_args()
    if given.rank:
        rank(*given.rank)
        return
    if shutil.which("nginx") is None or shutil.which("curl") is None:
        raise SystemExit("served.py needs nginx and curl: install them (tests/nginx_install.sh)")
    given.folder.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=given.folder.resolve()) as work:
        report = measure(Path(work), given.gb, given.edge, round(given.shard_mib * (1 << 20)))
    for record in report["records"]:
        print(f"{record['variant']}: {record['metric']} {record['value']:.5g} {record['unit']}")
    files.write(report, given.out)
    files.write_pages(report, given.out)


if __name__ == "__main__":
    main()
