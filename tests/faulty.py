"""`cclmpc train` with a fault, once: FAULT=ACTION:POINT:RANK:STEP:FILE; FILE says that it happened.

In the save of checkpoint STEP: ACTION kill (SIGKILL to this process) or hang, at POINT file (before the rank's own
file) or rename (the manifest is written, the folder not renamed). At POINT batch, when the rank asks for a batch and
STEP batches came before: ACTION stop (SIGSTOP to this process), hang, or slow (half a second for this batch and each
after it).
"""

import os
import signal
import sys
import time
from pathlib import Path
from typing import Any

from cclmpc_dist import cli
from cclmpc_dist.training import checkpoint
from cclmpc_dist.training.monitor import Window


def act(action: str, happened: Path) -> None:
    happened.touch()
    if action == "slow":
        time.sleep(0.5)
    elif action == "hang":
        time.sleep(3600)
    else:
        os.kill(os.getpid(), {"kill": signal.SIGKILL, "stop": signal.SIGSTOP}[action])


def in_save(action: str, point: str, step: int, happened: Path) -> None:
    name, pattern = {"file": ("_save_whole", "*.tmp/rank-*"), "rename": ("_sync_folder", "*.tmp")}[point]
    sound = getattr(checkpoint, name)

    def faulty(*arguments: Any) -> None:
        place = arguments[-1]
        if f"step-{step:09d}.tmp" in place.parts and place.match(pattern):
            act(action, happened)
        sound(*arguments)

    setattr(checkpoint, name, faulty)


def in_batch(action: str, step: int, happened: Path) -> None:
    sound, came = Window.wait_for, 0

    def faulty(*arguments: Any) -> Any:
        nonlocal came
        if came >= step:
            act(action, happened)
        came += 1
        return sound(*arguments)

    Window.wait_for = faulty  # type: ignore[method-assign]


if __name__ == "__main__":
    action, point, rank, step, file = os.environ["FAULT"].split(":")
    if os.environ["RANK"] == rank and not Path(file).exists():
        if point == "batch":
            in_batch(action, int(step), Path(file))
        else:
            in_save(action, point, int(step), Path(file))
    sys.argv.insert(1, "train")
    cli.main()
