"""The run folder: what a run was, and whether it can go on."""

import fcntl
import json
import os
import platform
import re
import shutil
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from importlib import metadata
from pathlib import Path
from typing import Any

import torch

from cclmpc_dist.config import Config, dump
from cclmpc_dist.errors import InputError
from cclmpc_dist.training.checkpoint import complete_steps, read_state

# Settings that may change between the parts of a run: they are no part of what is optimised.
FREE = ("log_every", "hang_seconds", "checkpoint", "evaluation", "profile", "runs", "data.path", "data.cache",
        "data.cache_gib", "data.workers", "data.on_error", "deepspeed", "ccl_mpc.contrast.exchange",
        "ccl_mpc.contrast.tile", "model.recompute")  # fmt: skip
VERSIONED = ("torch", "accelerate", "numpy", "webdataset", "safetensors", "h5py", "scipy", "deepspeed", "blosc2")


def checkpoints_folder(run: Path) -> Path:
    return run / "checkpoints"


def newest(run: Path) -> int:
    """Step of the newest complete checkpoint, -1 without one."""
    return (complete_steps(checkpoints_folder(run)) or [-1])[-1]


def resumable_state(config: Config, step: int) -> dict[str, Any]:
    """The state of checkpoint `step`. Raises InputError where another configuration made it, naming each difference."""
    state = read_state(checkpoints_folder(config.folder), step)
    then, now = _flat(state["config"]), _flat(json.loads(config.model_dump_json()))
    changed = [key for key in sorted(then.keys() | now.keys()) if then.get(key) != now.get(key) and not _is_free(key)]
    if changed:
        told = ", ".join(f"{key} = {_told(now.get(key))} (was {_told(then.get(key))})" for key in changed)
        raise InputError(f"{config.folder}: its checkpoint of step {step} was made with other settings: {told}: "
                         "give the run another name=, or the settings it had")  # fmt: skip
    return state


@contextmanager
def locked(folder: Path) -> Iterator[None]:
    """Rank 0: hold the run folder, at most until the process ends, killed or not.

    Raises InputError while another process trains there, or where it cannot be written.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
        handle = (folder / "lock").open("w")
    except OSError as error:
        raise InputError(f"{folder}: cannot write there ({error.strerror}): choose another name or runs") from None
    with handle:
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise InputError(f"{folder}: another process trains there: wait for it, or choose another name") from None
        yield


def prepare(config: Config, world_size: int, step: int) -> None:
    """Rank 0: write config.yaml and environment.json, and cut the log back to `step`, from which the run goes on."""
    folder = config.folder
    (folder / "config.yaml").write_text(dump(config))
    (folder / "environment.json").write_text(json.dumps(environment(world_size), indent=1))
    log = folder / "metrics.jsonl"
    if log.exists():
        lines = [line for line in log.read_text().splitlines() if _is_of(line, step)]
        log.write_text("".join(f"{line}\n" for line in lines))


def environment(world_size: int) -> dict[str, Any]:
    """Machine, versions, command and commit, for whoever reads the numbers later."""
    return {
        "machine": {
            "platform": platform.platform(),
            "cpu": _cpu(),
            "cpus": os.cpu_count(),
            "gpu": torch.cuda.get_device_name() if torch.cuda.is_available() else None,
        },
        "processes": world_size,
        "threads_per_process": torch.get_num_threads(),
        "versions": {"python": platform.python_version()} | {name: _version(name) for name in VERSIONED},
        "commit": _commit(),
        "command": command(),
    }


def command() -> list[str]:
    """What this process was started as; `python -m cclmpc_dist` is cclmpc."""
    program = Path(sys.argv[0])
    return ["cclmpc" if program.name == "__main__.py" else program.name, *sys.argv[1:]]


def _is_of(line: str, step: int) -> bool:
    """Whether a log line was written by a process that lived to write it whole, at or before `step`."""
    try:
        return bool(json.loads(line)["step"] <= step)
    except json.JSONDecodeError:
        return False


def _cpu() -> str:
    info = Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.exists() else []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor()


def _version(package: str) -> str | None:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None


def _commit() -> str | None:
    if shutil.which("git") is None:
        return None
    here = Path(__file__).resolve().parent
    done = subprocess.run(["git", "-C", str(here), "rev-parse", "HEAD"], capture_output=True, text=True, check=False)
    return done.stdout.strip() or None


def _flat(tree: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    flat: dict[str, Any] = {}
    for key, value in tree.items():
        flat |= _flat(value, f"{prefix}{key}.") if isinstance(value, dict) else {f"{prefix}{key}": value}
    return flat


def _told(value: Any) -> str:
    """A value as YAML has it; one whose default follows from elsewhere, or that is left out, is not set."""
    return "not set" if value is None else value if isinstance(value, str) else json.dumps(value)


def _is_free(key: str) -> bool:
    place = re.fullmatch(r"data\.further\.[^.]+\.path", key)  # of a corpus that the order knows by its hash
    return place is not None or any(key == free or key.startswith(f"{free}.") for free in FREE)
