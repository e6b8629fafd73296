"""`cclmpc bench checkpoint`: what a save costs the loop, written by the thread against waited for."""

import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from cclmpc_dist.config import Config, parse
from cclmpc_dist.data import phantom, shards
from cclmpc_dist.distributed import runtime
from cclmpc_dist.records import Record, repeated
from cclmpc_dist.training.state import save, tensors
from cclmpc_dist.training.trainer import Trainer

MIB = 2**20
UNITS = {"checkpoint": "MiB"}


def bench_checkpoint(folder: Path, filters: int = 16, patch: int = 32, repeats: int = 7) -> list[Record]:
    """Records of one case: the network of configs/la.yaml for 16 filters, its optimiser and bank, saved below `folder`.

    Each round takes a step, then saves and waits for the files (synchronous), then saves and goes on with a step while
    the thread writes (asynchronous). blocked_seconds: what the loop waits for; step_slowed_seconds: what the step after
    an asynchronous save takes longer than the round's other; save_seconds: until the files are there. Medians.
    """
    with tempfile.TemporaryDirectory(dir=folder) as place:
        trainer = Trainer(_config(Path(place), filters, patch), runtime.start("fp32"))
        try:
            trainer.build()
            trainer.checkpoints.prepare()
            trainer.first_step()
            rounds = [_round(trainer) for _ in range(repeats + 1)][1:]
            told = f"{trainer.size:,} parameters"
            groups, mine, _ = tensors(trainer)
        finally:
            runtime.stop()
    size = sum(value.numel() * value.element_size() for group in [*groups.values(), mine] for value in group.values())
    found = {key: repeated([one[key] for one in rounds]) for key in rounds[0]}
    waited, blocked, slowed = (found[key]["value"] for key in (
        ("synchronous", "blocked_seconds"), ("asynchronous", "blocked_seconds"), ("asynchronous", "step_slowed_seconds")
    ))  # fmt: skip
    found["asynchronous", "blocked_over_synchronous"] = {"value": blocked / waited}
    found["asynchronous", "blocked_and_slowed_over_synchronous"] = {"value": (blocked + slowed) / waited}
    found["both", "checkpoint"] = {"value": size / MIB}
    return [
        {"bench": "checkpoint", "case": told, "variant": variant, "metric": metric,
         "unit": UNITS.get(metric, "s" if metric.endswith("seconds") else "1")} | numbers
        for (variant, metric), numbers in found.items()
    ]  # fmt: skip


def _round(trainer: Trainer) -> dict[tuple[str, str], float]:
    checkpoints = trainer.checkpoints
    alone = _timed(trainer.first_step)
    trainer.done += 1
    synchronous = _timed(lambda: save(trainer), checkpoints.wait)
    trainer.done += 1
    began = time.perf_counter()
    asynchronous = _timed(lambda: save(trainer))
    beside = _timed(trainer.first_step)
    checkpoints.wait()
    whole = time.perf_counter() - began
    return {
        ("synchronous", "blocked_seconds"): synchronous,
        ("asynchronous", "blocked_seconds"): asynchronous,
        ("asynchronous", "save_seconds"): checkpoints.seconds or whole,
        ("asynchronous", "step_slowed_seconds"): beside - alone,
        ("both", "step_seconds"): alone,
    }


def _timed(*work: Callable[[], Any]) -> float:
    began = time.perf_counter()
    for one in work:
        one()
    return time.perf_counter() - began


def _config(place: Path, filters: int, patch: int) -> Config:
    shards.write(phantom.cases(4, 0, 2 * patch), place / "data", source="phantom", labelled=2)
    raw = {
        "name": "bench",
        "runs": str(place / "runs"),
        "data": {"path": str(place / "data"), "patch": [patch] * 3, "batch_labelled": 2, "batch_unlabelled": 2},
        "model": {"filters": filters, "swin": {"window": [3, 3, 3]}},
        "ccl_mpc": {"contrast": {"n_sbcl": 64}, "t_contrast": 0.0},
        "budget": {"images": 4},
        "checkpoint": {"keep": 1},
    }
    return parse(raw, "bench checkpoint")
