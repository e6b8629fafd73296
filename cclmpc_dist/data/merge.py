"""The pieces of all parts -> index and manifest. Nothing of a corpus but one piece is held in memory, and its names."""

import shutil
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from cclmpc_dist.data import index
from cclmpc_dist.data.columns import VERSION, create
from cclmpc_dist.data.index import MANIFEST, TRAIN, VAL, Index
from cclmpc_dist.data.parts import PARTS, Part, Piece, Rows, difference, read_record
from cclmpc_dist.data.seen import Seen
from cclmpc_dist.errors import InputError

SKIPPED = "skipped.json"
COPIED = (*(name for name in Rows.INTEGERS if name != "case"), "shape", "spacing", *Seen._fields)


def merge(out: str | Path) -> Index:
    """Write index and manifest of a folder in which every part is finished, and open it; a finished one is opened.

    Samples lie in the order of the cases, whatever the number of parts. Raises InputError: a part that is
    missing, unfinished, torn or made with other settings, a shard that is not there, a name or a patient that
    must not come twice.
    """
    out = Path(out)
    if not (out / MANIFEST).is_file():
        parts = _parts(out)
        _write(out, parts, _survey(out, parts))
    shutil.rmtree(out / PARTS, ignore_errors=True)
    return Index.open(out)


@dataclass
class _Found:
    """A finished part."""

    part: Part
    settings: dict[str, Any]
    shards: int
    skipped: list[dict[str, str]]
    inputs: str

    def pieces(self) -> Iterator[Piece]:
        for number in range(self.shards):
            piece = Piece.load(self.part.piece(number))
            if piece is None:
                file = self.part.piece(number)
                raise InputError(f"{file}: missing or torn: shard {self.part} again")
            yield piece


def _parts(out: Path) -> list[_Found]:
    """All parts in order, of like settings and each finished."""
    records = {file: read_record(file) for file in sorted((out / PARTS).glob("*-of-*.json"))}
    if not records:
        raise InputError(f"{out}: no parts to merge: make them with `cclmpc shard --part 1/N` to N/N")
    (first, record), *others = records.items()
    for file, other in others:
        if other["settings"] != record["settings"]:
            what = difference(other["settings"], record["settings"])
            raise InputError(f"{file}: made with {what} as {first.name}: shard it, or the others, again")
    settings = record["settings"]
    found = []
    for number in range(1, settings["parts"] + 1):
        part = Part(out, number, settings["parts"], settings["cases"])
        told = records.get(part.record)
        if told is None or not told["finished"]:
            state = "is missing" if told is None else "is not finished"
            raise InputError(f"{out}: {part} {state}: run `cclmpc shard` with --part {number}/{part.count}")
        found.append(_Found(part, settings, told["shards"], told["skipped"], told["inputs"]))
    return found


@dataclass
class _Survey:
    """What must be known before the first row can be written."""

    rows: int = 0
    key_bytes: int = 0
    widest: int = 0
    voxels: int = 0
    classes: int = 2
    present: set[int] = field(default_factory=set)  # classes from 1 on that a label holds
    form: list[int] = field(default_factory=list)
    seen: int = 1  # w of columns.py
    cropped_by_label: bool = False
    shards: list[dict[str, Any]] = field(default_factory=list)
    skipped: list[dict[str, str]] = field(default_factory=list)
    held_out: dict[str, str] = field(default_factory=dict)  # patient -> a case of --val-last


def _survey(out: Path, parts: list[_Found]) -> _Survey:
    settings = parts[0].settings
    all_of_it = _Survey(classes=settings["classes"] or 2)
    for found in parts:
        for piece in found.pieces():
            _add(all_of_it, out, piece, settings["cases"] - settings["val_last"])
        all_of_it.skipped += found.skipped
    accounted = all_of_it.rows + len(all_of_it.skipped)
    if accounted != settings["cases"]:
        raise InputError(f"{out}: {accounted} of {settings['cases']} cases are accounted for: shard the parts again")
    if not all_of_it.rows:
        raise InputError(f"{out}: all {accounted} cases were left out: {all_of_it.skipped[0]['why']}")
    absent = sorted(set(range(1, all_of_it.classes)) - all_of_it.present)
    if settings["classes"] is None and all_of_it.present and absent:
        held = ", ".join(map(str, sorted(all_of_it.present)))
        raise InputError(f"{out}: the labels hold {held} and never {absent[0]}: say --classes {all_of_it.classes} "
                         "if that is right, or shard anew with --label-map")  # fmt: skip
    return all_of_it


def _add(survey: _Survey, out: Path, piece: Piece, train: int) -> None:
    told, entry = piece.told, piece.told["shard"]
    file = out / entry["name"]
    if not file.is_file() or file.stat().st_size != entry["bytes"]:
        raise InputError(f"{file}: missing or truncated: copy it here or shard its part again")
    survey.form = survey.form or told["form"]
    if told["form"] != survey.form:
        forms = f"(channels, axes) are {tuple(told['form'])}, those before have {tuple(survey.form)}"
        raise InputError(f"{file}: {forms}: make the cases alike")
    survey.rows += len(told["keys"])
    survey.key_bytes += sum(map(len, told["keys"]))
    survey.widest = max(survey.widest, *map(len, told["keys"]))
    survey.voxels += len(piece.columns["voxels"])
    survey.classes = max(survey.classes, told["top"] + 1)
    survey.present.update(piece.columns["voxel_class"].tolist())
    survey.seen = max(survey.seen, piece.columns["scale"].shape[1])
    survey.cropped_by_label |= told["cropped_by_label"]
    survey.shards.append(entry)
    survey.skipped += told["skipped"]
    for case, key, patient in zip(piece.columns["case"].tolist(), told["keys"], told["patients"], strict=True):
        if case >= train:
            survey.held_out.setdefault(patient, key)


def _write(out: Path, parts: list[_Found], survey: _Survey) -> None:
    settings = parts[0].settings
    columns = create(out, _layout(survey))
    names = np.empty(survey.rows, f"S{survey.widest}")
    row = key = voxel = shard = 0
    for found in parts:
        for piece in found.pieces():
            told, rows = piece.told, slice(row, row + len(piece.told["keys"]))
            names[rows] = told["keys"]
            _copy(columns, piece, rows, shard)
            _label(columns, piece, rows, settings["cases"] - settings["val_last"])
            _check_patients(piece, columns["split"][rows], survey.held_out)
            text = "".join(told["keys"]).encode()
            columns["key_bytes"][key : key + len(text)] = np.frombuffer(text, np.uint8)
            columns["voxels"][voxel : voxel + len(piece.columns["voxels"])] = piece.columns["voxels"]
            row, key, voxel, shard = rows.stop, key + len(text), voxel + len(piece.columns["voxels"]), shard + 1
    np.cumsum(columns["voxel_at"], out=columns["voxel_at"])
    np.cumsum(np.char.str_len(names), out=columns["key_at"][1:])
    columns["key_order"][:] = _sorted(out, names)
    _count_labelled(columns, settings["labelled"])
    if survey.skipped:
        index.replace(out / SKIPPED, index.pretty(survey.skipped))
    manifest = {
        "version": VERSION, "format": "webdataset", "source": settings["source"],
        "compress": settings["compress"], "cropped_by_label": survey.cropped_by_label, "shards": survey.shards,
        "skipped": len(survey.skipped), "settings": settings, "inputs": [found.inputs for found in parts],
    }  # fmt: skip
    index.seal(out, manifest | index.summary(columns))


def _layout(survey: _Survey) -> dict[str, tuple[str, tuple[int, ...]]]:
    """Type and shape of each column of columns.py's docstring."""
    n, dims, seen = survey.rows, survey.form[1], (survey.rows, survey.seen)
    places = {f"{part}_{what}": ("I64", (n,)) for part in ("image", "label", "json") for what in ("at", "bytes")}
    return places | {
        "shard": ("I32", (n,)), "dtype": ("U8", (n,)), "shape": ("I32", (n, 1 + dims)),
        "scale": ("F64", seen), "offset": ("F64", seen), "low": ("F32", seen), "high": ("F32", seen),
        "spacing": ("F64", (n, dims)),
        "labelled": ("U8", (n,)), "split": ("U8", (n,)),
        "key_bytes": ("U8", (survey.key_bytes,)), "key_at": ("I64", (n + 1,)), "key_order": ("I64", (n,)),
        "voxel_at": ("I64", (n * (survey.classes - 1) + 1,)), "voxels": ("I32", (survey.voxels, dims)),
    }  # fmt: skip


def _copy(columns: dict[str, np.ndarray], piece: Piece, rows: slice, shard: int) -> None:
    for name in COPIED:
        columns[name][rows] = piece.columns[name]
    columns["shard"][rows] = shard
    foregrounds = (len(columns["voxel_at"]) - 1) // len(columns["shard"])
    # Class 1 is the first: its count stands one later than its start.
    at = (rows.start + piece.columns["voxel_row"]) * foregrounds + piece.columns["voxel_class"]
    columns["voxel_at"][at] = piece.columns["voxel_count"]


def _label(columns: dict[str, np.ndarray], piece: Piece, rows: slice, train: int) -> None:
    """Split of the rows, and for now `labelled` wherever a training case has a label."""
    split = np.where(piece.columns["case"] < train, TRAIN, VAL)
    columns["split"][rows] = split
    columns["labelled"][rows] = (piece.columns["label_bytes"] > 0) & (split == TRAIN)


def _count_labelled(columns: dict[str, np.ndarray], count: int | None) -> None:
    """Leave the flag to the first `count`."""
    candidates = np.flatnonzero(columns["labelled"])
    if count is not None and count > len(candidates):
        raise InputError(f"--labelled {count}: only {len(candidates)} training cases have a label: lower it")
    if count is not None:
        columns["labelled"][candidates[count:]] = 0


def _check_patients(piece: Piece, split: np.ndarray, held_out: dict[str, str]) -> None:
    for key, patient, where in zip(piece.told["keys"], piece.told["patients"], split.tolist(), strict=True):
        if where == TRAIN and patient in held_out:
            cases = f"case {key} to train on and in case {held_out[patient]} of --val-last"
            raise InputError(f"patient {patient}: is in {cases}: give --val-last a number that parts no patient")


def _sorted(out: Path, names: np.ndarray) -> np.ndarray:
    order = np.argsort(names, kind="stable")
    again = np.flatnonzero(names[order[1:]] == names[order[:-1]])
    if len(again):
        key = names[order[again[0]]].decode()
        raise InputError(f"{out}: case {key} comes twice in the parts: rename one and shard again")
    return order
