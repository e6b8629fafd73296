"""Sharding by several processes, and on from a kill, a failure or a change: always the same bytes."""

import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import h5py
import numpy as np
import psutil
import pytest
from corpora import numbered, tree, write, write_h5
from stalled import build
from test_data_parts import settings, sick

from cclmpc_dist.data import phantom, shards
from cclmpc_dist.data.case import Case
from cclmpc_dist.data.index import Index
from cclmpc_dist.data.merge import merge
from cclmpc_dist.data.sources import la_h5
from cclmpc_dist.data.verify import verify
from cclmpc_dist.data.workers import AHEAD, ordered
from cclmpc_dist.errors import InputError

HERE = Path(__file__).parent


def test_bytes_do_not_depend_on_the_number_of_workers(tmp_path: Path) -> None:
    one, two, three = (write(tmp_path / str(n), numbered(10), workers=n).path for n in (1, 2, 3))
    assert len(tree(one)) > 4
    assert tree(one) == tree(two) == tree(three)


def test_killed_before_any_file_operation_it_goes_on_to_the_same_bytes(tmp_path: Path) -> None:
    command = [sys.executable, str(HERE / "killed.py"), str(tmp_path)]
    done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=200)
    assert done.returncode == 0, done.stderr
    assert int(done.stdout) > 30, "a kill an operation"


def pieces(out: Path) -> int:
    return len(list(out.glob("parts/*.rows")))


@contextmanager
def stalled(out: Path, gate: Path, shards: int) -> Iterator[tuple[subprocess.Popen[str], list[psutil.Process]]]:
    """A build that waits for a case, with so many shards complete, and its two workers."""
    command = [sys.executable, str(HERE / "stalled.py"), str(out), str(gate), "2"]
    with subprocess.Popen(command, stderr=subprocess.PIPE, text=True) as process:
        try:
            workers: list[psutil.Process] = []
            while pieces(out) < shards or len(workers) < 2:
                assert process.poll() is None, process.communicate()[1]
                time.sleep(0.02)
                workers = [child for child in psutil.Process(process.pid).children() if is_worker(child)]
            yield process, workers
        finally:
            process.kill()


def is_worker(process: psutil.Process) -> bool:
    """Other children come and go while Python's packages are imported."""
    try:
        return "spawn_main" in " ".join(process.cmdline())
    except psutil.NoSuchProcess:
        return False


def test_killed_it_keeps_its_shards_and_its_workers_end(tmp_path: Path) -> None:
    """First the process, then a worker; the third run has one worker."""
    straight = tree(write(tmp_path / "straight", numbered(10)).path)
    out, gate = tmp_path / "out", tmp_path / "gate"
    with stalled(out, gate, 2) as (process, workers):
        process.kill()
        assert not psutil.wait_procs(workers, timeout=30)[1]
    told_of = [out / f"{piece.stem}.tar" for piece in out.glob("parts/*.rows")]  # the kill may fall between the two
    kept = {file: file.stat().st_mtime_ns for file in told_of}
    assert len(kept) >= 2
    assert not (out / "manifest.json").exists()

    with stalled(out, gate, 2) as (process, workers):
        workers[0].kill()
        _, said = process.communicate(timeout=60)
    told = "InputError: a worker was killed, perhaps for want of memory: give fewer --workers"
    assert told in said.splitlines()[-1]
    gate.touch()
    build(out, gate, workers=1)
    assert all(file.stat().st_mtime_ns == then for file, then in kept.items()), "they were not written again"
    assert tree(out) == straight


@pytest.mark.slow
def test_killed_at_random_moments_it_ends_with_the_same_bytes(tmp_path: Path) -> None:
    shards.write(phantom.cases(40, 0, 40), tmp_path / "straight", source="phantom", shard_bytes=1 << 20)
    rng, out = np.random.default_rng(), tmp_path / "out"
    kills = 0
    while not (out / "manifest.json").exists():
        words = ["40", "--format", "phantom", "--size", "40", "--shard-mib", "1", "--out", str(out), "--workers"]
        command = [sys.executable, "-m", "cclmpc_dist", "shard", *words, str(rng.integers(1, 4))]
        process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        time.sleep(rng.uniform(0.2, 1.5) + kills / 5)
        process.kill()
        process.wait()
        kills += 1
    subprocess.run(command, check=True, timeout=120)
    assert kills > 1
    assert tree(out) == tree(tmp_path / "straight")


def test_after_a_failure_it_goes_on_once_the_case_is_repaired_or_may_be_left_out(tmp_path: Path) -> None:
    cases: list[Case] = [*numbered(9), sick("case-009")]
    outs = [tmp_path / name for name in ("repaired", "left")]
    for out in outs:
        with pytest.raises(InputError, match="case-009"):
            write(out, cases, labelled=2)
        assert pieces(out) > 1, "full shards are kept"
    before = [{file: file.stat().st_mtime_ns for file in out.glob("*.tar")} for out in outs]
    write(outs[0], numbered(10), labelled=2)
    write(outs[1], cases, labelled=2, on_error="skip")
    for times in before:
        assert all(file.stat().st_mtime_ns == then for file, then in times.items())
    write(tmp_path / "straight", numbered(10), labelled=2)
    assert tree(outs[0]) == tree(tmp_path / "straight")
    assert Index.open(outs[1]).manifest["skipped"] == 1


def test_a_damaged_shard_and_a_changed_file_are_made_again(tmp_path: Path) -> None:
    image = np.arange(600, dtype=np.float32).reshape(10, 10, 6)
    for number in range(8):
        write_h5(tmp_path / "la", f"case{number}", image=image + number)
    out, plan = tmp_path / "out", settings(parts=1, shard_bytes=6000, labelled=None)
    shards.write_part(la_h5(tmp_path / "la"), out, plan)
    damaged = sorted(out.glob("*.tar"))[2]
    damaged.write_bytes(damaged.read_bytes().replace(b"NUMPY", b"NIMPY"))
    shards.write_part(la_h5(tmp_path / "la"), out, plan)
    with h5py.File(tmp_path / "la/case6/mri_norm2.h5", "a") as file:
        file["image"][:] = image * 3.7
        file["note"] = np.zeros(1000)
    shards.write_part(la_h5(tmp_path / "la"), out, plan)
    merge(out)
    assert verify(out) == []
    shards.write_part(la_h5(tmp_path / "la"), tmp_path / "straight", plan)
    merge(tmp_path / "straight")
    assert tree(out) == tree(tmp_path / "straight")


def test_no_more_cases_are_in_flight_than_the_workers_need(tmp_path: Path) -> None:
    """A corpus may be larger than memory: what was encoded ahead is bounded."""
    taken = 0

    def items() -> object:
        nonlocal taken
        for number in range(40):
            taken += 1
            yield number

    results = ordered(abs, items(), 2)
    for number in range(10):
        assert next(results) == number
        assert taken <= number + AHEAD * 2
    results.close()
