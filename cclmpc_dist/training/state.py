"""What a checkpoint holds of a trainer, and putting it back.

Equal on all ranks: module and average (with norm statistics averaged over ranks), optimiser, method. A rank's own: its
random state, norm statistics, its part of an optimiser that is shared out, and what the method keeps a rank (a sharded
bank), restored at the same world size; at another, every rank starts from the averaged statistics and a fresh random
state, strategy and method share their parts out anew, and batches, draws and positions go on exactly.
"""

from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from cclmpc_dist.data.loader import Stream
from cclmpc_dist.distributed import runtime
from cclmpc_dist.errors import InputError
from cclmpc_dist.training import checkpoint
from cclmpc_dist.training.checkpoint import Tensors
from cclmpc_dist.words import counted

if TYPE_CHECKING:
    from cclmpc_dist.training.trainer import Trainer


def norm_buffers(module: nn.Module) -> list[Tensor]:
    """Floating buffers: the running statistics of batch norm."""
    return [buffer for buffer in module.buffers() if buffer.is_floating_point()]


def random_state(device: torch.device) -> Tensors:
    """Of the generators that dropout draws from: rng.cpu, and rng.cuda on a GPU."""
    state = {"rng.cpu": torch.get_rng_state()}
    return state | ({"rng.cuda": torch.cuda.get_rng_state()} if device.type == "cuda" else {})


def set_random_state(device: torch.device, state: Tensors) -> None:
    """Put back what `random_state` gave, as far as the device is of that kind."""
    torch.set_rng_state(state["rng.cpu"])
    if "rng.cuda" in state and device.type == "cuda":
        torch.cuda.set_rng_state(state["rng.cuda"])


def averaged(module: nn.Module) -> nn.Module:
    """The module, with norm statistics that are the mean over ranks. Collective."""
    runtime.average_(norm_buffers(module))
    return module


def _averaged_state(module: nn.Module) -> Tensors:
    """Its state with norm statistics averaged over ranks, without a copy of the rest. Collective."""
    state: Tensors = dict(module.state_dict())
    names = [name for name, value in module.named_buffers() if value.is_floating_point() and name in state]
    state |= {name: state[name].clone() for name in names}
    runtime.average_([state[name] for name in names])
    return state


def tensors(trainer: "Trainer") -> tuple[dict[str, Tensors], Tensors, dict[str, Any]]:
    """Rank 0's files, this rank's own, and the optimiser's values for the state. Collective."""
    modules = _modules(trainer)
    optimizer, own, values = trainer.strategy.pack()
    groups: dict[str, Tensors] = {"model": _averaged_state(trainer.strategy.whole())}
    if trainer.ema is not None:
        groups["ema"] = _averaged_state(trainer.ema.module)
    groups |= {"optimizer": optimizer, "method": trainer.method.state_dict()}
    mine = random_state(trainer.device)
    for name, module in modules.items():
        mine |= {f"{name}.{buffer}": value for buffer, value in module.named_buffers()}
    mine |= {f"optimizer.{name}": value for name, value in own.items()}
    mine |= {f"method.{name}": value for name, value in trainer.method.rank_state_dict().items()}
    return groups, mine, values


def save(trainer: "Trainer") -> None:
    """Hand a copy of everything to the checkpoint's writer. Collective."""
    groups, mine, values = tensors(trainer)
    state = {
        "phase": trainer.phase,
        "phase_step": trainer.step,
        "skipped": trainer.skipped,
        "best": trainer.best,
        "streams": {
            part.name: part.order.state(trainer.positions[name])
            for name, stream in trainer.streams.items()
            for part in stream.parts
        },
        "optimizer": values,
        "config": trainer.config.model_dump(mode="json"),
    }
    best = int(trainer.best["step"]) if trainer.best else None
    trainer.checkpoints.save(trainer.done, groups, mine, state, best)


def restore(trainer: "Trainer", step: int, state: dict[str, Any]) -> list[str]:
    """Put checkpoint `step` back into a trainer that was just built for its phase. Returns what there is to tell of it.

    Raises InputError where the streams are others, or a stream's corpus, selection, batch or seed is not the
    checkpoint's.
    """
    folder = trainer.checkpoints.folder
    trainer.positions = positions(trainer, step, state)
    trainer.step, trainer.done, trainer.skipped = state["phase_step"], step, state["skipped"]
    trainer.best, trainer.checkpoints.seconds = state["best"], state.get("save_seconds")
    trainer.strategy.load(checkpoint.read_group(folder, step, "model"))
    if trainer.ema is not None:
        trainer.ema.module.load_state_dict(checkpoint.read_group(folder, step, "ema"))
    trainer.strategy.unpack(
        checkpoint.read_group(folder, step, "optimizer"),
        lambda rank: _part(checkpoint.read_rank(folder, step, rank), "optimizer"),
        state["optimizer"],
        state["world_size"],
    )
    trainer.method.load_state_dict(checkpoint.read_group(folder, step, "method"))
    if state["world_size"] == trainer.world:
        _restore_rank(trainer, _modules(trainer), checkpoint.read_rank(folder, step, trainer.rank))
        return []
    if trainer.method.rank_state_dict():
        parts = [checkpoint.read_rank(folder, step, rank) for rank in range(state["world_size"])]
        return [trainer.method.deal([_part(part, "method") for part in parts])]
    return []


def positions(trainer: "Trainer", step: int, state: dict[str, Any]) -> dict[str, int]:
    """Microbatches that checkpoint `step` has taken from each stream. Raises InputError as restore does of streams."""
    _check_streams(trainer, step, state)
    found = {}
    for name, stream in trainer.streams.items():
        (found[name],) = {_position(part, state["streams"][part.name]) for part in stream.parts}
    return found


def _position(part: Stream, state: dict[str, Any]) -> int:
    try:
        return part.order.position(state)
    except InputError as error:
        raise InputError(f"{part.index.path}: {error}") from None


def _check_streams(trainer: "Trainer", step: int, state: dict[str, Any]) -> None:
    """An unset batch follows the number of ranks, and what it leaves to data.path, perhaps nothing, with it."""
    was = {name: order["batch"] for name, order in state["streams"].items()}
    now = {part.name: part.order.batch_size for stream in trainer.streams.values() for part in stream.parts}
    if was != now:
        then = counted(state["world_size"], "rank")
        raise InputError(f"{trainer.config.folder}: its checkpoint of step {step}, by {then}, has {_batches(was)} a "
                         f"microbatch, and {counted(trainer.world, 'rank')} would have {_batches(now)}: go on with "
                         f"{then}, or in a new run set data.batch_labelled and data.batch_unlabelled")  # fmt: skip


def _batches(sizes: dict[str, int]) -> str:
    return ", ".join(f"{size} {name}" for name, size in sizes.items())


def _restore_rank(trainer: "Trainer", modules: dict[str, nn.Module], mine: Tensors) -> None:
    set_random_state(trainer.device, mine)
    for name, module in modules.items():
        module.load_state_dict(_part(mine, name), strict=False)
    if own := _part(mine, "method"):
        trainer.method.load_rank_state_dict(own)


def _part(tensors: Tensors, name: str) -> Tensors:
    """Tensors called `<name>.*`, without that."""
    return {key.removeprefix(f"{name}."): value for key, value in tensors.items() if key.startswith(f"{name}.")}


def _modules(trainer: "Trainer") -> dict[str, nn.Module]:
    return {"model": trainer.module} | ({"ema": trainer.ema.module} if trainer.ema is not None else {})
