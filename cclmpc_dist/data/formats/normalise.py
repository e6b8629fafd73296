"""Intensities -> what the network sees: value = offset + scale * clip(image, low, high).

All four numbers are only written down, and applied on the device: the image stays as the file has it, unless its
channels differ.
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
    and high-th percentile, then zscore of what is left. window: clipped to [low, high], which becomes [0, 1]."""

    kind: str
    low: float = 0.0
    high: float = 0.0

    def __str__(self) -> str:
        return self.kind if self.kind in ("none", "zscore") else f"{self.kind}:{self.low:g},{self.high:g}"


@dataclass(frozen=True)
class Normalised:
    """image (C, *S) is stored; the network sees offset + scale * clip(image, low, high). said: for the sample's
    JSON."""

    image: np.ndarray
    said: dict[str, Any]
    scale: float = 1.0
    offset: float = 0.0
    low: float = -math.inf
    high: float = math.inf

    @property
    def seen(self) -> dict[str, float]:
        """How the network sees it, as Case takes it."""
        return {"scale": self.scale, "offset": self.offset, "low": self.low, "high": self.high}

    def applied(self) -> np.ndarray:
        """What the network sees, float32."""
        return (self.offset + self.scale * np.clip(self.image, self.low, self.high)).astype(np.float32)


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
    """What a rule makes of a finite image (C, *S), each channel by itself unless `together`.

    Channels that want different numbers are stored normalised, as float32. Raises InputError naming the file where
    a channel is constant.
    """
    if rule.kind == "none":
        return Normalised(image, {"rule": "none"})
    groups = [image] if together else list(image)
    found = [_one(values, rule, path) for values in groups]
    said: dict[str, Any] = {name: [entry.said[name] for entry in found] for name in found[0].said}
    said |= {"rule": str(rule)}
    if all(entry.seen == found[0].seen for entry in found):
        return Normalised(image, said, **found[0].seen)
    return Normalised(np.stack([entry.applied() for entry in found]), said)


def _one(values: np.ndarray, rule: Rule, path: Path) -> Normalised:
    if rule.kind == "window":
        scale, clip = 1 / (rule.high - rule.low), [rule.low, rule.high]
        return Normalised(values, {"clip": clip}, scale, -rule.low * scale, rule.low, rule.high)
    clipped, said, bounds = values, {}, {}
    if rule.kind == "percentile":
        # Voxels of the image, not values between two of them: the clip makes no levels that were not there.
        low, high = np.percentile(values, (rule.low, rule.high), method="nearest").tolist()
        clipped, said = np.clip(values, low, high), {"clip": [float(low), float(high)]}
        bounds = {"low": float(low), "high": float(high)}
    mean, sd = float(clipped.mean(dtype=np.float64)), float(clipped.std(dtype=np.float64))
    if not sd > 0:
        raise InputError(f"{path}: every voxel is {mean:g}{_after(rule)}: leave it out, or take --normalise none")
    return Normalised(values, {**said, "mean": mean, "sd": sd}, 1 / sd, -mean / sd, **bounds)


def _after(rule: Rule) -> str:
    return f" after the clip to its {rule.low:g} to {rule.high:g} percentiles" if rule.kind == "percentile" else ""
