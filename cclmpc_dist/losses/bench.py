"""`cclmpc bench contrast`: time, memory and agreement of the naive and the streamed contrast, forward and
backward.

Each measurement runs in a process of its own, so that one variant's memory never hides in another's. float32, whose
matrix products a GPU may take in TF32 (`tf32`); the contrast widens bf16 to float32 before it computes, so there is no
bf16 to measure.
"""

import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import normalize

from cclmpc_dist.benching.alone import alone, answer, memory
from cclmpc_dist.errors import InputError
from cclmpc_dist.losses import costs
from cclmpc_dist.losses.contrast import Exchange, cgcl, sbcl
from cclmpc_dist.losses.costs import Cost
from cclmpc_dist.losses.terms import Additive
from cclmpc_dist.records import Record, repeated

CASES = ("sbcl", "sbcl other_class", "cgcl")
TEMPERATURE = 0.07
MIB = 2**20
UNITS = {"seconds": "s", "peak_extra_mib": "MiB", "predicted_mib": "MiB"}
SWEEP = {"anchors": (512, 4096), "keys": (16384, 524288), "features": (64, 128), "classes": (8,)}
LARGEST = 2**30  # bytes of one N x M tensor up to which naive is measured


def bench_contrast(
    anchors: int = 2048,
    keys: int = 65536,
    features: int = 256,
    classes: int = 2,
    sweep: bool = False,
    tile: int = costs.TILE,
    repeats: int = 3,
    device: str = "cpu",
    tf32: bool = False,
) -> list[Record]:
    """Records of three cases: "sbcl" and "sbcl other_class", all keys with gradient; "cgcl", `anchors` live keys
    and a bank for the rest. `sweep` adds the sizes of SWEEP, one changed at a
    time.

    Each variant has seconds (median of `repeats`, forward and backward),
    peak_extra_mib (memory above inputs, gradients and imports, at its peak in one step: resident on a CPU, allocated
    on a GPU), predicted_mib (losses/costs.py) and product_share: the rate of its matrix products over the whole time,
    as a share of the rate at which the device does one such product alone. The streamed one has the ratios of seconds
    and memory to naive's besides, and at the first size the largest relative differences of value and gradients (norm
    of the difference over the norm). Naive is left out where one of its N x M tensors would exceed LARGEST.
    """
    if tf32 and device == "cpu":
        raise InputError("bench contrast --tf32: a CPU has no TF32: give --device cuda, or leave it out")
    how = {"tile": tile, "device": device, "tf32": tf32}
    base = {"anchors": anchors, "keys": keys, "features": features, "classes": classes}
    sizes = [base]
    if sweep:
        sizes += [base | {name: value} for name, values in SWEEP.items() for value in values]
    records = []
    for size in sizes:
        for case in CASES:
            if size["classes"] != classes and case == "sbcl":
                continue  # knows no classes
            records += _compare(case, size, how, repeats, size is base)
    return records


def _compare(case: str, size: dict[str, int], how: dict[str, Any], repeats: int, differences: bool) -> list[Record]:
    """Both sides of one size, naive where it fits."""
    job = {"case": case, "size": size, **how}
    naive = {}
    if 4 * size["anchors"] * size["keys"] <= LARGEST:
        naive = alone(_run, exchange="naive", repeats=repeats, **job)
    streamed = alone(_run, exchange="keys", repeats=repeats, **job)
    if naive:
        streamed["seconds_over_naive"] = statistics.median(streamed["seconds"]) / statistics.median(naive["seconds"])
        if naive["peak_extra_mib"] > 0:  # resident memory does not see a few pages
            streamed["peak_extra_mib_over_naive"] = streamed["peak_extra_mib"] / naive["peak_extra_mib"]
        streamed |= alone(_differences, **job) if differences else {}
    return _records(case, size, "naive", naive) + _records(case, size, "keys", streamed)


def _records(case: str, size: dict[str, int], variant: str, metrics: dict[str, Any]) -> list[Record]:
    told = f"{case}: N={size['anchors']} M={size['keys']} F={size['features']} K={size['classes']}"
    return [
        {"bench": "contrast", "case": told, "variant": variant, "metric": name, "unit": UNITS.get(name, "1")}
        | (repeated(value) if isinstance(value, list) else {"value": value})
        for name, value in metrics.items()
    ]  # fmt: skip


def _differences(case: str, tile: int, size: dict[str, int], device: str, tf32: bool) -> dict[str, float]:
    _prepare(tf32)
    (naive, naive_grads), (streamed, streamed_grads) = (
        _step(case, exchange, tile, _inputs(case, **size, device=device)) for exchange in ("naive", "keys")
    )
    apart = [float((x - y).norm() / y.norm()) for x, y in zip(streamed_grads, naive_grads, strict=True)]
    return {
        "value_difference": abs(float(streamed - naive) / float(naive)),
        "gradient_difference": max(apart),
    }


def _prepare(tf32: bool) -> None:
    torch.set_num_threads(1)
    torch.set_float32_matmul_precision("high" if tf32 else "highest")


def _inputs(case: str, anchors: int, keys: int, features: int, classes: int, device: str = "cpu") -> dict[str, Any]:
    """The same numbers on every device."""
    made = _random(case, anchors, keys, features, classes)
    return {name: x.detach().to(device).requires_grad_(x.requires_grad) for name, x in made.items()}


def _random(case: str, anchors: int, keys: int, features: int, classes: int) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(0)

    def unit(*shape: int) -> Tensor:
        return normalize(torch.randn(*shape, generator=generator), dim=-1)

    if case != "cgcl":
        shapes = {"anchors": (anchors, features), "positives": (anchors, features), "negatives": (keys, features)}
        inputs = {name: unit(*shape).requires_grad_() for name, shape in shapes.items()}
        if case == "sbcl":
            return inputs
        known = {"anchor_class": anchors, "negative_class": keys}
        return inputs | {name: torch.randint(-1, classes, (n,), generator=generator) for name, n in known.items()}
    rows = classes, anchors // classes
    stored = classes, (keys - anchors) // classes
    return {
        "anchors": unit(*rows, features).requires_grad_(),
        "anchor_valid": torch.rand(rows, generator=generator) < 0.9,
        "anchor_id": torch.arange(rows[0] * rows[1]).view(rows),
        "bank_keys": unit(*stored, features),
        "bank_valid": torch.rand(stored, generator=generator) < 0.9,
    }


def _step(case: str, exchange: Exchange, tile: int, inputs: dict[str, Any]) -> tuple[Tensor, tuple[Tensor, ...]]:
    """Value and gradients."""
    loss: Any = cgcl if case == "cgcl" else sbcl
    out: Additive = loss(**inputs, temperature=TEMPERATURE, exchange=exchange, tile=tile)
    value = out.sum / out.count
    return value.detach(), torch.autograd.grad(value, [x for x in inputs.values() if x.requires_grad])


def _run(
    case: str,
    exchange: Exchange,
    tile: int,
    size: dict[str, int],
    repeats: int,
    device: str,
    tf32: bool,
) -> dict[str, Any]:
    """The first step, which also warms up, gives the peak; the others the time: seconds are those of each."""
    _prepare(tf32)
    small = {"anchors": 64, "keys": 256, "features": 8, "classes": size["classes"]}
    _step(case, exchange, 16, _inputs(case, **small, device=device))
    inputs = _inputs(case, **size, device=device)
    peak_extra = (_peak_on_cpu if device == "cpu" else _peak_on_gpu)(lambda: _step(case, exchange, tile, inputs)[1])
    spent = [_seconds(lambda: _step(case, exchange, tile, inputs), device) for _ in range(repeats)]
    predicted = _predicted(case, exchange, tile, size)
    return {
        "seconds": spent,
        "peak_extra_mib": peak_extra / MIB,
        "predicted_mib": predicted.held / MIB,
        "product_share": predicted.flops / statistics.median(spent) / _product_rate(size, tile, repeats, device),
    }


def _peak_on_cpu(step: Callable[[], tuple[Tensor, ...]]) -> int:
    """Bytes that a step held at its peak, without the gradients that it returns."""
    Path("/proc/self/clear_refs").write_text("5")  # the peak counts from here: making the inputs took more
    before = memory("VmRSS")
    grads = step()
    return memory("VmHWM") - before - sum(x.nbytes for x in grads)


def _peak_on_gpu(step: Callable[[], tuple[Tensor, ...]]) -> int:
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    grads = step()
    return torch.cuda.max_memory_allocated() - before - sum(x.nbytes for x in grads)


def _seconds(step: Callable[[], Any], device: str) -> float:
    wait = torch.cuda.synchronize if device != "cpu" else lambda: None
    wait()
    start = time.perf_counter()
    step()
    wait()
    return time.perf_counter() - start


def _product_rate(size: dict[str, int], tile: int, repeats: int, device: str) -> float:
    """FLOP/s of the products that make the logits of one tile, nothing else."""
    rows, features, many = size["anchors"], size["features"], 20
    left, right = (torch.randn(n, features, device=device) for n in (rows, tile))
    out = torch.empty(rows, tile, device=device)

    def products() -> None:
        for _ in range(many):
            torch.mm(left, right.T, out=out)

    products()
    best = min(_seconds(products, device) for _ in range(repeats))
    return many * 2 * rows * tile * features / best


def _predicted(case: str, exchange: Exchange, tile: int, size: dict[str, int]) -> Cost:
    n, m, f, k = size["anchors"], size["keys"], size["features"], size["classes"]
    if case != "cgcl":
        return costs.sbcl(exchange, n, m, f, 1, tile=tile)
    return costs.cgcl(exchange, n // k, k, f, 1, stored=(m - n) // k, tile=tile)


if __name__ == "__main__":
    answer(_run, _differences)
