"""What a user says of a corpus's files, read from the command line's words."""

import math
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from cclmpc_dist.data.formats.labels import LabelMap, parse_map
from cclmpc_dist.data.formats.normalise import Rule, parse_rule
from cclmpc_dist.errors import InputError

AXIS = "axis"  # --channels axis: a file's fourth axis, or its vectors, are the channels
COLOURS = ("grey", "rgb")


@dataclass(frozen=True)
class Options:
    """labels: folder of label files. label_suffix: what their names have after the case's. label_map: file values to
    classes. classes: labels lie in [0, classes). normalise: None takes the format's own. spacing: mm to resample to.
    orient: "RAS" turns axes to the nearest of them, "keep" does not. resize: (height, width) in pixels. channels: the
    suffixes of a case's files, one a channel; or AXIS; or one of COLOURS.
    """

    labels: Path | None = None
    label_suffix: str = ""
    label_map: LabelMap | None = None
    classes: int | None = None
    normalise: Rule | None = None
    spacing: tuple[float, ...] | None = None
    orient: str = "RAS"
    resize: tuple[int, ...] | None = None
    channels: tuple[str, ...] = ()

    def given(self) -> dict[str, str]:
        """Those that samples depend on, where they are not as they come, as the command line takes them."""
        plain = Options()
        named = {name: value for name, value in vars(self).items() if value != getattr(plain, name)}
        return {name: _spelled(name, value) for name, value in named.items() if name != "classes"}


def _spelled(name: str, value: Any) -> str:
    if name == "label_map":
        return ",".join(f"{low}{f'..{high}' if high > low else ''}={number}" for low, high, number in value)
    if name in ("spacing", "resize", "channels"):
        return ",".join(str(part).removesuffix(".0") for part in value)
    return str(value)


def parse(
    *,
    labels: Path | None,
    label_suffix: str,
    label_map: str | None,
    classes: int | None,
    normalise: str | None,
    spacing: str | None,
    orient: str,
    resize: str | None,
    channels: str | None,
) -> Options:
    """Options from the command line's words. Raises InputError."""
    if labels and not labels.is_dir():
        raise InputError(f"--labels {labels}: no such folder: name the one that holds the labels")
    return Options(
        labels,
        label_suffix,
        parse_map(label_map) if label_map else None,
        classes,
        parse_rule(normalise) if normalise else None,
        numbers(spacing, "--spacing") if spacing else None,
        orient,
        tuple(int(size) for size in numbers(resize, "--resize", whole=True, count=2)) if resize else None,
        tuple(part.strip() for part in channels.split(",")) if channels else (),
    )


def numbers(text: str, option: str, whole: bool = False, count: int = 3) -> tuple[float, ...]:
    """`count` positive numbers between commas. Raises InputError naming the option."""
    parts = text.split(",")
    kind = "whole numbers" if whole else "numbers"
    pattern = r"\d+" if whole else r"\d+(\.\d*)?|\.\d+"
    if len(parts) != count or not all(re.fullmatch(pattern, part.strip()) for part in parts):
        raise InputError(f"{option} {text}: give {count} positive {kind} with commas between them")
    values = tuple(int(part) if whole else float(part) for part in parts)
    if not all(value > 0 and math.isfinite(value) for value in values):
        raise InputError(f"{option} {text}: give {count} positive {kind} with commas between them")
    return values
