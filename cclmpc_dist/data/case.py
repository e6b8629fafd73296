"""One case of a corpus, as every source yields it."""

from dataclasses import dataclass, field
from typing import Any

import numpy as np


@dataclass
class Case:
    """An image and what is known of it.

    key: unique name. image: float32 or integer (C, *S). label: uint8 (*S), None where there is none. spacing:
    mm a voxel, one number an axis. meta: what JSON can hold, such as `patient`, `affine`, `normalisation`,
    `cropped_by_label`.
    """

    key: str
    image: np.ndarray
    label: np.ndarray | None
    spacing: tuple[float, ...]
    meta: dict[str, Any] = field(default_factory=dict)
