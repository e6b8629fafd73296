"""model.recompute: peak memory of a process against the seconds of a step, as more stages are computed anew.

    python benchmarks/recompute.py configs/la.yaml data.batch_labelled=1 data.batch_unlabelled=1 \\
        --out benchmarks/results/recompute.json

The step is that of plain_step.py in bf16, channels last, with instance norm. Each choice runs in a process of its own,
the choices in turns, round by round. The loss of the last step tells whether all compute the same.
"""

import argparse
import json
import statistics
import subprocess
import sys
from pathlib import Path
from typing import Any

from plain_step import take

from cclmpc_dist.training.run import environment

CHOICES = ("[]", "[1]", "[1,2]", "[1,2,4]", "[1,2,4,8,16]")  # strides
VARIANT = "ours, bf16, channels last"
UNITS = {"seconds": "s", "memory": "MiB", "loss": "1"}


def measure(config: str, overrides: list[str], rounds: int, steps: int) -> list[dict[str, Any]]:
    found: dict[str, list[dict[str, Any]]] = {choice: [] for choice in CHOICES}
    for _ in range(rounds):
        for choice, rows in found.items():
            command = [sys.executable, __file__, config, *overrides, f"model.recompute={choice}"]
            command += ["--steps", str(steps), "--one"]
            rows.append(json.loads(subprocess.run(command, check=True, capture_output=True, text=True).stdout))
    case = " ".join([Path(config).stem, *overrides])
    records = []
    for choice, rows in found.items():
        values = {
            "seconds": statistics.median(second for row in rows for second in row["seconds"]),
            "memory": statistics.median(row["memory"] for row in rows),
            "loss": rows[0]["losses"][-1],
        }
        common = {"bench": "recompute", "case": case, "variant": choice}
        records += [common | {"metric": name, "value": v, "unit": UNITS[name]} for name, v in values.items()]
    return records


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("config")
    parser.add_argument("overrides", nargs="*", help="settings, as in data.batch_labelled=1")
    parser.add_argument("--rounds", type=int, default=1)
    parser.add_argument("--steps", type=int, default=2, help="of each choice in a round, after warming up")
    parser.add_argument("--out", type=Path)
    parser.add_argument("--one", action="store_true", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.one:
        print(json.dumps(take(arguments.config, arguments.overrides, VARIANT, arguments.steps)))
        return
    records = measure(arguments.config, arguments.overrides, arguments.rounds, arguments.steps)
    for record in records:
        print(f"{record['case']}, {record['variant']}: {record['metric']} {record['value']:.6g} {record['unit']}")
    if arguments.out:
        arguments.out.write_text(json.dumps({"meta": environment(1), "records": records}, indent=1) + "\n")


if __name__ == "__main__":
    main()
