"""`cclmpc train --dry-run`: what a run would need, from its first step, without a file of its own."""

import os

import torch

from cclmpc_dist.config import Config
from cclmpc_dist.distributed import runtime
from cclmpc_dist.training import profiling, run, strategy
from cclmpc_dist.training.checkpoint import Tensors
from cclmpc_dist.training.monitor import duration, memory_mib
from cclmpc_dist.training.state import positions, tensors
from cclmpc_dist.training.trainer import Trainer
from cclmpc_dist.words import counted

MIB = 2**20


def rehearse(config: Config) -> None:
    """Check configuration and corpus, take one step with every loss at the launched world size, say what it took; leave
    nothing behind.

    A run folder that is there is not gone on from, but looked at: could training? Raises InputError as training does.
    """
    accelerator = strategy.start(config)
    try:
        trainer = Trainer(config, accelerator)
        _corpora(trainer)
        trainer.build()
        trainer.describe()
        _estimate(trainer)
        trainer.step = trainer.totals[0] - 1  # where every term counts
        window = trainer.first_step()
        _seen(trainer, window.seconds - window.waited, window.waited)
    except torch.OutOfMemoryError as error:
        raise profiling.exhausted(error) from error
    finally:
        runtime.stop()


def _corpora(trainer: Trainer) -> None:
    """The corpora, and what the folder holds already. Raises InputError where training could not go on from it."""
    say, folder = trainer.monitor.say, trainer.config.folder
    for index in trainer.indexes:
        shards = index.manifest["shards"]
        size = sum(shard["bytes"] for shard in shards) / MIB
        say(f"{index.path}: {counted(len(index), 'case')} in {counted(len(shards), 'shard')}, {size:.0f} MiB, "
            f"{index.where}; index {index.identity[:12]} as in its manifest")  # fmt: skip
    at = run.newest(folder)
    if at >= 0:
        positions(trainer, at, run.resumable_state(trainer.config, at))
        spent = at >= trainer.total
        then = "its budget is spent, training would do nothing" if spent else "training would go on from it"
        say(f"{folder}: has a checkpoint of step {at}: {then}; this step starts anew")


def _estimate(trainer: Trainer) -> None:
    """What a rank holds between steps; said before the step, which may be too much."""
    optim = trainer.config.optim
    module = trainer.strategy.whole()
    weights, model = _mib(dict(module.named_parameters())), _mib(module.state_dict())
    copies = 2 if optim.name == "adamw" else int(optim.momentum > 0)
    parts = trainer.strategy.held(weights, model, copies)
    parts["average"] = model if trainer.ema is not None else 0.0
    parts["method"] = _mib(trainer.method.state_dict() | trainer.method.rank_state_dict())
    told = ", ".join(f"{name} {size:.1f}" for name, size in parts.items())
    trainer.monitor.say(f"memory: {sum(parts.values()):.1f} MiB a rank between steps ({told}); activations come to it")


def _seen(trainer: Trainer, seconds: float, waited: float) -> None:
    """Memory, time and checkpoint sizes: the most of any rank. Collective."""
    say, config, device = trainer.monitor.say, trainer.config, trainer.device
    peak = memory_mib(device)
    groups, mine, _ = tensors(trainer)
    everyone = runtime.gather_json([peak, seconds, waited, _mib(mine)], device)
    peak, seconds, waited = (max(one[column] for one in everyone) for column in range(3))
    whose = "GPU's allocator" if device.type == "cuda" else "process, libraries included"
    say(f"memory: {peak:.0f} MiB at the step's peak (of the {whose}), of {_total(device):.0f}")
    if trainer.skipped:
        say("warning: the step's gradient was not finite: the step was skipped")
    say(f"time: {seconds:.2f} s for this first step, unwarmed, after {waited:.2f} s for its data")
    say(f"time: {trainer.total} such steps would take {duration(seconds * trainer.total)}, without validation and "
        "saving: a rough figure, as later steps are faster")  # fmt: skip
    size = sum(map(_mib, groups.values())) + sum(one[3] for one in everyone)
    say(f"checkpoint: {size:.2f} MiB, {size * config.checkpoint.keep:.2f} for the {config.checkpoint.keep} kept")
    say("dry run: nothing was written")


def _mib(group: Tensors) -> float:
    return sum(tensor.numel() * tensor.element_size() for tensor in group.values()) / MIB


def _total(device: torch.device) -> float:
    """MiB of the device, or of the machine for a CPU."""
    if device.type == "cuda":
        return torch.cuda.get_device_properties(device).total_memory / MIB
    return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") / MIB
