"""How far a build is, on stderr: a bar with the time left on a terminal, elsewhere a line every half minute."""

import sys
import time
from datetime import timedelta
from typing import Any

EVERY_SECONDS = 30.0


class Progress:
    """`done` of `total` cases were there before."""

    def __init__(self, title: str, total: int, done: int) -> None:
        self.title, self.total, self.before, self.done, self.bytes = title, total, done, done, 0
        self.began = self.told = time.monotonic()
        self._bar: Any = None

    def __enter__(self) -> "Progress":
        if sys.stderr.isatty():
            self._bar = _bar()
            self._bar.start()
            self._task = self._bar.add_task(self.title, total=self.total, completed=self.done, text="")
        return self

    def __exit__(self, *_: object) -> None:
        if self._bar is not None:
            self._bar.stop()

    def step(self, size: int) -> None:
        """One more case, of `size` bytes as stored."""
        self.done, self.bytes, now = self.done + 1, self.bytes + size, time.monotonic()
        if self._bar is not None:
            rate = self.bytes / 1e6 / max(now - self.began, 1e-3)
            self._bar.update(self._task, completed=self.done, text=f"{rate:.0f} MB/s")
        elif now - self.told >= EVERY_SECONDS:
            self.told = now
            print(self._line(now - self.began), file=sys.stderr, flush=True)

    def _line(self, seconds: float) -> str:
        rate = (self.done - self.before) / seconds
        left = timedelta(seconds=round((self.total - self.done) / rate))
        speed = f"{rate:.3g} cases/s, {self.bytes / 1e6 / seconds:.3g} MB/s"
        return f"{self.title}: {self.done} of {self.total} cases, {speed}, {left} left"


def _bar() -> Any:
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

    columns = TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn()
    return Progress(*columns, TextColumn("{task.fields[text]}"), console=Console(stderr=True))
