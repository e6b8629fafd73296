"""A synthetic corpus of 3D "atria", so that everything runs without a download.

A case holds a body (an ellipsoid warped by a smooth field) with vessel stubs: the label. Beside it lie
vessels and a chamber of the same brightness that are *not* labelled, so that brightness alone does not
segment; a bias field, blur and noise follow. All of it [F]. Images are 8-bit grey levels, normalised: at most
256 evenly spaced values, as LA's are.
"""

from dataclasses import dataclass

import numpy as np
from numpy.random import Generator
from scipy.ndimage import gaussian_filter, zoom

from cclmpc_dist.data.case import Case
from cclmpc_dist.data.draws import philox

SPACING = (1.25, 1.25, 1.25)  # mm


@dataclass(frozen=True)
class Phantom:
    """The handle of case `number`."""

    number: int
    seed: int
    size: int

    @property
    def key(self) -> str:
        return f"phantom-{self.number:04d}"

    @property
    def fingerprint(self) -> str:
        return f"seed {self.seed} size {self.size}"

    def read(self) -> Case:
        return case(self.number, self.seed, self.size)


def cases(count: int = 16, seed: int = 0, size: int = 64) -> list[Phantom]:
    """`count` cases, a pure function of (seed, number). Each axis has `size` voxels, give or take an
    eighth."""
    return [Phantom(number, seed, size) for number in range(count)]


def case(number: int, seed: int = 0, size: int = 64) -> Case:
    """Case `number`: image (1, X, Y, Z) float32 of mean about 0 and deviation about 1, label {0, 1}."""
    rng = Generator(philox("phantom", seed, number))
    shape = tuple(int(n) for n in rng.integers(size - size // 8, size + size // 8, size=3, endpoint=True))
    grid = _grid(shape)
    body, others, label = _anatomy(rng, grid)
    grey = _intensity(rng, shape, body, others)
    levels = np.clip(np.round(grey), 0, 255).astype(np.uint8)
    scale = 1.0 / float(levels.std())
    image = (np.float32(-scale * levels.mean()) + np.float32(scale) * levels.astype(np.float32))[None]
    meta = {
        "patient": f"phantom{number}",
        "normalisation": "zero mean, unit variance",
        "cropped_by_label": False,
    }
    return Case(f"phantom-{number:04d}", image, label, SPACING, meta)


def _grid(shape: tuple[int, ...]) -> list[np.ndarray]:
    """Open coordinate grids in [-1, 1] along each axis."""
    return list(np.meshgrid(*[np.linspace(-1, 1, n, dtype=np.float32) for n in shape], indexing="ij", sparse=True))


def _smooth(rng: Generator, shape: tuple[int, ...], knots: int = 5) -> np.ndarray:
    """A random field of the given shape, deviation about 1 at its knots, linear in between."""
    coarse = rng.standard_normal((knots,) * len(shape)).astype(np.float32)
    return zoom(coarse, [n / knots for n in shape], order=1, grid_mode=True, mode="nearest")


def _anatomy(rng: Generator, grid: list[np.ndarray]) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Occupancies in [0, 1] of the atrium with its vessels and of what only looks like it, and the label.

    The label takes in a vessel up to `reach` body radii, a little of each stub, as annotators of the atrium
    do.
    """
    centre = rng.uniform(-0.12, 0.12, 3)
    radii = rng.uniform(0.36, 0.58, 3)
    warp = 0.22 * _smooth(rng, tuple(np.broadcast_shapes(*[g.shape for g in grid])))
    distance = _ellipsoid(grid, centre, radii) + warp
    vessels = [_stub(rng, grid, centre, radii) for _ in range(int(rng.integers(3, 6)))]
    tubes = np.minimum.reduce(vessels)
    soft = _occupancy(np.minimum(distance, tubes))
    label = (distance < 1) | ((tubes < 1) & (distance < 1.35))
    others = np.maximum(_occupancy(_distractors(rng, grid, centre, radii)) - soft, 0)
    return soft, others, label.astype(np.uint8)


def _ellipsoid(grid: list[np.ndarray], centre: np.ndarray, radii: np.ndarray) -> np.ndarray:
    """Distance from the centre in radii: the surface is at 1."""
    return np.sqrt(sum(((g - np.float32(c)) / np.float32(r)) ** 2 for g, c, r in zip(grid, centre, radii, strict=True)))


def _tube(grid: list[np.ndarray], start: np.ndarray, direction: np.ndarray, width: float, half: bool) -> np.ndarray:
    """Distance, in widths, from a line through `start`; only ahead of it if `half`."""
    offset = [g - np.float32(s) for g, s in zip(grid, start, strict=True)]
    along = sum(o * np.float32(d) for o, d in zip(offset, direction, strict=True))
    if half:
        along = np.maximum(along, 0)
    across = sum((o - along * np.float32(d)) ** 2 for o, d in zip(offset, direction, strict=True))
    return np.sqrt(across) / np.float32(width)


def _direction(rng: Generator) -> np.ndarray:
    vector = rng.standard_normal(3)
    return vector / np.linalg.norm(vector)


def _stub(rng: Generator, grid: list[np.ndarray], centre: np.ndarray, radii: np.ndarray) -> np.ndarray:
    direction = _direction(rng)
    return _tube(grid, centre + 0.5 * radii * direction, direction, rng.uniform(0.07, 0.12), half=True)


def _distractors(rng: Generator, grid: list[np.ndarray], centre: np.ndarray, radii: np.ndarray) -> np.ndarray:
    """A chamber and an aorta beside the atrium, close to its wall, as bright as it."""
    side = _direction(rng)
    chamber_radii = rng.uniform(0.28, 0.5, 3)
    chamber = _ellipsoid(grid, centre + side * (radii + chamber_radii) * rng.uniform(0.9, 1.0), chamber_radii)
    other = np.cross(side, _direction(rng))
    other /= np.linalg.norm(other)
    aorta = _tube(grid, centre + other * (radii + 0.12), np.cross(other, side), rng.uniform(0.08, 0.14), half=False)
    return np.minimum(chamber, aorta)


def _occupancy(distance: np.ndarray) -> np.ndarray:
    """1 inside, 0 outside, a soft wall between: partial volume."""
    return np.clip((1.06 - distance) / 0.12, 0, 1)


def _intensity(rng: Generator, shape: tuple[int, ...], body: np.ndarray, others: np.ndarray) -> np.ndarray:
    """Grey levels: tissue with texture, blood pools of like brightness, bias, blur and noise."""
    tissue = 70 + 22 * _smooth(rng, shape, 9)
    pool, other = rng.uniform(105, 150), rng.uniform(100, 155)
    grey = tissue + body * (pool - tissue) + others * (other - tissue)
    grey *= 1 + 0.16 * _smooth(rng, shape, 3)
    grey = gaussian_filter(grey, rng.uniform(0.5, 0.9), truncate=3)
    return grey + rng.uniform(10, 20) * rng.standard_normal(shape, dtype=np.float32)
