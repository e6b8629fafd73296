"""model.recompute: peak memory of a process against the seconds of a step, as more stages are computed anew.

    python benchmarks/recompute.py configs/la.yaml data.batch_labelled=1 data.batch_unlabelled=1 \\
        --out benchmarks/results/recompute.json

The step is that of plain_step.py in bf16, channels last, with instance norm. Each choice runs in a process of its own,
the choices in turns, round by round. The loss of the last step tells whether all compute the same.
"""

import argparse
import statistics
from pathlib import Path

from plain_step import take
from variants import Record, in_turns, records, tell

from cclmpc_dist.benching.alone import alone
from cclmpc_dist.records import repeated

CHOICES = ("[]", "[1]", "[1,2]", "[1,2,4]", "[1,2,4,8,16]")  # strides
VARIANT = "ours, bf16, channels last"


def measure(config: str, overrides: list[str], rounds: int, steps: int) -> list[Record]:
    found = in_turns(
        CHOICES,
        rounds,
        lambda choice: alone(
            take, config=config, overrides=[*overrides, f"model.recompute={choice}"], variant=VARIANT, steps=steps
        ),
    )
    case = " ".join([Path(config).stem, *overrides])
    told = []
    for choice, rows in found.items():
        seconds = [second for row in rows for second in row["seconds"]]
        values = {
            "seconds": (statistics.median(seconds), "s"),
            "memory": (statistics.median(row["memory"] for row in rows), "MiB"),
            "loss": (rows[0]["losses"][-1], "1"),
        }
        first, *rest = records("recompute", case, choice, values)
        told += [first | repeated(seconds), *rest]
    return told


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("config")
    parser.add_argument("overrides", nargs="*", help="settings, as in data.batch_labelled=1")
    parser.add_argument("--rounds", type=int, default=1)
    parser.add_argument("--steps", type=int, default=2, help="of each choice in a round, after warming up")
    parser.add_argument("--out", type=Path)
    arguments = parser.parse_args()
    tell(measure(arguments.config, arguments.overrides, arguments.rounds, arguments.steps), arguments.out)


if __name__ == "__main__":
    main()
