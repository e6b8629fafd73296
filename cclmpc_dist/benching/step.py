"""`cclmpc bench step`: the trainer's own step, timed, with and without data loading.

Stretches of a step: data wait (for the loader, and the copy to the device), forward (of the network), losses (views,
terms, objective), backward, collectives (exposed: what Python's calls take, and the wait for DDP's gradients after the
last of them is there), optimiser (norm, host read, update, average, bank). What the contrast takes is the difference
between steps with and without it, in turns: its heads, terms and their gradients.
"""

import math
import socket
from collections.abc import Iterator
from itertools import repeat
from statistics import mean, median, quantiles
from typing import Any

import torch
from accelerate import Accelerator

from cclmpc_dist.benching.clock import COLLECTIVES, Clock
from cclmpc_dist.config import Config
from cclmpc_dist.distributed import runtime
from cclmpc_dist.errors import InputError
from cclmpc_dist.records import Record, record, repeated
from cclmpc_dist.training.monitor import Window, memory_mib
from cclmpc_dist.training.run import environment
from cclmpc_dist.training.throughput import (
    FORWARD_AND_BACKWARD,
    TERA,
    Peak,
    forward_flops,
    mfu,
    peak_of,
    product_seconds,
)
from cclmpc_dist.training.trainer import Batches, Trainer

CONTRAST = ("sbcl", "cgcl")  # the terms that are switched on and off
WARMUP = 2  # steps of each kind
OWN = ("data wait", "forward", "losses", "backward", "optimiser")  # stretches that a rank spends on its own
PARTS = ("data wait", "forward", "losses", "backward", "contrast", COLLECTIVES, "optimiser", "other")
LOADING, SAME, WITHOUT = "with loading", "same batch", "without contrast"
FLOAT, MIB = 4, 2**20
UNITS = {"gradient_bytes": "B", "product_seconds": "s"}
Stretches = dict[str, float]  # of one step, seconds


class TimedTrainer(Trainer):
    """A trainer that takes steps at the end of its budget, where every term counts, and writes nothing."""

    def __init__(self, config: Config, accelerator: Accelerator) -> None:
        if config.strategy != "ddp":
            raise InputError(f"strategy = {config.strategy}: its backward pass cannot be told from its step: measure "
                             "with strategy=ddp")  # fmt: skip
        super().__init__(config, accelerator)
        self.clock = Clock(self.device)
        self.contrasting = True
        self.calls = 0.0  # collectives of a step with everything, but DDP's

    def build(self) -> None:
        super().build()
        self.step = self.totals[0] - 1
        self._watch_network()
        self._watch_backward()
        weights = self.method.weights

        def chosen(step: int) -> dict[str, float]:
            return {
                name: 0.0 if name in CONTRAST and not self.contrasting else value
                for name, value in weights(step).items()
            }

        self.method.weights = chosen  # type: ignore[method-assign]

    def _watch_network(self) -> None:
        self.module.register_forward_pre_hook(lambda *_: self._enter("forward"))
        self.module.register_forward_hook(lambda *_: self._enter("losses"))

    def _watch_backward(self) -> None:
        """The gradients' collectives are exposed from when the last gradient is there."""
        backward = self.accelerator.backward
        ready = [self.clock.now()]

        def note(_: torch.Tensor) -> None:
            ready[0] = self.clock.now()

        def timed(loss: torch.Tensor) -> None:
            self._enter("backward")
            backward(loss)
            if self.world > 1:
                self.clock.enter(COLLECTIVES, at=ready[0])
            self._enter("optimiser")

        if self.world > 1:
            for parameter in (one for one in self.module.parameters() if one.requires_grad):
                parameter.register_post_accumulate_grad_hook(note)
        self.accelerator.backward = timed

    def _enter(self, name: str) -> None:
        if self.clock.running:
            self.clock.enter(name)

    @property
    def has_contrast(self) -> bool:
        return any(self.method.weights(self.step).get(name, 0) > 0 for name in CONTRAST)

    def measure(self, steps: int, same: bool) -> dict[str, list[Stretches]]:
        """The stretches of `steps` steps of each kind; `same`: one batch again and again besides."""
        kinds = [LOADING, WITHOUT] if self.has_contrast else [LOADING]
        self.totals[0] = self.step + (len(kinds) * (WARMUP + steps)) + 1  # the loader ends with the phase
        batches = self._loader()
        found = self._turns(kinds, batches, steps)
        return found | (self._turns([SAME], repeat(next(batches)), steps) if same else {})

    def _turns(self, kinds: list[str], batches: Iterator[Batches], steps: int) -> dict[str, list[Stretches]]:
        first = len(self.clock.steps)
        runtime.barrier()
        for _ in range(WARMUP + steps):
            for kind in kinds:
                self.contrasting = kind != WITHOUT
                with self.clock.step("losses"):
                    self._train_step(batches, TimedWindow(self.clock))
        self.contrasting = True
        self.calls = median(self.clock.calls[first :: len(kinds)])
        taken = self.clock.stretches()[first:]
        return {kind: taken[place :: len(kinds)][WARMUP:] for place, kind in enumerate(kinds)}

    def sizes(self) -> dict[str, Any]:
        """Of the step over all ranks."""
        images = self._images
        return {
            "ranks": self.world,
            "threads": torch.get_num_threads(),
            "images": images,
            "voxels": images * math.prod(self.config.data.patch),
            "classes": self.index.classes,
            "gradient_bytes": FLOAT * self.size,
            "collective_calls": self.calls,
        }

    def flops(self) -> dict[str, int]:
        """Of this rank's step, with every term and with all but the contrast: three times the forward pass."""
        batch = next(self._loader())
        found = {}
        for self.contrasting, kind in ((False, WITHOUT), (True, LOADING)):
            with torch.no_grad():
                forward = forward_flops(lambda: self.method.terms(self.module, batch, self.step))
            self.method.discard_step()
            found[kind] = FORWARD_AND_BACKWARD * forward * self.config.accumulate
        return found


class TimedWindow(Window):
    """Marks the wait for data."""

    def __init__(self, clock: Clock) -> None:
        super().__init__()
        self.clock = clock

    def wait_for(self, batches: Iterator[Any]) -> Any:
        self.clock.enter("data wait")
        batch = super().wait_for(batches)
        self.clock.enter("losses")
        return batch


def bench_step(config: Config, steps: int) -> tuple[list[Record], dict[str, Any]]:
    """Records and meta of one configuration at the launched world size, on every rank alike. Raises InputError as
    training does."""
    accelerator = runtime.start(config.precision)
    try:
        return measure(config, accelerator, steps, "step", f"{config.name} {runtime.world_size()}")
    finally:
        runtime.stop()


def measure(
    config: Config, accelerator: Accelerator, steps: int, bench: str, case: str, same: bool = True
) -> tuple[list[Record], dict[str, Any]]:
    """As bench_step, inside a process group that is there."""
    trainer = TimedTrainer(config, accelerator)
    with trainer.clock.watching_collectives():
        trainer.build()
        flops = trainer.flops()
        runtime.barrier()
        products = product_seconds(trainer.device, config.precision)  # all ranks at the same time
        mine = {
            "host": socket.gethostname(),
            "products": products,
            "stretches": trainer.measure(steps, same),
            "memory": memory_mib(trainer.device),
        }
    everyone = runtime.gather_json(mine, trainer.device)
    top = peak_of(trainer.device, config.precision, lambda: everyone[0]["products"])
    product = mean(mean(one["products"]) for one in everyone)
    hosts = sorted({one["host"] for one in everyone})
    records = to_records(everyone, trainer.sizes() | {"hosts": len(hosts), "product_seconds": product}, flops, top)
    meta = environment(trainer.world) | {
        "hosts": hosts,
        "config": config.model_dump(mode="json"),
        "peak": top.source,
        "steps": steps,
    }
    return [{"bench": bench, "case": case} | record for record in records], meta


# ---- from the stretches of all ranks to records --------------------------------------------------------------------


def to_records(everyone: list[Any], sizes: dict[str, Any], flops: dict[str, int], top: Peak) -> list[Record]:
    """everyone: of each rank its host, the stretches of its steps by kind, its peak memory in MiB. sizes: of the step
    over all ranks. flops: of a rank's step. Records without bench and case."""
    records = []
    for kind in everyone[0]["stretches"]:
        steps = len(everyone[0]["stretches"][kind])
        seconds = [mean(sum(one["stretches"][kind][n].values()) for one in everyone) for n in range(steps)]
        records += _rates(kind, seconds, sizes, flops[WITHOUT if kind == WITHOUT else LOADING], top)
    records += [record(LOADING, name, value * 1000, "ms") for name, value in parts(everyone).items()]
    if WITHOUT in everyone[0]["stretches"]:
        quartiles = zip(("contrast_q25", "contrast_q75"), contrast_quartiles(everyone), strict=True)
        records += [record(LOADING, name, value * 1000, "ms") for name, value in quartiles]
    for rank, one in enumerate(everyone):
        who = f"rank {rank} ({one['host']})"
        records.append(record(who, "busy", 1000 * busy(one["stretches"][LOADING]), "ms"))
        records.append(record(who, "memory", one["memory"], "MiB"))
    records += [record("sizes", name, value, UNITS.get(name, "1")) for name, value in sizes.items()]
    return [*records, record("sizes", "peak", top.flops / TERA, "TFLOP/s")]


def _rates(kind: str, seconds: list[float], sizes: dict[str, Any], flops: int, top: Peak) -> list[Record]:
    middle, (low, high) = median(seconds), _quartiles(seconds)
    return [
        {"variant": kind, "metric": "seconds", "unit": "s"} | repeated(seconds),
        record(kind, "seconds_q25", low, "s"),
        record(kind, "seconds_q75", high, "s"),
        record(kind, "images_per_second", sizes["images"] / middle, "images/s"),
        record(kind, "voxels_per_second", sizes["voxels"] / middle, "voxels/s"),
        record(kind, "step_tflop", flops / TERA, "TFLOP"),
        record(kind, "tflops", flops / middle / TERA, "TFLOP/s"),
        record(kind, "mfu", mfu(flops, middle, top), "fraction"),
    ]


def _quartiles(seconds: list[float]) -> tuple[float, float]:
    low, _, high = quantiles(seconds, n=4) if len(seconds) > 1 else seconds * 3
    return low, high


def busy(steps: list[Stretches]) -> float:
    """Median seconds that a rank spends on its own."""
    return median(_own(step) for step in steps)


def _own(step: Stretches) -> float:
    """A step less its collectives, in which a rank waits for the others."""
    return sum(step.values()) - step.get(COLLECTIVES, 0.0)


def contrast_quartiles(everyone: list[Any]) -> tuple[float, float]:
    """Of what a step takes more, in seconds of a rank's own, than its neighbour without contrast; means over the ranks.
    How sure the part `contrast` is: on a busy machine it may be less than 0."""
    ranks = []
    for one in everyone:
        pairs = zip(one["stretches"][LOADING], one["stretches"][WITHOUT], strict=True)
        ranks.append(_quartiles([_own(full) - _own(plain) for full, plain in pairs]))
    return mean(low for low, _ in ranks), mean(high for _, high in ranks)


def parts(everyone: list[Any]) -> dict[str, float]:
    """Seconds of PARTS, means over the ranks of their medians; together they are the median step with everything.

    `other` is what medians do not add up to, which is little, of either sign.
    """
    ranks = [_parts(one["stretches"]) for one in everyone]
    return {name: mean(rank[name] for rank in ranks) for name in PARTS}


def _parts(stretches: dict[str, list[Stretches]]) -> dict[str, float]:
    """Of one rank."""
    full = stretches[LOADING]
    plain = stretches.get(WITHOUT, full)
    found = {name: median(step.get(name, 0.0) for step in plain) for name in OWN}
    found["contrast"] = busy(full) - busy(plain)
    found[COLLECTIVES] = median(step.get(COLLECTIVES, 0.0) for step in full)
    found["other"] = median(sum(step.values()) for step in full) - sum(found.values())
    return found
