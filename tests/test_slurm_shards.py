"""slurm/shard_corpus.sh on a real Slurm: parts as an array, a merge that waits for them, and on after a kill."""

import sys
from pathlib import Path

import numpy as np
import psutil
import pytest
from slurm_cluster import Cluster, until

from cclmpc_dist.data import phantom, shards
from cclmpc_dist.data.reader import Reader
from cclmpc_dist.data.verify import verify

ROOT = Path(__file__).resolve().parent.parent
SCRIPT = "slurm/shard_corpus.sh"
CASES, SIZE = 24, 72

pytestmark = [pytest.mark.cluster, pytest.mark.timeout(300)]


def submit(slurm: Cluster, logs: Path, *arguments: str) -> int:
    where = {"PYTHON": sys.executable, "LOGS": str(logs)}
    return slurm.submit(f"--output={logs}/%A_%a.out", *arguments, cwd=ROOT, **where)


def queued(slurm: Cluster, name: str) -> bool:
    return bool(slurm.ask("squeue", "-h", f"--name={name}"))


def task(out: Path, part: str) -> list[psutil.Process]:
    found = []
    for one in psutil.process_iter():
        try:
            words = one.cmdline()
        except psutil.Error:
            continue
        if str(out) in words and part in words:
            found.append(one)
    return found


def test_a_killed_task_fails_the_merge_and_the_same_submission_goes_on(slurm: Cluster, tmp_path: Path) -> None:
    out = tmp_path / "corpus"
    words = (SCRIPT, str(CASES), "--format", "phantom", "--size", str(SIZE), "--shard-mib", "1", "--out", str(out),
             "--labelled", "4", "--val-last", "6")  # fmt: skip
    first = submit(slurm, tmp_path, *words)
    pieces = out / "parts"
    until(lambda: len(list(pieces.glob("shard-0002-*.rows"))) >= 2, "part 2 has two shards", 120)
    (process,) = task(out, "2/2")
    process.kill()
    whole = [out / f"{rows.stem}.tar" for rows in pieces.glob("*.rows")]  # of a shard without rows nothing is kept
    kept = {file.name: file.stat().st_mtime_ns for file in whole}
    until(lambda: not queued(slurm, f"merge_{first}") and not queued(slurm, "shard_corpus"), "both have left", 120)
    assert not (out / "manifest.json").exists()
    assert not (tmp_path / f"shard_corpus-{first}_merge.out").exists(), "the merge never started"

    second = submit(slurm, tmp_path, *words)
    merged = tmp_path / f"shard_corpus-{second}_merge.out"
    until(lambda: merged.exists() and not queued(slurm, f"merge_{second}"), "the parts are merged", 120)
    assert "24 cases in" in merged.read_text()
    assert "4 labelled, 6 for reports only" in merged.read_text()
    assert verify(out) == []
    assert kept.items() <= {file.name: file.stat().st_mtime_ns for file in out.glob("*.tar")}.items()
    assert_same_samples(out, tmp_path / "alone")


def assert_same_samples(out: Path, alone: Path) -> None:
    """As those of a run in one part."""
    index = shards.write(
        phantom.cases(CASES, 0, SIZE), alone, source="phantom", labelled=4, val_last=6, shard_bytes=1 << 20
    )
    one, many = Reader(index), Reader(shards.Index.open(out))
    assert len(many.index) == CASES
    for name in ("key_bytes", "shape", "scale", "offset", "labelled", "split", "voxels", "voxel_at", "key_order"):
        np.testing.assert_array_equal(many.index[name], index[name], err_msg=name)
    for row in range(CASES):
        np.testing.assert_array_equal(many.image(row), one.image(row))
        np.testing.assert_array_equal(many.label(row), one.label(row))


@pytest.mark.parametrize(
    ("array", "words", "said"),
    [
        ("0-1", ["8", "--out", "o"], "number the parts from 1"),
        ("1-2", ["8", "--format", "phantom"], "no --out FOLDER"),
        ("1-2", ["nowhere", "--format", "la-h5", "--out", "{tmp}/o"], "nowhere: no such folder"),
    ],
)
def test_what_cannot_work_ends_in_one_line(
    array: str, words: list[str], said: str, slurm: Cluster, tmp_path: Path
) -> None:
    number = submit(slurm, tmp_path, f"--array={array}", SCRIPT, *(word.format(tmp=tmp_path) for word in words))
    until(lambda: not queued(slurm, "shard_corpus") and not queued(slurm, f"merge_{number}"), "all have left", 90)
    for index in array.split("-"):
        lines = (tmp_path / f"{number}_{index}.out").read_text().splitlines()
        assert sum(said in line for line in lines) == 1
        assert [line for line in lines if "Submitted batch job" not in line] == [lines[-1]]
    assert not (tmp_path / "o").exists()
