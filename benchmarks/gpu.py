"""What a GPU has to show, in parts that each fit a short lease of one: a log and a JSON file of each.

    python benchmarks/gpu.py SHARDS OUT                       # every part but training
    python benchmarks/gpu.py SHARDS OUT train --seconds 500   # again and again, until 6000 steps are done
    python benchmarks/gpu.py SHARDS OUT eval

SHARDS is a corpus of configs/la.yaml, LA's or phantoms; start from the root of a checkout. A part that fails or takes
longer than `--limit` leaves its log, and the others go on; the exit code is then 1. `train` asks the run to save and
stop after so many seconds, and the next call goes on from there; its file has the seconds of all steps together.
"""

import argparse
import json
import os
import signal
import subprocess
import sys
import time
from contextlib import suppress
from pathlib import Path

from variants import Record, records

from cclmpc_dist.benching import files
from cclmpc_dist.training.run import environment

PREEMPTED = 75  # exit code of a run that was asked to stop
GRACE = 60  # seconds for its save
RUN = "gpu"


def commands(config: str, settings: list[str], out: Path, small: bool) -> dict[str, list[str]]:
    """What comes after Python, by part."""
    contrast = ["-m", "cclmpc_dist", "bench", "contrast", f"--device={'cpu' if small else 'cuda'}"]
    sizes = ["--anchors=128", "--keys=1024", "--features=16", "--repeats=1"] if small else []
    large = ["--anchors=256", "--keys=4096"] if small else ["--anchors=8192", "--keys=524288"]
    tiny = ["--blocks=1", "--largest=2", "--edge=128", "--copied=1000000"]
    tiny += ["--variant=ours, bf16", "--variant=UA-MT, float32 strict"]
    step, steps, lines = (tiny, 2, 1) if small else ([], 20, 50)
    marked = [str(file) for file in sorted(Path("tests").glob("test_*.py")) if "mark.gpu" in file.read_text()]
    return {
        "tests": ["-m", "pytest", "-m", "gpu", "-W", "default", "-p", "no:cacheprovider", *marked],
        "doctor": ["-m", "cclmpc_dist", "doctor", "--folder", str(out)],
        "gpu_step": ["benchmarks/gpu_step.py", config, *settings, *step],
        "contrast": [*contrast, *sizes],
        "contrast_tf32": [*contrast, *sizes, "--tf32"],
        "contrast_large": [*contrast, *sizes, *large],
        "step": ["-m", "cclmpc_dist", "bench", "step", config, *settings, f"--steps={steps}"],
        "compiled": ["benchmarks/gpu_step.py", config, *settings, "--variant=ours, bf16, torch.compile", "--largest=1"],
        "train": ["-m", "cclmpc_dist", "train", config, *settings, f"name={RUN}", f"runs={out}", f"log_every={lines}"],
        "eval": ["-m", "cclmpc_dist", "eval", str(out / RUN)],
    }


WITHOUT_FILE = ("tests", "doctor", "train", "eval")  # that take no --out


def take(name: str, command: list[str], out: Path, limit: float) -> tuple[str, float]:
    """What came of a part, and its seconds."""
    file = [] if name in WITHOUT_FILE else ["--out", str(out / f"{name}.json")]
    began = time.monotonic()
    with (out / f"{name}.log").open("a") as log:
        process = subprocess.Popen(
            [sys.executable, *command, *file], stdout=log, stderr=subprocess.STDOUT, start_new_session=True
        )
        try:
            process.wait(limit)
        except subprocess.TimeoutExpired:
            pass
        finally:
            code = stopped(process)
    told = {0: "done", PREEMPTED: "stopped and saved: call it again"}.get(code, f"failed with exit code {code}")
    return told, time.monotonic() - began


def stopped(process: subprocess.Popen[bytes]) -> int:
    """Exit code of the leader of a session, of which nothing is left running: a measurement is a child of its part."""
    send(process, signal.SIGTERM)
    with suppress(subprocess.TimeoutExpired):
        process.wait(GRACE)
    send(process, signal.SIGKILL)
    return process.wait()


def send(process: subprocess.Popen[bytes], number: signal.Signals) -> None:
    with suppress(ProcessLookupError):  # nothing is left
        os.killpg(process.pid, number)


def trained(run: Path) -> list[Record]:
    """Of the run so far: steps, and their minutes without what lies between processes; the rest of the newest line."""
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    lines = [line for line in lines if "perf/step_seconds" in line]
    if not lines:
        return []
    taken, before = 0.0, 0
    for line in lines:
        taken, before = taken + (line["step"] - before) * line["perf/step_seconds"], line["step"]
    last = lines[-1]
    found = {"steps": (before, "1"), "minutes": (taken / 60, "min"), "step_seconds": (last["perf/step_seconds"], "s"),
             "data_wait_share": (last["perf/data_wait_share"], "fraction"), "memory": (last["perf/memory_mib"], "MiB"),
             "loss": (last["loss/total"], "1")}  # fmt: skip
    return records("gpu_train", run.name, "ccl_mpc", found)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("shards")
    parser.add_argument("out", type=Path)
    parser.add_argument("parts", nargs="*", help="unset: all but train and eval, in this order")
    parser.add_argument("--config", default="configs/la.yaml")
    parser.add_argument("--limit", type=float, default=540, help="seconds of a part")
    parser.add_argument("--seconds", type=float, default=500, help="of training in this call")
    parser.add_argument("--small", action="store_true", help="small sizes on the CPU, to try the script")
    arguments = parser.parse_args()
    out: Path = arguments.out
    out.mkdir(parents=True, exist_ok=True)
    known = commands(arguments.config, [f"data.path={arguments.shards}"], out, arguments.small)
    chosen = arguments.parts or [name for name in known if name not in ("train", "eval")]
    if unknown := [name for name in chosen if name not in known]:
        parser.error(f"no part {', '.join(unknown)}: there are {', '.join(known)}")
    outcomes = []
    for name in chosen:
        told, seconds = take(name, known[name], out, arguments.seconds if name == "train" else arguments.limit)
        if name == "train" and (out / RUN / "metrics.jsonl").exists():
            files.write({"meta": environment(1), "records": trained(out / RUN)}, out / "train.json")
        outcomes.append(told)
        print(f"{name}: {told}, {seconds:.0f} s", flush=True)
    sys.exit(any(told.startswith("failed") for told in outcomes))


if __name__ == "__main__":
    main()
