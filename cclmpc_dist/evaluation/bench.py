"""`cclmpc bench eval`: medpy's dc, jc, hd95 and asd against one pass of ours, same masks, same run."""

from collections.abc import Callable, Iterator
from pathlib import Path
from statistics import median
from time import perf_counter
from typing import Any

import h5py
import numpy as np
from scipy import ndimage

from cclmpc_dist.errors import InputError
from cclmpc_dist.evaluation.metrics import mask_metrics
from cclmpc_dist.records import record, repeated
from cclmpc_dist.words import counted

SPACING = (0.625, 0.625, 0.625)  # LA, mm
Shape = tuple[int, int, int]
_MEDPY = ("dice", "jaccard", "hd95_voxel", "asd_voxel")  # what medpy computes of ours


def bench_eval(
    la: Path | None = None, *, volumes: int = 2, repeats: int = 5, size: Shape = (180, 140, 88)
) -> list[dict[str, Any]]:
    """Records {"bench", "case", "variant", "metric", "value", "unit"}: medians of interleaved runs.

    The labels of `volumes` cases in `la`, a folder of <case>/mri_norm2.h5, are compared with perturbed copies;
    without one there, blobs of `size` voxels are. Raises InputError where medpy is not installed.
    """
    medpy = _medpy()
    records = []
    for case, prediction, truth in _pairs(la, volumes, size):
        records += _compare(case, prediction, truth, medpy, repeats)
    return records


def _compare(case: str, prediction: np.ndarray, truth: np.ndarray, medpy: Any, repeats: int) -> list[dict[str, Any]]:
    ours, theirs = [], []
    for _ in range(1 + repeats):  # in turns, so that a busy machine slows both; the first warms up
        ours.append(_timed(lambda: mask_metrics(prediction, truth, SPACING)))
        theirs.append(_timed(lambda: medpy(prediction, truth)))
    seconds = {name: [t for t, _ in found[1:]] for name, found in (("ours", ours), ("medpy", theirs))}
    speedup = median(seconds["medpy"]) / median(seconds["ours"])
    difference = max(abs(ours[0][1][column] - theirs[0][1][column]) for column in _MEDPY)
    place = {"bench": "eval", "case": case}
    return [
        *(record(name, "seconds", median(values), "s", **place) | repeated(values) for name, values in seconds.items()),
        record("ours", "speedup", speedup, "x", **place),
        record("ours", "largest_difference", difference, "fraction or voxel", **place),
    ]


def _timed(work: Callable[[], dict[str, float]]) -> tuple[float, dict[str, float]]:
    start = perf_counter()
    result = work()
    return perf_counter() - start, result


def _medpy() -> Callable[[np.ndarray, np.ndarray], dict[str, float]]:
    try:
        from medpy.metric import binary
    except ImportError:
        raise InputError("bench eval compares with medpy, which is not installed: pip install '.[dev]'") from None
    functions = (binary.dc, binary.jc, binary.hd95, binary.asd)
    return lambda p, t: {column: float(f(p, t)) for column, f in zip(_MEDPY, functions, strict=True)}


def _pairs(la: Path | None, volumes: int, size: Shape) -> Iterator[tuple[str, np.ndarray, np.ndarray]]:
    """Case name, prediction, truth."""
    for name, truth in _la_labels(la, volumes) or _blobs(volumes, size):
        for change, prediction in perturbed(truth).items():
            yield f"{name} {change}", prediction, truth


def _la_labels(la: Path | None, volumes: int) -> list[tuple[str, np.ndarray]]:
    if la is None:
        return []
    paths = sorted(la.glob("*/mri_norm2.h5"))
    if not paths:
        raise InputError(f"{la}: holds no <case>/mri_norm2.h5: name the folder of the LA volumes")
    if volumes > len(paths):
        raise InputError(f"--volumes {volumes}: {la} holds {counted(len(paths), 'volume')}: ask for fewer")
    labels = []
    for path in paths[:volumes]:
        with h5py.File(path) as file:
            labels.append((f"la {path.parent.name}", np.asarray(file["label"]) > 0))
    return labels


def _blobs(volumes: int, size: Shape) -> list[tuple[str, np.ndarray]]:
    """Ellipsoids with a smooth random relief."""
    x, y, z = np.meshgrid(*(np.linspace(-1, 1, n) for n in size), indexing="ij", sparse=True)
    blobs = []
    for seed in range(volumes):
        relief = ndimage.gaussian_filter(np.random.default_rng(seed).normal(size=size), min(size) / 10)
        blobs.append((f"blob {seed}", x**2 + y**2 + z**2 + 0.1 * relief / relief.std() < 0.4))
    return blobs


def perturbed(truth: np.ndarray) -> dict[str, np.ndarray]:
    """Predictions as networks get them wrong: moved, too large, too small, ragged, a far false positive."""
    noise = np.random.default_rng(0).normal(size=truth.shape)
    ragged = ndimage.gaussian_filter(truth + noise, 2) > 0.5
    stray = truth.copy()
    stray[(slice(0, 8),) * truth.ndim] = True
    return {
        "shifted": np.roll(truth, tuple(range(2, 2 + truth.ndim)), tuple(range(truth.ndim))),
        "dilated": ndimage.binary_dilation(truth, iterations=2),
        "eroded": ndimage.binary_erosion(truth, iterations=2),
        "ragged": ragged,
        "stray": stray,
    }
