"""A rank that stands still or is slow is named by the others; real processes without an agent, which would end them."""

import json
import os
import socket
import subprocess
import sys
import time
from datetime import timedelta
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
import toy
import yaml
from ranks import run_ranks

from cclmpc_dist.config import parse
from cclmpc_dist.distributed import exchange, runtime, watch
from cclmpc_dist.training import throughput
from cclmpc_dist.training.pace import slowest
from cclmpc_dist.training.trainer import Trainer

ROOT = Path(__file__).resolve().parent.parent
HOST = socket.gethostname()


def start(world: int, folder: Path, raw: dict[str, Any], faults: dict[int, str]) -> list[subprocess.Popen[str]]:
    """Every rank of a run, each with its fault."""
    (folder / "c.yaml").write_text(yaml.safe_dump(raw))
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    common = {"WORLD_SIZE": str(world), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "OMP_NUM_THREADS": "1"}
    return [
        subprocess.Popen(
            [sys.executable, str(ROOT / "tests/faulty.py"), str(folder / "c.yaml")],
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            env=os.environ | common | {
                "RANK": str(rank), "LOCAL_RANK": str(rank),
                "FAULT": f"{faults.get(rank, 'none:batch:-1:0')}:{folder}/happened-{rank}",
            },
        )
        for rank in range(world)
    ]  # fmt: skip


def stand_still(world: int, fault: str, folder: Path, corpus: Path) -> tuple[str, list[dict[str, Any]]]:
    """What the surviving ranks of a run say in which one stands still in step 4, and the reports they leave.

    Each must end by itself with exit code 1.
    """
    victim = int(fault.split(":")[2])
    processes = start(world, folder, toy.settings(corpus, folder, hang_seconds=4), {victim: fault})
    try:
        said = [toy.finish(process) for rank, process in enumerate(processes) if rank != victim]
    finally:
        for process in processes:
            process.kill()
            process.communicate()
    assert [code for code, _ in said] == [1] * (world - 1), said
    left = sorted((folder / "toy" / "hangs").glob("*/*.json"))
    assert all("training/trainer.py" in file.with_suffix(".txt").read_text() for file in left)
    return "".join(text for _, text in said), [json.loads(file.read_text()) for file in left]


@pytest.mark.slow
@pytest.mark.parametrize(("world", "victim"), [(2, 1), (3, 0), (3, 2)])
def test_a_stopped_rank_is_named_by_the_others(world: int, victim: int, toy_corpus: Path, tmp_path: Path) -> None:
    said, reports = stand_still(world, f"stop:batch:{victim}:3", tmp_path, toy_corpus)
    told = f"cclmpc: step 4 stands still for 4 s: no sign of rank {victim} on {HOST} (stopped, dead or cut off); stacks"
    assert said.count(told) == said.count("stands still") == 1
    assert "Traceback" not in said
    assert [report["rank"] for report in reports] == [rank for rank in range(world) if rank != victim]
    for report in reports:
        assert report["flight_recorder"]["entries"]


@pytest.mark.slow
def test_a_rank_that_is_busy_elsewhere_is_named_with_the_place(toy_corpus: Path, tmp_path: Path) -> None:
    said, reports = stand_still(3, "hang:batch:1:3", tmp_path, toy_corpus)
    assert said.count("stands still") == 1
    assert f"the others wait for rank 1 on {HOST}, at trainer.py:" in said
    entered = [report["entered"] for report in reports]
    assert entered[0] == entered[2] > entered[1]


@pytest.mark.slow
@pytest.mark.parametrize("slow", [{1}, {0, 1}])
def test_a_slow_rank_is_named_in_the_log(slow: set[int], toy_corpus: Path, tmp_path: Path) -> None:
    """Where all are alike nobody is."""
    raw = toy.settings(toy_corpus, tmp_path, budget__images=120, log_every=5)
    faults = {rank: f"slow:batch:{rank}:0" for rank in slow}
    said = [toy.finish(process) for process in start(2, tmp_path, raw, faults)]
    assert [code for code, _ in said] == [0, 0], said
    assert all((tmp_path / f"happened-{rank}").exists() for rank in slow)
    lines = [line for line in said[0][1].splitlines() if "samples/s" in line]
    assert [f"SLOW: rank 1 on {HOST}" in line for line in lines] == [slow == {1}] * 2
    assert ["SLOW" in line for line in lines] == [slow == {1}] * 2
    scalars = [json.loads(line) for line in (tmp_path / "toy" / "metrics.jsonl").read_text().splitlines()]
    if slow == {1}:
        assert [line["perf/slowest_rank"] for line in scalars] == [1, 1]
        assert min(line["perf/slowest_rank_late_seconds"] for line in scalars) > 0.25


@pytest.mark.parametrize(
    ("seconds", "named"),
    [([0.5, 0.5], None), ([0.5, 0.74], None), ([0.5, 0.76], 1), ([0.8, 0.5, 0.52], 0), ([0.5, 0.9, 0.9], None),
     ([0.5, 0.5, 0.5, 1.6], 3)],
)  # fmt: skip
def test_out_of_line_is_a_quarter_of_a_step_behind_the_median(seconds: list[float], named: int | None) -> None:
    scalars, words = slowest([(value, f"node{rank}") for rank, value in enumerate(seconds)], step=1.0)
    assert words.startswith(f"  SLOW: rank {named} on node{named}, ") == (named is not None) == bool(words)
    assert scalars["perf/slowest_rank"] == seconds.index(max(seconds))


def timed_out(rank: int, world: int) -> list[str]:
    """What a group says that rank 0 enters alone, made before the timeout was set and its own."""
    group = exchange.own_group(world)
    watch._limit(timedelta(seconds=0.4))
    error = ""
    if rank == 0:
        try:
            dist.all_reduce(torch.ones(1), group=group)
        except RuntimeError as raised:
            error = str(raised)
    else:
        time.sleep(1)
    watch._limit(exchange.COLLECTIVE_TIMEOUT)
    return [error]


def test_the_timeout_of_a_group_that_is_there_can_be_set() -> None:
    [told], _ = run_ranks(timed_out, 2)
    assert "Timed out waiting 400ms" in told


def measured_peaks(rank: int, world: int, raw: dict[str, Any]) -> list[list[Any]]:
    """Whether the watch is armed where the peak is measured, and at each log line behind what ranks wait for there."""
    trainer = Trainer(parse(raw, "toy"), runtime.start("fp32"))
    seen: list[list[Any]] = []
    products = throughput.product_seconds

    def watched(device: torch.device, precision: str) -> list[float]:
        seen.append(["product", trainer.watch._armed])
        return products(device, precision)

    throughput.product_seconds, throughput.WARMUP, throughput.EDGE = watched, 2, 64
    trainer.listener = lambda step, *_: seen.append([step, trainer.watch._armed])
    trainer.fit()
    return seen


def test_the_watch_rests_until_all_ranks_have_measured_their_peak(toy_corpus: Path, tmp_path: Path) -> None:
    raw = toy.settings(toy_corpus, tmp_path, method="supervised", data__batch_labelled=2, budget__images=6)
    for seen in run_ranks(measured_peaks, 2, raw):
        assert seen == [[1, True], ["product", False], [2, False], [3, True]]
