"""`cclmpc bench allreduce`: message sizes, seconds, and the line alpha + beta * bytes through them."""

from statistics import median
from typing import Any

import numpy as np
import torch
import torch.distributed as dist

from cclmpc_dist.distributed import runtime
from cclmpc_dist.distributed.reduce_times import all_reduce_seconds
from cclmpc_dist.errors import InputError
from cclmpc_dist.records import Record, record, repeated
from cclmpc_dist.training.run import environment

SIZES = tuple(4096 * 4**power for power in range(8))  # 4 KiB to 64 MiB
ROUNDS = 7


def bench_allreduce() -> tuple[list[Record], dict[str, Any]]:
    """Records and meta at the launched world size, on every rank alike. Raises InputError for a single process."""
    accelerator = runtime.start("fp32")
    try:
        world = runtime.world_size()
        if world == 1:
            raise InputError("bench allreduce on one process: nothing to reduce: start it with torchrun, or take "
                             "--ranks N")  # fmt: skip
        records = measure(accelerator.device)
        meta = environment(world) | {"backend": dist.get_backend()}
        return [{"bench": "allreduce", "case": f"{world} ranks"} | one for one in records], meta
    finally:
        runtime.stop()


def measure(device: torch.device, sizes: tuple[int, ...] = SIZES) -> list[Record]:
    """Records without bench and case. Of each size the median of ROUNDS, on the slowest rank. Collective."""
    all_reduce_seconds(sizes[-1], 1, device)  # warm-up
    mine = [all_reduce_seconds(size, ROUNDS, device) or [float("nan")] for size in sizes]
    everyone = runtime.gather_json(mine, device)
    slowest = [max((rank[place] for rank in everyone), key=median) for place in range(len(sizes))]
    return to_records(sizes, slowest, len(everyone))


def to_records(sizes: tuple[int, ...], seconds: list[list[float]], world: int) -> list[Record]:
    """Of each size its seconds, a list of repetitions; the fit through the medians, and the bandwidth of a ring that
    its slope stands for."""
    alpha, beta = fit(sizes, [median(values) for values in seconds])
    records = [
        {"variant": f"all-reduce {size} B", "metric": "seconds", "unit": "s"} | repeated(values)
        for size, values in zip(sizes, seconds, strict=True)
    ]
    return [
        *records,
        record("all-reduce fit", "alpha", alpha, "s"),
        record("all-reduce fit", "beta", beta, "s/B"),
        record("all-reduce fit", "ring_bandwidth", ring_bandwidth(beta, world), "B/s"),
    ]


def fit(sizes: tuple[int, ...], seconds: list[float]) -> tuple[float, float]:
    """alpha and beta, neither negative, with the least squares of (alpha + beta n - t) / t: small and large messages
    count alike."""
    n, t = np.array(sizes, float), np.array(seconds)
    alpha, beta = np.linalg.lstsq(np.stack([1 / t, n / t], axis=1), np.ones(len(t)), rcond=None)[0]
    if alpha < 0:
        return 0.0, float((n / t).sum() / ((n / t) ** 2).sum())
    if beta < 0:
        return float((1 / t).sum() / (1 / t**2).sum()), 0.0
    return float(alpha), float(beta)


def ring_bandwidth(beta: float, world: int) -> float:
    """Bytes a second that each rank of a ring sends: an all-reduce of n bytes sends 2 (W - 1) / W n."""
    return 2 * (world - 1) / world / beta if beta else float("inf")
