"""Scores cases of a corpus: during training on the cases set aside, and a finished run's checkpoint."""

from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Literal

import numpy as np
import torch

from cclmpc_dist.config import Config, load
from cclmpc_dist.data.index import Index, select
from cclmpc_dist.data.reader import Reader
from cclmpc_dist.distributed import runtime
from cclmpc_dist.errors import InputError
from cclmpc_dist.evaluation.evaluate import Evaluated, Meta, evaluate, gather_rows, save, share
from cclmpc_dist.evaluation.inference import Predict
from cclmpc_dist.evaluation.metrics import Row
from cclmpc_dist.methods.method import Corpus
from cclmpc_dist.methods.registry import create
from cclmpc_dist.training import checkpoint, run

Which = Literal["last", "best"]
Split = Literal["val", "select", "unlabelled", "labelled"]


def evaluate_cases(
    predict: Predict,
    index: Index,
    samples: Sequence[int] | np.ndarray,
    config: Config,
    device: torch.device,
    folder: Path | None = None,
    done: Callable[[str], None] | None = None,
) -> list[Row]:
    """Rows of all `samples` (index numbers) on every rank, each case scored by one rank. Collective."""
    mine = [int(samples[number]) for number in share(len(samples), runtime.rank(), runtime.world_size())]
    with torch.autocast(device.type, dtype=_autocast(config), enabled=config.precision != "fp32"):
        rows = evaluate(
            predict,
            _cases(index, mine),
            config.data.patch,
            config.stride,
            index.classes,
            blend=config.evaluation.blend,
            batch=config.evaluation.batch,
            device=device,
            folder=folder,
            done=done,
        )
    return gather_rows(rows, device)


def evaluate_run(
    folder: Path, which: Which, split: Split, overrides: Sequence[str], say: Callable[[str], None]
) -> tuple[list[Row], Meta]:
    """Score a run's checkpoint on a split of its corpus and write RUN/eval/.

    overrides change config values such as evaluation.stride or data.path. Raises InputError where run, checkpoint or
    split is not there.
    """
    if not (folder / "config.yaml").is_file():
        raise InputError(f"{folder}: no run folder: name one that `cclmpc train` wrote")
    config = load(folder / "config.yaml", overrides)
    device = runtime.start(config.precision).device
    index = Index.open(config.data.path)
    groups = select(index, config.data.labelled, config.data.select)
    if not len(groups[split]):
        raise InputError(
            f"{config.data.path}: no case in the {split} split: choose another --split, or shard with --val-last"
        )
    step = _step(folder, which)
    method = create(config, Corpus(index.channels, index.classes))
    module = method.build().to(device).eval()
    weights: Literal["model", "ema"] = "ema" if config.ema else "model"
    checkpoint.read_state(run.checkpoints_folder(folder), step)
    module.load_state_dict(checkpoint.read_group(run.checkpoints_folder(folder), step, weights))
    count = f"{len(groups[split])} {split} cases"
    say(f"{folder}: step {step} ({which}), {weights} weights, {count}, stride {config.stride}")
    rows = evaluate_cases(
        method.predictor(module),
        index,
        groups[split],
        config,
        device,
        folder / "eval",
        lambda key: say(f"  {key}"),
    )
    meta = Meta(
        step=step,
        checkpoint=which,
        weights=weights,
        dataset=config.data.path,
        split=split,
        cropped_by_label=bool(index.manifest["cropped_by_label"]),
        patch=config.data.patch,
        stride=config.stride,
        blend=config.evaluation.blend,
        classes=index.classes,
    )
    if runtime.rank() == 0:
        save(folder / "eval", rows, meta)
    runtime.barrier()
    return rows, meta


def _step(folder: Path, which: Which) -> int:
    newest = run.newest(folder)
    if newest < 0:
        raise InputError(f"{folder}: holds no complete checkpoint: train it first")
    if which == "last":
        return newest
    best = checkpoint.read_state(run.checkpoints_folder(folder), newest)["best"]
    if not best:
        raise InputError(
            f"{folder}: has no best checkpoint: it was trained without data.select and evaluation.every_steps"
        )
    return int(best["step"])


def _cases(index: Index, samples: Sequence[int]) -> Iterator[Evaluated]:
    reader = Reader(index)
    for sample in samples:
        _, label = reader.volume(sample)
        spacing = tuple(float(edge) for edge in index["spacing"][sample])
        yield index.key(sample), torch.from_numpy(reader.normalised(sample)), label, spacing


def _autocast(config: Config) -> torch.dtype:
    return torch.float16 if config.precision == "fp16" else torch.bfloat16
