"""The README's three plots, from committed results alone.

    python benchmarks/figures.py --results benchmarks/results --out docs

speed.png: how many times as fast as its peer each part is. contrast_memory.png: what the contrast holds.
scaling.png: efficiency measured on this machine's ranks, and what the cost model expects of clusters.
"""

import argparse
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from typing import Any

import matplotlib

matplotlib.use("agg")
from matplotlib import pyplot

from cclmpc_dist.benching import contrast_pages, files, pictures
from cclmpc_dist.benching.tables import Cells


@dataclass(frozen=True)
class Row:
    """Ours over theirs, in each case that has both; `rate`: more is better. case: a part of its name, where one has
    it."""

    told: str
    file: str
    ours: str
    theirs: str
    metric: str = "seconds"
    case: str = ""


SIZE = "N=2048 M=65536 F=256 K=2"
ALONE = "warm, 0 workers"
FLOAT, HALF = "ours, float32", "ours, bf16"
CHANNELS_LAST = f"{HALF}, channels last"
ROWS = (
    Row("crops with label, over UA-MT's loader", "loader", "shards", "gzip_h5", "rate", ALONE),
    Row("crops with label, over webdataset", "loader", "shards", "webdataset", "rate", ALONE),
    Row("crops with label, over blosc2 as nnU-Net stores it", "loader", "shards", "blosc2", "rate", ALONE),
    Row("metrics of a volume, over medpy", "eval", "ours", "medpy"),
    Row("LA volumes predicted and scored, over UA-MT's loop", "evaluate_la", FLOAT, "UA-MT's loop, medpy"),
    Row("the same, bf16", "evaluate_la", HALF, "UA-MT's loop, medpy"),
    Row("training step, float32, over its plain form", "plain_step", FLOAT, "plain"),
    Row("the same, bf16 and channels last", "plain_step", CHANNELS_LAST, "plain"),
    Row("contrast (SBCL), over all logits at once", "contrast", "keys", "naive", case=f"sbcl: {SIZE}"),
    Row("contrast (CGCL), over all logits at once", "contrast", "keys", "naive", case=f"cgcl: {SIZE}"),
)


def ratios(row: Row, report: dict[str, Any]) -> list[float]:
    """Times as fast, of each case."""
    cells, found = Cells(report), []
    chosen = [case for case in cells.variants if row.case in case] or list(cells.variants)
    for case in chosen:
        ours, theirs = (cells.get(case, variant, row.metric) for variant in (row.ours, row.theirs))
        if ours is not None and theirs is not None:
            found.append(ours / theirs if row.metric == "rate" else theirs / ours)
    return found


def speed(results: Path, file: Path) -> None:
    """A bar each row that was measured, on a logarithmic axis; where there are several cases from the least to the
    most."""
    found = []
    for row in ROWS:
        path = results / f"{row.file}.json"
        values = ratios(row, files.read(path)) if path.exists() else []
        if values:
            found.append((row.told, values))
    figure, axis = pyplot.subplots(figsize=(8, 0.8 + 0.42 * len(found)), layout="constrained")
    middle = [median(values) for _, values in found]
    spread = [[m - min(v) for m, (_, v) in zip(middle, found, strict=True)],
              [max(v) - m for m, (_, v) in zip(middle, found, strict=True)]]  # fmt: skip
    axis.barh(range(len(found)), middle, xerr=spread, capsize=3, color="C0", ecolor="black")
    for place, (value, (_, values)) in enumerate(zip(middle, found, strict=True)):
        axis.text(max(values) * 1.08, place, f"{value:.3g} x", va="center", fontsize=9)
    axis.set_yticks(range(len(found)), [told for told, _ in found], fontsize=9)
    axis.invert_yaxis()
    axis.axvline(1.0, color="black", linewidth=0.8)
    axis.set(xscale="log", xlim=(0.5, 3 * max(middle)), xlabel="times as fast")
    axis.set_xticks([1, 10, 100], ["1", "10", "100"])
    _save(figure, file)


def contrast_memory(results: Path, file: Path) -> None:
    measured = contrast_pages.read(files.read(results / "contrast.json")["records"])
    figure, axes = pyplot.subplots(1, 2, figsize=(8, 3.8), layout="constrained", sharey=True)
    for axis, name in zip(axes, ("N", "M"), strict=True):
        contrast_pages.curves(measured, name, "peak_extra_mib", axis)
    axes[0].set_ylabel("MiB beyond inputs and gradients")
    figure.legend(*axes[0].get_legend_handles_labels(), fontsize=8, ncols=3, loc="outside lower center")
    _save(figure, file)


def scaling(results: Path, file: Path) -> None:
    """Left what was measured, each mark with its spread and the prediction beside it; right the prediction alone."""
    figure, axes = pyplot.subplots(1, 2, figsize=(10, 3.6), layout="constrained")
    named = {"LA, ": results / "scale_la_cpu.json", "phantom, ": results / "scale_demo.json"}
    reports = {name: Cells(files.read(path)) for name, path in named.items() if path.exists()}
    for name, cells in reports.items():
        pictures.efficiency(cells, axes[0], name)
    axes[0].set_title("two CPU cores: images a second and rank, over one rank's", fontsize=9)
    pictures.predicted(reports["LA, "], axes[1])
    axes[1].set_title("LA on GPUs, predicted, not measured (weak scaling)", fontsize=9)
    _save(figure, file)


def _save(figure: Any, file: Path) -> None:
    figure.savefig(file, dpi=100, metadata={"Software": None})
    pyplot.close(figure)
    print(f"{file}: {file.stat().st_size / 1000:.0f} kB")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--results", type=Path, required=True)
    parser.add_argument("--out", type=Path, required=True)
    arguments = parser.parse_args()
    for draw, needed in ((speed, "loader"), (contrast_memory, "contrast"), (scaling, "scale_la_cpu")):
        file, source = arguments.out / f"{draw.__name__}.png", arguments.results / f"{needed}.json"
        if source.exists():
            draw(arguments.results, file)
        else:
            print(f"{file}: not drawn, there is no {source}")


if __name__ == "__main__":
    main()
