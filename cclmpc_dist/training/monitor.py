"""What a run says while it trains: a progress bar or plain lines for people, JSONL and TensorBoard for machines.

Scalar names are one list for all of them: loss/<term>, weight/<term>, train/*, optim/lr, perf/*, data/*, val/*.
"""

import json
import math
import resource
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch


class Monitor:
    """Rank 0's log of a run of `total` steps; on other ranks (active False) every call does nothing."""

    def __init__(self, folder: Path, name: str, total: int, active: bool) -> None:
        self.folder, self.name, self.total, self.active = folder, name, total, active
        self._progress: Any = None
        self._started, self._first = 0.0, -1

    @contextmanager
    def recording(self, step: int) -> Iterator[None]:
        """Keeps the files and the bar open; what TensorBoard has beyond `step` is struck out."""
        if not self.active:
            yield
            return
        from torch.utils.tensorboard import SummaryWriter

        self._board = SummaryWriter(str(self.folder / "tensorboard"), purge_step=step + 1)
        with (self.folder / "metrics.jsonl").open("a") as self._jsonl, self._board, self._bar(step):
            yield

    @contextmanager
    def _bar(self, step: int) -> Iterator[None]:
        """Rich's progress on a terminal, nothing elsewhere."""
        if not sys.stderr.isatty():
            yield
            return
        with _progress_bar() as self._progress:
            self._task = self._progress.add_task(self.name, total=self.total, completed=step, text="")
            yield
        self._progress = None

    def say(self, text: str) -> None:
        """One plain line to a person, above the bar where there is one."""
        if self.active and self._progress is not None:
            self._progress.console.print(text, markup=False, highlight=False)
        elif self.active:
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

    def progress(self, step: int, values: dict[str, float], note: str = "") -> None:
        """Show where the run stands, with a note behind it: the bar on a terminal, else one line."""
        if not self.active:
            return
        if self._first < 0:
            self._started, self._first = time.monotonic(), step
        if self._progress is not None:
            self._progress.update(self._task, completed=step, text=_line(values) + note)
            return
        done = step - self._first
        left = (time.monotonic() - self._started) / done * (self.total - step) if done else math.nan
        self.say(f"{self.name} {step}/{self.total}  {_line(values)}  eta {duration(left)}{note}")


class Window:
    """Scalars and times of the steps since the last log line; saving and validation between them are not timed."""

    def __init__(self) -> None:
        self.sums: dict[str, float] = {}
        self.counts: dict[str, int] = {}
        self.steps, self.waited, self.seconds = 0, 0.0, 0.0
        self.own: list[float] = []  # of each step: until this rank came to its first collective

    @contextmanager
    def step(self) -> Iterator[None]:
        began = time.perf_counter()
        yield
        self.seconds += time.perf_counter() - began
        self.steps += 1

    def wait_for(self, batches: Iterator[Any]) -> Any:
        began = time.perf_counter()
        batch = next(batches)
        self.waited += time.perf_counter() - began
        return batch

    def add(self, values: dict[str, float]) -> None:
        for name, value in values.items():
            self.sums[name] = self.sums.get(name, 0.0) + value
            self.counts[name] = self.counts.get(name, 0) + 1

    def means(self) -> dict[str, float]:
        return {name: total / self.counts[name] for name, total in self.sums.items()}

    def performance(self, images: int, voxels: int) -> dict[str, float]:
        """images: of one step, over all ranks. voxels: of one image's patch."""
        return {
            "perf/step_seconds": self.seconds / self.steps,
            "perf/samples_per_second": images * self.steps / self.seconds,
            "perf/voxels_per_second": voxels * images * self.steps / self.seconds,
            "perf/data_wait_share": self.waited / self.seconds,
        }


def memory_mib(device: torch.device) -> float:
    """Peak memory: of the device's allocator, or of this process on a CPU."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 2**20
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**10


def _progress_bar() -> Any:
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

    columns = (TextColumn("{task.description}"), BarColumn(20), MofNCompleteColumn(), TimeRemainingColumn())
    return Progress(*columns, TextColumn("{task.fields[text]}", markup=False), console=Console(stderr=True))


def _line(values: dict[str, float]) -> str:
    losses = {name.removeprefix("loss/"): value for name, value in values.items() if name.startswith("loss/")}
    shown = "  ".join(f"{name} {value:.4f}" for name, value in losses.items())
    rate, wait, memory = (values[f"perf/{name}"] for name in ("samples_per_second", "data_wait_share", "memory_mib"))
    share = f"  mfu {values['perf/mfu']:.1%}" if "perf/mfu" in values else ""
    return f"{shown}  {rate:.2f} samples/s{share}  wait {wait:.0%}  {memory:.0f} MiB"


def duration(seconds: float) -> str:
    """h:mm:ss, or - for what is not known."""
    if not math.isfinite(seconds):
        return "-"
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02d}:{rest:02d}"
