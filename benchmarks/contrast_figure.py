"""Table (Markdown, printed) and plot of what `cclmpc bench contrast --sweep` measured.

python benchmarks/contrast_figure.py benchmarks/results/contrast.json --plot benchmarks/results/contrast.png
"""

import argparse
import json
import re
from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("agg")
from matplotlib import pyplot

SIZES = {"N": "anchors", "M": "keys", "F": "features", "K": "classes"}
Measured = dict[tuple[str, tuple[int, ...], str], dict[str, float]]  # case, sizes in the order of SIZES, variant


def read(file: Path) -> Measured:
    found: Measured = {}
    for record in json.loads(file.read_text())["records"]:
        case, told = record["case"].split(": ")
        sizes = tuple(int(number) for number in re.findall(r"=(\d+)", told))
        found.setdefault((case, sizes, record["variant"]), {})[record["metric"]] = record["value"]
    return found


def table(measured: Measured) -> str:
    lines = [
        "| term | N | M | F | K | naive s | streamed s | ratio | naive MiB | streamed MiB | ratio | gradients differ |",
        "|" + "---|" * 12,
    ]
    for (case, sizes, variant), streamed in measured.items():
        if variant != "keys":
            continue
        naive = measured.get((case, sizes, "naive"), {})
        row = [case, *sizes]
        for metric, digits in (("seconds", 2), ("peak_extra_mib", 0)):
            row += [_number(naive.get(metric), digits), _number(streamed[metric], digits)]
            row.append(_number(streamed.get(f"{metric}_over_naive"), 3 if digits == 0 else 2))
        row.append(f"{streamed['gradient_difference']:.0e}" if "gradient_difference" in streamed else "")
        lines.append("| " + " | ".join(str(value) for value in row) + " |")
    return "\n".join(lines)


def _number(value: float | None, digits: int) -> str:
    return "-" if value is None else f"{value:,.{digits}f}"


def plot(measured: Measured, file: Path) -> None:
    """Seconds and memory against each size, the others as in the first measurement."""
    base = next(iter(measured))[1]
    names = ("N", "M", "F")
    figure, axes = pyplot.subplots(2, len(names), figsize=(12, 6.5), layout="constrained")
    for column, name in enumerate(names):
        place = list(SIZES).index(name)
        for case, colour in (("sbcl", "C0"), ("sbcl other_class", "C2"), ("cgcl", "C3")):
            for variant, style in (("naive", "--"), ("keys", "-")):
                points = _along(measured, base, place, case, variant)
                label = f"{case}, {'streamed' if variant == 'keys' else variant}"
                for row, metric in enumerate(("seconds", "peak_extra_mib")):
                    values = [point[1][metric] for point in points]
                    axes[row, column].plot([p[0] for p in points], values, f"{style}o", color=colour, label=label, ms=3)
        for row, unit in enumerate(("s, forward and backward", "MiB beyond inputs and gradients")):
            axes[row, column].set(xscale="log", yscale="log", xlabel=f"{SIZES[name]} ({name})", title=unit)
            ticks = sorted({sizes[place] for _, sizes, _ in measured})
            axes[row, column].set_xticks(ticks, [f"{tick:,}" for tick in ticks])
            axes[row, column].minorticks_off()
    axes[0, 0].legend(fontsize=7)
    figure.savefig(file, dpi=100, metadata={"Software": None})


def _along(
    measured: Measured, base: tuple[int, ...], place: int, case: str, variant: str
) -> list[tuple[int, dict[str, float]]]:
    """(size, metrics) where only the size at `place` differs from the base."""
    others = [value for i, value in enumerate(base) if i != place]
    found: list[tuple[int, Any]] = [
        (sizes[place], metrics)
        for (what, sizes, how), metrics in measured.items()
        if (what, how) == (case, variant) and [value for i, value in enumerate(sizes) if i != place] == others
    ]
    return sorted(found, key=lambda point: point[0])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("file", type=Path)
    parser.add_argument("--plot", type=Path)
    arguments = parser.parse_args()
    measured = read(arguments.file)
    print(table(measured))
    if arguments.plot:
        plot(measured, arguments.plot)


if __name__ == "__main__":
    main()
