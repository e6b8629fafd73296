"""Plots of a report, from its JSON alone."""

from pathlib import Path
from typing import Any

from cclmpc_dist.benching import contrast_pages, loader_pages
from cclmpc_dist.benching.step import LOADING, PARTS
from cclmpc_dist.benching.tables import Cells, ranks

CONTRAST = {"seconds": "s, forward and backward", "peak_extra_mib": "MiB beyond inputs and gradients"}


def draw(report: dict[str, Any], file: Path) -> bool:
    """Write the plots that there are for such a report; whether there are any."""
    import matplotlib

    matplotlib.use("agg")
    from matplotlib import pyplot

    drawers = {"scale": _scale, "step": _step, "allreduce": _all_reduce, "contrast": _contrast,
               "loader": _loader, "served": _served}  # fmt: skip
    figure = pyplot.figure(layout="constrained")
    drawn = drawers.get(report["records"][0]["bench"], _repeated)(report, figure)
    if drawn:
        figure.savefig(file, dpi=110, metadata={"Software": None})
    pyplot.close(figure)
    return drawn


def panels(figure: Any, rows: int, columns: int, width: float = 5, height: float = 4) -> list[Any]:
    """The axes of a figure of so many panels, row by row."""
    figure.set_size_inches(width * columns, height * rows)
    return list(figure.subplots(rows, columns, squeeze=False).flat)


def _scale(report: dict[str, Any], figure: Any) -> bool:
    cells = Cells(report)
    axes = panels(figure, 1, 2 + bool(cells.predicted()))
    efficiency(cells, axes[0])
    _stack(cells, cells.measured("weak") + cells.measured("strong"), axes[1])
    if len(axes) == 3:
        predicted(cells, axes[2])
    return True


def predicted(cells: Cells, axis: Any) -> None:
    """The cost model's efficiencies on its clusters."""
    for name, values in cells.predicted().items():
        axis.plot(list(values), list(values.values()), "o-", label=name)
    axis.set(xscale="log", ylim=(0, 1.05), xlabel="GPUs", title="predicted efficiency, weak scaling")
    worlds = list(next(iter(cells.predicted().values())))
    axis.set_xticks(worlds, [str(world) for world in worlds], fontsize=7)
    axis.minorticks_off()
    axis.legend(fontsize=8)


def efficiency(cells: Cells, axis: Any, prefix: str = "") -> None:
    """Measured efficiencies with their spread, and the predictions for the same ranks."""
    for mode in ("weak", "strong"):
        cases = cells.measured(mode)
        if not cases:
            continue
        x = [ranks(case) for case in cases]
        middle, low, high = (
            [cells.values[case, LOADING, name] for case in cases]
            for name in ("efficiency", "efficiency_low", "efficiency_high")
        )
        spread = [[m - a for m, a in zip(middle, low, strict=True)], [b - m for m, b in zip(middle, high, strict=True)]]
        (line, *_) = axis.errorbar(x, middle, spread, marker="o", capsize=3, label=f"{prefix}{mode}, measured")
        known = {ranks(case): cells.get(case, "predicted", "efficiency") for case in cases}
        known = {world: value for world, value in known.items() if value is not None}
        if known:
            colour = line.get_color()
            axis.plot(list(known), list(known.values()), "x", color=colour, label=f"{prefix}{mode}, predicted")
    axis.axhline(1.0, color="grey", linewidth=0.8)
    axis.set(xlabel="ranks", ylim=(0, 1.15), title="images a second and rank, over the fewest ranks'")
    axis.set_xticks(sorted({ranks(case) for mode in ("weak", "strong") for case in cells.measured(mode)}))
    axis.legend(fontsize=8)


def _step(report: dict[str, Any], figure: Any) -> bool:
    cells = Cells(report)
    _stack(cells, list(cells.variants), panels(figure, 1, 1)[0])
    return True


def _stack(cells: Cells, cases: list[str], axis: Any) -> None:
    """A bar a case, the parts of its step on top of each other; a negative remainder lies below zero."""
    bottom = [0.0] * len(cases)
    for part in PARTS:
        values = [cells.values.get((case, LOADING, part), 0.0) for case in cases]
        below = [0.0 if value < 0 else base for value, base in zip(values, bottom, strict=True)]
        axis.bar(cases, values, bottom=below, label=part, width=0.6)
        bottom = [base + max(value, 0.0) for base, value in zip(bottom, values, strict=True)]
    axis.set(ylabel="ms a step", title="where the milliseconds go")
    axis.legend(fontsize=7)


def _all_reduce(report: dict[str, Any], figure: Any) -> bool:
    cells, (axis,) = Cells(report), panels(figure, 1, 1)
    (case,) = cells.variants
    sizes = [int(name.split()[1]) for name in cells.variants[case] if name.endswith(" B")]
    seconds = [cells.values[case, f"all-reduce {size} B", "seconds"] for size in sizes]
    alpha, beta = (cells.values[case, "all-reduce fit", name] for name in ("alpha", "beta"))
    axis.plot(sizes, seconds, "o", label="measured")
    axis.plot(sizes, [alpha + beta * size for size in sizes], label=f"{alpha:.3g} s + {beta:.3g} s/B")
    axis.set(xscale="log", yscale="log", xlabel="bytes", ylabel="s", title=f"all-reduce, {case}")
    axis.legend()
    return True


def _loader(report: dict[str, Any], figure: Any) -> bool:
    for axis, state in zip(panels(figure, 1, len(loader_pages.STATES)), loader_pages.STATES, strict=True):
        loader_pages.bars(report, state, axis)
    return True


def _served(report: dict[str, Any], figure: Any) -> bool:
    """The cache's size and the ranks' memory over time."""
    cells, series = Cells(report), report["series"]
    (axis,), (case,) = panels(figure, 1, 1), cells.variants
    for name, values in series.items():
        if name != "seconds":
            axis.plot(series["seconds"], values, label=name, linewidth=1)
    for metric, style in (("limit", ":"), ("limit and blocks in use", "--")):
        axis.axhline(cells.values[case, "cache", metric], color="grey", linestyle=style, label=f"cache, {metric}")
    axis.set(xlabel="s", ylabel="MB", ylim=(0, None), title=case)
    axis.title.set_fontsize(8)
    axis.legend(fontsize=6)
    return True


def _contrast(report: dict[str, Any], figure: Any) -> bool:
    """Against each size where sizes were swept; else bars."""
    measured = contrast_pages.read(report["records"])
    names = contrast_pages.swept(measured)
    if not names:
        return _repeated(report, figure)
    axes = panels(figure, len(CONTRAST), len(names), 4, 3.2)
    places = [(name, metric) for metric in CONTRAST for name in names]
    for axis, (name, metric) in zip(axes, places, strict=True):
        contrast_pages.curves(measured, name, metric, axis)
        axis.set_title(CONTRAST[metric])
    axes[0].legend(fontsize=7)
    return True


def _repeated(report: dict[str, Any], figure: Any) -> bool:
    """A bar for every record that was measured repeatedly, from the least to the most; a panel a unit."""
    units: dict[str, list[dict[str, Any]]] = {}
    for record in report["records"]:
        if "samples" in record:
            units.setdefault(record["unit"], []).append(record)
    if not units:
        return False
    axes = panels(figure, 1, len(units), 8, 1 + 0.25 * max(map(len, units.values())))
    for axis, (unit, records) in zip(axes, units.items(), strict=True):
        told = [name for name in ("case", "variant", "metric") if len({r[name] for r in records}) > 1]
        names = [", ".join(r[name] for name in told) for r in records]
        values = [r["value"] for r in records]
        spread = [[r["value"] - min(r["samples"]) for r in records], [max(r["samples"]) - r["value"] for r in records]]
        axis.barh(range(len(records)), values, xerr=spread, capsize=2, color="C0", ecolor="black")
        axis.set_yticks(range(len(records)), names, fontsize=7)
        axis.invert_yaxis()
        axis.set(xlabel=unit, title="median, least and most")
        if min(values) > 0 and max(values) > 50 * min(values):
            axis.set_xscale("log")
    return True
