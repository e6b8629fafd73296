"""How the network sees a stored image: offset + scale * clip(stored, low, high), by four numbers a channel."""

import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np


class Seen(NamedTuple):
    """Arrays of one length: (C,), or (1,) where all channels are seen alike. low, high: in stored units, -inf and inf
    where nothing is clipped."""

    scale: np.ndarray
    offset: np.ndarray
    low: np.ndarray
    high: np.ndarray

    @classmethod
    def of(cls, channels: Sequence[Sequence[float]]) -> "Seen":
        """Of scale, offset, low, high of each channel."""
        return cls(*np.array(channels[:1] if all(one == channels[0] for one in channels) else channels, float).T)

    def applied(self, image: np.ndarray) -> np.ndarray:
        """What the network sees of an image (C, *S): a new float32 array, the bits of loader.to_device."""
        axes = (-1,) + (1,) * (image.ndim - 1)
        scale, offset, low, high = (numbers.astype(np.float32).reshape(axes) for numbers in self)
        values = image.astype(np.float32)
        np.clip(values, low, high, out=values)
        values *= scale
        values += offset
        return values

    def said(self) -> dict[str, Any]:
        """As JSON has it: a number where all channels have the same, else a list; None for infinity."""
        found = {}
        for name, numbers in self._asdict().items():
            values = [number if math.isfinite(number) else None for number in numbers.tolist()]
            found[name] = values[0] if values.count(values[0]) == len(values) else values
        return found


AS_STORED = Seen.of([(1.0, 0.0, -math.inf, math.inf)])
