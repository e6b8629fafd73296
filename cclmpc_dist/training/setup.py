"""What a run trains on: its streams, and how many steps its budget is."""

import math
from collections.abc import Sequence

import numpy as np
import torch
from torch import nn

from cclmpc_dist.config import Config
from cclmpc_dist.data.ahead import in_use
from cclmpc_dist.data.columns import chunks
from cclmpc_dist.data.index import Index, select, training
from cclmpc_dist.data.loader import Mixture, Stream
from cclmpc_dist.data.remote import GIB, RemoteIndex, open_corpora
from cclmpc_dist.errors import InputError
from cclmpc_dist.methods.exchange_plan import bank_offers
from cclmpc_dist.methods.method import Corpus, Method, Phase
from cclmpc_dist.methods.registry import METHODS, create
from cclmpc_dist.training.schedule import total_steps
from cclmpc_dist.words import counted

Part = tuple[str, Index, np.ndarray, int]  # name, corpus, samples, lanes


def corpora(config: Config) -> tuple[list[Index], Method, dict[str, np.ndarray]]:
    """The corpora that the method draws from, that of data.path first; the method; and data.path's cases, as select
    parts them. Raises InputError."""
    data = config.data
    if "unlabelled" not in _streams_of(METHODS[config.method].phases):
        data = data.model_copy(update={"further": {}})
    indexes = open_corpora(data)
    method = create(config, Corpus(indexes[0].channels, indexes[0].classes))
    return indexes, method, select(indexes[0], data.labelled, data.select)


def _streams_of(phases: Sequence[Phase]) -> list[str]:
    return list({name: None for phase in phases for name in phase.streams})


def module(config: Config, method: Method) -> nn.Module:
    """The method's module, in the memory layout of `channels_last`."""
    built = method.build()
    if config.channels_last:
        built.to(memory_format={2: torch.channels_last, 3: torch.channels_last_3d}[config.dims])  # type: ignore[call-overload]
    return built


def streams(
    config: Config, indexes: Sequence[Index], method: Method, cases: dict[str, np.ndarray], world_size: int
) -> dict[str, Mixture]:
    """The streams of all the method's phases. The rest is what `corpora` gives.

    Raises InputError with every way in which the settings do not fit.
    """
    names = _streams_of(method.phases)
    parts = {name: _parts(config, indexes, cases, name, world_size) for name in names}
    problems = check_world(config, names, world_size) + _misfits(config, indexes)
    problems += [
        f"{index.path} leaves no case for the {part} stream: {_remedy(config, part)}"
        for found in parts.values()
        for part, index, rows, lanes in found
        if not len(rows) and lanes > 0
    ]
    if problems:
        raise InputError("\n".join(problems))
    return {
        name: Mixture([_stream(config, part, index, rows, lanes) for part, index, rows, lanes in found if lanes])
        for name, found in parts.items()
    }


def check_world(config: Config, streams: Sequence[str], world_size: int) -> list[str]:
    """Batches that the ranks cannot share evenly. One line a problem."""
    problems = []
    shared = math.gcd(*(config.batch(stream, world_size) for stream in streams))
    fewer = max(ranks for ranks in range(1, world_size + 1) if shared % ranks == 0)
    for stream in streams:
        size = config.batch(stream, world_size)
        if size % world_size:
            up = math.ceil(size / world_size) * world_size
            problems.append(f"data.batch_{stream} = {size} does not divide over {world_size} ranks: start "
                            f"{fewer}, or in a new run take {up}")  # fmt: skip
    if "unlabelled" in streams and (left := config.lanes(world_size)[0]) < 0:
        size = config.batch("unlabelled", world_size)
        problems.append(f"data.batch_unlabelled = {size} is less than the {size - left} images of data.further: raise "
                        "it, by as many as data.path is to give")  # fmt: skip
    if config.method != "ccl_mpc":
        return problems
    contrast = config.ccl_mpc.contrast
    if world_size % (contrast.group or world_size):
        ranks = counted(world_size, "rank")
        problems.append(f"ccl_mpc.contrast.group = {contrast.group} does not divide over {ranks}: start a multiple of "
                        f"{contrast.group}, or in a new run set a divisor or null")  # fmt: skip
    offered = bank_offers(config, sum(config.batch(stream, world_size) for stream in streams))
    sharded = contrast.bank_layout == "sharded"
    if sharded:
        offered = math.ceil(offered / world_size)
    if config.ccl_mpc.lambda_cgcl and 0 < contrast.bank < offered:
        remedy = "start more ranks, or in a new run" if sharded else "take bank_layout: sharded, or"
        problems.append(f"ccl_mpc.contrast.bank = {contrast.bank} holds less than one step's {offered} offers a class: "
                        f"{remedy} set it to {offered} or more, to 0 for none, or bank_offer lower")  # fmt: skip
    return problems


def _parts(
    config: Config, indexes: Sequence[Index], cases: dict[str, np.ndarray], name: str, world_size: int
) -> list[Part]:
    if name == "labelled":
        return [(name, indexes[0], cases[name], config.batch(name, world_size))]
    own, *lanes = config.lanes(world_size)
    further = zip(sorted(config.data.further), indexes[1:], lanes, strict=True)
    others = [(f"{name}.{corpus}", index, training(index), size) for corpus, index, size in further]
    return [(name, indexes[0], cases[name], own), *others]


def _remedy(config: Config, part: str) -> str:
    if part == "unlabelled" and config.data.further:
        return "change data.labelled, or lower data.batch_unlabelled to the images of data.further"
    return "leave it out of data.further" if "." in part else "change data.labelled or method"


def _stream(config: Config, name: str, index: Index, rows: np.ndarray, lanes: int) -> Stream:
    data = config.data
    return Stream(
        index,
        name,
        rows,
        lanes,
        config.seed,
        data.patch,
        block=data.block,
        oversample=data.oversample_foreground if name == "labelled" else 0.0,
        rotate=data.rotate,
        flip=data.flip,
        with_label=name == "labelled",
        on_error=data.on_error,
    )


def _misfits(config: Config, indexes: Sequence[Index]) -> list[str]:
    found = _against_patch(config, indexes[0])
    for number, index in enumerate(indexes[1:], 1):
        found += _twins(indexes[:number], index) or _differences(indexes[0], index) or _against_patch(config, index)
    return found


def _twins(before: Sequence[Index], other: Index) -> list[str]:
    """That one of the corpora before it is the same."""
    for number, index in enumerate(before):
        if index.identity == other.identity:
            harm = "whose cases would come twice" if number else "whose labelled cases would be unlabelled too"
            return [f"{other.path} and {index.path} are the same corpus, {harm}: give another, or leave it out of "
                    "data.further"]  # fmt: skip
    return []


def _differences(first: Index, other: Index) -> list[str]:
    """Why one network cannot learn from both."""
    pair, remedy = f"{other.path} and {first.path}", "or leave it out of data.further"
    numbers = {"axes": (other.dims, first.dims), "channels": (other.channels, first.channels)}
    if other.manifest["counts"]["with_label"]:  # without labels the number says nothing
        numbers["classes"] = other.classes, first.classes
    return [
        f"{pair} have {theirs} and {ours} {what}: shard one of them again to match, {remedy}"
        for what, (theirs, ours) in numbers.items()
        if theirs != ours
    ]


def _against_patch(config: Config, index: Index) -> list[str]:
    patch = list(config.data.patch)
    if config.dims != index.dims:
        return [f"data.patch has {config.dims} numbers and {index.path} {index.dims} axes: give one an axis"]
    shapes = (index["shape"][rows, 1:] for rows in chunks(len(index)))  # the first ones tell, as a rule
    if any((shape >= np.array(patch)).all(1).any() for shape in shapes):
        return []
    return [f"data.patch = {patch} is larger than every volume of {index.path}: take a smaller one"]


def label_notes(index: Index, cases: dict[str, np.ndarray]) -> list[str]:
    """Where data.labelled takes other cases than `cclmpc shard --labelled` did."""
    given = index.manifest.get("settings", {}).get("labelled")
    taken = np.sort(np.concatenate([cases["labelled"], cases["select"]]))
    said = np.flatnonzero(index["labelled"])
    if given is None or np.array_equal(taken, said):
        return []
    other = "other " if len(taken) == len(said) else ""
    return [f"labelled: data.labelled takes {len(taken)} {other}cases, the shards say {len(said)} "
            f"(--labelled {given}): the configuration holds"]  # fmt: skip


def cache_bytes(streams: dict[str, Mixture]) -> int:
    """What the blocks in use take of data.cache at most, over all ranks; of no remote corpus, what they would take."""
    parts = _remote(streams) or [part for stream in streams.values() for part in stream.parts]
    return in_use((part.index, part.order) for part in parts)


def _remote(streams: dict[str, Mixture]) -> list[Stream]:
    return [part for stream in streams.values() for part in stream.parts if isinstance(part.index, RemoteIndex)]


def cache_notes(config: Config, streams: dict[str, Mixture]) -> list[str]:
    """What the run needs of data.cache, where a corpus is remote."""
    if not _remote(streams):
        return []
    used, limit = cache_bytes(streams) / GIB, config.data.cache_gib
    note = f"data.cache: {config.data.cache}, {limit:g} GiB; the blocks in use take up to {used:.2g} GiB over all ranks"
    few = [f"warning: {note}, and the cache with them: next to nothing is fetched ahead: raise data.cache_gib, or in a "
           "new run lower data.block"]  # fmt: skip
    return few if used > limit else [note]


def corpus_notes(config: Config, streams: dict[str, Mixture], cases: dict[str, np.ndarray]) -> list[str]:
    """Where the images of data.further leave none to data.path's unlabelled cases."""
    unlabelled = streams.get("unlabelled")
    if unlabelled is None or not len(cases["unlabelled"]) or unlabelled.parts[0].name == "unlabelled":
        return []
    return [f"warning: the {len(cases['unlabelled'])} unlabelled cases of {config.data.path} are not drawn, as "
            "data.further takes every unlabelled image: raise data.batch_unlabelled"]  # fmt: skip


def steps_of_phases(config: Config, method: Method, streams: dict[str, Mixture]) -> list[int]:
    """T of each phase: its share of the budget in optimiser steps, at least 1."""
    batches = {name: stream.batch_size for name, stream in streams.items()}
    whole = total_steps(config, batches, {name: stream.steps for name, stream in streams.items()})
    return [max(1, round(phase.share * whole)) for phase in method.phases]
