"""What the drivers of Ray here share: options, places that every node sees, the workers asked for, how they end.

Only drivers use it: a worker finds the package, but not this folder.
"""

import argparse
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any, NoReturn

import ray
from ray.train import ScalingConfig

from cclmpc_dist.cli import BAD_INPUT
from cclmpc_dist.config import Config
from cclmpc_dist.errors import InputError

ENVIRONMENT = {
    "TORCH_CPP_LOG_LEVEL": "ERROR",  # as cclmpc_dist.cli.main
    "RAY_TRAIN_ENABLE_PRINT_PATCH": "0",  # Ray would show each line twice
}


class Parser(argparse.ArgumentParser):
    """Has the options that every driver takes; a usage error is an InputError."""

    def __init__(self, description: str) -> None:
        super().__init__(description=description)
        self.add_argument("--config", type=Path, required=True, help="YAML file; configs/ has examples")
        self.add_argument(
            "--storage", type=Path, required=True, help="folder that every node sees, absolute; relative runs, "
            "data.path, data.cache, deepspeed are taken from it",
        )  # fmt: skip
        self.add_argument("--cpus", type=int, default=1, help="cores of a worker, which are its threads (default 1)")
        self.add_argument("overrides", nargs="*", metavar="key=value", help="settings; docs/configuration.md has all")

    def error(self, message: str) -> NoReturn:
        raise InputError(f"{message}: see `python launch/{self.prog} --help`")


def at(storage: Path, config: Config) -> Config:
    """The configuration with absolute places: Ray gives the driver and each worker a working folder of its own."""
    if not storage.is_absolute():
        raise InputError(f"--storage {storage} is relative: give the absolute path of a folder that every node sees")

    def there(path: str) -> str:
        return path if "://" in path else str(storage / path)

    further = {
        name: corpus.model_copy(update={"path": there(corpus.path)}) for name, corpus in config.data.further.items()
    }
    cache = config.data.cache and str(storage / config.data.cache)
    data = config.data.model_copy(update={"path": there(config.data.path), "further": further, "cache": cache})
    deepspeed = config.deepspeed and str(storage / config.deepspeed)
    return config.model_copy(update={"data": data, "deepspeed": deepspeed, "runs": str(storage / config.runs)})


def scaling(workers: int | tuple[int, int], cpus: int, **options: Any) -> ScalingConfig:
    """So many workers, or as many of (least, most) as there is room for; each with a GPU where the cluster has any."""
    cards = ray.cluster_resources().get("GPU", 0)
    return ScalingConfig(num_workers=workers, use_gpu=cards > 0, resources_per_worker={"CPU": cpus}, **options)


def run_driver(main: Callable[[], int | None]) -> NoReturn:
    """Run a driver and leave with its exit code; anything that a user can mend is told in a line."""
    try:
        sys.exit(main())
    except InputError as error:
        sys.stderr.writelines(f"cclmpc: {line}\n" for line in str(error).splitlines())
        sys.exit(BAD_INPUT)
