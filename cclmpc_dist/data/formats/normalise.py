"""Intensities -> what the network sees: value = offset + scale * clip(image, low, high).

All four numbers are only written down, for each channel, and applied on the device: the image stays as the file has it.
"""

import math
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from cclmpc_dist.data.seen import AS_STORED, Seen
from cclmpc_dist.errors import InputError

KINDS = ("none", "zscore", "percentile", "window")


@dataclass(frozen=True)
class Rule:
    """none: values as they are. zscore: zero mean, unit variance over the image. percentile: clipped to the low-th
    and high-th percentile, then zscore of what is left. window: clipped to [low, high], which becomes [0, 1]."""

    kind: str
    low: float = 0.0
    high: float = 0.0

    def __str__(self) -> str:
        return self.kind if self.kind in ("none", "zscore") else f"{self.kind}:{self.low:g},{self.high:g}"


@dataclass(frozen=True)
class Normalised:
    """image (C, *S) is stored, the network sees it by `seen`. said: for the sample's JSON."""

    image: np.ndarray
    said: dict[str, Any]
    seen: Seen = AS_STORED


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
    """What a rule makes of a finite image (C, *S), each channel by itself unless `together`. Raises InputError naming
    the file where a channel is constant."""
    if rule.kind == "none":
        return Normalised(image, {"rule": "none"})
    found = [_one(values, rule, path) for values in ([image] if together else image)]
    said: dict[str, Any] = {name: [entries[name] for entries, _ in found] for name in found[0][0]}
    return Normalised(image, said | {"rule": str(rule)}, Seen.of([numbers for _, numbers in found]))


def _one(values: np.ndarray, rule: Rule, path: Path) -> tuple[dict[str, Any], tuple[float, float, float, float]]:
    """What is said of a channel, or of all, and its scale, offset, low and high."""
    if rule.kind == "window":
        scale = 1 / (rule.high - rule.low)
        return {"clip": [rule.low, rule.high]}, (scale, -rule.low * scale, rule.low, rule.high)
    said, low, high = {}, -math.inf, math.inf
    if rule.kind == "percentile":
        # Voxels of the image, not values between two of them: the clip makes no levels that were not there.
        low, high = np.percentile(values, (rule.low, rule.high), method="nearest").tolist()
        values, said = np.clip(values, low, high), {"clip": [float(low), float(high)]}
    mean, sd = float(values.mean(dtype=np.float64)), float(values.std(dtype=np.float64))
    if not sd > 0:
        raise InputError(f"{path}: every voxel is {mean:g}{_after(rule)}: leave it out, or take --normalise none")
    return {**said, "mean": mean, "sd": sd}, (1 / sd, -mean / sd, low, high)


def _after(rule: Rule) -> str:
    return f" after the clip to its {rule.low:g} to {rule.high:g} percentiles" if rule.kind == "percentile" else ""
