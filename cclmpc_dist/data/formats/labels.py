"""Label values of files -> classes 0..K-1."""

import re
from pathlib import Path

import numpy as np

from cclmpc_dist.errors import InputError

UNMAPPED = 128  # values from here on are taken for grey levels unless the user says otherwise [F]
SHOWN = 8  # values that an error lists
LabelMap = tuple[tuple[int, int, int], ...]  # (lowest, highest, class)


def parse_map(text: str) -> LabelMap:
    """`0=0,255=1` or, with ranges, `0..127=0,128..255=1`. Raises InputError."""
    entries: list[tuple[int, int, int]] = []
    for part in text.split(","):
        found = re.fullmatch(r"\s*(-?\d{1,9})(?:\.\.(-?\d{1,9}))?=(\d{1,3})\s*", part)
        if not found:
            raise InputError(f"--label-map {text}: {part!r} is not VALUE=CLASS or LOW..HIGH=CLASS, as in 0=0,255=1")
        low, high, number = int(found[1]), int(found[2] or found[1]), int(found[3])
        if low > high or number > 255:
            raise InputError(f"--label-map {text}: {part!r}: ranges run upwards and classes end at 255")
        if any(low <= last and first <= high for first, last, _ in entries):
            raise InputError(f"--label-map {text}: {part!r} overlaps what stands before it: name each value once")
        entries.append((low, high, number))
    return tuple(entries)


def to_classes(label: np.ndarray, label_map: LabelMap | None, classes: int | None, path: Path) -> np.ndarray:
    """Labels of a file as uint8 classes. Raises InputError naming the file and the values found."""
    if label.dtype.kind not in "biuf" or (label.dtype.kind == "f" and not _whole(label)):
        raise InputError(f"{path}: the label holds other values than whole numbers: save class numbers")
    values = np.unique(label).astype(np.int64)
    if label_map is None:
        top = (classes or UNMAPPED) - 1
        if values[0] < 0 or values[-1] > top:
            raise InputError(f"{path}: the label holds {_listed(values)}, and classes are 0..{top}: say what they are "
                             "with --label-map, as in 0=0,255=1, or raise --classes")  # fmt: skip
        return label.astype(np.uint8)
    result = np.zeros(label.shape, np.uint8)
    left = values
    for low, high, number in label_map:
        result[(label >= low) & (label <= high)] = number
        left = left[(left < low) | (left > high)]
    if len(left):
        raise InputError(f"{path}: the label holds {_listed(left)}, which --label-map does not name: add it there")
    return result


def _whole(label: np.ndarray) -> bool:
    return bool(np.isfinite(label).all() and (label == np.round(label)).all())


def _listed(values: np.ndarray) -> str:
    more = ", ..." if len(values) > SHOWN else ""
    return ", ".join(map(str, values[:SHOWN].tolist())) + more
