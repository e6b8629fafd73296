"""Real processes that meet by gloo, or by NCCL with a GPU each, inside one test."""

import gc
import os
import tempfile
import time
import traceback
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.multiprocessing


def run_ranks(
    fn: Callable[..., Any], world: int, *args: Any, timeout: float = 60.0, backend: str = "gloo"
) -> list[Any]:
    """[fn(rank, world, *args) for every rank], each rank a process of its own in one group.

    fn lies at the top of an importable module and returns tensors, numbers, strings or lists, tuples and
    dicts of them. The environment carries RANK, LOCAL_RANK and WORLD_SIZE. Raises AssertionError with the
    traceback of the first rank that failed, or after `timeout` seconds; no process outlives the call.
    """
    context = torch.multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["cclmpc_dist.training.trainer"])  # imported once, not by every rank
    with tempfile.TemporaryDirectory() as folder:
        ranks = [context.Process(target=_rank, args=(fn, rank, world, folder, backend, args)) for rank in range(world)]
        try:
            for process in ranks:
                process.start()
            _wait(ranks, time.monotonic() + timeout)
        finally:
            for process in ranks:
                if process.pid is not None:
                    process.kill()
                    process.join()
        for file in sorted(Path(folder).glob("*.error"), key=lambda file: file.stat().st_mtime_ns):
            raise AssertionError(f"rank {file.stem} of {world} failed\n{file.read_text()}")
        codes = [process.exitcode for process in ranks]
        assert codes == [0] * world, (
            f"{fn.__name__}: exit codes {codes} (negative: killed, after {timeout} s or before)"
        )
        return [torch.load(Path(folder) / f"{rank}.pt", weights_only=True) for rank in range(world)]


def _wait(ranks: list[Any], deadline: float) -> None:
    """Until all have ended, one has failed, or it is too late."""
    while time.monotonic() < deadline:
        codes = [process.exitcode for process in ranks]
        if None not in codes or any(codes):
            return
        time.sleep(0.02)


def _rank(fn: Callable[..., Any], rank: int, world: int, folder: str, backend: str, args: tuple[Any, ...]) -> None:
    address = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "29500"}  # asked for by accelerate, used by nobody
    os.environ.update(address, RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE=str(world))
    warnings.simplefilter("error", FutureWarning)
    torch.set_num_threads(1)
    if backend == "nccl":
        torch.cuda.set_device(rank)
    dist.init_process_group(backend, init_method=f"file://{folder}/rendezvous", rank=rank, world_size=world)
    try:
        torch.save(fn(rank, world, *args), Path(folder) / f"{rank}.pt")
    except BaseException:
        Path(folder, f"{rank}.error").write_text(traceback.format_exc())
        raise SystemExit(1) from None
    dist.barrier()
    gc.collect()  # gloo's thread may otherwise drop the last work object while Python ends, and abort
    time.sleep(0.2)
    dist.destroy_process_group()
