"""One case of a corpus: in memory, and before it is read."""

from dataclasses import dataclass, field
from typing import Any, Protocol

import numpy as np

from cclmpc_dist.data.seen import AS_STORED, Seen


class Handle(Protocol):
    """A case that a source has found and not read: cheap to hold, and to send to another process.

    key: unique name. fingerprint: changes when the case does, as far as that can be told without reading it.
    """

    @property
    def key(self) -> str: ...

    @property
    def fingerprint(self) -> str: ...

    def read(self) -> "Case":
        """The case. Raises InputError naming the file."""
        ...


@dataclass
class Case:
    """An image and what is known of it. It serves as its own handle.

    key: unique name. image: float32 or integer (C, *S). label: uint8 (*S), None where there is none. spacing:
    mm a voxel, one number an axis. meta: what JSON can hold, such as `patient`, `affine`, `normalisation`,
    `cropped_by_label`. seen: how the network sees the image, bounds in its own units.
    """

    key: str
    image: np.ndarray
    label: np.ndarray | None
    spacing: tuple[float, ...]
    meta: dict[str, Any] = field(default_factory=dict)
    seen: Seen = AS_STORED

    @property
    def fingerprint(self) -> str:
        return ""

    def read(self) -> "Case":
        return self
