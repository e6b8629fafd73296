"""`python launch/ray_bench.py --config CONFIG --storage FOLDER --workers 1,2,4 [key=value ...]`: `cclmpc bench scale`
on the workers of Ray, one worker group after the other.

docs/benchmarks.md says what is measured, docs/ray.md how to submit a job.
"""

import argparse
import sys
from typing import Any

import ray
import ray.train
from ray.train import RunConfig
from ray.train.torch import TorchTrainer
from ray_workers import ENVIRONMENT, Parser, at, run_driver, scaling

from cclmpc_dist.benching import files, scale, tables
from cclmpc_dist.config import Config, load, parse
from cclmpc_dist.errors import InputError


def main() -> None:
    """Raises InputError for anything a user can mend."""
    arguments = _arguments()
    if arguments.predict:
        scale.check_predictable([arguments.mode], arguments.workers)
    config = at(arguments.storage, load(arguments.config, arguments.overrides))
    ray.init()
    worlds = [world for world in arguments.workers if scale.fits(config, arguments.mode, world)]
    points = [_point(config, world, arguments) for _ in range(arguments.rounds) for world in worlds]
    report = scale.gathered(points, arguments.predict)
    out = arguments.storage / "bench_ray" / config.name / "scale.json"
    files.write(report, out)
    files.write_pages(report, out)
    print(tables.page(report))
    print(f"{out}, .md and .png")


def _point(config: Config, world: int, arguments: argparse.Namespace) -> files.Report:
    """Measured by a group of `world` workers. Raises a worker's InputError."""
    task = {"config": config.model_dump(mode="json"), "mode": arguments.mode, "steps": arguments.steps,
            "command": sys.argv}  # fmt: skip
    trainer = TorchTrainer(
        work,
        train_loop_config=task,
        scaling_config=scaling(world, arguments.cpus),
        run_config=RunConfig(
            name=f"{config.name}-{world}",
            storage_path=str(arguments.storage / "bench_ray"),
            worker_runtime_env={"env_vars": ENVIRONMENT},
        ),
    )
    try:
        found: files.Report = trainer.fit().return_value
    except ray.train.WorkerGroupError as error:
        for cause in error.worker_failures.values():
            if isinstance(cause, InputError):
                raise cause from None
        raise
    return found


def work(task: dict[str, Any]) -> files.Report:
    """One rank: the process group is Ray's."""
    sys.argv = task["command"]  # meta tells it
    return scale.point(parse(task["config"], "ray"), task["mode"], task["steps"])


def _arguments() -> argparse.Namespace:
    parser = Parser("Measure the training step on more and more workers of a Ray cluster.")
    parser.add_argument("--workers", type=_numbers, default=[1, 2], help="numbers of workers (default 1,2)")
    parser.add_argument("--mode", choices=scale.MODES, default="weak", help="weak (default) or strong")
    parser.add_argument("--steps", type=int, default=10, help="steps that the medians are of (default 10)")
    parser.add_argument("--rounds", type=int, default=3, help="how often each number is measured, in turns (default 3)")
    parser.add_argument("--predict", action="store_true", help="add the cost model's clusters of up to 1024 GPUs")
    return parser.parse_intermixed_args()


def _numbers(text: str) -> list[int]:
    if not all(part.isdecimal() and int(part) for part in text.split(",")):
        raise argparse.ArgumentTypeError(f"{text!r}: write numbers with commas between, as in 1,2,4")
    return sorted({int(part) for part in text.split(",")})


if __name__ == "__main__":
    run_driver(main)
