"""How long an all-reduce takes."""

import time

import torch
import torch.distributed as dist

from cclmpc_dist.distributed import runtime


def all_reduce_seconds(size: int, rounds: int, device: torch.device) -> list[float] | None:
    """Seconds of each round's all-reduce of `size` bytes of float32 on this rank, begun by all ranks together; None
    where a sum was wrong. Over two ranks or more."""
    world = runtime.world_size()
    seconds, right = [], True
    for _ in range(rounds + 1):
        values = torch.full((size // 4,), runtime.rank() + 1.0, device=device)
        runtime.barrier()
        began = time.perf_counter()
        dist.all_reduce(values)
        right &= bool((values == world * (world + 1) / 2).all())  # waits for the device
        seconds.append(time.perf_counter() - began)
    return seconds[1:] if right else None  # the first one connects
