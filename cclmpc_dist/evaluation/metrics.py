"""Overlap and surface metrics of a case, and their summary over cases. Layout: S spatial (H,W or X,Y,Z).

One pass a case and class: the masks' surfaces are found once inside their joint bounding box and each asks a
k-d tree of the other for its nearest voxel; every distance metric is a statistic of these distances. In
voxels the numbers are those of medpy.metric.binary dc, jc, hd95 and asd without spacing, the ones that LA
papers print.
"""

import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from scipy.spatial import cKDTree

TOLERANCE_MM = 1.0
_ROUNDING_MM = 1e-9  # ten voxels of 0.1 mm are 1 mm
BOOTSTRAP = 2000
FEWEST = 6  # values of an interval: the range of five holds the median at 1 - 2^(1 - 5) = 94 % only
SEED = 2025

Row = dict[str, Any]  # "case": key, "class": int >= 1, and a float for each metric's column


@dataclass(frozen=True)
class Metric:
    """A column: its name in files, its title and unit in tables, and what it is."""

    column: str
    title: str
    unit: str
    text: str


METRICS = (
    Metric("dice", "Dice", "fraction", "2 |P and T| / (|P| + |T|)"),
    Metric("jaccard", "Jaccard", "fraction", "|P and T| / |P or T|"),
    Metric(
        "hd95_voxel",
        "95HD",
        "voxel",
        "95th percentile of both directions' surface distances, pooled (medpy hd95)",
    ),
    Metric(
        "asd_voxel",
        "ASD",
        "voxel",
        "mean distance from the prediction's surface to the truth's, one way (medpy asd)",
    ),
    Metric("hd95_mm", "HD95", "mm", "the larger one of the two directions' 95th percentiles"),
    Metric("assd_mm", "ASSD", "mm", "mean of the surface distances of both directions, pooled"),
    Metric(
        "nsd_1mm",
        "NSD at 1 mm",
        "fraction",
        "share of both surfaces' voxels that lie within 1 mm of the other surface",
    ),
)
COLUMNS = tuple(metric.column for metric in METRICS)
STATISTICS = ("mean", "sd", "low", "high", "n", "n_excluded")


def metrics_in(unit: str) -> dict[str, Metric]:
    """METRICS by column, in the words of a corpus whose spacing is in `unit`."""
    words = {"mm": unit, "voxel": "pixel" if unit == "pixel" else "voxel"}

    def said(text: str) -> str:
        return re.sub(r"\b(mm|voxel)(?=s?\b)", lambda found: words[found[1]], text)

    return {m.column: Metric(m.column, said(m.title), said(m.unit), said(m.text)) for m in METRICS}


DISTANCES = ("hd95_voxel", "asd_voxel", "hd95_mm", "assd_mm")


def case_metrics(prediction: np.ndarray, label: np.ndarray, spacing: Sequence[float], classes: int) -> list[Row]:
    """Metrics of each foreground class 1..classes-1 of two (*S) integer arrays; spacing in mm, one number an
    axis.

    A class in neither: overlaps 1, distances 0. A class in one only: overlaps 0, distances NaN [F].
    """
    assert prediction.shape == label.shape, f"prediction {prediction.shape}, label {label.shape}"
    assert len(spacing) == label.ndim, f"spacing {spacing} of {label.ndim} axes"
    return [{"class": c, **mask_metrics(prediction == c, label == c, spacing)} for c in range(1, classes)]


def mask_metrics(prediction: np.ndarray, truth: np.ndarray, spacing: Sequence[float]) -> dict[str, float]:
    """All COLUMNS for two (*S) boolean masks."""
    sizes = int(np.count_nonzero(prediction)), int(np.count_nonzero(truth))
    if not all(sizes):
        overlap, distance = (0.0, float("nan")) if any(sizes) else (1.0, 0.0)
        return {column: distance if column in DISTANCES else overlap for column in COLUMNS}
    box = _bounding_box(prediction | truth)
    prediction, truth = prediction[box], truth[box]
    both = int(np.count_nonzero(prediction & truth))
    overlaps = {"dice": 2 * both / sum(sizes), "jaccard": both / (sum(sizes) - both)}
    return overlaps | _distance_metrics(surface(prediction), surface(truth), np.asarray(spacing, float))


def surface(mask: np.ndarray) -> np.ndarray:
    """The voxels of a boolean mask with a face neighbour outside it; the array ends outside (medpy)."""
    padded = np.pad(mask, 1)
    core = mask.copy()
    middle = (slice(1, -1),) * mask.ndim
    for axis, size in enumerate(mask.shape):
        for shift in (0, 2):
            core &= padded[(*middle[:axis], slice(shift, shift + size), *middle[axis + 1 :])]
    return mask & ~core


def _bounding_box(mask: np.ndarray) -> tuple[slice, ...]:
    """Of a mask that is not empty."""
    box = []
    for axis in range(mask.ndim):
        found = np.flatnonzero(mask.any(axis=tuple(a for a in range(mask.ndim) if a != axis)))
        box.append(slice(int(found[0]), int(found[-1]) + 1))
    return tuple(box)


def _distance_metrics(prediction: np.ndarray, truth: np.ndarray, spacing: np.ndarray) -> dict[str, float]:
    """Of two surfaces, neither of them empty."""
    voxels = _directed(prediction, truth, np.ones(prediction.ndim))
    isotropic = bool((spacing == spacing[0]).all())
    mm = tuple(d * spacing[0] for d in voxels) if isotropic else _directed(prediction, truth, spacing)
    pooled_mm = np.concatenate(mm)
    return {
        "hd95_voxel": float(np.percentile(np.concatenate(voxels), 95)),
        "asd_voxel": float(voxels[0].mean()),
        "hd95_mm": float(max(np.percentile(d, 95) for d in mm)),
        "assd_mm": float(pooled_mm.mean()),
        "nsd_1mm": float(np.mean(pooled_mm <= TOLERANCE_MM + _ROUNDING_MM)),
    }


def _directed(a: np.ndarray, b: np.ndarray, spacing: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Distances from each voxel of surface a to its nearest of b, and of b to a, in no particular order."""
    points_a, points_b = np.argwhere(a) * spacing, np.argwhere(b) * spacing
    return _nearest(points_a, points_b), _nearest(points_b, points_a)


def _nearest(points: np.ndarray, others: np.ndarray) -> np.ndarray:
    # Surface points are even and dense: a plain, shallow tree is built and asked faster (measured on LA).
    tree = cKDTree(others, leafsize=32, balanced_tree=False, compact_nodes=False)
    return np.asarray(tree.query(points)[0])


def summary(rows: Iterable[Row]) -> list[dict[str, Any]]:
    """Over cases, per class and metric: mean, sd (n - 1), the 95 % percentile-bootstrap interval of the mean,
    n, n_excluded.

    One dict each with "class", "metric", "mean", "sd", "low", "high", "n", "n_excluded"; NaN where too few
    values are left (no value: all four; one: the sd; fewer than FEWEST: the interval). With several foreground
    classes a class "mean" follows: a case counts with the mean over its defined classes, and n_excluded counts
    the (case, class) values that were undefined.
    """
    rows = list(rows)
    classes = sorted({row["class"] for row in rows})
    groups: dict[Any, list[list[Row]]] = {c: [[row] for row in rows if row["class"] == c] for c in classes}
    if len(classes) > 1:
        groups["mean"] = by_case(rows)
    return [_statistics(cases, column) | {"class": c} for c, cases in groups.items() for column in COLUMNS]


def by_case(rows: Iterable[Row]) -> list[list[Row]]:
    """The rows of each case together, cases in the order of their first row."""
    cases: dict[str, list[Row]] = {}
    for row in rows:
        cases.setdefault(row["case"], []).append(row)
    return list(cases.values())


def defined_mean(rows: Iterable[Row], column: str) -> float:
    """Mean over the rows' finite values; NaN without one."""
    values = [row[column] for row in rows if np.isfinite(row[column])]
    return float(np.mean(values)) if values else float("nan")


def _statistics(cases: list[list[Row]], column: str) -> dict[str, Any]:
    means = np.array([defined_mean(rows, column) for rows in cases])
    values = means[np.isfinite(means)]
    n = len(values)
    nan = float("nan")
    low, high = _interval(values) if n >= FEWEST else (nan, nan)
    return {
        "metric": column,
        "mean": float(values.mean()) if n else nan,
        "sd": float(values.std(ddof=1)) if n > 1 else nan,
        "low": low,
        "high": high,
        "n": n,
        "n_excluded": sum(not np.isfinite(row[column]) for rows in cases for row in rows),
    }


def _interval(values: np.ndarray) -> tuple[float, float]:
    """95 % interval of the mean: percentile bootstrap over cases, BOOTSTRAP resamples, a fixed seed."""
    draws = np.random.default_rng(SEED).integers(len(values), size=(BOOTSTRAP, len(values)))
    low, high = np.percentile(values[draws].mean(axis=1), [2.5, 97.5])
    return float(low), float(high)
