"""Markdown of a report, from its JSON alone."""

import re
from typing import Any

from cclmpc_dist.benching import contrast_pages, loader_pages
from cclmpc_dist.benching.step import LOADING, PARTS
from cclmpc_dist.words import counted

SPEED = (
    "seconds", "seconds_q25", "seconds_q75", "images_per_second", "voxels_per_second", "step_tflop", "tflops", "mfu",
)  # fmt: skip


class Cells:
    """The records of a report by case, variant and metric."""

    def __init__(self, report: dict[str, Any]) -> None:
        self.report = report
        self.values = {(r["case"], r["variant"], r["metric"]): float(r["value"]) for r in report["records"]}
        self.variants: dict[str, dict[str, None]] = {}
        for record in report["records"]:
            self.variants.setdefault(record["case"], {})[record["variant"]] = None

    def get(self, case: str, variant: str, metric: str) -> float | None:
        return self.values.get((case, variant, metric))

    def measured(self, mode: str) -> list[str]:
        """Cases of a mode of scaling that were measured, in the order of their ranks."""
        found = [case for case in self.variants if case.startswith(f"{mode} ") and "sizes" in self.variants[case]]
        return sorted(found, key=ranks)

    def slowest(self, case: str) -> tuple[str, float] | None:
        """The rank that spends most time on its own, and that over the least that a rank spends; None for one rank."""
        own = {who: self.values[case, who, "busy"] for who in self.variants[case] if who.startswith("rank ")}
        if len(own) < 2:
            return None
        most = max(own, key=lambda who: own[who])
        return most, own[most] / min(own.values())

    def predicted(self) -> dict[str, dict[int, float]]:
        """Efficiency by cluster and number of GPUs."""
        found: dict[str, dict[int, float]] = {}
        for (case, variant, metric), value in self.values.items():
            if metric == "efficiency" and variant not in (LOADING, "predicted"):
                found.setdefault(variant, {})[ranks(case)] = value
        return found


def ranks(case: str) -> int:
    return int(case.split()[1])


def page(report: dict[str, Any]) -> str:
    """Head and tables."""
    bench = report["records"][0]["bench"]
    cells = Cells(report)
    if bench == "scale":
        cases = cells.measured("weak") + cells.measured("strong")
        body = [*scaling(cells), *milliseconds(cells, cases), *prediction(cells)]
    elif bench == "step":
        body = [*speed(cells), *milliseconds(cells, list(cells.variants))]
    elif bench == "loader":
        body = loader_pages.table(report)
    elif bench == "contrast":
        body = [*contrast_pages.table(contrast_pages.read(report["records"])), "", *plain(report)]
    else:
        body = plain(report)
    return "\n".join([*head(report), *body])


def head(report: dict[str, Any]) -> list[str]:
    meta, bench = report["meta"], report["records"][0]["bench"]
    lines = [f"# bench {bench}", "", *machine(meta)]
    if bench in ("step", "scale"):
        lines.append(f"- {_setup(report)}")
    if "peak" in meta:
        source = meta["peak"]
        peak = f"the peak of its row, {_without_rate(source)}" if bench == "scale" else f"a peak, {source}"
        lines.append(f"- MFU: three times the forward pass's FLOPs, over {peak}")
        if bench == "scale":
            lines.append("- Each number of a row is the median over its rounds, by itself")
    return [*lines, ""]


def _setup(report: dict[str, Any]) -> str:
    """What a step is of, at the first point."""
    config, cells = report["meta"]["config"], Cells(report)
    case = report["records"][0]["case"]
    images = cells.get(case, "sizes", "images") or 0
    patch = " x ".join(map(str, config["data"]["patch"]))
    layout = ", channels last" if config["channels_last"] else ""
    return (f"{config['method']}, {images:.0f} images of {patch} voxels on {counted(ranks(case), 'rank')}, "
            f"{config['precision']}{layout}")  # fmt: skip


def _without_rate(source: str) -> str:
    """A peak's source without its number, which is that of one point."""
    return re.sub(r"[\d.]+ TFLOP/s,? ", "", source)


def machine(meta: dict[str, Any]) -> list[str]:
    """Where it was measured, and with which command."""
    here = meta["machine"]
    device = here["gpu"] or f"{here['cpu']}, {here['cpus']} cores"
    return [
        f"- {device}; torch {meta['versions']['torch']}; commit {meta['commit']}",
        f"- `{' '.join(meta['command'])}`",
    ]


def scaling(cells: Cells) -> list[str]:
    """A table a mode: speed, efficiency, the model's prediction, the slowest rank."""
    lines: list[str] = []
    for mode, told in (("weak", "each rank keeps its batch"), ("strong", "all ranks together keep the batch")):
        if cases := cells.measured(mode):
            lines += [f"## {mode.capitalize()} scaling: {told}", "",
                      "| ranks | hosts | step s (quartiles) | images/s | Mvoxels/s | MFU | peak, TFLOP/s "
                      "| efficiency (least - most) | predicted | predicted - seen, points | slowest rank |",
                      "|" + "---|" * 11]  # fmt: skip
            lines += [_row(cells, case) for case in cases] + [""]
    return lines


def _row(cells: Cells, case: str) -> str:
    def value(metric: str, variant: str = LOADING) -> float:
        found = cells.get(case, variant, metric)
        return float("nan") if found is None else found

    low, high = value("seconds_q25"), value("seconds_q75")
    least, most = value("efficiency_low"), value("efficiency_high")
    error = cells.get(case, "predicted", "error")
    slow = cells.slowest(case)
    columns = [
        f"{ranks(case)}",
        f"{value('hosts', 'sizes'):.0f}",
        f"{value('seconds'):.4g} ({low:.4g} - {high:.4g})",
        f"{value('images_per_second'):.3g}",
        f"{value('voxels_per_second') / 1e6:.3g}",
        f"{value('mfu'):.3f}",
        f"{value('peak', 'sizes'):.3g}",
        f"**{value('efficiency'):.3f}** ({least:.3f} - {most:.3f})",
        "-" if error is None else f"{value('efficiency', 'predicted'):.3f}",
        "-" if error is None else f"{error:+.1f}",
        "-" if slow is None else f"{slow[0]}: {slow[1]:.2f} x the fastest's own time",
    ]
    return f"| {' | '.join(columns)} |"


def speed(cells: Cells) -> list[str]:
    """What a step does, of each kind."""
    lines = ["| ranks | step | s (quartiles) | images/s | Mvoxels/s | TFLOP a rank | TFLOP/s a rank | MFU |",
             "|" + "---|" * 8]  # fmt: skip
    for case, variants in cells.variants.items():
        for variant in variants:
            numbers = [cells.values[case, variant, name] for name in SPEED if (case, variant, name) in cells.values]
            if len(numbers) < len(SPEED):
                continue
            seconds, low, high, images, voxels, work, rate, share = numbers
            lines.append(f"| {ranks(case)} | {variant} | {seconds:.4g} ({low:.4g} - {high:.4g}) | {images:.3g} "
                         f"| {voxels / 1e6:.3g} | {work:.3g} | {rate:.3g} | {share:.3f} |")  # fmt: skip
    return [*lines, ""]


def milliseconds(cells: Cells, cases: list[str]) -> list[str]:
    """What a step's time goes to, and the all-reduce."""
    lines = ["## Where the milliseconds go", ""]
    lines += [f"| a step of | {' | '.join(cases)} |", "|" + "---|" * (len(cases) + 1)]
    for part in PARTS:
        lines.append(f"| {part} | {' | '.join(_part(cells, case, part) for case in cases)} |")
    for metric, factor, told in (("alpha", 1e6, "all-reduce, start, µs"),
                                 ("ring_bandwidth", 1e-9, "all-reduce, ring, GB/s")):  # fmt: skip
        found = [cells.get(case, "all-reduce fit", metric) for case in cases]
        lines.append(f"| {told} | {' | '.join('-' if v is None else f'{v * factor:.3g}' for v in found)} |")
    return [*lines, ""]


def _part(cells: Cells, case: str, part: str) -> str:
    """Milliseconds; of what has quartiles, a difference of steps, with them, and whether it is within noise."""
    value = f"{cells.get(case, LOADING, part) or 0.0:.1f}"
    low, high = (cells.get(case, LOADING, f"{part}_{quartile}") for quartile in ("q25", "q75"))
    if low is None or high is None:
        return value
    return f"{value} ({low:.1f} to {high:.1f}{', within noise' if low <= 0 else ''})"


def prediction(cells: Cells) -> list[str]:
    """Efficiencies of the cost model's clusters."""
    found = cells.predicted()
    if not found:
        return []
    worlds = sorted(next(iter(found.values())))
    sources = cells.report["meta"]["predicted"]
    lines = ["## Predicted weak scaling: efficiency", "", f"Step: {sources['step']}.", "",
             f"| GPUs | {' | '.join(map(str, worlds))} |", "|" + "---|" * (len(worlds) + 1)]  # fmt: skip
    for cluster, values in found.items():
        lines.append(f"| {cluster} | {' | '.join(f'{values[world]:.3f}' for world in worlds)} |")
    return [*lines, "", *(f"- {cluster}: {sources[cluster]}" for cluster in found), ""]


def plain(report: dict[str, Any]) -> list[str]:
    """One line a record; of what was repeated the median with the least and the most."""
    lines = ["| case | variant | metric | value (least - most, repeats) | unit |", "|---|---|---|---|---|"]
    return (
        lines
        + [
            f"| {r['case']} | {r['variant']} | {r['metric']} | {r['value']:.4g}{_spread(r)} | {r['unit']} |"
            for r in report["records"]
        ]
        + [""]
    )


def _spread(record: dict[str, Any]) -> str:
    samples = record.get("samples")
    return f" ({min(samples):.4g} - {max(samples):.4g}, {len(samples)})" if samples else ""
