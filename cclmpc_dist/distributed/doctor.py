"""`cclmpc doctor`: what training here depends on, looked at on every rank; rank 0 prints one line a check."""

import os
import statistics
import sys
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import asdict, replace
from datetime import timedelta
from itertools import groupby
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from cclmpc_dist.distributed import checks, folder_checks, runtime
from cclmpc_dist.distributed.checks import Finding, attempt
from cclmpc_dist.distributed.reduce_times import all_reduce_seconds
from cclmpc_dist.words import counted

TIMEOUT = timedelta(minutes=3)  # until ranks give up one that is lost; the checks between two gathers take less
REDUCED = 32 * 2**20  # bytes, about the gradients of the V-Net
ROUNDS = 7
OUT_OF_LINE = 0.5  # of the ranks' median; a rank with less is named
UNLIKE = "it differs from the other ranks: make them alike"

Row = tuple[Finding, list[int]]  # what some ranks found alike, and which


def examine(folder: Path) -> bool:
    """Look at everything and print it on rank 0; whether nothing failed, on every rank alike.

    folder: where runs go. Raises InputError where launcher and process group disagree.
    """
    found: list[Finding] = []
    try:
        told = os.environ.get("ACCELERATE_MIXED_PRECISION", "no")  # by accelerate launch; any will do here
        device = runtime.start("fp32" if told == "no" else told, TIMEOUT).device
        _look(folder, device, found)
        everyone = runtime.gather_json([asdict(finding) for finding in found], device)
        rows = merged([[Finding(**finding) for finding in one] for one in everyone])
        if runtime.rank() == 0:
            print(table(rows, len(everyone)), flush=True)
        runtime.barrier()  # a rank that leaves with code 1 makes torchrun end the others
    except RuntimeError as error:  # of the process group: this rank can only tell its own
        print(table(merged([[*found, _apart(error)]]), 1), file=sys.stderr, flush=True)
        return False
    finally:
        runtime.stop()
    return all(finding.state != "failed" for finding, _ in rows)


def _apart(error: RuntimeError) -> Finding:
    rank, world = (os.environ.get(name, "?") for name in ("RANK", "WORLD_SIZE"))
    told = f"rank {rank} of {world} lost the others: {str(error).splitlines()[0]}"
    remedy = "look at what the others say, at MASTER_ADDR and MASTER_PORT, NCCL_SOCKET_IFNAME or GLOO_SOCKET_IFNAME"
    return Finding("rendezvous", told, "failed", remedy)


def _look(folder: Path, device: torch.device, found: list[Finding]) -> None:
    """Append this rank's findings, check by check. Collective."""
    mine = checks.facts(device)
    everyone = runtime.gather_json(mine, device)
    found.append(_met(everyone))
    found += attempt("versions", checks.versions, "install the package with pip")
    found += attempt("GPUs", lambda: checks.gpus(device), "look at the driver: nvidia-smi")
    found += attempt("shared memory", checks.shared_memory, "mount /dev/shm")
    found += attempt("cores", lambda: checks.cores(mine, everyone), "set OMP_NUM_THREADS")
    found += attempt("bf16 conv3d", lambda: checks.bf16_convolution(device), "take precision=fp32")
    found += folder_checks.look(folder, device)
    found.append(_reduce(device))


def _met(everyone: list[dict[str, Any]]) -> Finding:
    """Who is where."""
    hosts: dict[str, list[int]] = defaultdict(list)
    for rank, one in enumerate(everyone):
        hosts[one["host"]].append(rank)
    if len(everyone) == 1:
        return Finding("rendezvous", f"one process on {everyone[0]['host']}, nobody to meet")
    told = ", ".join(f"{host} ({ranks(members)})" for host, members in hosts.items())
    return Finding("rendezvous", f"{len(everyone)} ranks on {counted(len(hosts), 'machine')} met: {told}")


def _reduce(device: torch.device) -> Finding:
    """Time all-reduces: the median round, and the bandwidth that a ring needs for it, 2 (W-1)/W bytes a second."""
    world = runtime.world_size()
    if world == 1:
        return Finding("all-reduce", "one process, nothing to reduce")
    seconds = all_reduce_seconds(REDUCED, ROUNDS, device)
    if seconds is None:
        return Finding("all-reduce", "wrong sums", "failed", "look at network and NCCL: NCCL_DEBUG=INFO")
    median = statistics.median(seconds)
    bandwidth = 2 * (world - 1) / world * REDUCED / median / 1e9
    text = f"{{:.2f}} GB/s on a ring ({dist.get_backend()}, {REDUCED // 2**20} MiB, median of {ROUNDS})"
    return Finding("all-reduce", text, value=bandwidth)


# ---- from the findings of the ranks to a table ---------------------------------------------------------------------


def merged(everyone: Sequence[Sequence[Finding]]) -> list[Row]:
    """The ranks' findings, check by check; ranks that found the same share a row, and one out of line has its own."""
    names = list({finding.check: None for found in everyone for finding in found})
    rows = []
    for name in names:
        of_rank = [(rank, finding) for rank, found in enumerate(everyone) for finding in found if finding.check == name]
        rows += _merged_check(of_rank)
    return rows


def _merged_check(of_rank: list[tuple[int, Finding]]) -> list[Row]:
    measures = [finding.value for _, finding in of_rank if finding.value is not None]
    middle = statistics.median(measures) if measures else 0.0
    groups: dict[Finding, list[tuple[int, float]]] = defaultdict(list)
    for rank, finding in of_rank:
        value = finding.value if finding.value is not None else middle
        if finding.state == "OK" and value < OUT_OF_LINE * middle:
            finding = replace(
                finding, state="warning", remedy=f"the ranks' median is {middle:.3g}: look at that machine"
            )
        groups[replace(finding, value=None if finding.value is None else 0.0)].append((rank, value))
    ordered = sorted(groups.items(), key=lambda item: -len(item[1]))
    rows = []
    for place, (finding, members) in enumerate(ordered):
        if place and finding.state == "OK":
            finding = replace(finding, state="warning", remedy=UNLIKE)
        if finding.value is not None:
            finding = replace(finding, text=_filled(finding.text, [value for _, value in members]))
        rows.append((finding, [rank for rank, _ in members]))
    return rows


def _filled(text: str, values: list[float]) -> str:
    """The text's {:spec} with the value, or with the least and the most of several."""
    before, spec, after = (
        text[: text.index("{")],
        text[text.index("{") : text.index("}") + 1],
        text[text.index("}") + 1 :],
    )
    ends = list(dict.fromkeys(spec.format(value) for value in (min(values), max(values))))
    return before + " to ".join(ends) + after


def table(rows: list[Row], world: int) -> str:
    """Plain columns: state, check, ranks, what was found and what to do; at the end how many of each state."""
    lines = []
    for finding, members in rows:
        who = "all" if len(members) == world else ranks(members)
        told = finding.text if finding.state == "OK" else f"{finding.text}: {finding.remedy}".removesuffix(": ")
        lines.append((finding.state, finding.check, who, told))
    widths = [max(len(line[column]) for line in lines) for column in range(3)]
    text = [
        "  ".join([*(cell.ljust(width) for cell, width in zip(line[:3], widths, strict=True)), line[3]])
        for line in lines
    ]
    counts = ", ".join(f"{sum(line[0] == state for line in lines)} {state}" for state in ("OK", "warning", "failed"))
    return "\n".join([*text, f"{counted(world, 'rank')}: {counts}"])


def ranks(members: list[int]) -> str:
    """`rank 3`, `ranks 0-2, 5`."""
    runs = [[rank for _, rank in run] for _, run in groupby(enumerate(members), key=lambda pair: pair[1] - pair[0])]
    told = ", ".join(str(run[0]) if len(run) == 1 else f"{run[0]}-{run[-1]}" for run in runs)
    return f"rank{'s' if len(members) > 1 else ''} {told}"
