"""Table and plot of what `cclmpc bench contrast` measured: the naive and the streamed contrast side by side."""

import re
from typing import Any

SIZES = {"N": "anchors", "M": "keys", "F": "features", "K": "classes"}
COLOURS = {"sbcl": "C0", "sbcl other_class": "C2", "cgcl": "C3"}
Measured = dict[tuple[str, tuple[int, ...], str], dict[str, float]]  # case, sizes in the order of SIZES, variant


def read(records: list[dict[str, Any]]) -> Measured:
    found: Measured = {}
    for record in records:
        case, told = record["case"].split(": ")
        sizes = tuple(int(number) for number in re.findall(r"=(\d+)", told))
        found.setdefault((case, sizes, record["variant"]), {})[record["metric"]] = record["value"]
    return found


def table(measured: Measured) -> list[str]:
    lines = [
        "N anchors, M keys, F features, K classes. naive: all logits at once; streamed: tile by tile, `keys` below.",
        "Forward and backward; MiB beyond the inputs at the peak; each ratio is streamed over naive.",
        "",
        "| term | N | M | F | K | naive s | streamed s | ratio | naive MiB | streamed MiB | ratio | gradients differ |",
        "|" + "---|" * 12,
    ]
    for (case, sizes, variant), streamed in measured.items():
        if variant != "keys":
            continue
        naive = measured.get((case, sizes, "naive"), {})
        row = [case, *map(str, sizes)]
        for metric, digits in (("seconds", 2), ("peak_extra_mib", 0)):
            row += [_number(naive.get(metric), digits), _number(streamed[metric], digits)]
            row.append(_number(streamed.get(f"{metric}_over_naive"), 3 if digits == 0 else 2))
        row.append(f"{streamed['gradient_difference']:.0e}" if "gradient_difference" in streamed else "")
        lines.append("| " + " | ".join(row) + " |")
    return lines


def _number(value: float | None, digits: int) -> str:
    return "-" if value is None else f"{value:z,.{digits}f}"


def swept(measured: Measured) -> list[str]:
    """Letters of the sizes that were measured at several values, the classes' aside."""
    return [name for place, name in enumerate(SIZES) if name != "K" and len({key[1][place] for key in measured}) > 1]


def curves(measured: Measured, name: str, metric: str, axis: Any) -> None:
    """A metric of all terms and both variants against one size, the others as in the first measurement."""
    place = list(SIZES).index(name)
    base = next(iter(measured))[1]
    for case, colour in COLOURS.items():
        for variant, style in (("naive", "--"), ("keys", "-")):
            points = _along(measured, base, place, case, variant)
            label = f"{case}, {'streamed' if variant == 'keys' else 'all logits at once'}"
            numbers = [metrics[metric] for _, metrics in points]
            axis.plot([size for size, _ in points], numbers, f"{style}o", color=colour, label=label, ms=3)
    ticks = sorted({sizes[place] for _, sizes, _ in measured})
    axis.set(xscale="log", yscale="log", xlabel=f"{SIZES[name]} ({name})")
    axis.set_xticks(ticks, [f"{tick:,}" for tick in ticks])
    axis.minorticks_off()


def _along(
    measured: Measured, base: tuple[int, ...], place: int, case: str, variant: str
) -> list[tuple[int, dict[str, float]]]:
    """(size, metrics) where only the size at `place` differs from the base."""
    others = [value for i, value in enumerate(base) if i != place]
    found = [
        (sizes[place], metrics)
        for (what, sizes, how), metrics in measured.items()
        if (what, how) == (case, variant) and [value for i, value in enumerate(sizes) if i != place] == others
    ]
    return sorted(found, key=lambda point: point[0])
