"""A training step of CCL-MPC against a plain version of itself: seconds, peak memory, and whether the losses agree.

    python benchmarks/plain_step.py configs/la_cpu.yaml --out benchmarks/results/plain_step.json
    python benchmarks/plain_step.py configs/la.yaml data.batch_labelled=1 data.batch_unlabelled=1 \\
        --steps 1 --rounds 1 --out benchmarks/results/plain_step_la.json

Plain is how research code usually writes the same losses: a pass of the network for each view, one of the encoder for
the originals, torch's layers, sampling in loops over images and classes, all logits of the contrast at once, an
optimiser that visits one tensor after the other, float32, contiguous, the C library's memory. It draws the same
positions, so that in float32 both have one loss. Published networks return all their outputs from every pass; "whole
passes" does so for the originals too. Norm is instance and dropout off, which makes separate passes equal to one. A
step is one batch from the shards without its loading: forward, backward, gradient norm, optimiser, bank. Each variant
runs in a process of its own, the variants in turns, round by round; a process takes one step to warm up.
"""

import argparse
import statistics
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import Any
from unittest.mock import patch

import torch
from torch import Tensor, nn
from variants import Record, in_turns, records, tell

from cclmpc_dist.benching.alone import alone, answer, memory
from cclmpc_dist.config import Config, load
from cclmpc_dist.data import draws
from cclmpc_dist.data.index import Index, select
from cclmpc_dist.data.loader import Mixture, Stream, to_device
from cclmpc_dist.distributed.runtime import keep_memory
from cclmpc_dist.losses import certainty, sampling
from cclmpc_dist.methods.method import Corpus
from cclmpc_dist.methods.registry import create
from cclmpc_dist.models import vnet
from cclmpc_dist.records import repeated
from cclmpc_dist.training.objective import objective

COMMON = ["model.norm=instance", "model.dropout=0", "ccl_mpc.t_contrast=0"]
PLAIN, WHOLE, KEPT = "plain", "plain, whole passes", "plain, freed memory kept"
CONTIGUOUS = ["precision=fp32", "channels_last=false"]
NAIVE = [*CONTIGUOUS, "ccl_mpc.contrast.exchange=naive"]
VARIANTS = {  # name -> settings
    PLAIN: NAIVE,
    WHOLE: NAIVE,
    KEPT: NAIVE,
    "ours, float32": CONTIGUOUS,
    "ours, float32, channels last": ["precision=fp32", "channels_last=true"],
    "ours, bf16, channels last": ["precision=bf16", "channels_last=true"],
}
PLAINS = (PLAIN, WHOLE, KEPT)
STEPS, AT = 1000, 500  # of the schedule; every term is on at this step
WARMUP = 1  # steps of a process


class PlainPasses(nn.Module):
    """The module with a pass for each view, and one for the originals: of the encoder, or of everything."""

    def __init__(self, module: nn.Module, whole: bool) -> None:
        super().__init__()
        self.module, self.whole = module, whole

    def forward(self, views: Tensor, originals: Tensor, **asked: Any) -> dict[str, Tensor]:
        asked.pop("detach_originals")
        positions, others = asked.pop("positions"), asked.pop("original_positions")
        halves = zip(views.chunk(2), positions.chunk(2), strict=True)
        passes = [self.module(view, positions=at, **asked) for view, at in halves]
        out = {name: torch.cat([one[name] for one in passes]) for name in passes[0]}
        if self.whole:
            projection = self.module(originals, positions=others, **asked)["projection"]
        else:
            projection = self.module._project(self.module.encoder.shallow(originals)[-1], others)
        return out | {"original_projection": projection}


def loop_anchors(
    labels: Tensor, hard: Tensor, keys: Tensor, n: int, classes: int, purpose: str
) -> tuple[Tensor, Tensor]:
    """`sampling.sample_anchors`, image by image and class by class."""
    index = torch.zeros(len(labels), classes, n, dtype=torch.int64)
    valid = torch.zeros(len(labels), classes, n, dtype=torch.bool)
    for image in range(len(labels)):
        order = draws.words(keys[image : image + 1], purpose, labels.shape[1])[0] & (sampling._TIER - 1)
        for label in range(classes):
            member = labels[image] == label
            difficult = _shuffled(member & hard[image], order)
            easy = _shuffled(member & ~hard[image], order)
            first = difficult[: n // 2]
            rest = difficult[n // 2 :]
            chosen = torch.cat([first, easy, rest])[:n]
            index[image, label, : len(chosen)] = chosen
            valid[image, label, : len(chosen)] = True
    return index, valid


def loop_offers(labels: Tensor, keys: Tensor, k: int, classes: int, purpose: str) -> tuple[Tensor, Tensor]:
    """`sampling.sample_offers` in the same way."""
    return loop_anchors(labels, torch.zeros_like(labels, dtype=torch.bool), keys, k, classes, purpose)


def _shuffled(member: Tensor, order: Tensor) -> Tensor:
    """The positions of `member`, the largest of `order` first."""
    found = member.nonzero()[:, 0]
    return found[order[found].argsort(descending=True)]


def plain_likeliest(log_p: Tensor) -> Tensor:
    return log_p.argmax(1)


@contextmanager
def plainly() -> Iterator[None]:
    """torch's own layers and the loops."""
    with (
        patch.object(vnet, "InstanceNorm3d", nn.InstanceNorm3d),
        patch.object(sampling, "sample_anchors", loop_anchors),
        patch.object(sampling, "sample_offers", loop_offers),
        patch.object(certainty, "likeliest", plain_likeliest),
    ):
        yield


def step_of(config: Config, variant: str) -> Callable[[], tuple[float, float]]:
    """A function that takes one step on the same batch again and again: seconds, total loss."""
    index = Index.open(config.data.path)
    cases = select(index, config.data.labelled, 0)
    method = create(config, Corpus(index.channels, index.classes))
    sizes = {name: config.batch(name, 1) for name in method.phases[0].streams}
    torch.manual_seed(config.seed)
    module = method.build()
    if config.channels_last:
        module.to(memory_format=torch.channels_last_3d)  # type: ignore[call-overload]
    method.enter(method.phases[0], STEPS, module, sizes)
    batch = {}
    for name, size in sizes.items():
        stream = Stream(index, name, cases[name], size, config.seed, config.data.patch, with_label=name == "labelled")
        batch[name] = to_device(Mixture([stream]).batch(0, range(size)), "cpu")
    plain = variant in PLAINS
    model = PlainPasses(module, whole=variant == WHOLE) if plain else module
    options: dict[str, Any] = {"lr": 1e-5, "weight_decay": 1e-4, "foreach": not plain}
    optimizer = torch.optim.AdamW(module.parameters(), **options)

    def step() -> tuple[float, float]:
        start = time.perf_counter()
        with torch.autocast("cpu", torch.bfloat16, enabled=config.precision == "bf16"):
            terms, metrics = method.terms(model, batch, AT)
        loss, logged = objective(terms, method.weights(AT), metrics)
        loss.backward()
        nn.utils.clip_grad_norm_(module.parameters(), 1e9, foreach=not plain)
        optimizer.step()
        optimizer.zero_grad()
        method.after_step(module)
        return time.perf_counter() - start, float(logged["loss/total"])

    return step


def take(config: str, overrides: list[str], variant: str, steps: int) -> dict[str, Any]:
    """Seconds of the steps after warming up, losses of all, peak memory of this process in MiB."""
    if variant not in PLAINS or variant == KEPT:
        keep_memory()
    with plainly() if variant in PLAINS else nullcontext():
        step = step_of(load(config, [*COMMON, *overrides, *VARIANTS[variant]]), variant)
        taken = [step() for _ in range(WARMUP + steps)]
    return {
        "seconds": [s for s, _ in taken[WARMUP:]],
        "losses": [loss for _, loss in taken],
        "memory": memory("VmHWM") / 2**20,
    }


def measure(config: str, overrides: list[str], rounds: int, steps: int) -> list[Record]:
    """Records of every variant."""
    found = in_turns(
        VARIANTS, rounds, lambda name: alone(take, config=config, overrides=overrides, variant=name, steps=steps)
    )
    seconds = {name: [s for row in rows for s in row["seconds"]] for name, rows in found.items()}
    case = " ".join([Path(config).stem, *overrides])
    told = []
    for name, rows in found.items():
        values = {
            "seconds": (statistics.median(seconds[name]), "s"),
            "seconds_min": (min(seconds[name]), "s"),
            "seconds_max": (max(seconds[name]), "s"),
            "speedup": (statistics.median(seconds[PLAIN]) / statistics.median(seconds[name]), "x"),
            "memory": (max(row["memory"] for row in rows), "MiB"),
            "loss": (rows[0]["losses"][0], "1"),
        }
        first, *rest = records("plain_step", case, name, values)
        told += [first | repeated(seconds[name]), *rest]
    return told


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("config")
    parser.add_argument("overrides", nargs="*", help="settings, as in data.batch_labelled=1")
    parser.add_argument("--rounds", type=int, default=2)
    parser.add_argument("--steps", type=int, default=4, help="of each variant in a round, after warming up")
    parser.add_argument("--out", type=Path)
    arguments = parser.parse_args()
    tell(measure(arguments.config, arguments.overrides, arguments.rounds, arguments.steps), arguments.out)


if __name__ == "__main__" and not answer(take):
    main()
