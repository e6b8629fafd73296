"""Plots of a report, from its JSON alone."""

from pathlib import Path
from typing import Any

from cclmpc_dist.benching import loader_pages
from cclmpc_dist.benching.step import LOADING, PARTS
from cclmpc_dist.benching.tables import Cells, ranks


def draw(report: dict[str, Any], file: Path) -> bool:
    """Write the plots that there are for such a report; whether there are any."""
    drawers = {"scale": _scale, "step": _step, "allreduce": _all_reduce, "loader": _loader, "served": _served}
    bench = report["records"][0]["bench"]
    if bench not in drawers:
        return False
    import matplotlib

    matplotlib.use("agg")
    from matplotlib import pyplot

    cells = Cells(report)
    count = {"scale": 2 + bool(cells.predicted()), "loader": 2}.get(bench, 1)
    figure, axes = pyplot.subplots(1, count, figsize=(5 * count, 4), layout="constrained", squeeze=False)
    drawers[bench](cells, list(axes[0]))
    figure.savefig(file, dpi=110, metadata={"Software": None})
    pyplot.close(figure)
    return True


def _scale(cells: Cells, axes: list[Any]) -> None:
    _efficiency(cells, axes[0])
    _stack(cells, cells.measured("weak") + cells.measured("strong"), axes[1])
    if len(axes) == 3:
        for name, values in cells.predicted().items():
            axes[2].plot(list(values), list(values.values()), "o-", label=name)
        axes[2].set(xscale="log", ylim=(0, 1.05), xlabel="GPUs", title="predicted efficiency, weak scaling")
        worlds = list(next(iter(cells.predicted().values())))
        axes[2].set_xticks(worlds, [str(world) for world in worlds], fontsize=7)
        axes[2].minorticks_off()
        axes[2].legend(fontsize=8)


def _efficiency(cells: Cells, axis: Any) -> None:
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
        axis.errorbar(x, middle, spread, marker="o", capsize=3, label=f"{mode}, measured")
        predicted = {ranks(case): cells.get(case, "predicted", "efficiency") for case in cases}
        known = {world: value for world, value in predicted.items() if value is not None}
        if known:
            axis.plot(list(known), list(known.values()), "x", color="black", label=f"{mode}, predicted")
    axis.axhline(1.0, color="grey", linewidth=0.8)
    axis.set(xlabel="ranks", ylim=(0, 1.15), title="images a second and rank, over the fewest ranks'")
    axis.set_xticks(sorted({ranks(case) for mode in ("weak", "strong") for case in cells.measured(mode)}))
    axis.legend(fontsize=8)


def _step(cells: Cells, axes: list[Any]) -> None:
    _stack(cells, list(cells.variants), axes[0])


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


def _all_reduce(cells: Cells, axes: list[Any]) -> None:
    (case,) = cells.variants
    sizes = [int(name.split()[1]) for name in cells.variants[case] if name.endswith(" B")]
    seconds = [cells.values[case, f"all-reduce {size} B", "seconds"] for size in sizes]
    alpha, beta = (cells.values[case, "all-reduce fit", name] for name in ("alpha", "beta"))
    axes[0].plot(sizes, seconds, "o", label="measured")
    axes[0].plot(sizes, [alpha + beta * size for size in sizes], label=f"{alpha:.3g} s + {beta:.3g} s/B")
    axes[0].set(xscale="log", yscale="log", xlabel="bytes", ylabel="s", title=f"all-reduce, {case}")
    axes[0].legend()


def _loader(cells: Cells, axes: list[Any]) -> None:
    for axis, state in zip(axes, loader_pages.STATES, strict=True):
        loader_pages.bars(cells.report, state, axis)


def _served(cells: Cells, axes: list[Any]) -> None:
    """The cache's size and the ranks' memory over time."""
    series, (case,) = cells.report["series"], cells.variants
    for name, values in series.items():
        if name != "seconds":
            axes[0].plot(series["seconds"], values, label=name, linewidth=1)
    for metric, style in (("limit", ":"), ("limit and blocks in use", "--")):
        axes[0].axhline(cells.values[case, "cache", metric], color="grey", linestyle=style, label=f"cache, {metric}")
    axes[0].set(xlabel="s", ylabel="MB", ylim=(0, None), title=case)
    axes[0].title.set_fontsize(8)
    axes[0].legend(fontsize=6)
