"""A corpus and a configuration small enough to train in a test, and processes to train in."""

import os
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import psutil
import torch
from safetensors.torch import load_file

from cclmpc_dist.config import Config, parse
from cclmpc_dist.data import phantom, shards
from cclmpc_dist.data.index import Index, select
from cclmpc_dist.data.loader import Batch, Mixture, Stream, to_device


def corpus(folder: Path, cases: int = 14, labelled: int = 4, val_last: int = 2, size: int = 40) -> Path:
    """Phantom shards, about three cases each, so that an order has shards to shuffle."""
    shards.write(
        phantom.cases(cases, 0, size),
        folder,
        source="phantom",
        labelled=labelled,
        val_last=val_last,
        shard_bytes=600_000,
    )
    return folder


def settings(data: Path | str, runs: Path, **changes: Any) -> dict[str, Any]:
    """A raw tree; changes are dotted keys with dots as double underscores."""
    raw: dict[str, Any] = {
        "name": "toy",
        "runs": str(runs),
        "data": {"path": str(data), "patch": [32, 16, 16], "batch_labelled": 6, "batch_unlabelled": 6, "workers": 0},
        "model": {
            "filters": 4,
            "swin": {"depth": 2, "window": [2, 2, 2], "head_width": 4},
            "projection": 8,
            "embedding": 8,
        },
        "ccl_mpc": {"contrast": {"n_sbcl": 8, "n_negatives": 8, "n_cgcl": 8, "bank": 128, "bank_offer": 4}},
        "optim": {"lr": 0.01},
        "budget": {"images": 240},
        "checkpoint": {"every_steps": 4},
        "log_every": 1,
    }
    for key, value in changes.items():
        node = raw
        *parents, last = key.split("__")
        for part in parents:
            node = node.setdefault(part, {})
        node[last] = value
    return raw


def config(data: Path | str, runs: Path, **changes: Any) -> Config:
    return parse(settings(data, runs, **changes), "toy")


def batches(config: Config, device: str) -> dict[str, Batch]:
    """The first two images of each stream."""
    index = Index.open(config.data.path)
    cases = select(index, config.data.labelled, 0)
    found = {}
    for name in ("labelled", "unlabelled"):
        stream = Stream(index, name, cases[name], 2, 0, config.data.patch, with_label=name == "labelled")
        found[name] = to_device(Mixture([stream]).batch(0, range(2)), device)
    return found


def launch(world: int, *arguments: str) -> subprocess.Popen[str]:
    """`cclmpc ARGUMENTS` on `world` ranks under torchrun, alone for 1."""
    head = [sys.executable, "-m"]
    if world > 1:
        head += ["torch.distributed.run", "--standalone", "--nproc-per-node", str(world), "-m"]
    environment = {
        name: value for name, value in os.environ.items() if name not in ("RANK", "WORLD_SIZE", "MASTER_ADDR")
    }
    return subprocess.Popen(
        [*head, "cclmpc_dist", *arguments],
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        env=environment | {"OMP_NUM_THREADS": "1"},
    )


def finish(process: subprocess.Popen[str], timeout: float = 120) -> tuple[int, str]:
    """Exit code and output; kills the whole group when it is too late."""
    try:
        output, _ = process.communicate(timeout=timeout)
    except subprocess.TimeoutExpired:
        kill(process)
        raise
    return process.returncode, output


def run(world: int, *arguments: str) -> str:
    """Output of a command that must succeed."""
    code, output = finish(launch(world, *arguments))
    assert code == 0, output
    return output


def kill(process: subprocess.Popen[str]) -> None:
    """SIGKILL to agent and ranks, as a power cut would; ranks live in sessions of their own."""
    agent = psutil.Process(process.pid)
    everyone = [agent, *agent.children(recursive=True)]
    for one in everyone:
        one.kill()
    psutil.wait_procs(everyone)
    process.communicate()


def steps_logged(folder: Path) -> int:
    log = folder / "metrics.jsonl"
    return log.read_text().count("\n") if log.exists() else 0


def wait_for_step(process: subprocess.Popen[str], folder: Path, step: int, timeout: float = 90) -> None:
    deadline = time.monotonic() + timeout
    while steps_logged(folder) < step:
        assert process.poll() is None, process.communicate()[0]
        assert time.monotonic() < deadline, f"step {step} was not reached"
        time.sleep(0.01)


def tensors(checkpoint: Path) -> dict[str, torch.Tensor]:
    """Every tensor of a checkpoint, by file and name."""
    return {
        f"{file.name}/{name}": value
        for file in sorted(checkpoint.glob("*.safetensors"))
        for name, value in load_file(file).items()
    }


def assert_same(left: dict[str, torch.Tensor], right: dict[str, torch.Tensor]) -> None:
    """Bit for bit."""
    assert left.keys() == right.keys()
    different = [name for name in left if not torch.equal(left[name], right[name])]
    assert not different, f"{len(different)} of {len(left)} tensors differ: {different[:5]}"
