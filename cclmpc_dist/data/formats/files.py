"""Which files make a case: names, suffixes, lists, labels beside images."""

import re
import struct
import zlib
from abc import ABC, abstractmethod
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

from cclmpc_dist.data.case import Case
from cclmpc_dist.data.formats.options import Options
from cclmpc_dist.errors import InputError

LABELS = tuple(
    mark + word for mark in "_-" for word in ("seg", "segmentation", "label", "labels", "mask", "gt")
)  # what a label's name has after its image's, as a rule [F]
# What the libraries raise, one or another, for bytes that are no file of theirs.
UNREADABLE = (
    ArithmeticError, AttributeError, EOFError, LookupError, MemoryError, OSError, RuntimeError, SyntaxError, TypeError,
    ValueError, struct.error, zlib.error,
)  # fmt: skip


@dataclass(frozen=True)
class Files(ABC):
    """A case that was found and not read. images: a file a channel, or a slice; label: None where there is none."""

    key: str
    images: tuple[Path, ...]
    label: Path | None
    options: Options

    @property
    def fingerprint(self) -> str:
        """The files' sizes and times of change."""
        stats = [path.stat() for path in (*self.images, *([self.label] if self.label else []))]
        return " ".join(f"{stat.st_size}:{stat.st_mtime_ns}" for stat in stats)

    @abstractmethod
    def read(self) -> Case:
        """The case. Raises InputError naming the file."""


def find(folder: Path, endings: Sequence[str], inside: Path | None = None) -> list[Path]:
    """Files below `folder` whose names end so, by name; none in `inside`, and none that is hidden.

    Raises InputError where there is no such folder, or none in it.
    """
    if not folder.is_dir():
        raise InputError(f"{folder}: no such folder: name the one that holds the files")
    left_out = inside.resolve() if inside else None
    files = [
        path
        for path in folder.rglob("*")
        if path.name.lower().endswith(tuple(endings))
        and not path.name.startswith(".")
        and not (left_out and path.resolve().is_relative_to(left_out))
        and path.is_file()
    ]
    if not files:
        raise InputError(f"{folder}: holds no file that ends in {', '.join(endings)}: name another folder or --format")
    return sorted(files, key=natural)


def natural(path: Path) -> list[tuple[int, int | str]]:
    """A sort key: slice_2 comes before slice_10."""
    return [(0, int(part)) if part.isdecimal() else (1, part) for part in re.split(r"(\d+)", str(path)) if part]


def stem(path: Path, endings: Sequence[str]) -> str:
    """The name without its ending."""
    return next(path.name[: -len(ending)] for ending in endings if path.name.lower().endswith(ending))


def by_key(files: Iterable[Path], suffix: str, endings: Sequence[str]) -> dict[str, Path]:
    """Files whose stem ends in `suffix`, by the rest of it; where nothing is left, by their folder's name.

    Raises InputError where two files make the same key.
    """
    found: dict[str, Path] = {}
    for path in files:
        name = stem(path, endings)
        if not name.endswith(suffix):
            continue
        key = name.removesuffix(suffix) or path.parent.name
        if key in found:
            raise InputError(f"{path}: makes the same case, {key}, as {found[key]}: rename one")
        found[key] = path
    return found


def paired(
    folder: Path, list_file: str | Path | None, options: Options, endings: Sequence[str], label_endings: Sequence[str]
) -> list[tuple[str, tuple[Path, ...], Path | None]]:
    """(key, a file for each channel, label) of the cases, in the list's order or by name.

    Raises InputError: a label without an image, labels asked for of which none fits, a channel that is missing, a
    listed case that is not there.
    """
    files = find(folder, endings, options.labels)
    labels = _labels(folder, options, label_endings)
    taken = {path.resolve() for path in labels.values()}
    images = [path for path in files if path.resolve() not in taken]
    channels = [by_key(images, suffix, endings) for suffix in options.channels or ("",)]
    for key, path in channels[0].items():
        for suffix, others in zip(options.channels[1:], channels[1:], strict=True):
            if key not in others:
                raise InputError(f"{path}: case {key} has no file {key}{suffix} beside it: add it, or leave this out")
    if not channels[0]:
        raise InputError(f"{folder}: no file's name ends in {options.channels[0]}: look at --channels")
    _refuse_labels(channels[0])
    keys = list(channels[0]) if list_file is None else listed(list_file, set(channels[0]), folder)
    _check_labels(folder, options, labels, channels[0], keys)
    return [(key, tuple(channel[key] for channel in channels), labels.get(key)) for key in keys]


def _labels(folder: Path, options: Options, endings: Sequence[str]) -> dict[str, Path]:
    if options.labels is None and not options.label_suffix:
        return {}
    return by_key(find(options.labels or folder, endings), options.label_suffix, endings)


def _refuse_labels(images: dict[str, Path]) -> None:
    """A label that is taken for an image would train as one, unseen."""
    for key, path in images.items():
        suffix = next((suffix for suffix in LABELS if key.endswith(suffix)), "")
        if suffix and key.removesuffix(suffix) in images:
            raise InputError(f"{path}: looks like the label of {key.removesuffix(suffix)}, and would be an image: give "
                             f"--label-suffix {suffix}, or take it out of the folder")  # fmt: skip


def _check_labels(
    folder: Path, options: Options, labels: dict[str, Path], images: dict[str, Path], keys: list[str]
) -> None:
    alone = next((path for key, path in labels.items() if key not in images), None)
    if labels and not labels.keys() & images.keys():
        key = keys[0]
        raise InputError(f"{options.labels or folder}: no label fits an image: expected {key}{options.label_suffix}.* "
                         f"for {images[key]}: look at --labels and --label-suffix")  # fmt: skip
    if alone:
        raise InputError(f"{alone}: a label without an image in {folder}: add the image or take the label away")
    if (options.labels or options.label_suffix) and not labels:
        raise InputError(f"{options.labels or folder}: no label's name ends in {options.label_suffix}: "
                         "look at --label-suffix")  # fmt: skip


def lines(path: str | Path) -> list[str]:
    """The lines of a list that are not blank. Raises InputError where it cannot be read or is empty."""
    try:
        found = [line.strip() for line in Path(path).read_text().splitlines() if line.strip()]
    except OSError as error:
        raise InputError(
            f"{path}: cannot read the list of cases ({error.strerror}): name a file with one a line"
        ) from None
    except UnicodeDecodeError:
        raise InputError(f"{path}: not UTF-8 text: name a list of cases, one a line") from None
    if not found:
        raise InputError(f"{path}: no cases: expected one name a line")
    return found


def listed(path: str | Path, known: set[str], folder: Path) -> list[str]:
    """The list's keys. Raises InputError where one is not in `known`."""
    keys = lines(path)
    absent = [key for key in keys if key not in known]
    if absent:
        others = f" (and {len(absent) - 1} more)" if len(absent) > 1 else ""
        raise InputError(f"{path}: case {absent[0]}{others} is not in {folder}: take it off the list or add its file")
    return keys
