"""What a run says while it trains: a progress bar or plain lines for people, JSONL and TensorBoard for machines.

Scalar names are one list for all of them: loss/<term>, weight/<term>, train/*, optim/lr, perf/*, data/*, val/*.
"""

import json
import math
import resource
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import torch


class Monitor:
    """Rank 0's log of a run; on other ranks every call does nothing."""

    def __init__(self, folder: Path, name: str, total: int, active: bool) -> None:
        self.name, self.total, self.active = name, total, active
        self._progress: Any = None
        if not active:
            return
        from torch.utils.tensorboard import SummaryWriter

        self._jsonl = (folder / "metrics.jsonl").open("a")
        self._board = SummaryWriter(str(folder / "tensorboard"))
        self._started, self._first = time.monotonic(), -1
        if sys.stderr.isatty():
            self._progress = _progress_bar()
            self._task = self._progress.add_task(name, total=total)

    def __enter__(self) -> Self:
        if self._progress is not None:
            self._progress.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._progress is not None:
            self._progress.stop()
        if self.active:
            self._jsonl.close()
            self._board.close()

    def say(self, text: str) -> None:
        """One plain line to a person."""
        if self.active:
            print(text, file=sys.stderr, flush=True)

    def scalars(self, step: int, values: dict[str, float]) -> None:
        """Record scalars of `step` (steps done). Non-finite values are written as null in JSONL."""
        if not self.active:
            return
        finite = {name: value if math.isfinite(value) else None for name, value in values.items()}
        self._jsonl.write(json.dumps({"step": step, **finite}) + "\n")
        self._jsonl.flush()
        for name, value in values.items():
            self._board.add_scalar(name, value, step)

    def progress(self, step: int, values: dict[str, float]) -> None:
        """Show where the run stands: the bar on a terminal, else one line."""
        if not self.active:
            return
        if self._first < 0:
            self._started, self._first = time.monotonic(), step
        if self._progress is not None:
            self._progress.update(self._task, completed=step, text=_line(values))
            return
        done = step - self._first
        left = (time.monotonic() - self._started) / done * (self.total - step) if done else math.nan
        self.say(f"{self.name} {step}/{self.total}  {_line(values)}  eta {_duration(left)}")


class Window:
    """Scalars of the steps since the last log line."""

    def __init__(self) -> None:
        self.sums: dict[str, float] = {}
        self.counts: dict[str, int] = {}
        self.steps, self.waited, self.began = 0, 0.0, time.perf_counter()

    def wait_for(self, batches: Iterator[Any]) -> Any:
        began = time.perf_counter()
        batch = next(batches)
        self.waited += time.perf_counter() - began
        return batch

    def add(self, values: dict[str, float], kept: bool) -> None:
        self.steps += 1
        for name, value in values.items() if kept else ():
            if not name.startswith("flag/"):
                self.sums[name] = self.sums.get(name, 0.0) + value
                self.counts[name] = self.counts.get(name, 0) + 1

    def means(self) -> dict[str, float]:
        means = {name: total / self.counts[name] for name, total in self.sums.items()}
        if "data/skipped" in self.sums:
            means["data/skipped"] = self.sums["data/skipped"]
        return means

    def performance(self, images: int) -> dict[str, float]:
        seconds = time.perf_counter() - self.began
        return {
            "perf/step_seconds": seconds / self.steps,
            "perf/samples_per_second": images * self.steps / seconds,
            "perf/data_wait_share": self.waited / seconds,
        }


def memory_mib(device: torch.device) -> float:
    """Peak memory: of the device's allocator, or of this process on a CPU."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 2**20
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**10


def _progress_bar() -> Any:
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    return Progress(*columns, TextColumn("{task.fields[text]}"), console=Console(stderr=True))


def _line(values: dict[str, float]) -> str:
    losses = "  ".join(
        f"{name.removeprefix('loss/')} {value:.4f}" for name, value in values.items() if name.startswith("loss/")
    )
    rate, wait, memory = (values[f"perf/{name}"] for name in ("samples_per_second", "data_wait_share", "memory_mib"))
    return f"{losses}  {rate:.2f} samples/s  wait {wait:.0%}  {memory:.0f} MiB"


def _duration(seconds: float) -> str:
    if not math.isfinite(seconds):
        return "-"
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02d}:{rest:02d}"
