"""DDP against ZeRO-1, 2 and 3 on two CPU processes: seconds a step and peak memory of rank 0, the variants in turns.

python benchmarks/strategies.py --out benchmarks/results/strategies.json

The network of configs/la.yaml (12 million parameters) on patches of 32x32x32 of the phantom, AdamW, float32: small
activations, so that optimiser states show. Medians leave out the first three steps of each run.
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

from variants import records, tell

from cclmpc_dist.data import phantom, shards

ROUNDS, STEPS, WARM = 2, 12, 3
SETTINGS = [
    "data.labelled=null", "data.patch=[32,32,32]", "model.norm=group", "model.dropout=0", "model.swin.window=[4,4,4]",
    "optim.name=adamw", "optim.lr=0.001", f"budget.images={4 * STEPS}", "precision=fp32", "channels_last=false",
    "ccl_mpc.t_contrast=0", "checkpoint.every_steps=0", "log_every=1", "data.workers=0", "evaluation.stride=null",
]  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True)
    out = parser.parse_args().out
    variants = {"ddp": ["strategy=ddp"]} | {
        f"zero{stage}": ["strategy=deepspeed", f"deepspeed=configs/deepspeed/zero{stage}.json"] for stage in (1, 2, 3)
    }
    lines: dict[str, list[dict[str, Any]]] = {name: [] for name in variants}
    with tempfile.TemporaryDirectory() as folder:
        shards.write(phantom.cases(8, 0, 48), Path(folder) / "shards", source="phantom", labelled=4)
        for turn in range(ROUNDS):
            for name, options in variants.items():
                lines[name] += run(Path(folder), f"{name}_{turn}", options)
    found = []
    for name, own in lines.items():
        found += records("strategies", "12 million parameters, 2 ranks", name, measured(own))
    tell(found, out, processes=2, settings=SETTINGS, config="configs/la.yaml")


def run(folder: Path, name: str, options: list[str]) -> list[dict[str, Any]]:
    """The log's lines after the first steps."""
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", "-m"]
    command += [
        "cclmpc_dist",
        "train",
        "configs/la.yaml",
        f"name={name}",
        f"runs={folder}",
        f"data.path={folder}/shards",
    ]
    subprocess.run([*command, *SETTINGS, *options], check=True, env=os.environ | {"OMP_NUM_THREADS": "1"})
    log = (folder / name / "metrics.jsonl").read_text().splitlines()
    return [json.loads(line) for line in log][WARM:]


def measured(lines: list[dict[str, Any]]) -> dict[str, tuple[float, str]]:
    seconds = [line["perf/step_seconds"] for line in lines]
    return {
        "step, median": (statistics.median(seconds), "s"),
        "step, fastest": (min(seconds), "s"),
        "peak memory of the process": (max(line["perf/memory_mib"] for line in lines), "MiB"),
        "last loss": (lines[-1]["loss/total"], "1"),
    }


if __name__ == "__main__":
    main()
