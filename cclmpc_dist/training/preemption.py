"""How a run is asked to save and stop: a file in its folder, or SIGTERM where no torchrun agent stands between."""

import os
import signal
from pathlib import Path

_received: list[int] = []


def listen() -> None:
    """Take SIGTERM as a request. Under torchrun the agent ends its ranks itself, so there only the file counts."""
    if "TORCHELASTIC_RUN_ID" not in os.environ:
        signal.signal(signal.SIGTERM, lambda number, frame: _received.append(number))


def signalled() -> bool:
    """Whether this process got SIGTERM."""
    return bool(_received)


def requested(folder: Path) -> bool:
    """Whether RUN/preempt asks for it."""
    return (folder / "preempt").exists()


def answer(folder: Path, step: int) -> None:
    """Rank 0, once everything is saved: RUN/preempted tells the batch script to queue the run again."""
    (folder / "preempt").unlink(missing_ok=True)
    (folder / "preempted").write_text(f"{step}\n")


def clear(folder: Path) -> None:
    """Rank 0, at the start: the run goes on."""
    (folder / "preempted").unlink(missing_ok=True)
