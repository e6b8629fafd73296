"""`python launch/ray_train.py --config CONFIG --storage FOLDER [key=value ...]`: `cclmpc train` on the workers of Ray.

The run folder is the truth: a restarted worker group goes on from its newest checkpoint, and Ray is told of the same
folders, not given copies. With --doctor the workers are looked at instead. docs/ray.md says how to submit it.
"""

import argparse
import re
import sys
import tempfile
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path
from typing import Any

import ray
import ray.train
from ray.train import CheckpointConfig, FailureConfig, RunConfig, UserCallback
from ray.train.torch import TorchConfig, TorchTrainer
from ray.util.metrics import Gauge
from ray_workers import ENVIRONMENT, Parser, at, run_driver, scaling

from cclmpc_dist.cli import FAILED, PREEMPTED
from cclmpc_dist.config import Config, load, parse
from cclmpc_dist.distributed import doctor, runtime
from cclmpc_dist.errors import InputError
from cclmpc_dist.training import run, setup, trainer

RAYS_RECORD = "checkpoint_manager_snapshot.json"  # in the run folder: the checkpoints that Ray was told of


def main() -> int:
    """Exit code: 0 done, 1 the doctor found a failure, 75 preempted and saved. Raises InputError for anything a user
    can mend."""
    arguments = _arguments()
    config = at(arguments.storage, load(arguments.config, arguments.overrides))
    if arguments.doctor:
        return _examine(config, arguments)
    check(config, arguments.workers)
    return _train(config, arguments)


def _train(config: Config, arguments: argparse.Namespace) -> int:
    task = {"config": config.model_dump(mode="json"), "command": sys.argv}
    options = RunConfig(
        name=config.name,
        storage_path=config.runs,  # so that Ray's storage is the run folder
        failure_config=FailureConfig(max_failures=arguments.max_failures),
        checkpoint_config=CheckpointConfig(num_to_keep=None),  # checkpoint.keep is what removes old ones
        callbacks=[NoSecondTry()],
        worker_runtime_env={"env_vars": ENVIRONMENT},
    )
    result = _on_workers(work, task, options, runtime.COLLECTIVE_TIMEOUT, arguments)
    print(f"{config.folder}: {'its budget is spent' if result.return_value else 'preempted and saved'}; "
          f"Ray's newest checkpoint is {result.checkpoint.path if result.checkpoint else None}")  # fmt: skip
    return 0 if result.return_value else PREEMPTED


def _examine(config: Config, arguments: argparse.Namespace) -> int:
    with tempfile.TemporaryDirectory() as place:  # Ray wants a storage, and leaves a folder there
        options = RunConfig(storage_path=place, callbacks=[NoSecondTry()], worker_runtime_env={"env_vars": ENVIRONMENT})
        result = _on_workers(look, {"folder": config.runs}, options, doctor.TIMEOUT, arguments)
    return 0 if result.return_value else FAILED


def _on_workers(
    loop: Callable[[dict[str, Any]], bool], task: dict[str, Any], options: RunConfig, timeout: timedelta,
    arguments: argparse.Namespace,
) -> ray.train.Result:  # fmt: skip
    """Run the loop on the workers asked for. Raises a worker's InputError."""
    ray.init()
    least, most = arguments.workers
    try:
        return TorchTrainer(
            loop,
            train_loop_config=task,
            torch_config=TorchConfig(timeout_s=int(timeout.total_seconds())),
            scaling_config=scaling(
                most if least == most else (least, most),
                arguments.cpus,
                elastic_resize_monitor_interval_s=arguments.resize_seconds,
            ),
            run_config=options,
        ).fit()
    except ray.train.ControllerError as error:
        if isinstance(error.controller_failure, InputError):
            raise error.controller_failure from None
        raise


def _arguments() -> argparse.Namespace:
    parser = Parser("Train on the workers of a Ray cluster.")
    parser.add_argument(
        "--workers", type=_workers, default=(1, 1),
        help="processes: N, or MIN,MAX for as many of them as the cluster has room for (default 1)",
    )  # fmt: skip
    parser.add_argument(
        "--resize-seconds", type=float, default=60, help="how often elastic workers look for room (default 60)"
    )
    parser.add_argument(
        "--max-failures", type=int, default=3, help="restarts after lost workers; -1 for any number (default 3)"
    )
    parser.add_argument(
        "--doctor", action="store_true", help="do not train: look at what training depends on, on these workers"
    )
    arguments = parser.parse_intermixed_args()
    if not arguments.resize_seconds >= 0:
        parser.error(f"--resize-seconds {arguments.resize_seconds:g}: give 0 or more")
    return arguments


def _workers(text: str) -> tuple[int, int]:
    """N or MIN,MAX as (least, most)."""
    found = re.fullmatch(r"(\d+)(?:,(\d+))?", text)
    least, most = (int(found[1]), int(found[2] or found[1])) if found else (0, 0)
    if not 1 <= least <= most:
        raise argparse.ArgumentTypeError(f"{text!r}: give N, or MIN,MAX")
    return least, most


def check(config: Config, workers: tuple[int, int]) -> None:
    """Make the run folder ready for Ray, and raise InputError now for what every worker would raise later.

    An elastic run must be able to go on at any number of workers, with the same batches.
    """
    indexes, method, cases = setup.corpora(config)
    counts = range(workers[0], workers[1] + 1)
    sizes = {tuple(_batches(setup.streams(config, indexes, method, cases, count))) for count in counts}
    if len(sizes) > 1:
        raise InputError(f"--workers {workers[0]},{workers[1]}: a batch that is not set follows the number of workers: "
                         "set data.batch_labelled and data.batch_unlabelled")  # fmt: skip
    with run.locked(config.folder):
        (config.folder / RAYS_RECORD).unlink(missing_ok=True)  # it may name checkpoints that are gone: Ray would stop


def _batches(streams: dict[str, Any]) -> list[int]:
    return [stream.batch_size for stream in streams.values()]


def work(task: dict[str, Any]) -> bool:
    """One rank: the process group is Ray's, the rest as under torchrun. True once the budget is spent."""
    sys.argv = task["command"]  # environment.json tells it
    config = parse(task["config"], "ray")
    reporter = Reporter(config)
    finished = trainer.train(config, reporter.listen)
    reporter.report()
    return finished


def look(task: dict[str, Any]) -> bool:
    """One rank of the doctor. True where nothing failed."""
    return doctor.examine(Path(task["folder"]))


class Reporter:
    """Tells Ray what rank 0 logs: gauges at each line; once a save, the newest whole checkpoint and the last scalars.

    Not each line to ray.train.report: it stops all ranks until Ray's controller, which looks every two seconds, has
    taken the report before, and Ray keeps scalars only beside a checkpoint.
    """

    def __init__(self, config: Config) -> None:
        self.name, self.folder = config.name, config.folder
        self.first = ray.train.get_context().get_world_rank() == 0
        self.gauges: dict[str, Gauge] = {}
        self.scalars: dict[str, float] = {}
        self.saved = 0

    def listen(self, step: int, saved: int, values: dict[str, float]) -> None:
        self.scalars = {"step": float(step)} | values
        if self.first:
            for name, value in self.scalars.items():
                self._gauge(name).set(value)
        if saved > self.saved:
            self.saved = saved
            self.report()

    def report(self) -> None:
        """On every rank equally often."""
        step = run.newest(self.folder) if self.first else -1
        place = run.checkpoints_folder(self.folder) / f"step-{step:09d}"
        ray.train.report(
            self.scalars if self.first else {},
            checkpoint=ray.train.Checkpoint.from_directory(place) if step >= 0 else None,
            checkpoint_upload_mode=ray.train.CheckpointUploadMode.NO_UPLOAD,
        )

    def _gauge(self, name: str) -> Gauge:
        if name not in self.gauges:
            self.gauges[name] = Gauge(f"cclmpc_{re.sub(r'[^a-zA-Z0-9_]', '_', name)}", tag_keys=("run",))
            self.gauges[name].set_default_tags({"run": self.name})
        return self.gauges[name]


class NoSecondTry(UserCallback):
    """Ends the job when a worker's input is wrong: an error of Ray's controller is not tried again."""

    def after_exception(self, run_context: Any, worker_exceptions: dict[int, Exception]) -> None:
        for error in worker_exceptions.values():
            if isinstance(error, InputError):
                raise error


if __name__ == "__main__":
    run_driver(main)
