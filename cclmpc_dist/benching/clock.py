"""Where the time of a step goes: a time line cut at marks, on the device's own clock.

On a GPU the marks are CUDA events on the stream that computes, so a stretch is what that stream spent in it, waiting
for the host, the data or a collective included, and nothing is synchronised within a step but what training does.
"""

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from itertools import pairwise
from typing import Any

import torch
import torch.distributed as dist

from cclmpc_dist.distributed import exchange

Stamp = Any  # seconds, or a CUDA event
COLLECTIVES, OUTSIDE = "collectives", ""  # stretches: in a collective; after the step's end


class Clock:
    """The stretches of one step after the other."""

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self.steps: list[list[tuple[str, Stamp]]] = []
        self.calls: list[int] = []

    def now(self) -> Stamp:
        if self.device.type != "cuda":
            return time.perf_counter()
        event = torch.cuda.Event(enable_timing=True)
        event.record()
        return event

    @property
    def running(self) -> bool:
        """Whether a step is under way."""
        return bool(self.steps) and self.steps[-1][-1][0] != OUTSIDE

    @contextmanager
    def step(self, name: str) -> Iterator[None]:
        """One step, which begins with the stretch `name`."""
        self.steps.append([(name, self.now())])
        self.calls.append(0)
        yield
        self.steps[-1].append((OUTSIDE, self.now()))

    def enter(self, name: str, at: Stamp = None) -> None:
        """A stretch begins, now or at a stamp taken before; the one before ends."""
        self.steps[-1].append((name, self.now() if at is None else at))

    def stretches(self) -> list[dict[str, float]]:
        """Seconds in each stretch, a dict a step. Waits for the device."""
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)
        return [_stretches(marks) for marks in self.steps]

    @contextmanager
    def watching_collectives(self) -> Iterator[None]:
        """Makes every collective that Python calls a stretch of its own. DDP's, which C++ calls, are not among them."""

        def watched(collective: Callable[..., Any]) -> Callable[..., Any]:
            def call(*arguments: Any, **named: Any) -> Any:
                if not self.running:
                    return collective(*arguments, **named)
                inside = self.steps[-1][-1][0]
                self.enter(COLLECTIVES)
                self.calls[-1] += 1
                result = collective(*arguments, **named)
                self.enter(inside)
                return result

            return call

        places = [(exchange, "_all_gather"), (exchange, "_reduce_scatter"), (dist, "all_reduce")]
        before = [getattr(module, name) for module, name in places]
        for (module, name), collective in zip(places, before, strict=True):
            setattr(module, name, watched(collective))
        try:
            yield
        finally:
            for (module, name), collective in zip(places, before, strict=True):
                setattr(module, name, collective)


def _stretches(marks: list[tuple[str, Stamp]]) -> dict[str, float]:
    found: dict[str, float] = {}
    for (name, begin), (_, end) in pairwise(marks):
        passed = end - begin if isinstance(begin, float) else begin.elapsed_time(end) / 1000
        found[name] = found.get(name, 0.0) + passed
    return found
