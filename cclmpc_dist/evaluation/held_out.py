"""Scores a run's checkpoint on a split of its corpus."""

import shutil
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Literal

from torch import nn

from cclmpc_dist.config import Config, load
from cclmpc_dist.data.index import Index, select
from cclmpc_dist.data.reader import Reader
from cclmpc_dist.data.remote import open_corpus
from cclmpc_dist.distributed import runtime
from cclmpc_dist.errors import InputError
from cclmpc_dist.evaluation.cases import evaluate_cases
from cclmpc_dist.evaluation.evaluate import Meta, save
from cclmpc_dist.evaluation.metrics import Row
from cclmpc_dist.methods.method import Corpus
from cclmpc_dist.methods.registry import create
from cclmpc_dist.models.folding import fold
from cclmpc_dist.training import checkpoint, run, setup
from cclmpc_dist.words import counted

Which = Literal["last", "best"]
Split = Literal["val", "select", "unlabelled", "labelled"]
TAKEN = (  # settings that an evaluation reads, without those that are the network's
    "data.path", "data.cache", "data.cache_gib", "data.labelled", "data.select", "data.patch",
    "evaluation.stride", "evaluation.blend", "evaluation.batch", "precision", "channels_last", "ema",
    "ccl_mpc.predictor",
)  # fmt: skip


def evaluate_run(
    folder: Path, which: Which, split: Split, overrides: Sequence[str], say: Callable[[str], None]
) -> tuple[list[Row], Meta]:
    """Score a run's checkpoint on a split of its corpus and write RUN/eval/. Collective.

    overrides change values such as evaluation.stride or data.path; ema=0 takes the weights themselves. Raises
    InputError where run, checkpoint or split is not there, the split has no label, or the checkpoint is of another
    network.
    """
    if not (folder / "config.yaml").is_file():
        raise InputError(f"{folder}: no run folder: name one that `cclmpc train` wrote")
    config = load(folder / "config.yaml", overrides)
    _check_taken(overrides)
    device = runtime.start(config.precision).device
    index = open_corpus(config.data)
    samples = select(index, config.data.labelled, config.data.select)[split]
    if not len(samples):
        remedy = {"val": "shard with --val-last, or choose another --split", "select": "train with data.select"}.get(
            split, "choose another --split"
        )
        raise InputError(f"{config.data.path}: no case in the {split} split: {remedy}")
    if not index["label_bytes"][samples].any():
        raise InputError(f"{config.data.path}: no case of the {split} split has a label to score against: shard it "
                         "with its labels, or choose another --split")  # fmt: skip
    step = _step(folder, which)
    method = create(config, Corpus(index.channels, index.classes))
    module = setup.module(config, method).to(device).eval()
    weights: Literal["model", "ema"] = "ema" if config.ema else "model"
    _load(module, folder, step, weights)
    fold(module)
    if runtime.rank() == 0:
        shutil.rmtree(folder / "eval", ignore_errors=True)  # predictions of another split or corpus are not mixed in
        cases = counted(len(samples), f"{split} case")
        if split in ("labelled", "unlabelled") and not any(one.startswith("data.path=") for one in overrides):
            cases += ", on which it was trained"
        say(f"{folder}: step {step} ({which}), {weights} weights, {cases}, stride {config.stride}")
    runtime.barrier()
    rows = evaluate_cases(
        method.predictor(module), index, samples, config, device, folder / "eval", lambda key: say(f"  {key}")
    )
    meta = _meta(config, index, step, which, weights, split, Reader(index).unit(int(samples[0])))
    if runtime.rank() == 0:
        save(folder / "eval", rows, meta)
    runtime.barrier()
    return rows, meta


def _check_taken(overrides: Sequence[str]) -> None:
    """Raises InputError where a setting would change nothing, or the network."""
    keys = [item.partition("=")[0] for item in overrides]
    others = [key for key in keys if key not in TAKEN]
    if others:
        raise InputError(f"command line: {', '.join(others)}: an evaluation has it from the run, or no use for it: "
                         f"leave it out, or change {', '.join(TAKEN)}")  # fmt: skip


def _meta(
    config: Config, index: Index, step: int, which: Which, weights: Literal["model", "ema"], split: Split, unit: str
) -> Meta:
    return Meta(
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
        unit=unit,
    )


def _load(module: nn.Module, folder: Path, step: int, weights: str) -> None:
    found = checkpoint.read_group(run.checkpoints_folder(folder), step, weights)
    if not found:
        raise InputError(f"{folder}: trained without an average of the weights: leave ema as it was")
    shapes = {name: value.shape for name, value in found.items()}
    if shapes != {name: value.shape for name, value in module.state_dict().items()}:
        raise InputError(f"{folder}: its checkpoint holds another network: leave model, method, data.patch and the "
                         "corpus's classes as they were")  # fmt: skip
    module.load_state_dict(found)


def _step(folder: Path, which: Which) -> int:
    """The step of a checkpoint that is whole."""
    checkpoints, newest = run.checkpoints_folder(folder), run.newest(folder)
    if newest < 0:
        raise InputError(f"{folder}: holds no complete checkpoint: train it first")
    state = checkpoint.read_state(checkpoints, newest, _without)
    if which == "last":
        return newest
    if not state["best"]:
        select, every = state["config"]["data"]["select"], state["config"]["evaluation"]["every_steps"]
        raise InputError(f"{folder}: has no best checkpoint, as no validation chose one (data.select = {select}, "
                         f"evaluation.every_steps = {every}): take --checkpoint last, or set both in a new run"
                         )  # fmt: skip
    best = int(state["best"]["step"])
    checkpoint.read_state(checkpoints, best, lambda *_: "take --checkpoint last")
    return best


def _without(place: Path, before: list[int]) -> str:
    return f"remove {place} {f'to evaluate step {before[-1]}' if before else 'and train again'}"
