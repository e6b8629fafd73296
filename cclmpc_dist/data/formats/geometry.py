"""A volume with its place in the patient: turned to stated axes, resampled, compared with its label's.

Layout: arrays (X, Y, Z, *rest); affines (4, 4) take voxel indices to mm, RAS+ (x to the patient's right, y to the
front, z up).
"""

import itertools
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from cclmpc_dist.errors import InputError

APART = 0.1  # voxels by which an image's and its label's corners may differ [F]
AXES = "RAS"


@dataclass(frozen=True)
class Volume:
    """An array (X, Y, Z, *rest), its affine and the file it is from."""

    array: np.ndarray
    affine: np.ndarray
    path: Path

    @property
    def spacing(self) -> tuple[float, ...]:
        """mm a voxel."""
        return tuple(np.sqrt((self.affine[:3, :3] ** 2).sum(0)).tolist())

    def checked(self) -> "Volume":
        """Itself. Raises InputError where spacing or position cannot be."""
        if not np.isfinite(self.affine).all() or min(self.spacing) <= 0 or np.linalg.matrix_rank(self.affine) < 4:
            spacing = ", ".join(f"{size:g}" for size in self.spacing)
            raise InputError(f"{self.path}: its header gives no usable spacing or orientation (spacing {spacing} mm): "
                             "repair the header")  # fmt: skip
        return self


def oriented(volume: Volume) -> Volume:
    """The volume with its axes permuted and flipped to the nearest of AXES; no value changes."""
    from nibabel import orientations

    now = orientations.io_orientation(volume.affine)
    turn = orientations.ornt_transform(now, orientations.axcodes2ornt(AXES))
    array = orientations.apply_orientation(volume.array, turn)
    affine = volume.affine @ orientations.inv_ornt_aff(turn, volume.array.shape[:3])
    return Volume(array, affine, volume.path)


def axes(volume: Volume) -> str:
    """Where the axes point, as "RAS"."""
    from nibabel import orientations

    return "".join(orientations.aff2axcodes(volume.affine))


def same_place(image: Volume, label: Volume) -> None:
    """Raises InputError naming the label where its shape is not the image's, or its corners lie elsewhere."""
    sizes = image.array.shape[:3], label.array.shape[:3]
    if sizes[0] != sizes[1]:
        raise InputError(f"{label.path}: has shape {sizes[1]} and {image.path} {sizes[0]}: they must be the same")
    corners = np.array([(*corner, 1) for corner in itertools.product(*((0, size) for size in sizes[0]))])
    apart = np.abs(corners @ (image.affine - label.affine).T).max()
    if apart > APART * min(image.spacing):
        raise InputError(f"{label.path}: lies {apart:.3g} mm away from {image.path} by its header (affine): resample "
                         "it to the image, or repair the header")  # fmt: skip


def resampled(volume: Volume, spacing: Sequence[float], order: int) -> Volume:
    """The volume at another spacing: order 1 is linear, 0 nearest. Edges stay where they are to half a voxel.

    Whole numbers stay whole. Coarser spacings are not smoothed first.
    """
    from scipy.ndimage import affine_transform

    ratio = np.array(spacing) / volume.spacing
    size = [max(1, round(n / r)) for n, r in zip(volume.array.shape[:3], ratio, strict=True)]
    shift = 0.5 * (ratio - 1)
    step = np.eye(4)
    step[:3, :3], step[:3, 3] = np.diag(ratio), shift
    kind = volume.array.dtype
    parts = np.moveaxis(volume.array.reshape(*volume.array.shape[:3], -1), -1, 0)
    floats = [part if order == 0 else part.astype(np.float32) for part in parts]
    done = [affine_transform(part, ratio, shift, tuple(size), order=order, mode="nearest") for part in floats]
    array = np.stack(done, axis=-1).reshape(*size, *volume.array.shape[3:])
    return Volume((np.round(array) if kind.kind in "iu" else array).astype(kind), volume.affine @ step, volume.path)
