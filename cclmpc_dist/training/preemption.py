"""How a run is asked to save and stop: a file in its folder; without a torchrun agent between, SIGTERM or Ctrl-C."""

import os
import signal
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import FrameType

from cclmpc_dist.errors import InputError

_received: list[int] = []
_interrupts = False


class Preempted(BaseException):
    """A signal came inside `interrupting`. As with KeyboardInterrupt, none but the loop may catch it."""


def listen() -> None:
    """Take SIGTERM and Ctrl-C as a request; a second one ends the process at once.

    Under torchrun the agent ends its ranks itself, so there only the file counts.
    """
    if "TORCHELASTIC_RUN_ID" not in os.environ:
        for number in (signal.SIGTERM, signal.SIGINT):
            signal.signal(number, _receive)


def _receive(number: int, frame: FrameType | None) -> None:
    global _interrupts
    _received.append(number)
    signal.signal(number, signal.SIG_DFL)
    if _interrupts:
        _interrupts = False  # a signal of the other kind must not interrupt the save
        raise Preempted


@contextmanager
def interrupting() -> Iterator[None]:
    """Inside, a signal ends a wait by Preempted, at once where it came before."""
    global _interrupts
    _interrupts = True
    try:
        if _received:
            raise Preempted
        yield
    finally:
        _interrupts = False


def signalled() -> bool:
    """Whether this process got SIGTERM or Ctrl-C."""
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


def grace() -> float | None:
    """Seconds from a request to the kill, where the launcher says them in CCLMPC_GRACE_SECONDS.

    Raises InputError where that is not a number.
    """
    told = os.environ.get("CCLMPC_GRACE_SECONDS", "")
    try:
        return float(told) if told else None
    except ValueError:
        raise InputError(f"CCLMPC_GRACE_SECONDS = {told!r}: give seconds, or unset it") from None
