"""Checkpoints that exist or do not: written under a temporary name by a thread, committed by a rename, no pickle.

checkpoints/step-000000500/   manifest.json (every other file: bytes, sha256), state.json, <group>.safetensors of
                              rank 0 (model, optimizer, ema, method), rank-00000.safetensors of every rank
checkpoints/step-000001000.tmp/   being written, or left by a killed run: never read
"""

import hashlib
import json
import os
import shutil
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from cclmpc_dist.errors import InputError, LostRanks
from cclmpc_dist.words import counted

VERSION = 2

Tensors = dict[str, Tensor]


class Checkpoints:
    """The checkpoints of a run folder: `save` hands a copy to a writer thread, `load` reads one back.

    Every rank writes its own file into the shared folder and the existence of a file under its final name says that it
    is whole; rank 0's thread waits for all of them, for `patience` seconds after it has written its own, then writes
    the manifest, syncs and renames. No thread uses collectives.
    """

    def __init__(self, folder: Path, rank: int, world_size: int, keep: int, patience: float = 600.0) -> None:
        self.folder, self.rank, self.world_size, self.keep = folder, rank, world_size, keep
        self.patience = patience
        self.seconds: float | None = None  # rank 0: what the last save took, the copy and every rank's files
        self._buffers: Tensors = {}
        self._thread: threading.Thread | None = None
        self._error: Exception | None = None

    def prepare(self) -> None:
        """Rank 0, before training: make the folder and drop what a killed run left half written."""
        self.folder.mkdir(parents=True, exist_ok=True)
        for left in self.folder.glob("*.tmp"):
            shutil.rmtree(left)

    def save(
        self, step: int, groups: dict[str, Tensors], mine: Tensors, state: dict[str, Any], best: int | None = None
    ) -> None:
        """Start writing checkpoint `step`, one that is not there yet. groups: rank 0's files; mine: this rank's; state:
        JSON values; best: a step that is kept whatever its age.

        Returns once every tensor is copied to host memory. Raises InputError if an earlier save failed.
        """
        self.wait()
        began = time.monotonic()
        files = (groups if self.rank == 0 else {}) | {_rank_file(self.rank): mine}
        copies = {name: {key: self._copy(f"{name}/{key}", value) for key, value in group.items()}
                  for name, group in files.items()}  # fmt: skip
        if torch.cuda.is_available():
            torch.cuda.current_stream().synchronize()
        self._thread = threading.Thread(target=self._write, args=(step, copies, state, best, began), daemon=True)
        self._thread.start()

    def wait(self) -> None:
        """Wait for the writer. Raises InputError where it failed, LostRanks where other ranks' files did not come; the
        checkpoints before it are untouched."""
        if self._thread is not None:
            self._thread.join()
            self._thread = None
        if self._error is not None:
            error, self._error = self._error, None
            if not isinstance(error, OSError | SafetensorError):
                raise error
            raise InputError(
                f"{self.folder}: the checkpoint could not be written ({error}): "
                "make room or rights there and start again; the checkpoints before it are whole"
            ) from error

    def _copy(self, name: str, tensor: Tensor) -> Tensor:
        """A copy in host memory that is kept for the next save: new memory would cost more than the copying. The
        memory layout stays, as another is the writer's to make."""
        buffer = self._buffers.get(name)
        if buffer is None or buffer.shape != tensor.shape or buffer.dtype != tensor.dtype:
            buffer = torch.empty_like(tensor, device="cpu", pin_memory=tensor.is_cuda, requires_grad=False)
            self._buffers[name] = buffer
        return buffer.copy_(tensor.detach(), non_blocking=True)

    def _write(
        self, step: int, files: dict[str, Tensors], state: dict[str, Any], best: int | None, began: float
    ) -> None:
        temporary = self.folder / f"{_name(step)}.tmp"
        try:
            temporary.mkdir(exist_ok=True)
            for name, tensors in files.items():
                _save_whole(tensors, temporary / f"{name}.safetensors")
            if self.rank == 0:
                self._commit(step, temporary, state, began)
                self._prune({step, best})
        except Exception as error:  # carried over to the main thread, which raises it in wait()
            self._error = error
            if self.rank == 0:
                shutil.rmtree(temporary, ignore_errors=True)

    def _commit(self, step: int, temporary: Path, state: dict[str, Any], began: float) -> None:
        expected = [temporary / f"{_rank_file(rank)}.safetensors" for rank in range(self.world_size)]
        deadline = time.monotonic() + self.patience
        while missing := [file.name for file in expected if not file.exists()]:
            if time.monotonic() > deadline:
                raise LostRanks(
                    f"{temporary}: {counted(len(missing), 'rank')} wrote no file within {self.patience:g} s, "
                    f"{missing[0]} the first: the checkpoints before it are whole"
                )
            time.sleep(0.02)
        manifest = {file.name: _digest(file) for file in sorted(temporary.iterdir())}
        self.seconds = time.monotonic() - began
        head = {"version": VERSION, "step": step, "world_size": self.world_size, "save_seconds": self.seconds}
        _write_json(temporary / "state.json", state | head)
        manifest["state.json"] = _digest(temporary / "state.json")
        _write_json(temporary / "manifest.json", manifest)
        _sync_folder(temporary)
        temporary.rename(self.folder / _name(step))
        _sync_folder(self.folder)

    def _prune(self, needed: set[int | None]) -> None:
        for step in complete_steps(self.folder)[: -self.keep]:
            if step not in needed:
                shutil.rmtree(self.folder / _name(step))


def complete_steps(folder: Path) -> list[int]:
    """Steps of the committed checkpoints, ascending. The name says it: the rename that gives it comes last."""
    names = (entry.name.removeprefix("step-") for entry in folder.glob("step-*"))
    return sorted(int(name) for name in names if name.isdigit())


Remedy = Callable[[Path, list[int]], str]  # of a damaged checkpoint's folder and the steps of those before it


def _to_go_on(place: Path, before: list[int]) -> str:
    return f"remove {place} to {f'go on from step {before[-1]}' if before else 'start at step 0'}"


def read_state(folder: Path, step: int, remedy: Remedy = _to_go_on) -> dict[str, Any]:
    """state.json of a checkpoint, after every file is checked against the manifest.

    Raises InputError naming a file that is missing, cut or altered, manifest.json too, with the remedy, which is
    training's if none is given; or a version this program does not read.
    """
    place, steps = folder / _name(step), complete_steps(folder)
    if step not in steps:
        raise InputError(f"{place}: no such checkpoint: there are {steps or 'none'}")
    harmed = _harmed(place)
    if harmed:
        told = remedy(place, [earlier for earlier in steps if earlier < step])
        raise InputError(f"{place / harmed}: missing or altered since it was written: {told}")
    state: dict[str, Any] = json.loads((place / "state.json").read_text())
    if state["version"] != VERSION:
        raise InputError(f"{place}: checkpoint version {state['version']}, this program reads {VERSION}")
    return state


def _harmed(place: Path) -> str | None:
    """Name of a file of a checkpoint that is not as it was written."""
    try:
        manifest = json.loads((place / "manifest.json").read_text())
    except (FileNotFoundError, ValueError):
        return "manifest.json"
    return next((name for name, digest in manifest.items() if not _is_as(place / name, digest)), None)


def read_group(folder: Path, step: int, name: str) -> Tensors:
    """Tensors of one file of a checkpoint, on the CPU; empty where the checkpoint has no such file."""
    file = folder / _name(step) / f"{name}.safetensors"
    return load_file(file) if file.exists() else {}


def read_rank(folder: Path, step: int, rank: int) -> Tensors:
    return read_group(folder, step, _rank_file(rank))


def pack_optimizer(optimizer: torch.optim.Optimizer) -> tuple[Tensors, dict[str, Any]]:
    """An optimiser's state as tensors and JSON values."""
    state = optimizer.state_dict()
    tensors: Tensors = {}
    values: dict[str, Any] = {"groups": state["param_groups"], "values": {}}
    for parameter, entries in state["state"].items():
        for name, value in entries.items():
            if isinstance(value, Tensor):
                tensors[f"{parameter}.{name}"] = value
            else:
                values["values"][f"{parameter}.{name}"] = value
    return tensors, values


def unpack_optimizer(optimizer: torch.optim.Optimizer, tensors: Tensors, values: dict[str, Any]) -> None:
    """Load what pack_optimizer gave."""
    state: dict[int, dict[str, Any]] = {}
    for key, value in [*tensors.items(), *values["values"].items()]:
        parameter, name = key.split(".", 1)
        state.setdefault(int(parameter), {})[name] = value
    optimizer.load_state_dict({"state": state, "param_groups": values["groups"]})


def _name(step: int) -> str:
    return f"step-{step:09d}"


def _rank_file(rank: int) -> str:
    return f"rank-{rank:05d}"


def _save_whole(tensors: Tensors, file: Path) -> None:
    part = file.with_suffix(".part")
    save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, part)
    _sync(part)
    part.rename(file)


def _write_json(file: Path, value: Any) -> None:
    file.write_text(json.dumps(value, indent=1))
    _sync(file)


def _digest(file: Path) -> dict[str, Any]:
    with file.open("rb") as handle:
        return {"bytes": file.stat().st_size, "sha256": hashlib.file_digest(handle, "sha256").hexdigest()}


def _is_as(file: Path, digest: dict[str, Any]) -> bool:
    return file.is_file() and _digest(file) == digest


def _sync(file: Path) -> None:
    with file.open("rb") as handle:
        os.fsync(handle.fileno())


def _sync_folder(folder: Path) -> None:
    handle = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
