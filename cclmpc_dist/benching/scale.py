"""`cclmpc bench scale`: the step and the all-reduce on more and more ranks, and what follows from them.

weak: each rank keeps its batch. strong: all ranks together keep it. A point is one world size under one of the two; it
is measured inside a process group that is there (`point`), or by ranks that torchrun starts on this machine (`launch`).
`gathered` makes one report of points, wherever they come from: points measured repeatedly are rounds.
"""

import json
import os
from collections import defaultdict
from collections.abc import Callable, Collection, Sequence
from pathlib import Path
from statistics import median
from typing import Any, Literal

from cclmpc_dist.benching import allreduce, launching, model, predict, step
from cclmpc_dist.benching.files import Report
from cclmpc_dist.benching.step import LOADING
from cclmpc_dist.config import Config, load
from cclmpc_dist.distributed import runtime
from cclmpc_dist.errors import InputError
from cclmpc_dist.records import Record
from cclmpc_dist.training import setup
from cclmpc_dist.words import counted

Mode = Literal["weak", "strong"]
MODES: tuple[Mode, ...] = ("weak", "strong")


def point(config: Config, mode: Mode, steps: int) -> Report:
    """Measure the launched world, the same on every rank. Raises InputError as training does."""
    accelerator = runtime.start(config.precision)
    try:
        world = runtime.world_size()
        case = f"{mode} {world}"
        sized = with_batches(config, mode, world)
        records, meta = step.measure(sized, accelerator, steps, "scale", case, same=False)
        if world > 1:
            curve = allreduce.measure(accelerator.device, allreduce.SIZES[:-1])
            records += [{"bench": "scale", "case": case} | record for record in curve]
        return {"meta": meta, "records": records}
    finally:
        runtime.stop()


def with_batches(config: Config, mode: Mode, world: int) -> Config:
    """With the global batches of a world size: the configuration's are those of one rank, or of all. A replicated bank
    grows where it would not hold what a step offers."""
    factor = world if mode == "weak" else 1
    labelled, unlabelled = (config.batch(name, 1) * factor for name in ("labelled", "unlabelled"))
    data = config.data.model_copy(update={"batch_labelled": labelled, "batch_unlabelled": unlabelled})
    return model.with_bank(config.model_copy(update={"data": data}), labelled + unlabelled)


def fits(config: Config, mode: Mode, world: int) -> bool:
    """Whether the ranks can share the batches of a strong scaling."""
    return mode == "weak" or all(config.batch(name, 1) % world == 0 for name in ("labelled", "unlabelled"))


def launch(
    path: Path, overrides: Sequence[str], modes: Sequence[Mode], worlds: Sequence[int], steps: int, rounds: int,
    threads: int | None, say: Callable[[str], None],
) -> list[Report]:  # fmt: skip
    """Points of ranks on this machine, all world sizes in turn, `rounds` times. threads: of a rank; unset, what the
    largest world size leaves. Raises InputError where a point could not be measured."""
    config = load(path, overrides)
    setup.streams(config, *setup.corpora(config), 1)  # what a rank would refuse
    launching.check_cards(max(worlds))
    threads = threads or max(1, len(os.sched_getaffinity(0)) // max(worlds))
    parts = []
    for turn in range(rounds):
        for mode in modes:
            for world in worlds:
                if fits(config, mode, world):
                    size = f"{counted(world, 'rank')}, {counted(threads, 'thread')} a rank"
                    say(f"round {turn + 1} of {rounds}: {mode} scaling, {size}")
                    options = (f"--mode={mode}", f"--steps={steps}")
                    parts.append(launching.torchrun(world, threads, "scale", str(path), *overrides, *options))
                elif not turn:
                    say(f"strong scaling, {world} ranks: left out, they do not divide the batches")
    return parts


# ---- from points to a report ---------------------------------------------------------------------------------------


def gathered(parts: Sequence[Report], clusters: bool) -> Report:
    """One report: medians over the rounds of each point, efficiencies, the prediction for the measured world sizes
    beside what was seen, and with `clusters` for the clusters of the cost model up to 1024 GPUs.

    Raises InputError where parts are of different configurations, hold no point, or there are none, and with
    `clusters` where one rank's weak scaling is not among them.
    """
    if not parts:
        raise InputError("no point was measured: give numbers of ranks that divide the batches")
    check_alike(parts)
    if clusters:
        measured = {_place(part["records"][0]["case"]) for part in parts}
        check_predictable([MODES[mode] for mode, _ in measured], [world for mode, world in measured if mode == 0])
    rounds: dict[str, list[list[Record]]] = defaultdict(list)
    for part in parts:
        rounds[part["records"][0]["case"]].append(part["records"])
    order = sorted(rounds, key=_place)
    records = [record for case in order for record in merged(rounds[case])]
    for mode in MODES:
        cases = [case for case in order if case.startswith(f"{mode} ")]
        for case in cases:
            records += efficiency(rounds[cases[0]], rounds[case])
    first = min(parts, key=lambda part: _place(part["records"][0]["case"]))
    meta = dict(first["meta"])
    meta["processes"] = [int(case.split()[1]) for case in order]
    meta["rounds"] = {case: len(rounds[case]) for case in order}
    meta["hosts"] = sorted({host for part in parts for host in part["meta"]["hosts"]})
    report: Report = {"meta": meta, "records": records}
    report["records"] += predict.local(report)
    if clusters:
        found, sources = predict.clusters(report)
        report["records"] += found
        meta["predicted"] = sources
    return report


def check_predictable(modes: Collection[str], worlds: Collection[int]) -> None:
    """Raises InputError for points from which the cost model cannot tell other world sizes."""
    if "weak" not in modes or 1 not in worlds:
        raise InputError("--predict rests on the step of one rank in weak scaling: measure that too, or leave "
                         "--predict out")  # fmt: skip


def check_alike(parts: Sequence[Report]) -> None:
    """All parts are points of one configuration, but for the batches and the bank. Raises InputError where one is not,
    or holds no point."""

    def told(part: Report) -> dict[str, Any]:
        config = json.loads(json.dumps(part["meta"]["config"]))
        for name in ("batch_labelled", "batch_unlabelled"):
            del config["data"][name]
        del config["ccl_mpc"]["contrast"]["bank"]
        return config

    for part in parts:
        point = part["records"] and part["records"][0]["bench"] == "scale" and "config" in part["meta"]
        if not point or "rounds" in part["meta"]:
            raise InputError(
                "bench gather: a file holds no point of bench scale: give those that it wrote in the ranks"
            )
        if told(part) != told(parts[0]):
            raise InputError("bench gather: the files are of different configurations: measure all with one")


def _place(case: str) -> tuple[int, int]:
    mode, world = case.split()
    return MODES.index(mode), int(world)


def merged(rounds: list[list[Record]]) -> list[Record]:
    """The median over the rounds of each record, and the samples of all rounds."""
    found: dict[tuple[str, str], list[Record]] = defaultdict(list)
    for records in rounds:
        for record in records:
            found[record["variant"], record["metric"]].append(record)
    return [_merged(same) for same in found.values()]


def _merged(same: list[Record]) -> Record:
    merged = same[0] | {"value": median(one["value"] for one in same)}
    if "samples" in merged:
        merged["samples"] = [value for one in same for value in one["samples"]]
    return merged


def efficiency(base: list[list[Record]], rounds: list[list[Record]]) -> list[Record]:
    """Images a second and rank over the base's, round by round: the median, the least and the most."""
    ratios = [_rate(many) / _rate(one) for one, many in zip(base, rounds, strict=False)]
    named = {"efficiency": median(ratios), "efficiency_low": min(ratios), "efficiency_high": max(ratios)}
    who = {name: rounds[0][0][name] for name in ("bench", "case")} | {"variant": LOADING}
    return [who | {"metric": name, "value": value, "unit": "fraction"} for name, value in named.items()]


def _rate(records: list[Record]) -> float:
    """Images a second of one rank."""
    images = value_of(records, LOADING, "images_per_second")
    return images / value_of(records, "sizes", "ranks")


def value_of(records: list[Record], variant: str, metric: str) -> float:
    return next(r["value"] for r in records if (r["variant"], r["metric"]) == (variant, metric))
