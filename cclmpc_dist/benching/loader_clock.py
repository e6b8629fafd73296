"""What crops take: seconds, CPU seconds and bytes from the disk, of this process and of all that it started."""

import os
import threading
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path

PART = 1 << 20


@dataclass(frozen=True)
class Usage:
    """wall: seconds; cpu: user and system seconds; read: bytes that storage gave, none for what the page cache held."""

    wall: float
    cpu: float
    read: float

    @staticmethod
    def now() -> "Usage":
        processes = _tree(os.getpid())
        return Usage(time.perf_counter(), sum(map(_cpu, processes)), sum(map(_read, processes)))

    def since(self, before: "Usage") -> "Usage":
        return Usage(self.wall - before.wall, self.cpu - before.cpu, self.read - before.read)


def _tree(pid: int) -> list[int]:
    """A process and all below it that run."""
    found = [pid]
    for children in Path(f"/proc/{pid}/task").glob("*/children"):
        for child in children.read_text().split():
            found += _tree(int(child))
    return found


def _cpu(pid: int) -> float:
    return time.clock_gettime(~pid << 3 | 2)  # what clock_getcpuclockid gives on Linux


def _read(pid: int) -> int:
    told = Path(f"/proc/{pid}/io").read_text().split()
    return int(told[told.index("read_bytes:") + 1])


class Gate:
    """Keeps every process or thread that makes crops before its first one, until all are there and `open` lets them go.

    folder: an empty one. Each thread has a gate of its own over it.
    """

    def __init__(self, folder: Path) -> None:
        self.folder, self._passed = folder, False

    def wait(self) -> None:
        """Of each process or thread that makes crops, before it opens a file."""
        if self._passed:
            return
        (self.folder / str(threading.get_native_id())).touch()
        while not (self.folder / "open").exists():
            time.sleep(0.001)
        self._passed = True

    def open(self, makers: int, prepare: Callable[[], None]) -> "Opening":
        """In a thread, once so many wait: prepare, and let them go."""
        opening = Opening(self.folder, makers, prepare)
        opening.start()
        return opening


class Opening(threading.Thread):
    """usage: at the moment at which the gate was opened."""

    usage: Usage

    def __init__(self, folder: Path, makers: int, prepare: Callable[[], None]) -> None:
        super().__init__(daemon=True)
        self._folder, self._makers, self._prepare = folder, makers, prepare

    def run(self) -> None:
        while len(list(self._folder.iterdir())) < self._makers:
            time.sleep(0.001)
        self._prepare()
        self.usage = Usage.now()
        (self._folder / "open").touch()


def forget(files: Iterable[Path]) -> None:
    """Have the page cache drop files, as far as no process maps them (posix_fadvise DONTNEED, after fsync)."""
    for file in files:
        descriptor = os.open(file, os.O_RDONLY)
        os.fsync(descriptor)
        os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_DONTNEED)
        os.close(descriptor)


def remember(files: Iterable[Path]) -> None:
    """Have the page cache hold files."""
    for file in files:
        with file.open("rb", buffering=0) as source:
            while source.read(PART):
                pass
