"""The cost of a step on W ranks, from a step on one: what it computes, plus what its collectives expose.

    T(W) = own(W) + exposed(gradient bytes) + gather(contrast bytes) + calls * all_reduce(nothing)

own(W): the measured step of one rank, with the contrast's further FLOPs (its keys grow with W) at the step's own rate.
On a CPU times crowding: how much longer a product of two matrices takes where all ranks compute one at the same time,
measured; ranks share cores, caches, power. exposed: all of the gradients' all-reduce on a CPU, whose cores also do the
reducing; on GPUs what backward does not hide, at least its last bucket. calls: collectives of the losses and the
contrast, each with its latency. Not in it: ranks that differ in speed, memory that ranks share,
networks that others use, and data loading that does not keep up.
"""

import math
from dataclasses import dataclass
from typing import Protocol

from cclmpc_dist.config import Config
from cclmpc_dist.losses.costs import Cost
from cclmpc_dist.methods.exchange_plan import bank_offers, exchange_plan, term_costs
from cclmpc_dist.training.throughput import TERA

BUCKET = 25 * 2**20  # bytes, DDP's default
NOTHING = 8  # bytes: what the latency of a collective is taken at


class Network(Protocol):
    """How long collectives take, in seconds."""

    def all_reduce(self, size: float, world: int) -> float:
        """Of `size` bytes on each rank."""

    def gather(self, received: float, world: int) -> float:
        """Of an all-gather or reduce-scatter that brings each rank `received` bytes."""


@dataclass(frozen=True)
class Fitted:
    """The line through measured all-reduces of one world size, taken as a ring."""

    alpha: float
    beta: float

    def all_reduce(self, size: float, world: int) -> float:
        return self.alpha + self.beta * size if world > 1 else 0.0

    def gather(self, received: float, world: int) -> float:
        return received * self.beta * world / (2 * (world - 1)) if world > 1 else 0.0


@dataclass(frozen=True)
class Cluster:
    """Equal nodes. inside: bytes/s each way of a GPU within its node; outside: of a whole node's links. hop_*: seconds
    a step of a ring inside, of a tree between nodes. start: seconds of any collective. Rates are line rates times
    `share`."""

    name: str
    node: int
    inside: float
    outside: float
    hop_inside: float
    hop_outside: float
    start: float
    share: float
    source: str

    def all_reduce(self, size: float, world: int) -> float:
        """Reduce-scatter in the node, all-reduce of the parts between nodes, all-gather in the node."""
        within, nodes = min(world, self.node), math.ceil(world / self.node)
        if world == 1:
            return 0.0
        seconds = self.start + 2 * (within - 1) * (size / within / (self.share * self.inside) + self.hop_inside)
        if nodes > 1:
            seconds += 2 * (nodes - 1) / nodes * size / (self.share * self.outside)
            seconds += 2 * math.log2(nodes) * self.hop_outside
        return seconds

    def gather(self, received: float, world: int) -> float:
        """All bytes arrive over the link inside; those of other nodes come into the node once."""
        if world == 1:
            return 0.0
        foreign = received * max(0, world - self.node) / (world - 1)
        return received / (self.share * self.inside) + foreign / (self.share * self.outside)


NCCL = "latencies: NCCL's tuning table (src/graph/tuning.cc, LL: start 6.8, NVLink 0.6, network 5 us)"
SHARE = 0.8  # of the line rate that large messages reach [F]
CLUSTERS = (
    Cluster(
        "NVLink + InfiniBand", 8, 450e9, 8 * 50e9, 0.6e-6, 5e-6, 6.8e-6, SHARE,
        f"DGX H100 data sheet: NVLink 900 GB/s both ways a GPU, eight 400 Gb/s InfiniBand ports a node; {NCCL}",
    ),
    Cluster(
        "NVLink + 100 Gb/s Ethernet", 8, 450e9, 12.5e9, 0.6e-6, 5e-6, 6.8e-6, SHARE,
        f"the same nodes with one 100 Gb/s Ethernet port each (IEEE 802.3ba); {NCCL}",
    ),
)  # fmt: skip
ASSUMED_GPU = "NVIDIA H100 80GB HBM3"  # where the step was measured on a CPU
ASSUMED_MFU = 0.2  # MLPerf Training 4.0, 3D U-Net on 8 H100: 20 % of the data sheet's peak
BACKWARD_SHARE = 2 / 3  # of a step's FLOPs


@dataclass(frozen=True)
class Step:
    """A step of one rank. seconds: all of it; backward: its backward pass; flops: its own; gradient: bytes; calls: of
    collectives but DDP's at two ranks or more; overlap: whether backward hides the gradients' all-reduce."""

    seconds: float
    backward: float
    flops: float
    gradient: float
    calls: float
    overlap: bool

    def on(self, network: Network, world: int, contrast: Cost, alone: Cost, crowding: float = 1.0) -> float:
        """Seconds on `world` ranks. contrast, alone: its cost a rank there and on one rank. crowding: how much longer
        computing takes there."""
        own = (self.seconds + (contrast.flops - alone.flops) * self.seconds / self.flops) * max(1.0, crowding)
        latency = self.calls * network.all_reduce(NOTHING, world)
        return own + self.exposed(network, world) + network.gather(contrast.received, world) + latency

    def exposed(self, network: Network, world: int) -> float:
        """Seconds of the gradients' all-reduce that backward does not hide."""
        whole = network.all_reduce(self.gradient, world)
        if not self.overlap:
            return whole
        return max(whole - self.backward, network.all_reduce(min(BUCKET, self.gradient), world))


def assumed_step(flops: float, peak: float, gradient: float, calls: float) -> Step:
    """The step on a GPU that nobody measured, at ASSUMED_MFU of its peak (FLOP/s)."""
    seconds = flops / (peak * ASSUMED_MFU)
    return Step(seconds, BACKWARD_SHARE * seconds, flops, gradient, calls, overlap=True)


def with_bank(config: Config, images: int) -> Config:
    """With a replicated bank that holds what a microbatch of so many images offers; it may be too small for more ranks
    than the configuration was written for."""
    contrast = config.ccl_mpc.contrast
    offered = bank_offers(config, images)
    if contrast.bank_layout == "sharded" or not 0 < contrast.bank < offered:
        return config
    contrast = contrast.model_copy(update={"bank": offered})
    return config.model_copy(update={"ccl_mpc": config.ccl_mpc.model_copy(update={"contrast": contrast})})


def contrast_cost(config: Config, classes: int, batches: dict[str, int], world: int) -> Cost:
    """Of a rank's step, with the exchange that would be taken. batches: global."""
    if config.method != "ccl_mpc":
        return Cost(0, 0, 0)
    config = with_bank(config, sum(batches.values()))
    plan = exchange_plan(config, classes, batches, world)
    cost = Cost(0, 0, 0)
    for term, choice in plan.items():
        cost = cost + term_costs(term, config, classes, batches, world)[choice.exchange]
    return Cost(cost.received * config.accumulate, cost.held, cost.flops * config.accumulate)


def assumption(flops: float, source: str) -> str:
    """A line on a step that was not measured."""
    return f"{flops / TERA:.3g} TFLOP at {ASSUMED_MFU:.0%} of {source} (MLPerf Training 4.0, 3D U-Net, 8 H100)"
