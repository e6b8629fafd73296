"""`cclmpc bench loader`: its arithmetic, its clock, the crops of its rivals, and a small run of every side."""

import subprocess
import sys
import time
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch
from corpora import numbered

from cclmpc_dist.benching import loader as bench
from cclmpc_dist.benching import pictures, tables
from cclmpc_dist.benching.loader_clock import Gate, Usage, forget, remember
from cclmpc_dist.benching.loader_files import blosc2, partitions, write_blosc2, write_h5
from cclmpc_dist.benching.loader_sides import Blosc2, cut, drawn, h5_crop
from cclmpc_dist.errors import InputError
from cclmpc_dist.training.run import environment

leaves_files_open = pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")  # webdataset does
SMALL = {"patch": (16, 16, 8), "cases": 4, "repeats": 1, "seconds": 0.02, "size": 24, "shard_bytes": 60_000}


def usage(wall: float, cpu: float, read: float = 0.0) -> Usage:
    return Usage(wall, cpu, read)


def test_rates_and_ratios() -> None:
    taken = {
        "gzip_h5": [(10, usage(5, 5)), (10, usage(10, 2)), (10, usage(1, 1))],
        "shards": [(100, usage(1, 2, 5e6)), (300, usage(2, 2, 3e6)), (50, usage(1, 2, 1e6))],
    }
    found = bench.records("LA", {("cold", 2): taken})
    assert {record["case"] for record in found} == {"LA, cold, 2 workers"}
    values = {(record["variant"], record["metric"]): record["value"] for record in found}
    assert values == {
        ("gzip_h5", "rate"): 2, ("gzip_h5", "core rate"): 5, ("gzip_h5", "disk"): 0,
        ("shards", "rate"): 100, ("shards", "core rate"): 50, ("shards", "disk"): 0.02,
        ("shards", "over gzip_h5"): 50, ("shards", "core over gzip_h5"): 10,
    }  # fmt: skip
    assert [r["samples"] for r in found if (r["variant"], r["metric"]) == ("shards", "rate")] == [[100, 150, 50]]


def test_the_clock_counts_what_processes_below_compute() -> None:
    compute = "end = time.process_time() + 0.3\nwhile time.process_time() < end: pass"
    script = f"import time\ninput()\n{compute}\nprint(flush=True)\ninput()"
    command = ["sh", "-c", '"$0" -c "$1"; true', sys.executable, script]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdin is not None
        assert process.stdout is not None
        before = Usage.now()
        process.stdin.write("\n")
        process.stdin.flush()
        process.stdout.readline()
        assert 0.3 <= Usage.now().since(before).cpu < 5
        process.communicate("\n")


def test_the_page_cache_forgets_and_remembers(tmp_path: Path) -> None:
    kind = subprocess.run(["stat", "-f", "-c", "%T", tmp_path], capture_output=True, text=True, check=True).stdout
    if kind.strip() == "tmpfs":
        pytest.skip("the folder for temporary files is in memory")
    file = tmp_path / "file"
    file.write_bytes(bytes(1 << 22))
    forget([file])
    read = []
    for _ in range(2):
        before = Usage.now()
        remember([file])
        read.append(Usage.now().since(before).read)
    assert read[0] >= 1 << 22
    assert read[1] < 1 << 22


def test_a_gate_opens_when_all_wait_and_the_files_are_prepared(tmp_path: Path) -> None:
    (tmp_path / "gate").mkdir()
    told = tmp_path / "told"
    gate = Gate(tmp_path / "gate")
    opening = gate.open(2, partial(told.write_text, "prepared"))
    (tmp_path / "gate" / "another process").touch()
    time.sleep(0.05)
    assert not told.exists()
    gate.wait()
    assert told.read_text() == "prepared"
    opening.join()
    assert opening.usage.wall <= time.perf_counter()
    gate.wait()  # open once, open for good


@pytest.mark.parametrize("patch", [(8, 6, 5), (14, 12, 11)], ids=["inside", "beyond the volume"])
def test_rivals_cut_what_stream_would(patch: tuple[int, ...]) -> None:
    """Against a plain reading of the crop: pad, take, turn, flip."""
    rng = np.random.default_rng(0)
    volume = rng.integers(1, 99, (2, 11, 10, 9)).astype(np.uint8)
    padded = np.pad(volume, [(0, 0), *[(20, 20)] * 3])
    turned = set()
    for _ in range(40):
        crop = drawn(rng, volume.shape[1:], patch)
        whole = padded[:, *(slice(20 + a, 20 + a + n) for a, n in zip(crop.start, crop.size, strict=True))]
        whole = np.flip(np.rot90(whole, crop.turns, (1, 2)), [1 + axis for axis in crop.flips])
        np.testing.assert_array_equal(cut(volume, crop), whole)
        assert whole.shape == (2, *patch)
        turned.add((crop.turns, crop.flips))
    assert len(turned) > 10, "of sixteen"


def test_ua_mts_way_makes_the_same_kind_of_crop(tmp_path: Path) -> None:
    path = write_h5(tmp_path, numbered(1, shape=(12, 11, 9))[0])
    image, label = h5_crop(path, (8, 12, 9), np.random.default_rng(0))
    assert (image.shape, image.dtype) == ((1, 8, 12, 9), torch.float32)
    assert (label.shape, label.dtype) == ((8, 12, 9), torch.int64)


@pytest.mark.parametrize(
    ("shape", "patch", "itemsize", "chunks", "blocks"),
    [
        ((1, 183, 140, 88), (112, 112, 80), 4, [1, 128, 128, 88], [1, 32, 32, 32]),
        ((1, 183, 140, 88), (112, 112, 80), 1, [1, 183, 140, 88], [1, 64, 64, 32]),
        ((2, 20, 20, 20), (16, 16, 8), 4, [2, 20, 20, 16], [2, 16, 16, 8]),
        ((4, 600, 600, 300), (160, 160, 80), 4, [4, 64, 128, 48], [4, 16, 32, 16]),
    ],
)
def test_chunks_and_blocks(shape: tuple, patch: tuple, itemsize: int, chunks: list, blocks: list) -> None:
    assert partitions(shape, patch, itemsize) == (chunks, blocks)


@leaves_files_open
def test_a_run_without_the_extra(tmp_path: Path) -> None:
    found = bench.bench_loader(rivals=("gzip_h5", "webdataset"), workers=(0,), **SMALL)
    for state, variants in (("cold", set()), ("warm", {"memcpy", "rows"})):
        rates = [r for r in found if r["metric"] == "core rate" and f"8 batch 4, {state}, 0 w" in r["case"]]
        assert {r["variant"] for r in rates} == variants | {"gzip_h5", "webdataset", "shards", "shards_zstd"}
        assert min(r["value"] for r in rates) > 0
    report = {"meta": environment(1), "records": found}
    page = tables.page(report)
    assert "## Warm" in page
    assert "| memcpy of as many bytes from the same maps | 0." in page
    assert pictures.draw(report, tmp_path / "plot.png")


def test_what_cannot_be_measured_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(InputError, match=r"^--rivals lmdb: there are gzip_h5, webdataset, blosc2"):
        bench.bench_loader(rivals=("lmdb",))
    monkeypatch.setitem(sys.modules, "blosc2", None)
    with pytest.raises(InputError, match=r"needs the extra `bench`: pip install '.\[bench\]', or leave"):
        bench.bench_loader()


@pytest.mark.cluster
@leaves_files_open
def test_a_run_of_every_side() -> None:
    pytest.importorskip("blosc2", reason="needs the extra `bench`")
    found = bench.bench_loader(workers=(0, 1), **SMALL)
    cases = {r["case"]: {x["variant"] for x in found if x["case"] == r["case"]} for r in found}
    assert len(cases) == 4
    for case, variants in cases.items():
        assert {"gzip_h5", "webdataset", "blosc2", "blosc2_stored", "shards", "shards_zstd"} <= variants
        assert ("memcpy" in variants) == ("warm, 0" in case)
    assert min(r["value"] for r in found if r["metric"] in ("rate", "core rate")) > 0


@pytest.mark.cluster
def test_blosc2_gives_what_was_stored(tmp_path: Path) -> None:
    pytest.importorskip("blosc2", reason="needs the extra `bench`")
    case = numbered(1, shape=(20, 22, 18), kind="float32")[0]
    assert case.label is not None
    pair = write_blosc2(tmp_path / "case", case.image, case.label[None], (16, 12, 8))
    opened = [blosc2().open(urlpath=str(path), mode="r") for path in pair]
    np.testing.assert_array_equal(opened[0][:], case.image)
    np.testing.assert_array_equal(opened[1][0], case.label)
    image, label = Blosc2([pair], (16, 12, 8), 3).item(0)
    assert (image.shape, image.dtype, label.dtype) == ((3, 1, 16, 12, 8), torch.float32, torch.int8)
    rng = np.random.default_rng(0)
    for place in range(3):
        crop = drawn(rng, case.image.shape[1:], (16, 12, 8))
        np.testing.assert_array_equal(image[place], cut(case.image, crop))
        np.testing.assert_array_equal(label[place], cut(case.label[None], crop)[0])
