"""Three steps of configs/la.yaml at full size: seconds a step and peak memory of the process.

python benchmarks/la_step.py --out benchmarks/results/la_step.json
"""

import argparse
import json
import shutil
import subprocess
import sys
from pathlib import Path

from variants import records, tell

SETTINGS = ["name=la_step", "budget.images=12", "log_every=1", "ccl_mpc.t_contrast=0.3"]  # contrast in steps 2 and 3
UNITS = {"perf/step_seconds": "s", "perf/memory_mib": "MiB", "loss/total": "1"}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True)
    out = parser.parse_args().out
    run = Path("runs/la_step")
    shutil.rmtree(run, ignore_errors=True)
    command = [sys.executable, "-m", "cclmpc_dist", "train", "configs/la.yaml", *SETTINGS]
    subprocess.run(command, check=True)
    log = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    found = []
    for line in log:
        values = {name: (line[name], unit) for name, unit in UNITS.items()}
        found += records("la_step", f"step {line['step']}", "ccl_mpc", values)
    tell(found, out, commands=[" ".join(["python", *command[1:]])])


if __name__ == "__main__":
    main()
