"""A build while it is made: OUT/parts/ holds what is needed to go on after a kill, and what `merge` reads.

0002-of-0003.json       settings and range of a part, and, once it is finished, its number of shards
0002-of-0003.lock       held by the process that writes the part
shard-0002-000000.rows  a piece: what the index will say of one complete shard; written after the shard
"""

import errno
import fcntl
import hashlib
import json
import re
from array import array
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Literal

import numpy as np

from cclmpc_dist.data.case import Handle
from cclmpc_dist.data.columns import VERSION
from cclmpc_dist.data.encode import Compression, Sample
from cclmpc_dist.data.index import pretty, replace
from cclmpc_dist.data.seen import Seen
from cclmpc_dist.errors import InputError
from cclmpc_dist.words import counted

PARTS = "parts"
FREE = ("classes", "labelled", "val_last", "on_error")  # may change until the parts are merged


@dataclass(frozen=True)
class Settings:
    """How a corpus is sharded; see `shards.write`."""

    source: str
    classes: int | None = None
    labelled: int | None = None
    val_last: int = 0
    shard_bytes: int = 64 << 20
    compress: Compression = "none"
    on_error: Literal["fail", "skip"] = "fail"
    parts: int = 1
    options: dict[str, str] = field(default_factory=dict)  # of the format, as Options.given

    def of(self, cases: Sequence[Handle]) -> dict[str, Any]:
        """As JSON, the options among the others, with the number and a hash of the names of the cases."""
        names = hashlib.sha256()
        for case in cases:
            names.update(f"{case.key}\n".encode())
        settings = asdict(self)
        return settings | settings.pop("options") | {"cases": len(cases), "keys": names.hexdigest()}


def settled(settings: dict[str, Any]) -> dict[str, Any]:
    """Those that shards are made of."""
    return {name: value for name, value in settings.items() if name not in FREE}


def difference(old: dict[str, Any], new: dict[str, Any]) -> str:
    """The settings in which two builds differ, in the words of `cclmpc shard`."""
    names = [name for name in new | old if old.get(name) != new.get(name)]
    if "cases" in names:
        names.remove("keys")
    return "; ".join(
        "other cases" if name == "keys" else f"{_option(name, old.get(name))}, not {_option(name, new.get(name))}"
        for name in names
    )


def _option(name: str, value: Any) -> str:
    """A setting as it was given on the command line."""
    if name == "cases":
        return counted(value, "case")
    named = {"source": "format", "shard_bytes": "shard-mib", "parts": "part"}
    shown = {"shard_bytes": lambda size: f"{size / 2**20:g}", "parts": lambda count: f"I/{count}"}.get(name, str)
    option = f"--{named.get(name, name).replace('_', '-')}"
    return f"no {option}" if value is None else f"{option} {shown(value)}"


def inputs(cases: Sequence[Handle]) -> str:
    """A hash of what can be told of the cases without reading them."""
    digest = hashlib.sha256()
    for case in cases:
        digest.update(f"{case.key} {case.fingerprint}\n".encode())
    return digest.hexdigest()


@dataclass(frozen=True)
class Part:
    """Part `number` of `count`, counted from 1: cases [first, stop) of the corpus."""

    out: Path
    number: int
    count: int
    cases: int

    @property
    def first(self) -> int:
        return self.cases * (self.number - 1) // self.count

    @property
    def stop(self) -> int:
        return self.cases * self.number // self.count

    @property
    def name(self) -> str:
        return f"{self.number:04d}-of-{self.count:04d}"

    @property
    def record(self) -> Path:
        return self.out / PARTS / f"{self.name}.json"

    @property
    def _stem(self) -> str:
        return "shard-" if self.count == 1 else f"shard-{self.number:04d}-"

    def shard(self, number: int) -> Path:
        return self.out / f"{self._stem}{number:06d}.tar"

    def piece(self, number: int) -> Path:
        return self.out / PARTS / f"{self.shard(number).stem}.rows"

    def pieces(self) -> list[Path]:
        return sorted((self.out / PARTS).glob(f"{self._stem}[0-9][0-9][0-9][0-9][0-9][0-9].rows"))

    def leftovers(self, number: int) -> list[Path]:
        """Files of its shards from `number` on, the unfinished one with them."""
        tars = self.out.glob(f"{self._stem}[0-9][0-9][0-9][0-9][0-9][0-9].tar*")
        kept = {self.shard(known).name for known in range(number)} | {self.piece(known).name for known in range(number)}
        return [file for file in (*tars, *self.pieces()) if file.name not in kept]

    def forget(self) -> None:
        """Remove what tells that it was begun."""
        for suffix in (".json", ".lock"):
            self.record.with_suffix(suffix).unlink(missing_ok=True)

    def write(self, settings: dict[str, Any], **result: Any) -> None:
        """Write the record; `result` is known once the part is finished."""
        record = {"settings": settings, "part": self.number, "finished": bool(result), **result}
        replace(self.record, pretty(record))

    def __str__(self) -> str:
        return f"part {self.number}/{self.count}"


def read_record(file: Path) -> dict[str, Any]:
    """A part's record. Raises InputError."""
    try:
        record = json.loads(file.read_text())
    except ValueError:
        record = None
    entries = {"settings", "part", "finished"}
    if isinstance(record, dict) and record.get("finished"):
        entries |= {"shards", "skipped", "inputs"}
    if not isinstance(record, dict) or not entries <= record.keys():
        raise InputError(f"{file}: torn or edited: shard part {_numbers(file)} again")
    return record


def _numbers(file: Path) -> str:
    found = re.fullmatch(r"(\d+)-of-(\d+)", file.stem)
    return f"{int(found[1])}/{int(found[2])}" if found else "1/1"


@contextmanager
def locked(part: Part) -> Iterator[None]:
    """Keep a second process from the part. A file system without locks is trusted. Raises InputError."""
    with open(part.record.with_suffix(".lock"), "w") as file:
        try:
            fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            if error.errno in (errno.EACCES, errno.EAGAIN):
                raise InputError(f"{part.out}: another process writes {part}: wait for it, or end it") from None
        yield


class Rows:
    """The rows of one shard while it grows: one machine array a column."""

    INTEGERS = ("case", "image_at", "image_bytes", "label_at", "label_bytes", "json_at", "json_bytes", "dtype")
    VOXELS = ("voxel_row", "voxel_class", "voxel_count")

    def __init__(self, first: int) -> None:
        self.first = first
        self.keys: list[str] = []
        self.patients: list[str] = []
        self.skipped: list[dict[str, str]] = []
        self.cropped_by_label, self.top = False, 0
        self.shape: tuple[int, ...] = ()
        self.integers = {name: array("q") for name in (*self.INTEGERS, *self.VOXELS)}
        self.shapes, self.floats = array("q"), {name: array("d") for name in ("spacing", *Seen._fields)}
        self.voxels: list[np.ndarray] = []

    def add(self, case: int, sample: Sample, places: dict[str, tuple[int, int]]) -> None:
        """`places`: (offset, bytes) in the shard by the first word of a member's extension."""
        row = {"case": case, "dtype": sample.dtype}
        for part in ("image", "label", "json"):
            row[f"{part}_at"], row[f"{part}_bytes"] = places.get(part, (0, 0))
        for label, voxels in sample.voxels:
            row_of_class = {"voxel_row": len(self.keys), "voxel_class": label, "voxel_count": len(voxels)}
            for name, value in row_of_class.items():
                self.integers[name].append(value)
            self.voxels.append(voxels)
        for name in self.INTEGERS:
            self.integers[name].append(row[name])
        self.shape = sample.shape
        self.shapes.extend(sample.shape)
        self.floats["spacing"].extend(sample.spacing)
        for name, numbers in sample.seen._asdict().items():
            self.floats[name].extend(np.broadcast_to(numbers, sample.shape[:1]).tolist())
        self.cropped_by_label |= sample.cropped_by_label
        self.top = max(self.top, sample.top)
        self.keys.append(sample.key)
        self.patients.append(sample.patient)

    def save(self, file: Path, **told: Any) -> None:
        """Write the piece: a hash, a line of JSON, safetensors."""
        from safetensors.numpy import save

        axes = len(self.shape)
        columns: dict[str, np.ndarray] = {name: np.array(values, np.int64) for name, values in self.integers.items()}
        columns |= {name: np.array(values, np.float64) for name, values in self.floats.items()}
        columns["spacing"] = columns["spacing"].reshape(-1, axes - 1)
        columns |= _narrowed({name: columns[name].reshape(len(self.keys), -1) for name in Seen._fields})
        columns["shape"] = np.array(self.shapes, np.int32).reshape(-1, axes)
        columns["voxels"] = np.concatenate([np.empty((0, axes - 1), np.int32), *self.voxels]).astype(np.int32)
        told |= {
            "first": self.first, "keys": self.keys, "patients": self.patients, "skipped": self.skipped,
            "cropped_by_label": self.cropped_by_label, "top": self.top, "form": [self.shape[0], axes - 1],
            "version": VERSION,
        }  # fmt: skip
        data = json.dumps(told).encode() + b"\n" + save(columns)
        replace(file, hashlib.sha256(data).hexdigest().encode() + b"\n" + data)


def _narrowed(seen: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    """Of columns (n, C) the first where no sample's channels differ in any of them."""
    alike = all((numbers == numbers[:, :1]).all() for numbers in seen.values())
    return {name: numbers[:, : 1 if alike else None].copy() for name, numbers in seen.items()}


@dataclass
class Piece:
    """What `Rows.save` wrote."""

    told: dict[str, Any]
    columns: dict[str, np.ndarray]

    @classmethod
    def load(cls, file: Path) -> "Piece | None":
        """None where it is missing or damaged, or another version's."""
        from safetensors.numpy import load

        if not file.is_file():
            return None
        digest, _, data = file.read_bytes().partition(b"\n")
        if hashlib.sha256(data).hexdigest().encode() != digest:
            return None
        told, _, columns = data.partition(b"\n")
        piece = cls(json.loads(told), load(columns))
        return piece if piece.told.get("version") == VERSION else None
