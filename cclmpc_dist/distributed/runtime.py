"""Who am I, and a clean start and end of the process group, whatever launched this process."""

import ctypes
import gc
import json
import os
import time
import warnings
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
from accelerate import Accelerator
from accelerate.utils import DistributedDataParallelKwargs, InitProcessGroupKwargs
from torch import nn

from cclmpc_dist.distributed.exchange import COLLECTIVE_TIMEOUT, gather_detached
from cclmpc_dist.errors import InputError

M_TRIM_THRESHOLD, M_MMAP_MAX = -1, -4  # of malloc.h


def rank() -> int:
    """This process's number, 0 without a process group."""
    return dist.get_rank() if dist.is_initialized() else 0


def world_size() -> int:
    """Number of processes, 1 without a process group."""
    return dist.get_world_size() if dist.is_initialized() else 1


def keep_memory() -> None:
    """Have glibc's malloc reuse freed blocks of any size. By default it gives those above 32 MiB back to the kernel,
    and a training step on a CPU spends a third of its time in getting them again page by page."""
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)  # not there with another C library
    if mallopt is not None:
        mallopt(M_MMAP_MAX, 0)
        mallopt(M_TRIM_THRESHOLD, -1)


def start(precision: str, timeout: timedelta = COLLECTIVE_TIMEOUT, plugin: Any = None) -> Accelerator:
    """An Accelerator over the processes that the launcher meant: NCCL with a GPU, gloo without. plugin: accelerate's
    DeepSpeedPlugin, which leaves the precision to whoever wraps the module.

    DDP sends no buffers around (each rank keeps its own norm statistics) and searches unused parameters: without that
    search its bucket rebuild breaks bit-identical resume at three ranks and more.
    Raises InputError where launcher and process group or precision disagree, torchrun could not restart, or fp16 meets
    a CPU.
    """
    expected = _launched_world_size()
    _check_restarts()
    on_cpu = not torch.cuda.is_available()
    if on_cpu:
        keep_memory()
    if on_cpu and precision == "fp16":
        raise InputError("precision = fp16 needs a GPU: take bf16 or fp32")
    told = os.environ.get("ACCELERATE_MIXED_PRECISION", "no")
    if told not in ("no", precision):
        raise InputError(f"precision = {precision}, and accelerate launch was told mixed_precision = {told}: make them "
                         "equal, or leave the second at no")  # fmt: skip
    if os.environ.get("ACCELERATE_USE_DEEPSPEED", "false").lower() == "true":
        raise InputError("accelerate launch was told use_deepspeed: start it without, and set strategy=deepspeed")
    group = InitProcessGroupKwargs(timeout=timeout)
    if on_cpu and plugin is not None:
        group.backend = "gloo"
    accelerator = Accelerator(
        cpu=on_cpu and plugin is None,  # true, it would turn the plugin off without a word
        mixed_precision="no" if precision == "fp32" or plugin is not None else precision,
        deepspeed_plugin=plugin,
        kwargs_handlers=[
            DistributedDataParallelKwargs(
                find_unused_parameters=True, broadcast_buffers=False, gradient_as_bucket_view=True
            ),
            group,
        ],
    )
    if accelerator.gradient_accumulation_steps != 1:
        raise InputError(
            "ACCELERATE_GRADIENT_ACCUMULATION_STEPS is set, and accumulation is a setting here: unset it "
            "(accelerate launch: no --gradient_accumulation_steps) and use accumulate=N"
        )
    if accelerator.num_processes != expected or world_size() != expected:
        raise InputError(
            f"the launcher started {expected} processes, the process group has {world_size()}: "
            "launch with torchrun --nproc-per-node N, or accelerate launch --multi_gpu --num_processes N"
        )
    return accelerator


def wrap(accelerator: Accelerator, module: nn.Module) -> nn.Module:
    """The module as Accelerate wraps it: DDP over several ranks, autocast where the precision asks for it."""
    with warnings.catch_warnings():
        # torch 2.13 renames an option that accelerate still passes under its old name.
        warnings.filterwarnings("ignore", message="`broadcast_buffers` is deprecated", category=FutureWarning)
        wrapped: nn.Module = accelerator.prepare_model(module)
    return wrapped


def _launched_world_size() -> int:
    """WORLD_SIZE as the launcher set it, 1 without one."""
    asked_for_several = "MASTER_ADDR" in os.environ and "ACCELERATE_MIXED_PRECISION" in os.environ
    if "WORLD_SIZE" not in os.environ and asked_for_several:
        raise InputError(
            "accelerate launch was asked for several processes and started one (it does so with --cpu): "
            "use torchrun --nproc-per-node N -m cclmpc_dist, or ACCELERATE_USE_CPU=true accelerate launch --multi_gpu; "
            "for one process unset MASTER_ADDR"
        )
    tasks = int(os.environ.get("SLURM_STEP_NUM_TASKS", 1))
    if "WORLD_SIZE" not in os.environ and tasks > 1:
        raise InputError(
            f"srun started {tasks} processes that do not know of one another: "
            "start one torchrun a node with it, srun --ntasks-per-node 1 torchrun --nnodes N ..."
        )
    return int(os.environ.get("WORLD_SIZE", 1))


def _check_restarts() -> None:
    """torchrun's agent keeps one store over all restarts, and ranks started again find the addresses of the dead in it:
    they fail or hang (pytorch#135712, seen in torch 2.13)."""
    restarts = int(os.environ.get("TORCHELASTIC_MAX_RESTARTS", 0))
    if restarts and os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True":
        raise InputError(
            f"torchrun --max-restarts {restarts} cannot start ranks again with the store it shares with them: "
            "export TORCH_DISABLE_SHARE_RDZV_TCP_STORE=1 before it"
        )


def stop() -> None:
    """End the process group. gloo's thread can abort Python's exit while it holds the last work object: the collection
    and the pause let it go (measured: 2 of 30 runs aborted without, 0 of 30 with)."""
    if dist.is_initialized():
        gc.collect()
        time.sleep(0.2)
        dist.destroy_process_group()


def average_(tensors: list[torch.Tensor]) -> None:
    """Replace floating tensors by their mean over ranks, in one collective."""
    if world_size() == 1 or not tensors:
        return
    flat = torch.cat([tensor.detach().reshape(-1).to(torch.float64) for tensor in tensors])
    dist.all_reduce(flat)
    flat /= world_size()
    for tensor, part in zip(tensors, flat.split([tensor.numel() for tensor in tensors]), strict=True):
        tensor.copy_(part.view_as(tensor))


def from_rank_zero(value: int, device: torch.device) -> int:
    """Rank 0's integer, on every rank."""
    if world_size() == 1:
        return value
    word = torch.tensor([value], device=device, dtype=torch.int64)
    dist.broadcast(word, 0)
    return int(word.item())


def gather_json(value: Any, device: torch.device | str) -> list[Any]:
    """Every rank's value, in the order of the ranks, on every rank. Collective.

    Values travel as JSON in tensors on `device` (CUDA for NCCL), padded to the longest.
    """
    text = torch.tensor(list(json.dumps(value).encode()), dtype=torch.uint8, device=device)
    sizes = gather_detached(torch.tensor([len(text)], device=device)).tolist()
    texts = gather_detached(nn.functional.pad(text, (0, max(sizes) - len(text)))).view(len(sizes), -1).cpu()
    return [json.loads(bytes(row[:size].tolist())) for row, size in zip(texts, sizes, strict=True)]


def barrier() -> None:
    if world_size() > 1:
        dist.barrier()
