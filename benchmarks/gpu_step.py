"""A training step on a GPU: its floor, how far above it the step is, UA-MT's recipe beside it, and the kernels.

    python benchmarks/gpu_step.py configs/la.yaml --out benchmarks/results/gpu_step.json

The floor is the larger of two times. Arithmetic: FLOPs of the step (three times the forward pass) over the rate at
which this device multiplies two large random matrices in the step's precision. Memory: the bytes that no eager step can
do without, every tensor kept for backward written once and read once, the weights read in both passes, their gradient
and momentum written and read, over the rate at which this device copies, counting what is read and what is written.

UA-MT's recipe [P: Yu et al., MICCAI 2019] is its public training loop: float32, contiguous, a V-Net that learns from
the labelled and the unlabelled images, a teacher's pass over the unlabelled ones and eight more under noise for its
uncertainty, weights averaged one tensor after the other; "mean teacher" is the same without the eight. torch runs
float32 convolutions in TF32 on a card that has it; "strict" switches that off. It is another method: losses are not
compared.

Each variant runs in a process of its own, on one batch of the configuration's shards. Blocks of steps are timed, the
device waited for before and after each. At the end the batch is doubled until memory runs out. What there is stands in
the file after each process. Without a GPU all of it runs on the CPU, to try the script.
"""

import argparse
import gc
import json
import math
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from itertools import repeat
from pathlib import Path
from statistics import median
from typing import Any

import torch
from torch import Tensor
from torch.autograd import DeviceType
from torch.autograd.graph import saved_tensors_hooks
from torch.nn import functional as F
from torch.profiler import ProfilerActivity, profile
from variants import Record, records, tell

from cclmpc_dist.benching import files
from cclmpc_dist.benching.model import with_bank
from cclmpc_dist.benching.step import LOADING, TimedTrainer
from cclmpc_dist.config import Config, load
from cclmpc_dist.distributed import runtime
from cclmpc_dist.models.dual_branch import DualBranch
from cclmpc_dist.records import repeated
from cclmpc_dist.training.monitor import Window, memory_mib
from cclmpc_dist.training.run import environment

OURS, COMPILED = "ours, bf16", "ours, bf16, torch.compile"
UAMT, TEACHER = "UA-MT, float32 strict", "mean teacher, float32 strict"
VARIANTS: dict[str, tuple[list[str], dict[str, bool]]] = {  # name -> settings, torch.backends.cudnn's
    OURS: (["precision=bf16"], {}),
    "ours, bf16, cudnn.benchmark": (["precision=bf16"], {"benchmark": True}),
    "ours, bf16, contiguous": (["precision=bf16", "channels_last=false"], {}),
    "ours, float32 as TF32": (["precision=fp32"], {}),
    "ours, float32 strict": (["precision=fp32"], {"allow_tf32": False}),
    UAMT: (["precision=fp32", "channels_last=false"], {"allow_tf32": False}),
    "UA-MT, float32 as TF32": (["precision=fp32", "channels_last=false"], {}),
    TEACHER: (["precision=fp32", "channels_last=false"], {"allow_tf32": False}),
    "mean teacher, float32 as TF32": (["precision=fp32", "channels_last=false"], {}),
    COMPILED: (["precision=bf16"], {}),
}
WARMUP, BLOCK = 5, 5  # steps
ROUNDS = 20  # products and copies that the rates are of
SHOWN = 30  # kernels
PASSES = 8  # of the teacher for its uncertainty [P]
WORK = {"tflop": "TFLOP", "kept": "MiB", "weights": "MiB"}
KINDS = ("bf16", "TF32", "float32")
Step = Callable[[], None]
BENCH = "gpu_step"


class Trained(TimedTrainer):
    """The trainer where every term counts, with one batch again and again."""

    def hold(self) -> None:
        self.build()
        self.batch = next(self._loader())

    def take(self) -> None:
        self._train_step(repeat(self.batch), Window())


class UaMt:
    """The published loop; `passes` of the teacher for its uncertainty."""

    def __init__(self, trainer: Trained, passes: int) -> None:
        self.labelled, self.unlabelled = (trainer.batch[name]["image"] for name in ("labelled", "unlabelled"))
        self.label, self.passes, config = trainer.batch["labelled"]["label"], passes, trainer.config
        made = [
            DualBranch(config.model, config.dims, trainer.index.channels, trainer.index.classes, swin=False,
                       projection=False, embedding=False).to(trainer.device)
            for _ in range(2)
        ]  # fmt: skip
        self.student, self.teacher = (module.train() for module in made)
        self.teacher.requires_grad_(False)
        self.optimizer = torch.optim.SGD(
            self.student.parameters(), lr=0.01, momentum=0.9, weight_decay=1e-4, foreach=False
        )

    def _taught(self, images: Tensor) -> Tensor:
        noise = torch.clamp(torch.randn_like(images) * 0.1, -0.2, 0.2)
        with torch.no_grad():
            return self.teacher(images + noise)["conv"]

    def _certain(self) -> Tensor:
        """Mask of the voxels whose entropy over the passes is low; two copies of the images at a time."""
        twice = self.unlabelled.repeat(2, *[1] * (self.unlabelled.dim() - 1))
        answers = torch.cat([self._taught(twice).softmax(1) for _ in range(self.passes // 2)])
        mean = answers.unflatten(0, (self.passes, -1)).mean(0)
        entropy = -(mean * (mean + 1e-6).log()).sum(1, keepdim=True)
        return (entropy < 0.75 * math.log(2)).float()

    def take(self) -> None:
        logits = self.student(torch.cat([self.labelled, self.unlabelled]))["conv"]
        taught = self._taught(self.unlabelled)
        supervised, free = logits.split([len(self.labelled), len(self.unlabelled)])
        p, truth = supervised.softmax(1)[:, 1], (self.label == 1).float()
        dice = 1 - (2 * (p * truth).sum() + 1e-5) / ((p * p).sum() + (truth * truth).sum() + 1e-5)
        distance = (free.softmax(1) - taught.softmax(1)) ** 2
        mask = self._certain() if self.passes else torch.ones_like(distance[:, :1])
        consistency = (mask * distance).sum() / (2 * mask.sum() + 1e-16)
        loss = 0.5 * (F.cross_entropy(supervised, self.label) + dice) + 0.1 * consistency
        self.optimizer.zero_grad()
        loss.backward()
        self.optimizer.step()
        for mine, theirs in zip(self.teacher.parameters(), self.student.parameters(), strict=True):
            mine.mul_(0.99).add_(theirs.detach(), alpha=0.01)
        loss.item()  # for its log


# ---- in a process of its own ---------------------------------------------------------------------------------------


def trained(config: Config) -> Trained:
    trainer = Trained(config, runtime.start(config.precision))
    trainer.hold()
    return trainer


def timed(config: Config, variant: str, blocks: int) -> dict[str, Any]:
    """Seconds of the first step, and of a step in each block after warming up; peak memory of these steps, or on a CPU
    of the process."""
    take, device = step_of(config, variant)
    first = seconds(take, 1, device)
    for _ in range(WARMUP):
        take()
    spent = [seconds(take, BLOCK, device) for _ in range(blocks)]
    return {"seconds": spent, "first": first, "memory": memory_mib(device)}


def step_of(config: Config, variant: str) -> tuple[Step, torch.device]:
    """A variant's step, and where it is taken. Nothing but the variant is left in memory."""
    trainer = trained(config)
    take, device = trainer.take, trainer.device
    if variant == COMPILED:
        compile_stages(trainer.module)
    passes = {UAMT.split(",")[0]: PASSES, TEACHER.split(",")[0]: 0}.get(variant.split(",")[0])
    if passes is not None:
        take = UaMt(trainer, passes).take
    del trainer
    gc.collect()
    if device.type == "cuda":
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats(device)
    return take, device


def compile_stages(module: Any) -> None:
    """Each stage of the network by itself: what lies between them is Python's."""
    torch._dynamo.config.recompile_limit = 64  # of all stages together
    for stage in (*module.encoder.blocks, *module.encoder.downs, module.conv, module.swin):
        stage.compile()


def seconds(call: Step, times: int, device: torch.device) -> float:
    """Of one of so many calls."""
    wait(device)
    began = time.perf_counter()
    for _ in range(times):
        call()
    wait(device)
    return (time.perf_counter() - began) / times


def wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def work(config: Config) -> dict[str, Any]:
    """What a step does: TFLOP, and MiB kept for backward and of its weights. Without the gradients that the streamed
    contrast keeps beside what autograd saves, of anchors and keys: the floor is a little too low by them."""
    trainer = trained(config)
    kept: dict[int, int] = {}

    def keep(x: Tensor) -> Tensor:
        kept[x.untyped_storage().data_ptr()] = x.untyped_storage().nbytes()
        return x

    with saved_tensors_hooks(keep, lambda x: x):
        terms = trainer.method.terms(trainer.strategy.wrapped, trainer.batch, trainer.step)
    trainer.method.discard_step()
    weights = list(trainer.module.parameters())
    for one in weights:
        kept.pop(one.untyped_storage().data_ptr(), None)
    del terms
    return {
        "tflop": trainer.flops()[LOADING] / 1e12,
        "kept": sum(kept.values()) / 2**20,
        "weights": sum(one.nbytes for one in weights) / 2**20,
    }


def kernels(config: Config, steps: int) -> dict[str, Any]:
    """Milliseconds a step of each kernel, of all of them, and of the step while it is watched."""
    trainer = trained(config)
    for _ in range(WARMUP):
        trainer.take()
    on_gpu = trainer.device.type == "cuda"
    kinds = [ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if on_gpu else [])]
    with profile(activities=kinds, acc_events=True) as watched:
        took = seconds(trainer.take, steps, trainer.device)
    place, name = (DeviceType.CUDA, "self_device_time_total") if on_gpu else (DeviceType.CPU, "self_cpu_time_total")
    rows = [one for one in watched.key_averages() if one.device_type == place and not one.is_user_annotation]
    rows.sort(key=lambda one: -getattr(one, name))
    listed = {one.key: [getattr(one, name) / steps / 1000, one.count / steps] for one in rows[:SHOWN]}
    whole = sum(getattr(one, name) for one in rows) / steps / 1000
    return {"kernels": listed, "all": whole, "number": sum(one.count for one in rows) / steps, "step": 1000 * took}


def rates(edge: int, copied: int) -> dict[str, Any]:
    """FLOP/s of the product of two matrices by precision, bytes a second of a copy."""
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    found = {}
    for name, kind, precise in (("bf16", torch.bfloat16, "highest"), ("TF32", torch.float32, "high"),
                                ("float32", torch.float32, "highest")):  # fmt: skip
        torch.set_float32_matmul_precision(precise)
        a, b = (torch.randn(edge, edge, device=device).to(kind) for _ in range(2))
        out = torch.empty_like(a)
        taken = [seconds(lambda: torch.mm(a, b, out=out), 5, device) for _ in range(3 + ROUNDS)][3:]  # noqa: B023
        found[name] = 2 * edge**3 / sorted(taken)[ROUNDS // 2]
    source = torch.randint(0, 255, (copied,), dtype=torch.uint8, device=device)
    target = torch.empty_like(source)
    taken = [seconds(lambda: target.copy_(source), 5, device) for _ in range(3 + ROUNDS)][3:]
    return found | {"copy": 2 * copied / sorted(taken)[ROUNDS // 2]}


# ---- all of them ---------------------------------------------------------------------------------------------------


def tried(config: str, overrides: list[str], job: str, **options: Any) -> dict[str, Any]:
    """What a job finds in a process of its own; nothing where it fails, whose words go to standard error."""
    command = [sys.executable, __file__, config, *overrides, "data.workers=0"]
    command += ["--one", json.dumps({"job": job, **options})]
    done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=False)
    found: dict[str, Any] = json.loads(done.stdout.splitlines()[-1]) if done.returncode == 0 else {}
    return found


def one(path: str, overrides: list[str], job: str, **options: Any) -> dict[str, Any]:
    if job == "rates":
        return rates(**options)
    if job == "timed":
        settings, cudnn = VARIANTS[options["variant"]]
        for name, value in cudnn.items():
            setattr(torch.backends.cudnn, name, value)
        return timed(enlarged(load(path, [*overrides, *settings]), options.pop("times")), **options)
    return {"work": work, "kernels": kernels}[job](load(path, [*overrides, *VARIANTS[OURS][0]]), **options)


def enlarged(config: Config, times: int) -> Config:
    """With so many times the images, and a bank that holds what they offer."""
    labelled, unlabelled = (times * config.batch(name, 1) for name in ("labelled", "unlabelled"))
    data = config.data.model_copy(update={"batch_labelled": labelled, "batch_unlabelled": unlabelled})
    return with_bank(config.model_copy(update={"data": data}), labelled + unlabelled)


def measure(arguments: argparse.Namespace) -> Iterator[list[Record]]:
    """Records of one part after the other."""
    path, overrides = arguments.config, arguments.overrides
    config = load(path, overrides)
    images = sum(config.batch(name, 1) for name in ("labelled", "unlabelled"))
    rate = tried(path, overrides, "rates", edge=arguments.edge, copied=arguments.copied)
    units = {"copy": "TB/s"}
    values = {name: (value / 1e12, units.get(name, "TFLOP/s")) for name, value in rate.items()}
    yield records(BENCH, "rates", "", values)
    did = tried(path, overrides, "work")
    yield records(BENCH, "work", OURS, {name: (value, WORK[name]) for name, value in did.items()})
    floors = floor(did, rate) if did and rate else {}
    for kind, value in floors.items():
        yield records(BENCH, "floor", kind, {"seconds": (value, "s")})
    for variant in arguments.variant or [name for name in VARIANTS if name != COMPILED]:
        found = tried(path, overrides, "timed", variant=variant, times=1, blocks=arguments.blocks)
        yield timing(f"{config.name}, {images} images", variant, images, found, floors)
    found = tried(path, overrides, "kernels", steps=BLOCK)
    yield table(found)
    times, found = 2, {"seconds": [0]}
    while found and times <= arguments.largest:
        found = tried(path, overrides, "timed", variant=OURS, times=times, blocks=arguments.blocks)
        yield timing(f"{config.name}, {times * images} images", OURS, times * images, found, {})
        times *= 2


def floor(did: dict[str, float], rate: dict[str, float]) -> dict[str, float]:
    """Seconds: "arithmetic" and "memory" of bf16, and by kind of number the larger of the two. did: as `work` gives it,
    in bf16; what float32 keeps is taken as twice that. Of the weights are 2 reads and 1 write, of gradient and momentum
    5 more."""
    found = {}
    for kind, wide in (("bf16", 1), ("TF32", 2), ("float32", 2)):
        arithmetic = 1e12 * did["tflop"] / rate[kind]
        memory = 2**20 * (2 * wide * did["kept"] + 8 * did["weights"]) / rate["copy"]
        found |= {f"{kind} arithmetic": arithmetic, f"{kind} memory": memory, kind: max(arithmetic, memory)}
    return found


def timing(case: str, variant: str, images: int, found: dict[str, Any], floors: dict[str, float]) -> list[Record]:
    if not found:
        return []
    middle = median(found["seconds"])
    values = {"seconds": (middle, "s"), "images_per_second": (images / middle, "images/s"),
              "first": (found["first"], "s"), "memory": (found["memory"], "MiB")}  # fmt: skip
    kind = next((kind for kind in KINDS if kind in variant), "")
    if variant.startswith("ours") and kind in floors:
        values["over_floor"] = (middle / floors[kind], "1")
    first, *rest = records(BENCH, case, variant, values)
    return [first | repeated(found["seconds"]), *rest]


def table(found: dict[str, Any]) -> list[Record]:
    if not found:
        return []
    told = records(BENCH, "kernels", "the step, watched", {"milliseconds": (found["step"], "ms")})
    for name, (spent, calls) in [("all kernels", (found["all"], found["number"])), *found["kernels"].items()]:
        told += records(BENCH, "kernels", name[:100], {"milliseconds": (spent, "ms"), "calls": (calls, "1")})
    return told


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("config")
    parser.add_argument("overrides", nargs="*", help="settings, as in data.path=FOLDER")
    parser.add_argument(
        "--variant", action="append", choices=VARIANTS, help="unset: all but torch.compile's, which takes minutes"
    )
    parser.add_argument("--blocks", type=int, default=8, help=f"of {BLOCK} steps, of each variant")
    parser.add_argument("--largest", type=int, default=64, help="most times the configuration's images")
    parser.add_argument("--edge", type=int, default=8192, help="of the matrices that are multiplied")
    parser.add_argument("--copied", type=int, default=1 << 31, help="bytes of the tensor that is copied")
    parser.add_argument("--out", type=Path)
    parser.add_argument("--one", type=json.loads, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.one:
        print(json.dumps(one(arguments.config, arguments.overrides, **arguments.one)))
        return
    found: list[Record] = []
    for part in measure(arguments):
        found += part
        tell(part, None)
        if arguments.out:  # what there is, should the lease end
            files.write({"meta": environment(1), "records": found}, arguments.out)


if __name__ == "__main__":
    main()
