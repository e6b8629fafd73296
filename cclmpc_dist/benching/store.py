"""How fast the shards of a URL reach this machine's cache, beside what curl makes of the same files."""

import shutil
import subprocess
import tempfile
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from statistics import median
from typing import Any

from cclmpc_dist.config import Data
from cclmpc_dist.data.ahead import THREADS
from cclmpc_dist.data.remote import RemoteIndex, open_corpus
from cclmpc_dist.errors import InputError
from cclmpc_dist.records import repeated

MB = 1e6


def bench_store(url: str, folder: Path, *, repeats: int = 5) -> list[dict[str, Any]]:
    """MB/s of all shards, in turn, the median of `repeats`.

    curl: one process, to nowhere. curl_files: the same to files of `folder`. cache_1, cache_4: by one and by four
    threads into an empty cache in `folder`: hashed, flushed to disk, renamed. found: files that lie in the cache, as a
    new process opens them, hashed again. Raises InputError.
    """
    if shutil.which("curl") is None or not url.startswith("http"):
        raise InputError(f"{url}: is compared with curl: install it, and give a http(s) URL")
    rounds = []
    for _ in range(1 + repeats):
        with tempfile.TemporaryDirectory(dir=folder) as work:
            rounds.append(_round(url, Path(work)))
    kept = rounds[1:]  # the first warms up
    return _records({variant: [one[variant] for one in kept] for variant in kept[0]})


def _round(url: str, work: Path) -> dict[str, float]:
    index = _open(url, work / "first")
    shards = index.manifest["shards"]
    names, size = [shard["name"] for shard in shards], sum(shard["bytes"] for shard in shards)
    (work / "files").mkdir()
    nowhere = ["curl", "-sf", *(word for name in names for word in ("-o", "/dev/null", f"{url}/{name}"))]
    files = ["curl", "-sf", *(word for name in names for word in ("-o", f"{work}/files/{name}", f"{url}/{name}"))]
    ways: dict[str, Callable[[], object]] = {
        "curl": lambda: subprocess.run(nowhere, check=True),
        "curl_files": lambda: subprocess.run(files, check=True),
        "cache_1": lambda: _fetch(index, 1),
        f"cache_{THREADS}": lambda: _fetch(other, THREADS),
        "found": lambda: _fetch(again, 1),
    }
    other, again = _open(url, work / "second"), _open(url, work / "second")
    rates = {}
    for variant, way in ways.items():
        begin = time.perf_counter()
        way()
        rates[variant] = size / MB / (time.perf_counter() - begin)
    return rates


def _open(url: str, cache: Path) -> RemoteIndex:
    index = open_corpus(Data(path=url, patch=(16, 16), cache=str(cache), cache_gib=1024))
    assert isinstance(index, RemoteIndex)
    return index


def _fetch(index: RemoteIndex, threads: int) -> None:
    with ThreadPoolExecutor(threads) as pool:
        for file in pool.map(index.open_shard, range(len(index.manifest["shards"]))):
            file.close()


def _records(rates: dict[str, list[float]]) -> list[dict[str, Any]]:
    medians = {variant: median(values) for variant, values in rates.items()}
    return [
        {"bench": "store", "case": "all shards", "variant": variant, "metric": metric, "unit": unit} | numbers
        for variant, values in rates.items()
        for metric, numbers, unit in (
            ("rate", repeated(values), "MB/s"),
            ("over curl", {"value": medians[variant] / medians["curl"]}, "x"),
            ("over curl_files", {"value": medians[variant] / medians["curl_files"]}, "x"),
        )
    ]
