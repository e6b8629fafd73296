"""The report's pictures as bytes: curves of scalars (SVG), overlays of a case (PNG). Layout: S spatial."""

from collections.abc import Sequence
from io import BytesIO
from typing import Any

import numpy as np
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

POINTS = 400  # a curve with more is drawn by the means of this many equal bins
TRUTH, PREDICTION = "#31d67b", "#ff4d4d"
_LINE, _FAINT, _TEXT = "#2563a8", "#e3e6ea", "#3c4650"
_COLUMNS = 3

Curve = tuple[np.ndarray, np.ndarray]  # steps, values


def curves(group: dict[str, Curve]) -> bytes:
    """An SVG of small panels, one a scalar (they share no unit), three a line; tells non-finite values."""
    lines = -(-len(group) // _COLUMNS)
    figure = Figure(figsize=(10.8, 2.05 * lines), layout="constrained")
    for place, (name, (steps, values)) in enumerate(group.items(), 1):
        axes = figure.add_subplot(lines, _COLUMNS, place)
        finite = np.isfinite(values)
        _panel(axes, name, *_thin(steps[finite], values[finite]), int((~finite).sum()))
    return _bytes(figure, "svg")


def _panel(axes: Any, name: str, steps: np.ndarray, values: np.ndarray, lost: int) -> None:
    axes.set_title(
        f"{name} ({lost} not finite)" if lost else name,
        fontsize=8.5,
        color=_TEXT,
        loc="left",
        parse_math=False,
    )
    axes.plot(steps, values, color=_LINE, linewidth=1.2, marker="o" if len(steps) == 1 else None, markersize=3)
    axes.grid(color=_FAINT, linewidth=0.7)
    axes.tick_params(labelsize=7.5, colors=_TEXT, length=0)
    axes.xaxis.set_major_locator(MaxNLocator(5, integer=True))
    axes.yaxis.set_major_locator(MaxNLocator(4))
    for side in axes.spines.values():
        side.set_visible(False)


def _thin(steps: np.ndarray, values: np.ndarray) -> Curve:
    """At most POINTS points: means over runs of (nearly) equal length."""
    if len(steps) <= POINTS:
        return steps, values
    cuts = np.linspace(0, len(steps), POINTS + 1).astype(int)
    counts = np.diff(cuts)
    return np.add.reduceat(steps, cuts[:-1]) / counts, np.add.reduceat(values, cuts[:-1]) / counts


def overlay(image: np.ndarray, label: np.ndarray, prediction: np.ndarray, spacing: Sequence[float]) -> bytes:
    """A PNG of the three planes (2D: the one) through the label's centre of mass, contours of label and
    prediction.

    image uint8, label and prediction integers, all (*S) with 2 or 3 axes; spacing in mm keeps the body's
    proportions. Without a labelled voxel the prediction's centre is taken, without that the image's.
    """
    planes = _planes(image.shape, _centre(label, prediction))
    extents = [_extent(image.shape, spacing, kept) for _, kept in planes]
    height = 3.1
    ratios = [width / tall for width, tall in extents]
    figure = Figure(figsize=(height * sum(ratios) + 0.1 * (len(ratios) - 1), height))
    grid = figure.add_gridspec(1, len(planes), width_ratios=ratios, wspace=0.03, left=0, right=1, bottom=0, top=1)
    for place, (cut, kept) in enumerate(planes):
        axes = figure.add_subplot(grid[place])
        _grey(axes, image[cut], spacing, kept)
        _contours(axes, _turned(label[cut], kept), TRUTH)
        _contours(axes, _turned(prediction[cut], kept), PREDICTION)
    return _bytes(figure, "png")


def sheet(cases: Sequence[tuple[str, np.ndarray, np.ndarray | None, Sequence[float]]]) -> bytes:
    """A PNG of one plane a case, six a line, under its name: (name, image, label or None, spacing).

    The plane is the one across the last axis through the label's centre of mass, or the image's middle; grey from
    the image's 1st to its 99th percentile; image and label (*S).
    """
    columns, lines = min(6, len(cases)), -(-len(cases) // 6)
    figure = Figure(figsize=(2.1 * columns, 2.3 * lines), layout="constrained")
    for place, (name, image, label, spacing) in enumerate(cases, 1):
        axes = figure.add_subplot(lines, columns, place)
        shown = np.zeros(image.shape, np.uint8) if label is None else label
        cut, kept = _planes(image.shape, _centre(shown, shown))[0]
        low, high = np.percentile(image, [1, 99])
        _grey(axes, 255 * np.clip((image[cut] - low) / max(high - low, 1e-12), 0, 1), spacing, kept)
        _contours(axes, _turned(shown[cut], kept), TRUTH)
        axes.set_title(name if len(name) <= 28 else f"{name[:27]}…", fontsize=7, color=_TEXT, parse_math=False)
    return _bytes(figure, "png")


def _grey(axes: Any, plane: np.ndarray, spacing: Sequence[float], kept: tuple[int, int]) -> None:
    """Draw a plane of grey levels 0 to 255; photographs stand upright."""
    origin = "lower" if kept[0] < kept[1] else "upper"
    aspect = spacing[kept[1]] / spacing[kept[0]]
    axes.imshow(_turned(plane, kept), cmap="gray", vmin=0, vmax=255, origin=origin, aspect=aspect)
    axes.set_axis_off()


def _turned(plane: np.ndarray, kept: tuple[int, int]) -> np.ndarray:
    """A plane with axis kept[0] across and kept[1] along the picture's height."""
    return plane.T if kept[0] < kept[1] else plane


def _contours(axes: Any, plane: np.ndarray, colour: str) -> None:
    for c in range(1, int(plane.max()) + 1):
        mask = plane == c
        if mask.any() and not mask.all():
            axes.contour(mask, levels=[0.5], colors=colour, linewidths=1.4)


def _centre(label: np.ndarray, prediction: np.ndarray) -> list[int]:
    for mask in (label > 0, prediction > 0):
        if mask.any():
            return [round(float(x.mean())) for x in np.nonzero(mask)]
    return [n // 2 for n in label.shape]


def _planes(shape: Sequence[int], centre: Sequence[int]) -> list[tuple[tuple[Any, ...], tuple[int, int]]]:
    """Index of each plane and the two axes it keeps, across and up (2D: across and down); first the plane across the
    last axis (LA: axial)."""
    if len(shape) == 2:
        return [((slice(None), slice(None)), (1, 0))]
    planes = []
    for axis in (2, 1, 0):
        cut = tuple(centre[a] if a == axis else slice(None) for a in range(3))
        first, second = (a for a in range(3) if a != axis)
        planes.append((cut, (first, second)))
    return planes


def _extent(shape: Sequence[int], spacing: Sequence[float], kept: tuple[int, int]) -> tuple[float, float]:
    return shape[kept[0]] * spacing[kept[0]], shape[kept[1]] * spacing[kept[1]]


def _bytes(figure: Figure, kind: str) -> bytes:
    buffer = BytesIO()
    figure.savefig(buffer, format=kind, dpi=130, metadata={"Date": None} if kind == "svg" else {"Software": None})
    return buffer.getvalue()
