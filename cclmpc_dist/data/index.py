"""The index beside the shards: arrays that are memory-mapped (columns.py), no Python object a sample."""

import difflib
import errno
import hashlib
import json
import os
import re
import threading
from collections.abc import Mapping, Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np

from cclmpc_dist.data import sound
from cclmpc_dist.data.columns import INDEX, UNCLIPPED, VERSION, chunks, mapped
from cclmpc_dist.data.seen import Seen
from cclmpc_dist.data.store import Url
from cclmpc_dist.errors import InputError, refuse

MANIFEST = "manifest.json"
SHA256 = "[0-9a-f]{64}"  # cached files are named by it
DTYPES = (np.dtype("<u1"), np.dtype("<i2"), np.dtype("<f4"))
FOREGROUND = 64  # voxels kept a sample and class [F]
TRAIN, VAL = 0, 1
LOOKED_THROUGH = 1 << 20  # samples up to which every value is looked at; beyond, `cclmpc verify` alone does


def sha256(path: Path) -> str:
    """Hex digest of a file."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


class Index:
    """The samples of a corpus. `index[column]` is a memory-mapped array, `len(index)` the number of
    samples."""

    where = "all there"  # the shards, once it is open

    def __init__(self, path: Path | Url, manifest: dict[str, Any], file: Path | None = None) -> None:
        """file: the index where it does not lie in `path`."""
        self.path = path
        self.manifest = manifest
        self.file = file or Path(path / INDEX)
        self.columns = mapped(self.file, manifest["version"])
        unsound = sound.structure(self.columns)
        if unsound:
            raise InputError(f"{path / INDEX}: {unsound}: damaged, or the index of another corpus than {MANIFEST}: "
                             "shard again")  # fmt: skip
        self.identity: str = manifest["index_sha256"]
        self.classes: int = manifest["classes"]
        self.channels: int = manifest["channels"]
        self.dims: int = manifest["dims"]
        self.compress: str = manifest["compress"]

    @classmethod
    def open(cls, path: str | Path, check: bool = True) -> "Index":
        """The index of a folder that `shards.write` or `merge` made.

        With `check`, the index is hashed and every shard must be there in full size. Raises InputError naming
        the files.
        """
        path = Path(path)
        index = cls(path, _manifest(path))
        if check:
            refuse(path, index.problems())
        return index

    def __len__(self) -> int:
        return len(self.columns["shard"])

    def __getitem__(self, column: str) -> np.ndarray:
        return self.columns[column]

    def of(self, column: str, rows: np.ndarray) -> np.ndarray:
        """index[column][rows], without the 64-bit copy of all rows that numpy would make of them."""
        out = np.empty(rows.shape, self.columns[column].dtype)
        for part in chunks(len(rows)):
            out[part] = self.columns[column][rows[part]]
        return out

    def shard_path(self, shard: int) -> Path:
        """Of a local corpus."""
        return Path(self.path, self.manifest["shards"][shard]["name"])

    def shard_name(self, shard: int) -> str:
        """Where a shard is, for people."""
        return str(self.path / self.manifest["shards"][shard]["name"])

    def open_shard(self, shard: int, stop: threading.Event | None = None) -> BinaryIO:
        """A shard, of the size that it must have. Raises InputError; OSError where this process may open no more
        files; store.Stopped where it would have to be waited for and `stop` is set."""
        path = self.shard_path(shard)
        expected = self.manifest["shards"][shard]["bytes"]
        try:
            file = open(path, "rb")  # noqa: SIM115 (the caller's)
        except FileNotFoundError:
            raise InputError(f"{path}: missing: copy it beside the index, or shard again") from None
        except OSError as error:
            if error.errno == errno.EMFILE:
                raise
            raise InputError(f"{path}: cannot be read ({error.strerror}): copy it again or shard again") from None
        size = os.fstat(file.fileno()).st_size
        if size != expected:  # reading beyond the end of a map would kill the process
            file.close()
            raise InputError(f"{path}: has {size} of {expected} bytes: truncated, copy it again or shard again")
        return file

    def problems(self) -> list[str]:
        """One line if the index is not the manifest's, else one for each entry of the manifest that the index
        contradicts, and for each shard that is missing or of another size."""
        if sha256(self.file) != self.identity:
            return [f"{self.path / INDEX}: damaged, or the index of another corpus than {MANIFEST}: shard again"]
        problems = self.contradictions()
        if any(INDEX in problem for problem in problems):
            return problems
        for number, shard in enumerate(self.manifest["shards"]):
            path = self.shard_path(number)
            if not path.is_file():
                problems.append(f"{path}: missing: copy it beside the index, or shard again")
            elif path.stat().st_size != shard["bytes"]:
                size = path.stat().st_size
                problems.append(
                    f"{path}: has {size} of {shard['bytes']} bytes: truncated, copy it again or shard again"
                )
        return problems

    def contradictions(self) -> list[str]:
        """One line for each entry of the manifest that the index contradicts, else for an index that cannot be."""
        problems = [
            edited(self.path, name, self.manifest[name], value)
            for name, value in summary(self.columns).items()
            if self.manifest[name] != value
        ] + self._miscounted()
        unsound = self.unsound() if len(self) <= LOOKED_THROUGH and not problems else ""
        return [unsound] if unsound else problems

    def unsound(self) -> str:
        """What the columns say that cannot be, one line, or nothing."""
        found = sound.values(self.columns, self.manifest, np.array([dtype.itemsize for dtype in DTYPES]))
        return found and f"{self.path / INDEX}: {found}: damaged, shard again"

    def _miscounted(self) -> list[str]:
        """Shards whose number of samples the index contradicts, one line each."""
        shards = self.manifest["shards"]
        counts = np.zeros(max(len(shards), int(self["shard"].max()) + 1), np.int64)
        for rows in chunks(len(self)):
            counts += np.bincount(self["shard"][rows], minlength=len(counts))
        held = counts.tolist()
        if len(held) > len(shards):
            return [f"{self.path / MANIFEST}: names {len(shards)} shards, the index {len(held)}: edited, shard again"]
        return [
            edited(self.path, f"{shard['name']}: samples", shard["samples"], samples)
            for shard, samples in zip(shards, held, strict=True)
            if shard["samples"] != samples
        ]

    def seen(self, row: int) -> Seen:
        """How the network sees the image of a sample."""
        return Seen(*(self.columns[name][row] for name in Seen._fields))

    def key(self, row: int) -> str:
        start, stop = self["key_at"][row : row + 2]
        return self["key_bytes"][start:stop].tobytes().decode()

    def find(self, keys: Sequence[str]) -> np.ndarray:
        """Rows of the named samples, int32, in the order of `keys`. Raises InputError with the nearest
        name."""
        return np.array([self._find(key) for key in keys], np.int32)

    def _find(self, key: str) -> int:
        order = self["key_order"]
        low, high = 0, len(order)
        while low < high:
            middle = (low + high) // 2
            low, high = (middle + 1, high) if self.key(order[middle]) < key else (low, middle)
        if low < len(order) and self.key(order[low]) == key:
            return int(order[low])
        around = {self.key(row) for row in order[max(0, low - 500) : low + 500]}
        near = difflib.get_close_matches(key, sorted(around), 1, cutoff=0.0)
        raise InputError(f"{self.path}: no case {key!r}: did you mean {near[0] if near else 'another corpus'}?")

    def foreground(self, row: int) -> list[np.ndarray]:
        """Stored foreground voxels of a sample, one (v, dims) array for each class that it has."""
        first = row * (self.classes - 1)
        at = self["voxel_at"][first : first + self.classes]
        return [self["voxels"][a:b] for a, b in pairwise(at.tolist()) if b > a]


def summary(columns: Mapping[str, np.ndarray]) -> dict[str, Any]:
    """What the manifest repeats of the index, for whoever reads it without."""
    samples = len(columns["shard"])
    return {
        "classes": (len(columns["voxel_at"]) - 1) // samples + 1,
        "channels": int(columns["shape"][0, 0]),
        "dims": columns["shape"].shape[1] - 1,
        "counts": {
            "samples": samples,
            "with_label": int((columns["label_bytes"] > 0).sum()),
            "labelled": int(columns["labelled"].sum()),
            "val": int((columns["split"] == VAL).sum()),
        },
    }


def edited(path: Path | Url, entry: str, said: Any, true: Any) -> str:
    """The line for an entry of a folder's manifest that is not what was written."""
    was = json.dumps(true)
    return f"{path / MANIFEST}: {entry} = {json.dumps(said)}, written as {was}: put {was} back, or shard again"


def seal(path: Path, manifest: dict[str, Any]) -> None:
    """Complete the index of `columns.create` and write the manifest, last: a folder without one is no corpus."""
    part = path / f"{INDEX}.part"
    with open(part, "r+b") as file:
        os.fsync(file.fileno())
    part.rename(path / INDEX)
    replace(path / MANIFEST, pretty(manifest | {"index_sha256": sha256(path / INDEX)}))


def pretty(value: Any) -> bytes:
    """JSON for people too, always the same bytes."""
    return (json.dumps(value, indent=1, sort_keys=True) + "\n").encode()


def replace(path: Path, data: bytes) -> None:
    """Write a file so that it is there in full or not at all."""
    part = path.with_name(path.name + ".part")
    with open(part, "wb") as file:
        file.write(data)
        file.flush()
        os.fsync(file.fileno())
    part.rename(path)


def select(index: Index, labelled: int | Sequence[str] | None, select: int = 0) -> dict[str, np.ndarray]:
    """Who is in which stream: ascending rows, int32, for "labelled", "unlabelled", "select" and "val".

    labelled: the first N labelled training cases, or their keys; None takes what the shards say. `select`
    cases are cut from the end of them and are in neither stream; "val" cases (the shards' --val-last) are in
    none. Every other training case is unlabelled, whether or not the shards hold its label. Raises
    InputError.
    """
    train = index["split"] == TRAIN
    chosen = _chosen(index, labelled, train)
    if not len(chosen):
        raise InputError(f"{index.path}: no case is labelled: shard with labels, or set data.labelled")
    if select >= len(chosen):
        raise InputError(f"data.select = {select} leaves none of {len(chosen)} labelled cases to train on: lower it")
    kept, held = chosen[: len(chosen) - select], chosen[len(chosen) - select :]
    rest = train.copy()
    rest[chosen] = False
    return {"labelled": np.sort(kept), "unlabelled": _rows(rest), "select": np.sort(held), "val": _rows(~train)}


def training(index: Index) -> np.ndarray:
    """Ascending rows of all training cases, int32."""
    return _rows(index["split"] == TRAIN)


def _rows(mask: np.ndarray) -> np.ndarray:
    """Where a mask is true, int32: as many as column `shard` can number, in half the memory of numpy's own indices."""
    out, at = np.empty(np.count_nonzero(mask), np.int32), 0
    for part in chunks(len(mask)):
        found = np.flatnonzero(mask[part])
        out[at : at + len(found)] = found + part.start
        at += len(found)
    return out


def _chosen(index: Index, labelled: int | Sequence[str] | None, train: np.ndarray) -> np.ndarray:
    """Rows of the labelled training cases, in the order in which they were asked for."""
    if labelled is None:
        return _rows(train & (index["labelled"] > 0))
    has_label = index["label_bytes"] > 0
    if isinstance(labelled, int):
        rows = _rows(train & has_label)
        if labelled > len(rows):
            raise InputError(
                f"data.labelled = {labelled}: only {len(rows)} training cases of {index.path} have a label: "
                "lower it, or null for those that the shards say"
            )
        return rows[:labelled]
    rows = index.find(labelled)
    for key, row in zip(labelled, rows, strict=True):
        if not train[row]:
            raise InputError(f"data.labelled: {key} is a validation case of {index.path}: name a training case")
        if not has_label[row]:
            raise InputError(f"data.labelled: {key} has no label in {index.path}: name a case that has one")
    if len(set(rows.tolist())) < len(rows):
        raise InputError("data.labelled names a case twice: name each once")
    return rows


def _manifest(path: Path) -> dict[str, Any]:
    try:
        manifest = parsed((path / MANIFEST).read_bytes(), path / MANIFEST)
    except FileNotFoundError:
        if (path / "parts").is_dir():
            raise InputError(f"{path}: not finished: give its `cclmpc shard` command again, or `cclmpc merge` once all "
                             "parts are there") from None  # fmt: skip
        raise InputError(f"{path}: no corpus here ({MANIFEST} is missing): make one with `cclmpc shard`") from None
    except OSError as error:
        raise InputError(f"{path / MANIFEST}: cannot be read ({error}): shard again") from None
    if not (path / INDEX).is_file():
        raise InputError(f"{path / INDEX}: missing: shard again")
    return manifest


def parsed(data: bytes, file: Path | Url) -> dict[str, Any]:
    """The manifest in `data`, read from `file`. Raises InputError."""
    try:
        manifest = json.loads(data)
    except ValueError as error:
        raise InputError(f"{file}: cannot be read ({error}): shard again") from None
    version = manifest.get("version") if isinstance(manifest, dict) else None
    if version not in range(UNCLIPPED, VERSION + 1):
        raise InputError(f"{file}: version {version}, and this program reads {UNCLIPPED} to {VERSION}: shard again")
    if not _is_sound(manifest):
        raise InputError(f"{file}: edited or damaged: shard again")
    return manifest


def _is_sound(manifest: dict[str, Any]) -> bool:
    """Whether every entry that is read has its type."""
    counts = [manifest.get(name) for name in ("classes", "channels", "dims")]
    shards = manifest.get("shards")
    fields = {"name": str, "bytes": int, "samples": int, "sha256": str}
    return (
        all(isinstance(count, int) and count > 0 for count in counts)
        and manifest["classes"] > 1
        and isinstance(manifest.get("source"), str)
        and manifest.get("compress") in ("none", "zstd")
        and isinstance(manifest.get("counts"), dict)
        and isinstance(manifest.get("cropped_by_label"), bool)
        and isinstance(manifest.get("index_sha256"), str)
        and isinstance(shards, list)
        and all(isinstance(entry, dict) for entry in shards)
        and all(isinstance(entry.get(name), kind) for entry in shards for name, kind in fields.items())
        and all(re.fullmatch(r"[\w.\-]+\.tar", entry["name"]) and entry["bytes"] >= 0 for entry in shards)
        and all(re.fullmatch(SHA256, entry["sha256"]) for entry in [{"sha256": manifest["index_sha256"]}, *shards])
    )
