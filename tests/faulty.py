"""`cclmpc train` with a fault in one save, once: FAULT=ACTION:POINT:RANK:STEP:FILE; FILE says that it happened.

ACTION: kill (SIGKILL to this process) or hang. POINT: file (before the rank's own file), rename (the manifest is
written, the folder not renamed). STEP: of the checkpoint.
"""

import os
import signal
import sys
import time
from pathlib import Path
from typing import Any

from cclmpc_dist import cli
from cclmpc_dist.training import checkpoint


def build_in(action: str, point: str, step: int, happened: Path) -> None:
    name, pattern = {"file": ("_save_whole", "*.tmp/rank-*"), "rename": ("_sync_folder", "*.tmp")}[point]
    sound = getattr(checkpoint, name)

    def faulty(*arguments: Any) -> None:
        place = arguments[-1]
        if f"step-{step:09d}.tmp" in place.parts and place.match(pattern):
            happened.touch()
            if action == "hang":
                time.sleep(3600)
            os.kill(os.getpid(), signal.SIGKILL)
        sound(*arguments)

    setattr(checkpoint, name, faulty)


if __name__ == "__main__":
    action, point, rank, step, file = os.environ["FAULT"].split(":")
    if os.environ["RANK"] == rank and not Path(file).exists():
        build_in(action, point, int(step), Path(file))
    sys.argv.insert(1, "train")
    cli.main()
