"""What the scripts here share: variants measured in turns, records, and where these go."""

from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

from cclmpc_dist.benching import files
from cclmpc_dist.records import Record
from cclmpc_dist.training.run import environment

Found = dict[str, list[dict[str, Any]]]  # variant -> what each round found


def in_turns(variants: Iterable[str], rounds: int, measure: Callable[[str], dict[str, Any]]) -> Found:
    """Every variant once a round, so that a busy machine slows all."""
    found: Found = {variant: [] for variant in variants}
    for _ in range(rounds):
        for variant, rows in found.items():
            rows.append(measure(variant))
    return found


def records(bench: str, case: str, variant: str, values: dict[str, tuple[float, str]]) -> list[Record]:
    """values: metric -> value and unit."""
    common = {"bench": bench, "case": case, "variant": variant}
    return [common | {"metric": metric, "value": value, "unit": unit} for metric, (value, unit) in values.items()]


def tell(found: list[Record], out: Path | None, processes: int = 1, **further: Any) -> None:
    """Print the records, and write them to a file if one is given. further: of its meta."""
    for one in found:
        print(f"{one['case']}, {one['variant']}: {one['metric']} {one['value']:.6g} {one['unit']}", flush=True)
    if out:
        files.write({"meta": environment(processes) | further, "records": found}, out)
