"""What a few steps of a run do: torch.profiler's trace, and on a GPU torch's memory snapshot, of every rank.

RUN/profile/trace-step-000000013-rank-00000.json.gz    Chrome trace: ui.perfetto.dev, chrome://tracing
            operators-step-000000013.txt               rank 0's time in each part of a step and in each operator
            memory-step-000000013-rank-00000.pickle    pytorch.org/memory_viz; nothing here reads it
            memory-exhausted-rank-00000.pickle         the same of the moment at which memory ran out

Steps are named by how many were done at the window's end.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.autograd import DeviceType
from torch.profiler import ProfilerActivity, record_function, schedule

from cclmpc_dist.config import Profile
from cclmpc_dist.errors import InputError
from cclmpc_dist.words import counted

PARTS = ("data wait", "losses", "forward", "contrast", "exchange", "backward", "optimiser")  # labels in the trace
ENTRIES = 200_000  # allocations and frees that the history remembers
SHOWN = 15  # operators of the table
WIDTH = 44  # of an operator's name


class Profiler:
    """Watches `settings.steps` steps of this process after its first `settings.after`, whose last one warms the
    profiler up. Does nothing where neither flag is set."""

    def __init__(
        self, settings: Profile, run: Path, device: torch.device, rank: int, say: Callable[[str], None]
    ) -> None:
        self.settings, self.folder, self.rank, self.say = settings, run / "profile", rank, say
        self.cuda = device.type == "cuda"
        self.tracing = settings.trace or (settings.memory and not self.cuda)
        self.remembering = settings.memory and self.cuda
        self.left = settings.after + settings.steps  # steps until the window ends
        self.done = 0
        self._profile: Any = None
        if self.remembering:
            torch.cuda.memory._record_memory_history(stacks="python", max_entries=ENTRIES)

    @contextmanager
    def watching(self) -> Iterator[None]:
        """Around the loop."""
        with self._profiler() if self.tracing else nullcontext() as self._profile:
            yield
        if self.left > 0 and (self.tracing or self.remembering):
            left = counted(self.left, "step")
            self.say(f"warning: profile: the run ended {left} before its window did: lower profile.after")

    def _profiler(self) -> torch.profiler.profile:
        return torch.profiler.profile(
            activities=[ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if self.cuda else [])],
            schedule=schedule(wait=self.settings.after - 1, warmup=1, active=self.settings.steps, repeat=1),
            on_trace_ready=self._write,
            profile_memory=self.settings.memory,
            acc_events=True,
        )

    @property
    def ending(self) -> bool:
        """Whether the step that was just taken is the window's last: files will be written."""
        return self.left == 1 and (self.tracing or self.remembering)

    def step(self, done: int) -> None:
        """A step was taken; done: in the run."""
        self.done, self.left = done, self.left - 1
        if self._profile is not None:
            self._profile.step()
        if self.remembering and self.left == 0:
            self.say(f"profile: {self._snapshot(f'step-{done:09d}')}")

    def exhausted(self, error: torch.OutOfMemoryError) -> InputError:
        """What to raise where the GPU's memory ran out, with a snapshot where one is asked for."""
        return exhausted(error, self._snapshot("exhausted") if self.remembering else None)

    def _snapshot(self, when: str) -> Path:
        file = self._file(f"memory-{when}-rank-{self.rank:05d}.pickle")
        torch.cuda.memory._dump_snapshot(str(file))
        return file

    def _write(self, profile: Any) -> None:
        """The trace; of rank 0 the table too. Nothing where the run ended as the window began."""
        taken = self.settings.steps - max(self.left, 0)
        if not taken:
            return
        step = f"step-{self.done:09d}"
        trace = self._file(f"trace-{step}-rank-{self.rank:05d}.json.gz")
        profile.export_chrome_trace(str(trace))
        if self.rank == 0:
            lines = table(profile.key_averages(), taken, self.cuda, self.settings.memory)
            self._file(f"operators-{step}.txt").write_text("\n".join(lines) + "\n")
            for line in [f"profile: {counted(taken, 'step')}, {trace}", *lines]:
                self.say(line)

    def _file(self, name: str) -> Path:
        self.folder.mkdir(parents=True, exist_ok=True)
        return self.folder / name


def table(averages: Any, steps: int, cuda: bool, memory: bool) -> list[str]:
    """Milliseconds a step: of the parts, as the host sees them; of the operators that take most, by themselves.

    averages: what key_averages of a profile gives. On a GPU the operators' time is the GPU's. With memory also the MiB
    that an operator allocates less those it frees, on the device that trains.
    """
    averages = [entry for entry in averages if entry.device_type == DeviceType.CPU]  # a kernel comes by itself too
    named = {entry.key: entry for entry in averages}
    parts = [f"{name} {named[name].cpu_time_total / steps / 1000:.1f}" for name in PARTS if name in named]
    operators = [entry for entry in averages if entry.key not in PARTS and not entry.key.startswith("ProfilerStep")]
    time = "self_device_time_total" if cuda else "self_cpu_time_total"
    size = "self_device_memory_usage" if cuda else "self_cpu_memory_usage"
    whole = sum(getattr(entry, time) for entry in operators)
    lines = [f"ms a step on the host (forward, contrast and exchange lie within others): {', '.join(parts)}",
             f"{'operator':<{WIDTH}} {'calls':>8} {'ms':>9} {'share':>7}{'       MiB' if memory else ''}"]  # fmt: skip
    for entry in sorted(operators, key=lambda entry: -getattr(entry, time))[:SHOWN]:
        spent = getattr(entry, time)
        held = f" {getattr(entry, size) / steps / 2**20:>9.1f}" if memory else ""
        lines.append(f"{entry.key[:WIDTH]:<{WIDTH}} {entry.count / steps:>8.1f} {spent / steps / 1000:>9.2f} "
                     f"{spent / whole:>7.1%}{held}")  # fmt: skip
    return lines


def exhausted(error: torch.OutOfMemoryError, snapshot: Path | None = None) -> InputError:
    """One line for a GPU whose memory ran out: what was asked for, and what to do."""
    told = ". ".join(str(error).split(". ")[:3]).rstrip(".")
    look = f"{snapshot} shows what held it" if snapshot else "profile.memory=true shows what holds it"
    return InputError(f"{told}: take model.recompute=[1,2,4,8,16], or in a new run precision=bf16, half of "
                      "data.batch_labelled and data.batch_unlabelled with twice accumulate, or a smaller data.patch; "
                      + look)  # fmt: skip


def label(module: nn.Module, name: str) -> None:
    """Give each forward pass of a module a label in traces."""
    under_way: list[record_function] = []

    def begin(*_: Any) -> None:
        under_way.append(record_function(name))
        under_way[-1].__enter__()

    def end(*_: Any) -> None:
        under_way.pop().__exit__(None, None, None)

    module.register_forward_pre_hook(begin)
    module.register_forward_hook(end)
