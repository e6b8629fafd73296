"""A small corpus is sharded by a process that is killed before its n-th file operation, for every n; then again.

`python killed.py FOLDER` prints how many kills there were, after each of which the second run must give the bytes of an
undisturbed one. Processes are forked: hundreds of kills take seconds.
"""

import os
import shutil
import signal
import sys
from pathlib import Path

from corpora import numbered, tree, write

EVENTS = ("os.mkdir", "os.rename", "os.remove", "os.rmdir")


def build(out: Path) -> None:
    write(out, numbered(4, channels=2, kind="unlike"), labelled=2, val_last=1, shard_bytes=9000)


def in_a_child(out: Path, kill_at: int) -> int:
    """How the process ended; it is killed before the n-th of these."""
    child = os.fork()
    if child:
        return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    left = kill_at

    def count(event: str, arguments: tuple[object, ...]) -> None:
        nonlocal left
        if event in EVENTS or (event == "open" and str(out) in str(arguments[0])):
            left -= 1
            if left == 0:
                os.kill(os.getpid(), signal.SIGKILL)

    sys.addaudithook(count)
    build(out)
    os._exit(0)


def main(folder: Path) -> None:
    os.fsync = lambda _: None  # what a kill leaves is in the page cache
    build(folder / "straight")
    expected = tree(folder / "straight")
    out, kills = folder / "out", 0
    while in_a_child(out, kills + 1) == -signal.SIGKILL:
        kills += 1
        build(out)
        assert tree(out) == expected, f"killed before operation {kills}"
        shutil.rmtree(out)
    print(kills)


main(Path(sys.argv[1]))
