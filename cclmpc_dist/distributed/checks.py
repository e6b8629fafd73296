"""What one rank finds out about its own machine: versions, GPUs, shared memory, cores, bf16 convolutions."""

import math
import os
import platform
import re
import shutil
import socket
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path
from typing import Any, Literal

import torch
from torch import nn

from cclmpc_dist.models import vnet
from cclmpc_dist.words import counted

State = Literal["OK", "warning", "failed"]

PACKAGES = ("cclmpc-dist", "torch", "accelerate", "numpy", "webdataset", "safetensors")
DRIVER = Path("/proc/driver/nvidia/version")
QUOTA = Path("/sys/fs/cgroup/cpu.max")  # "<microseconds or max> <period>"
SHARED_MEMORY = Path("/dev/shm")
GIB = 2**30
LEAST_SHARED = 1.0  # GiB free [F]: what NVIDIA advises for NCCL in a container, whose default is 64 MiB
FREE_SHARE = 0.9  # of a GPU's memory; less is free where another process holds some [F]
BF16_ERROR = 0.05  # relative, in the L2 norm; bf16 keeps 8 bits, some 0.003 [F]


@dataclass(frozen=True)
class Finding:
    """What a check found on one rank.

    Ranks should find the same text. Where they measure, `value` fills the text's one {} and may differ; more is better.
    """

    check: str
    text: str
    state: State = "OK"
    remedy: str = ""
    value: float | None = None


def attempt(check: str, look: Callable[[], list[Finding]], remedy: str) -> list[Finding]:
    """What `look` finds; whatever it raises is a finding too, so that the other checks and ranks go on."""
    try:
        return look()
    except Exception as error:
        said = error.strerror if isinstance(error, OSError) and error.strerror else str(error).split("\n")[0]
        return [Finding(check, f"{type(error).__name__}: {said}", "failed", remedy)]


def facts(device: torch.device) -> dict[str, Any]:
    """Who this rank is, for the others; JSON values."""
    return {
        "host": socket.gethostname(),
        "device": str(device),
        "cores": sorted(os.sched_getaffinity(0)),
        "quota": _quota(),
        "threads": torch.get_num_threads(),
    }


def versions() -> list[Finding]:
    found = {"python": platform.python_version()} | {name: _version(name) for name in PACKAGES}
    told = ", ".join(f"{name} {version or 'not installed'}" for name, version in found.items())
    if all(found.values()):
        return [Finding("versions", told)]
    return [Finding("versions", told, "warning", "what needs it will say so: install the package with pip")]


def _version(package: str) -> str | None:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None


def gpus(device: torch.device) -> list[Finding]:
    """All GPUs of this rank's machine, and the free memory of the one that it uses."""
    driver = _driver()
    if not torch.cuda.is_available():
        if driver is None:
            return [Finding("GPUs", "none: the CPU and gloo")]
        remedy = "install a CUDA build of torch, or look at CUDA_VISIBLE_DEVICES"
        return [Finding("GPUs", f"driver {driver}, and torch {torch.__version__} sees no GPU", "warning", remedy)]
    cards = [torch.cuda.get_device_properties(number) for number in range(torch.cuda.device_count())]
    kinds = Counter(f"{card.name} ({card.total_memory / GIB:.1f} GiB)" for card in cards)
    told = ", ".join(f"{count} x {kind}" for kind, count in kinds.items())
    cudnn, nccl = torch.backends.cudnn.version(), ".".join(map(str, torch.cuda.nccl.version()))
    software = f"driver {driver}, CUDA {torch.version.cuda}, cuDNN {cudnn}, NCCL {nccl}"
    free, total = torch.cuda.mem_get_info(device)
    state: State = "OK" if free > FREE_SHARE * total else "warning"
    remedy = "another process holds memory there: nvidia-smi names it"
    memory = Finding("GPU memory", f"{{:.1f}} of {total / GIB:.1f} GiB free", state, remedy, free / GIB)
    return [Finding("GPUs", f"{told}, {software}"), memory]


def shared_memory() -> list[Finding]:
    """Where NCCL's ranks of a machine meet."""
    usage = shutil.disk_usage(SHARED_MEMORY)
    state: State = "OK" if usage.free >= LEAST_SHARED * GIB else "warning"
    remedy = "NCCL may fail for it: give a container more (docker --shm-size)"
    text = f"{{:.2f}} of {usage.total / GIB:.2f} GiB free"
    return [Finding("shared memory", text, state, remedy, usage.free / GIB)]


def cores(mine: dict[str, Any], everyone: list[dict[str, Any]]) -> list[Finding]:
    """Cores of this rank's machine that its ranks may use, against the threads that they start. From `facts`."""
    here = [one for one in everyone if one["host"] == mine["host"]]
    count = min(len({core for one in here for core in one["cores"]}), mine["quota"])
    threads = sum(one["threads"] for one in here)
    own = min(len(mine["cores"]), mine["quota"])
    told = (
        f"{own:g} for this rank and its {counted(mine['threads'], 'OMP thread')}, "
        f"{count:g} for its machine's {counted(len(here), 'rank')}"
    )
    if threads > count:
        return [Finding("cores", told, "warning", f"{threads} threads are too many: set OMP_NUM_THREADS lower")]
    if mine["device"] == "cpu" and threads <= count / 2:
        each = int(count // len(here))
        return [Finding("cores", told, "warning", f"cores stay idle: OMP_NUM_THREADS={each} (torchrun sets 1)")]
    return [Finding("cores", told)]


def bf16_convolution(device: torch.device) -> list[Finding]:
    """3x3x3 convolutions under bf16 autocast against float32: the models' own must be right, torch's need not be."""
    sizes: list[tuple[int, ...]] = [(2, 2, 1), (2, 4, 4), (16, 16, 16)]
    if device.type == "cuda":
        sizes.append((112, 112, 80))
    wrong = {
        kind: [size for size in sizes if not _bf16_error(kind, size, device) < BF16_ERROR]
        for kind in (vnet.Conv3d, nn.Conv3d)
    }
    if bad := wrong[vnet.Conv3d]:
        remedy = "take precision=fp32, or another version of torch"
        return [Finding("bf16 conv3d", f"{device.type}: wrong for maps of {_sizes(bad)}", "failed", remedy)]
    told = f"{device.type}: as float32 for maps of {_sizes(sizes)}"
    if bad := wrong[nn.Conv3d]:
        told += f"; torch's own is wrong for {_sizes(bad)}, the models go around it"
    return [Finding("bf16 conv3d", told)]


def _bf16_error(kind: type[nn.Conv3d], size: tuple[int, ...], device: torch.device) -> float:
    """Largest relative error of output and gradients; NaN where one is not finite."""
    torch.manual_seed(0)
    layer = kind(32, 32, 3, padding=1).to(device)
    x, seed = (torch.randn(2, 32, *size, device=device) for _ in range(2))
    found = []
    for bf16 in (False, True):
        layer.zero_grad()
        leaf = x.clone().requires_grad_()
        with torch.autocast(device.type, torch.bfloat16, enabled=bf16):
            out = layer(leaf)
        (out.float() * seed).sum().backward()
        assert leaf.grad is not None
        assert layer.weight.grad is not None
        found.append([out.detach().double(), leaf.grad.double(), layer.weight.grad.double()])
    errors = [float((b - a).norm() / a.norm()) for a, b in zip(*found, strict=True)]
    return math.nan if any(math.isnan(error) for error in errors) else max(errors)


def _sizes(sizes: list[tuple[int, ...]]) -> str:
    return ", ".join("x".join(map(str, size)) for size in sizes)


def _driver() -> str | None:
    """Version of the NVIDIA kernel driver, None without one."""
    found = re.search(r"\d+\.\d+[.\d]*", DRIVER.read_text()) if DRIVER.exists() else None
    return found[0] if found else None


def _quota() -> float:
    """Cores' worth of time that the control group grants; the machine's cores where it sets no limit."""
    limit, _, period = QUOTA.read_text().partition(" ") if QUOTA.exists() else ("max", "", "")
    return float(os.cpu_count() or 1) if limit == "max" else int(limit) / int(period)
