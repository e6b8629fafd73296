"""Which rank is slow: by the time until it comes to a step's first collective, as that makes all ranks equally late."""

import statistics
import time
from typing import Any

import torch

LATE = 0.25  # of a step [F]


class Pace:
    """Seconds of a step that are this rank's own: from the beginning of each microbatch, its data included, to the end
    of the forward pass, which no collective precedes unless norm is sync_batch. On a GPU in the GPU's own time, without
    waiting for it.
    """

    def __init__(self, device: torch.device) -> None:
        self.cuda = device.type == "cuda"
        self._began: list[Any] = []
        self._reached: list[Any] = []

    def begin(self) -> None:
        """A microbatch begins."""
        self._began.append(self._now())

    def reached(self) -> None:
        """Its forward pass has ended; evaluation has none that began."""
        if len(self._reached) < len(self._began):
            self._reached.append(self._now())

    def seconds(self) -> float:
        """Of the microbatches begun since the last call, once the step's read has waited for them."""
        pairs = list(zip(self._began, self._reached, strict=True))
        self._began.clear()
        self._reached.clear()
        if self.cuda:
            return sum(began.elapsed_time(reached) for began, reached in pairs) / 1000
        return sum(reached - began for began, reached in pairs)

    def _now(self) -> Any:
        if not self.cuda:
            return time.perf_counter()
        event = torch.cuda.Event(enable_timing=True)
        event.record()
        return event


def slowest(own: list[tuple[float, str]], step: float) -> tuple[dict[str, float], str]:
    """Scalars of the slowest rank, and words for the log line where it is out of line. own: of each rank the median of
    its own seconds over the line's steps, and its host; step: mean seconds of a step.

    Out of line is who comes later than the ranks' (lower) median by LATE of a step and more. As each rank gives its
    median, a step or two that were held up name nobody.
    """
    seconds = [value for value, _ in own]
    late = max(seconds) - statistics.median_low(seconds)
    rank = seconds.index(max(seconds))
    words = f"  SLOW: rank {rank} on {own[rank][1]}, {late:.2f} s late ({late / step:.0%} of a step)"
    return {
        "perf/slowest_rank": float(rank),
        "perf/slowest_rank_late_seconds": late,
    }, words if late >= LATE * step else ""
