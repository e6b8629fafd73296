"""Files of measurements, {"meta", "records"}: read, written with table and plot beside, compared."""

import json
from pathlib import Path
from tempfile import TemporaryFile
from typing import Any

from cclmpc_dist.errors import InputError

KEYS = {"bench", "case", "variant", "metric", "value", "unit"}
Report = dict[str, Any]


def read(path: Path) -> Report:
    """Raises InputError for what is no such file."""
    try:
        found = json.loads(path.read_text())
    except (OSError, ValueError) as error:
        raise InputError(f"{path}: cannot be read ({error}): give a JSON file that cclmpc bench wrote") from None
    records = found.get("records") if isinstance(found, dict) else None
    if not records or not all(isinstance(record, dict) and set(record) >= KEYS for record in records):
        raise InputError(f"{path}: holds no records: give a JSON file that cclmpc bench wrote")
    return found


def check_out(path: Path) -> None:
    """Raises InputError where a report cannot be written, or would replace what is none."""
    if path.suffix != ".json" or path.is_dir():
        raise InputError(f"--out {path}: name a file that ends in .json: table and plot get its name with .md and .png")
    if path.exists():
        try:
            read(path)
        except InputError:
            raise InputError(f"--out {path}: is there and no report of cclmpc bench: name another file") from None
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with TemporaryFile(dir=path.parent):
            pass
    except OSError as error:
        raise InputError(f"--out {path}: cannot be written ({error.strerror}): name another place") from None


def write(report: Report, path: Path) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(report, indent=1) + "\n")


def write_pages(report: Report, path: Path) -> list[Path]:
    """The table beside a report's file as .md, and where there is something to draw the plot as .png."""
    from cclmpc_dist.benching import pictures, tables

    page, picture = path.with_suffix(".md"), path.with_suffix(".png")
    drawn = pictures.draw(report, picture)
    page.write_text(tables.page(report) + (f"\n![plot of this report]({picture.name})\n" if drawn else ""))
    return [page, picture] if drawn else [page]


def compare(left: Path, right: Path) -> str:
    """A Markdown table of what both files measured, and what their metas differ in; of two folders one for each pair
    of files. Raises InputError where there is nothing to compare."""
    if not (left.is_dir() and right.is_dir()):
        return _beside(left, right)
    here, there = ({path.name for path in folder.glob("*.json")} for folder in (left, right))
    if not here & there:
        raise InputError(f"{left} and {right} have no file of one name: compare folders that bench all wrote")
    parts = [f"# {name}\n\n{_found(left / name, right / name)}" for name in sorted(here & there)]
    alone = [f"{folder} alone has {', '.join(sorted(names))}" for folder, names in
             ((left, here - there), (right, there - here)) if names]  # fmt: skip
    return "\n\n".join(parts + alone)


def _found(left: Path, right: Path) -> str:
    """The table, or why there is none."""
    try:
        return _beside(left, right)
    except InputError as error:
        return str(error)


def _beside(left: Path, right: Path) -> str:
    a, b = read(left), read(right)
    here, there = ({_key(record): record for record in one["records"]} for one in (a, b))
    common = [key for key in here if key in there]
    if not common:
        both = " and ".join(sorted({one["records"][0]["bench"] for one in (a, b)}))
        raise InputError(f"{left} and {right} have no record in common (bench {both}): compare files of one benchmark "
                         "on the same cases")  # fmt: skip
    lines = [f"{name}: {old} -> {new}" for name, old, new in _differences(a["meta"], b["meta"])]
    lines += ["", f"| case | variant | metric | unit | {left} | {right} | ratio |", "|" + "---|" * 7]
    for key in common:
        old, new = here[key]["value"], there[key]["value"]
        ratio = f"{new / old:.3f}" if old else "-"
        lines.append(f"| {' | '.join(key[1:])} | {here[key]['unit']} | {old:.4g} | {new:.4g} | {ratio} |")
    alone = len(here) + len(there) - 2 * len(common)
    return "\n".join([*lines, "", f"{len(common)} records in both files, {alone} in one of them only"])


def _key(record: dict[str, Any]) -> tuple[str, ...]:
    return tuple(record[name] for name in ("bench", "case", "variant", "metric"))


def _differences(a: Any, b: Any, name: str = "") -> list[tuple[str, Any, Any]]:
    """Dotted name and both values of everything in two metas that is not alike."""
    if isinstance(a, dict) and isinstance(b, dict):
        names = dict.fromkeys([*a, *b])
        return [found for key in names for found in _differences(a.get(key), b.get(key), f"{name}.{key}".lstrip("."))]
    return [] if a == b else [(name, a, b)]
