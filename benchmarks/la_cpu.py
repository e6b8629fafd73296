"""CCL-MPC against supervised on real LA volumes: the same images, steps, seed and processes, scored on held-out cases.

    cclmpc shard LA/volumes --format la-h5 --list LA/train.list --val-last 16 --out data/la
    python benchmarks/la_cpu.py --out benchmarks/results/la_cpu.json

Supervised takes four labelled images a step where CCL-MPC takes two and two.
"""

import argparse
import csv
import json
import os
import shutil
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

from cclmpc_dist.training.run import environment

CONFIG = "configs/la_cpu.yaml"
VARIANTS = {
    "ccl_mpc": ["name=la_cpu"],
    "supervised": ["name=la_cpu_supervised", "method=supervised", "data.batch_labelled=4"],
}
COLUMNS = ("dice", "jaccard", "hd95_voxel", "asd_voxel")


def measure(variant: str, ranks: int) -> tuple[list[dict[str, Any]], list[str]]:
    """Train and score one variant: records and the commands that made them."""
    run = Path("runs") / VARIANTS[variant][0].removeprefix("name=")
    shutil.rmtree(run, ignore_errors=True)
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(ranks)]
    train = [*torchrun, "-m", "cclmpc_dist", "train", CONFIG, *VARIANTS[variant]]
    score = [sys.executable, "-m", "cclmpc_dist", "eval", str(run)]
    began = time.monotonic()
    subprocess.run(train, check=True, env=os.environ | {"OMP_NUM_THREADS": "1"})
    seconds = time.monotonic() - began
    subprocess.run(score, check=True)
    records = []
    for entry in csv.DictReader((run / "eval" / "summary.csv").open()):
        if entry["metric"] in COLUMNS:
            records += [
                record(variant, f"{entry['metric']}_{part}", float(entry[part]))
                for part in ("mean", "sd", "low", "high")
            ]
    records.append(record(variant, "train_seconds", seconds))
    return records, [" ".join(["python", *command[1:]]) for command in (train, score)]


def record(variant: str, metric: str, value: float) -> dict[str, Any]:
    unit = {"dice": "1", "jaccard": "1", "hd95": "voxel", "asd": "voxel", "train": "s"}[metric.split("_")[0]]
    return {
        "bench": "la_cpu",
        "case": "16 held-out",
        "variant": variant,
        "metric": metric,
        "value": value,
        "unit": unit,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--ranks", type=int, default=2)
    arguments = parser.parse_args()
    measured = [measure(variant, arguments.ranks) for variant in VARIANTS]
    meta = environment(arguments.ranks) | {"commands": [line for _, lines in measured for line in lines]}
    records = [entry for entries, _ in measured for entry in entries]
    arguments.out.write_text(json.dumps({"meta": meta, "records": records}, indent=1) + "\n")


if __name__ == "__main__":
    main()
