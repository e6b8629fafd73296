"""Ranks of one more command on this machine, by torchrun."""

import os
import subprocess
import sys
import tempfile
from pathlib import Path

import torch

from cclmpc_dist.benching import alone, files
from cclmpc_dist.benching.files import Report
from cclmpc_dist.errors import InputError
from cclmpc_dist.words import counted


def in_world() -> bool:
    """Whether a launcher started this process as a rank."""
    return "WORLD_SIZE" in os.environ


def check_cards(world: int) -> None:
    """Raises InputError for more ranks than this machine has GPUs, where it has some."""
    cards = torch.cuda.device_count()
    if torch.cuda.is_available() and world > cards:
        raise InputError(f"--ranks {world}: this machine has {counted(cards, 'GPU')}, one a rank: give fewer")


def torchrun(world: int, threads: int, *arguments: str) -> Report:
    """What `cclmpc bench ARGUMENTS --out` writes on `world` ranks. Raises InputError where it fails."""
    with tempfile.TemporaryDirectory() as folder:
        out = Path(folder) / "part.json"
        head = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={world}", "-m"]
        command = [*head, "cclmpc_dist", "bench", *arguments, f"--out={out}"]
        environment = os.environ | {"OMP_NUM_THREADS": str(threads)}
        code, _ = alone.run(command, env=environment, stdout=subprocess.DEVNULL)
        if code or not out.exists():
            raise InputError(f"bench: the measurement on {counted(world, 'rank')} ended with {code}: "
                             "what it said stands above")  # fmt: skip
        return files.read(out)
