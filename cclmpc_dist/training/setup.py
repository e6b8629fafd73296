"""What a run trains on: its streams, and how many steps its budget is."""

import numpy as np
import torch
from torch import nn

from cclmpc_dist.config import Config, check_world
from cclmpc_dist.data.ahead import blocks
from cclmpc_dist.data.index import Index
from cclmpc_dist.data.loader import Stream
from cclmpc_dist.data.remote import GIB, RemoteIndex
from cclmpc_dist.errors import InputError
from cclmpc_dist.methods.method import Method
from cclmpc_dist.training.schedule import total_steps


def module(config: Config, method: Method) -> nn.Module:
    """The method's module, in the memory layout of `channels_last`."""
    built = method.build()
    if config.channels_last:
        built.to(memory_format={2: torch.channels_last, 3: torch.channels_last_3d}[config.dims])  # type: ignore[call-overload]
    return built


def streams(
    config: Config, index: Index, method: Method, cases: dict[str, np.ndarray], world_size: int
) -> dict[str, Stream]:
    """The streams of all the method's phases. Raises InputError with every way in which the settings do not fit."""
    names = list({name: None for phase in method.phases for name in phase.streams})
    problems = check_world(config, names, world_size) + _misfits(config, index)
    problems += [
        f"{config.data.path} leaves no case for the {name} stream: change data.labelled or method"
        for name in names
        if not len(cases[name])
    ]
    if problems:
        raise InputError("\n".join(problems))
    return {
        name: Stream(
            index,
            name,
            cases[name],
            config.batch(name, world_size),
            config.seed,
            config.data.patch,
            block=config.data.block,
            oversample=config.data.oversample_foreground if name == "labelled" else 0.0,
            rotate=config.data.rotate,
            flip=config.data.flip,
            with_label=name == "labelled",
            on_error=config.data.on_error,
        )
        for name in names
    }


def _misfits(config: Config, index: Index) -> list[str]:
    path, patch = config.data.path, list(config.data.patch)
    if config.dims != index.dims:
        return [f"data.patch has {config.dims} numbers and {path} {index.dims} axes: give one an axis"]
    if (index["shape"][:, 1:] < np.array(patch)).any(1).all():
        return [f"data.patch = {patch} is larger than every volume of {path}: take a smaller one"]
    return []


def cache_notes(config: Config, index: Index, streams: dict[str, Stream]) -> list[str]:
    """What the run needs of data.cache, where the corpus is remote."""
    if not isinstance(index, RemoteIndex):
        return []
    used, limit = sum(blocks(index, stream.order) for stream in streams.values()) / GIB, config.data.cache_gib
    note = f"data.cache: {config.data.cache}, {limit:g} GiB; the blocks in use take up to {used:.2g} GiB over all ranks"
    few = [f"warning: {note}: next to nothing is fetched ahead: raise data.cache_gib, or in a new run lower data.block"]
    return few if used > limit else [note]


def steps_of_phases(config: Config, method: Method, streams: dict[str, Stream]) -> list[int]:
    """T of each phase: its share of the budget in optimiser steps, at least 1."""
    batches = {name: stream.order.batch_size for name, stream in streams.items()}
    whole = total_steps(config, batches, {name: stream.order.steps for name, stream in streams.items()})
    return [max(1, round(phase.share * whole)) for phase in method.phases]
