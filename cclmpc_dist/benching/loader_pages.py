"""Tables and plot of what `cclmpc bench loader` measured."""

from typing import Any

OURS = "shards"
STATES = {"warm": "files in the page cache", "cold": "files dropped from the page cache before"}
SAID = {
    "gzip_h5": "UA-MT's way, gzip h5",
    "webdataset": "webdataset on the same shards",
    "blosc2": "blosc2 as nnU-Net v2 stores it",
    "blosc2_stored": "blosc2 of the shards' stored types",
    "shards": "**this project's loader**",
    "shards_zstd": "this project's loader, zstd shards",
    "memcpy": "memcpy of as many bytes from the same maps",
    "rows": "copy of a crop's rows, nothing else",
}
Values = dict[tuple[str, int, str, str], float]  # state, workers, variant, metric


def read(report: dict[str, Any]) -> Values:
    found = {}
    for record in report["records"]:
        *_, state, workers = record["case"].split(", ")
        found[state, int(workers.split()[0]), record["variant"], record["metric"]] = float(record["value"])
    return found


def table(report: dict[str, Any]) -> list[str]:
    """Two tables for each state of the page cache: rates, and what they are beside this project's."""
    values = read(report)
    corpus = ", ".join(report["records"][0]["case"].split(", ")[:-2])
    lines = [f"Crops with label of {corpus}; a second, and a second that CPUs were busy with it in all processes.", ""]
    for state, said in STATES.items():
        columns = sorted({workers for found, workers, *_ in values if found == state})
        variants = [name for name in SAID if any(key[0] == state and key[2] == name for key in values)]
        if not columns:
            continue
        lines += [f"## {state.capitalize()}: {said}", "", _head("", columns, ("/s", "/CPU s"))]
        for name in variants:
            cells = [(state, count, name, metric) for count in columns for metric in ("rate", "core rate")]
            lines.append(_row(SAID[name], values, cells, ".0f"))
        lines += ["", _head("this project's loader over", columns, ("by /s", "by /CPU s"))]
        for name in (name for name in variants if name != OURS):
            cells = [(state, count, OURS, f"{how} {name}") for count in columns for how in ("over", "core over")]
            lines.append(_row(SAID[name], values, cells, ".3g"))
        if state == "cold":
            lines += ["", _head("MB a crop from the disk", columns, ("",))]
            lines += [_row(SAID[name], values, [(state, n, name, "disk") for n in columns], ".2f") for name in variants]
        lines.append("")
    return lines


def _head(title: str, columns: list[int], units: tuple[str, ...]) -> str:
    names = [f"{count} worker{'' if count == 1 else 's'}{unit and ', '}{unit}" for count in columns for unit in units]
    return f"| {title} | {' | '.join(names)} |\n|{'---|' * (len(names) + 1)}"


def _row(name: str, values: Values, cells: list[tuple[str, int, str, str]], style: str) -> str:
    return f"| {name} | {' | '.join(format(values[key], style) if key in values else '-' for key in cells)} |"


def bars(report: dict[str, Any], state: str, axis: Any) -> None:
    """Crops a CPU second of every variant, a bar for each number of workers."""
    values = read(report)
    columns = sorted({workers for found, workers, *_ in values if found == state})
    names = [name for name in SAID if any(key[0] == state and key[2] == name for key in values)]
    height = 0.8 / max(1, len(columns))
    for place, count in enumerate(columns):
        rates = [values.get((state, count, name, "core rate"), 0.0) for name in names]
        axis.barh([row + place * height for row in range(len(names))], rates, height, label=f"{count} workers")
    axis.set_yticks([row + 0.4 - height / 2 for row in range(len(names))], names, fontsize=8)
    axis.invert_yaxis()
    axis.set(xscale="log", xlim=(10, None), xlabel="crops a CPU second", title=f"{state}: {STATES[state]}")
    axis.xaxis.set_minor_formatter("")
    axis.legend(fontsize=7)
