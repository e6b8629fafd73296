"""CCL-MPC against supervised: the same steps and seed on two processes, scored on held-out cases.

la_select chooses the settings of la_cpu: half the steps, trained on four labelled cases, scored on the other four.

    cclmpc shard LA/volumes --format la-h5 --list LA/train.list --labelled 8 --val-last 16 --out data/la
    python benchmarks/methods.py la_select --out benchmarks/results/la_select.json
    python benchmarks/methods.py la_cpu --out benchmarks/results/la_cpu.json
    cclmpc shard 48 --format phantom --out data/phantom --labelled 4 --val-last 8
    python benchmarks/methods.py phantom --out benchmarks/results/phantom.json

`supervised` takes four labelled images a step, all that CCL-MPC takes; `supervised_2` takes CCL-MPC's two, the same
batches without the unlabelled ones. A run that is scored already is not made again; the result says with which command
and commit each run was made.
"""

import argparse
import csv
import json
import os
import subprocess
import sys
from pathlib import Path

from variants import Record, records, tell

SUPERVISED = ["method=supervised", "data.batch_labelled=4"]
SELECT = ["data.select=4", "budget.images=720"]
SUITES = {
    "la_select": (
        "configs/la_cpu.yaml",
        "select",
        {
            "supervised, norm instance": ["name=select_instance", *SELECT, *SUPERVISED, "model.norm=instance"],
            "supervised, norm batch": ["name=select_batch", *SELECT, *SUPERVISED, "model.norm=batch"],
            "ccl_mpc, lambda_con 0.1": ["name=select_con_01", *SELECT, "ccl_mpc.lambda_con=0.1"],
            "ccl_mpc, lambda_con 1": ["name=select_con_1", *SELECT, "ccl_mpc.lambda_con=1"],
        },
    ),
    "la_cpu": (
        "configs/la_cpu.yaml",
        "val",
        {
            "ccl_mpc": ["name=la_cpu"],
            "supervised": ["name=la_cpu_supervised", *SUPERVISED],
            "supervised_2": ["name=la_cpu_supervised_2", "method=supervised", "budget.images=720"],
        },
    ),
    "phantom": (
        "configs/demo.yaml",
        "val",
        {
            "ccl_mpc": ["name=phantom"],
            "supervised": ["name=phantom_supervised", *SUPERVISED],
            "supervised_2": ["name=phantom_supervised_2", "method=supervised", "budget.images=400"],
            "supervised, all 40 labels": ["name=phantom_supervised_40", *SUPERVISED, "data.labelled=40"],
        },
    ),
}
UNITS = {"dice": "1", "jaccard": "1", "hd95_voxel": "voxel", "asd_voxel": "voxel"}


def make(config: str, split: str, run: Path, settings: list[str], ranks: int) -> None:
    """Train and score one variant."""
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(ranks)]
    train = [*torchrun, "-m", "cclmpc_dist", "train", config, *settings]
    subprocess.run(train, check=True, env=os.environ | {"OMP_NUM_THREADS": "1"})
    subprocess.run([sys.executable, "-m", "cclmpc_dist", "eval", str(run), "--split", split], check=True)


def scored(suite: str, split: str, variant: str, run: Path) -> list[Record]:
    """Mean, SD and interval of each metric, steps, and seconds of training without saving and start-up."""
    with (run / "eval" / "summary.csv").open() as file:
        entries = [entry for entry in csv.DictReader(file) if entry["metric"] in UNITS]
    values = {
        f"{entry['metric']}_{part}": (float(entry[part]), UNITS[entry["metric"]])
        for entry in entries
        for part in ("mean", "sd", "low", "high")
        if entry[part] != "nan"
    }
    log = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    every = log[0]["step"]
    values["train_seconds"] = (sum(line["perf/step_seconds"] * every for line in log), "s")
    values["steps"] = (log[-1]["step"], "1")
    return records(suite, f"{split} cases", variant, values)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("suite", choices=SUITES)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--ranks", type=int, default=2)
    arguments = parser.parse_args()
    config, split, variants = SUITES[arguments.suite]
    runs = {variant: Path("runs") / settings[0].removeprefix("name=") for variant, settings in variants.items()}
    for variant, run in runs.items():
        if not (run / "eval" / "summary.csv").exists():
            make(config, split, run, variants[variant], arguments.ranks)
    made = {variant: json.loads((run / "environment.json").read_text()) for variant, run in runs.items()}
    told = {variant: {name: made[variant][name] for name in ("command", "commit", "processes")} for variant in made}
    found = [entry for variant, run in runs.items() for entry in scored(arguments.suite, split, variant, run)]
    tell(found, arguments.out, processes=arguments.ranks, runs=told)


if __name__ == "__main__":
    main()
