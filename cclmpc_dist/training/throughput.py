"""How much of a device a step uses: its FLOPs, and the peak they are held against."""

import re
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, TypeVar

import torch
from torch.utils.flop_counter import FlopCounterMode

from cclmpc_dist.words import counted

FORWARD_AND_BACKWARD = 3  # FLOPs of a training step over those of its forward pass: each product has two gradients
TERA = 1e12
Result = TypeVar("Result")
KINDS = {"fp32": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}
EDGE, ROUNDS = 2048, 5  # of the square matrices whose product is measured
WARMUP = 50  # microbatches of a process before its MFU is told


@dataclass(frozen=True)
class Peak:
    """FLOPs a second that a device could do, and who says so."""

    flops: float
    source: str


@dataclass(frozen=True)
class Sheet:
    """Dense TFLOP/s of the matrix units: half precision (bf16 or fp16), and what float32 convolutions run as (TF32
    where there is one, torch's default, else float32). `words`: all of them are in the name that CUDA reports."""

    words: set[str]
    half: float
    single: float
    source: str
    single_kind: str = "TF32"


# The first match counts. Data sheets that print figures "with sparsity" are halved.
SHEETS = (
    Sheet({"V100"}, 125, 15.7, "NVIDIA V100 data sheet, SXM2", single_kind="fp32"),
    Sheet({"A100"}, 312, 156, "NVIDIA A100 data sheet"),
    Sheet({"A10"}, 125, 62.5, "NVIDIA A10 data sheet"),
    Sheet({"L40S"}, 362, 183, "NVIDIA L40S data sheet"),
    Sheet({"H100", "PCIe"}, 756, 378, "NVIDIA H100 data sheet, PCIe"),
    Sheet({"H100", "NVL"}, 835.5, 417.5, "NVIDIA H100 data sheet, NVL"),
    Sheet({"H100"}, 989.4, 494.7, "NVIDIA H100 data sheet, SXM"),
    Sheet({"H200", "NVL"}, 835.5, 417.5, "NVIDIA H200 data sheet, NVL"),
    Sheet({"H200"}, 989.4, 494.7, "NVIDIA H200 data sheet, SXM"),
    Sheet({"B200"}, 2250, 1125, "NVIDIA HGX B200 data sheet, an eighth"),
)


def listed(device: str, precision: str) -> Peak | None:
    """What the data sheet of a device promises; None for one that is not in SHEETS. device: the name CUDA reports."""
    words = set(re.split(r"[^A-Za-z0-9]+", device))
    for sheet in SHEETS:
        if sheet.words <= words:
            kind, rate = (sheet.single_kind, sheet.single) if precision == "fp32" else (precision, sheet.half)
            return Peak(rate * TERA, f"{sheet.source}: {rate:g} TFLOP/s dense {kind}")
    return None


def product_seconds(device: torch.device, precision: str) -> list[float]:
    """Seconds of each of some products of two square matrices, with the threads that this process has; torch's random
    state stays as it is."""
    generator = torch.Generator(device).manual_seed(0)
    a, b = (torch.rand(EDGE, EDGE, device=device, generator=generator).to(KINDS[precision]) for _ in range(2))
    seconds = []
    for _ in range(1 + ROUNDS):
        began = time.perf_counter()
        (a @ b)[0, 0].item()  # waits for the device
        seconds.append(time.perf_counter() - began)
    return seconds[1:]


def measured(device: torch.device, precision: str, seconds: list[float]) -> Peak:
    """The best rate of product_seconds."""
    rate = 2 * EDGE**3 / min(seconds)
    cpu = device.type == "cpu"
    where = counted(torch.get_num_threads(), "thread") if cpu else torch.cuda.get_device_name(device)
    told = f"{rate / TERA:.3g} TFLOP/s, product of two {EDGE} x {EDGE} matrices, {KINDS[precision]}, {where}"
    return Peak(rate, f"measured: {told}, best of {ROUNDS}")


def forward_flops(call: Callable[[], Any]) -> int:
    """FLOPs of the matrix products and convolutions that `call` does."""
    with FlopCounterMode(display=False) as counter:
        call()
    return int(counter.get_total_flops())


def peak_of(device: torch.device, precision: str, seconds: Callable[[], list[float]]) -> Peak:
    """The data sheet's where the device is listed, else the measured one. seconds: gives product_seconds."""
    sheet = listed(torch.cuda.get_device_name(device), precision) if device.type == "cuda" else None
    return sheet or measured(device, precision, seconds())


class Meter:
    """MFU of training, from the first log line on that the process came to after WARMUP microbatches: only then is the
    peak looked up, or measured, and FLOPs are counted."""

    def __init__(self, device: torch.device, precision: str) -> None:
        self.device, self.precision = device, precision
        self.peak: Peak | None = None
        self.counted: dict[frozenset[str], int] = {}  # FLOPs of a microbatch, by its active terms
        self.seen, self.done = 0, 0

    def watch(self, active: frozenset[str], forward: Callable[[], Result]) -> Result:
        """What `forward` returns. Its FLOPs are counted the first time that these terms are active, which takes some
        time, and known from then on."""
        self.seen += 1
        if self.peak is None:
            return forward()
        if active not in self.counted:
            with FlopCounterMode(display=False) as counter:
                result = forward()
            self.counted[active] = FORWARD_AND_BACKWARD * int(counter.get_total_flops())
        else:
            result = forward()
        self.done += self.counted[active]
        return result

    @property
    def due(self) -> bool:
        """Whether the next `performance` looks the peak up, or measures it: on all ranks alike."""
        return self.peak is None and self.seen >= WARMUP

    def performance(self, seconds: float) -> dict[str, float]:
        """Of the microbatches taken since the last call, in so many seconds; nothing while it warms up."""
        done, self.done = self.done, 0
        if self.peak is not None:
            return {"perf/mfu": mfu(done, seconds, self.peak)}
        if self.due:
            self.peak = peak_of(self.device, self.precision, lambda: product_seconds(self.device, self.precision))
        return {}


def mfu(flops: float, seconds: float, peak: Peak) -> float:
    """Share of a device's peak: flops that it did in so many seconds."""
    return flops / seconds / peak.flops
