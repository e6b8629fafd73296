"""`python stalled.py OUT GATE WORKERS` shards ten cases, one of which cannot be read until the file GATE is there."""

import sys
import time
from dataclasses import dataclass
from pathlib import Path

from corpora import numbered, write

from cclmpc_dist.data.case import Case


@dataclass(frozen=True)
class Waiting:
    """The handle of case `number`, which comes once the gate is open."""

    number: int
    gate: Path

    @property
    def key(self) -> str:
        return f"case-{self.number:03d}"

    @property
    def fingerprint(self) -> str:
        return ""

    def read(self) -> Case:
        while not self.gate.exists():
            time.sleep(0.05)
        return numbered(self.number + 1)[-1]


def build(out: Path, gate: Path, workers: int) -> None:
    cases = numbered(10)
    write(out, [*cases[:7], Waiting(7, gate), *cases[8:]], workers=workers)


if __name__ == "__main__":
    build(Path(sys.argv[1]), Path(sys.argv[2]), int(sys.argv[3]))
