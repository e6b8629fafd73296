"""Intensities -> what the network sees: a clip of the stored values, then value = offset + scale * stored.

The clip happens here, on whole numbers where the file has them; scale and offset are only written down, and applied
on the device.
"""

import math
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from cclmpc_dist.errors import InputError

KINDS = ("none", "zscore", "percentile", "window")


@dataclass(frozen=True)
class Rule:
    """none: values as they are. zscore: zero mean, unit variance over the image. percentile: clipped to the low-th
    and high-th percentile, then zscore. window: clipped to [low, high], which becomes [0, 1]."""

    kind: str
    low: float = 0.0
    high: float = 0.0

    def __str__(self) -> str:
        return self.kind if self.kind in ("none", "zscore") else f"{self.kind}:{self.low:g},{self.high:g}"


@dataclass(frozen=True)
class Normalised:
    """image (C, *S) is stored; the network sees offset + scale * image. said: for the sample's JSON."""

    image: np.ndarray
    scale: float
    offset: float
    said: dict[str, Any]


def parse_rule(text: str) -> Rule:
    """`zscore`, `percentile:0.5,99.5`, `window:-160,240` or `none`. Raises InputError."""
    kind, _, rest = text.partition(":")
    number = r"-?\d+(?:\.\d*)?"
    found = re.fullmatch(f"({number}),({number})", rest)
    if kind not in KINDS or (kind in ("percentile", "window")) != bool(found) or (rest and not found):
        raise InputError(f"--normalise {text}: take none, zscore, percentile:LOW,HIGH or window:LOW,HIGH, "
                         "as in percentile:0.5,99.5 or window:-160,240")  # fmt: skip
    if found is None:
        return Rule(kind)
    low, high = float(found[1]), float(found[2])
    if low >= high or (kind == "percentile" and not 0 <= low < high <= 100):
        raise InputError(f"--normalise {text}: LOW must be below HIGH{', in 0..100' if kind == 'percentile' else ''}")
    return Rule(kind, low, high)


def normalise(image: np.ndarray, rule: Rule, path: Path, together: bool = False) -> Normalised:
    """Apply a rule to a finite image (C, *S), each channel by itself unless `together`.

    Channels that want different scales are stored normalised, as float32. Raises InputError naming the file where
    a channel is constant.
    """
    if rule.kind == "none":
        return Normalised(image, 1.0, 0.0, {"rule": "none"})
    groups = [image] if together else list(image)
    found = [_one(values, rule, path) for values in groups]
    said: dict[str, Any] = {name: [entry.said[name] for entry in found] for name in found[0].said}
    said |= {"rule": str(rule)}
    if together:
        return Normalised(found[0].image, found[0].scale, found[0].offset, said)
    if len({(entry.scale, entry.offset) for entry in found}) == 1:
        return Normalised(np.stack([entry.image for entry in found]), found[0].scale, found[0].offset, said)
    channels = [(entry.offset + entry.scale * entry.image).astype(np.float32) for entry in found]
    return Normalised(np.stack(channels), 1.0, 0.0, said)


def _one(values: np.ndarray, rule: Rule, path: Path) -> Normalised:
    said: dict[str, Any] = {}
    if rule.kind != "zscore":
        low, high = _bounds(values, rule)
        values = _clip(values, low, high)
        said["clip"] = [float(low), float(high)]
    if rule.kind == "window":
        scale = 1 / (rule.high - rule.low)
        return Normalised(values, scale, -rule.low * scale, said)
    mean, sd = float(values.mean(dtype=np.float64)), float(values.std(dtype=np.float64))
    if not sd > 0:
        raise InputError(f"{path}: every voxel is {mean:g}{_after(rule)}: leave it out, or take --normalise none")
    return Normalised(values, 1 / sd, -mean / sd, said | {"mean": mean, "sd": sd})


def _bounds(values: np.ndarray, rule: Rule) -> tuple[float, float]:
    """Between them values stay; whole numbers where the values are."""
    if rule.kind == "percentile":
        low, high = np.percentile(values, (rule.low, rule.high), method="nearest").tolist()
        return low, high
    if values.dtype.kind in "iu":
        return math.ceil(rule.low), math.floor(rule.high)
    return rule.low, rule.high


def _clip(values: np.ndarray, low: float, high: float) -> np.ndarray:
    if values.dtype.kind == "f":
        return np.clip(values, low, high)
    limits = np.iinfo(values.dtype)
    bounds = [int(min(max(bound, limits.min), limits.max)) for bound in (low, high)]
    return np.clip(values, bounds[0], bounds[1])


def _after(rule: Rule) -> str:
    return f" after the clip to its {rule.low:g} to {rule.high:g} percentiles" if rule.kind == "percentile" else ""
