"""LA volumes predicted and scored at the protocol's stride: UA-MT's loop and medpy against ours, same network.

    pip install -e .[bench]
    python benchmarks/evaluate_la.py LA/volumes --out benchmarks/results/evaluate_la.json

UA-MT's way is written here after its published test script (Yu et al., MICCAI 2019): one patch a pass, softmax, a map
of scores and one of counts in numpy, float32 and torch's usual layout; then medpy's dc, jc, hd95 and asd, one after
the other. Ours is what `cclmpc eval` runs, and once more with the network compiled by torch, which `cclmpc eval` does
not; the compiling, with an empty cache, is a record of its own and in no other. The network is the V-Net of
configs/la.yaml in evaluation mode, after a few steps on small patches, so that its answer looks like a segmentation;
how good it is does not matter. Each volume and variant has a process of its own, the variants in turns, a few rounds;
reading the volume and one warming pass are not counted.
"""

import argparse
import math
import os
import tempfile
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import h5py
import numpy as np
import torch
from variants import Record, records, tell

from cclmpc_dist.benching.alone import alone, answer
from cclmpc_dist.config import Model
from cclmpc_dist.distributed.runtime import keep_memory
from cclmpc_dist.evaluation.inference import sliding_window, starts
from cclmpc_dist.evaluation.metrics import mask_metrics
from cclmpc_dist.losses.certainty import likeliest
from cclmpc_dist.losses.segmentation import log_softmax, seg, softmax
from cclmpc_dist.models.dual_branch import DualBranch
from cclmpc_dist.models.folding import fold
from cclmpc_dist.records import repeated

PATCH, STRIDE, CLASSES = (112, 112, 80), (18, 18, 4), 2
SPACING = (0.625,) * 3
LESSON = (64, 64, 48)  # patch of the few training steps
THEIRS = "UA-MT's loop, medpy"
COMPILED = "ours, float32, compiled"
VARIANTS = {THEIRS: "fp32", "ours, float32": "fp32", COMPILED: "fp32", "ours, bf16": "bf16"}
BATCH = 4  # windows a pass of ours, as evaluation.batch
METRICS = ("dice", "jaccard", "hd95_voxel", "asd_voxel")
PARTS = ("network", "windows", "metrics")  # network: with its softmax; windows: all else of the sliding window


def network() -> DualBranch:
    return DualBranch(Model(), 3, 1, CLASSES, swin=False, projection=False, embedding=False)


def read(volume: Path) -> tuple[np.ndarray, np.ndarray]:
    """Image (*S) float32 and label (*S) bool."""
    with h5py.File(volume / "mri_norm2.h5") as file:
        return np.asarray(file["image"], np.float32), np.asarray(file["label"]) > 0


def lesson(volumes: list[Path], steps: int) -> dict[str, torch.Tensor]:
    """Weights after some steps on random patches."""
    torch.manual_seed(0)
    draw = np.random.default_rng(0)
    module = network().to(memory_format=torch.channels_last_3d)
    optimizer = torch.optim.AdamW(module.parameters(), lr=2e-3)
    cases = [read(volume) for volume in volumes]
    for _ in range(steps):
        image, label = cases[draw.integers(len(cases))]
        corners = [[draw.integers(n - p) for n, p in zip(image.shape, LESSON, strict=True)] for _ in range(2)]
        places = [tuple(slice(a, a + p) for a, p in zip(corner, LESSON, strict=True)) for corner in corners]
        x, y = (torch.from_numpy(np.stack([whole[place] for place in places])) for whole in (image, label))
        with torch.autocast("cpu", torch.bfloat16):
            logits = module(x[:, None])["conv"]
        (_, entropy), (_, overlap) = seg(log_softmax(logits), y.long())
        (entropy.sum / entropy.count + overlap.finish(overlap.sums)).backward()
        optimizer.step()
        optimizer.zero_grad()
    return module.state_dict()


class Timed:
    """A function, and the seconds spent in it."""

    def __init__(self, work: Callable[..., Any]) -> None:
        self.work, self.seconds = work, 0.0

    def __call__(self, *arguments: Any) -> Any:
        start = time.perf_counter()
        found = self.work(*arguments)
        self.seconds += time.perf_counter() - start
        return found


def ua_mt(net: Callable[[torch.Tensor], torch.Tensor], image: np.ndarray) -> np.ndarray:
    """Labels (*S) of an image no smaller than the patch."""
    score = np.zeros((CLASSES, *image.shape), np.float32)
    count = np.zeros(image.shape, np.float32)
    first, second, third = (starts(n, p, s) for n, p, s in zip(image.shape, PATCH, STRIDE, strict=True))
    for x in first:
        for y in second:
            for z in third:
                place = slice(x, x + PATCH[0]), slice(y, y + PATCH[1]), slice(z, z + PATCH[2])
                patch = torch.from_numpy(image[place][None, None].astype(np.float32))
                probability = net(patch).numpy()[0]
                score[(slice(None), *place)] = score[(slice(None), *place)] + probability
                count[place] = count[place] + 1
    return np.argmax(score / count[None], axis=0)


def medpy(prediction: np.ndarray, label: np.ndarray) -> dict[str, float]:
    from medpy.metric import binary

    functions = (binary.dc, binary.jc, binary.hd95, binary.asd)
    return {name: float(function(prediction, label)) for name, function in zip(METRICS, functions, strict=True)}


@torch.no_grad()
def score(variant: str, volume: str, weights: str, out: str) -> dict[str, Any]:
    """Seconds of the parts and of compiling, metrics and number of windows; the prediction goes to `out`."""
    ours = variant != THEIRS
    if ours:
        keep_memory()
    module = network().eval()
    module.load_state_dict(torch.load(weights, weights_only=True))
    softly = softmax if ours else partial(torch.softmax, dim=1)
    if ours:
        module.to(memory_format=torch.channels_last_3d)  # type: ignore[call-overload]
        fold(module)
    image, label = read(Path(volume))
    net = Timed(lambda x: softly(module(x)["conv"]))
    with torch.autocast("cpu", torch.bfloat16, enabled=VARIANTS[variant] == "bf16"):
        net(torch.zeros(1, 1, *PATCH))
        compiling = Timed(_compiled)
        if variant == COMPILED:
            net.work = compiling(net.work, Path(weights).parent)
        net.seconds = 0.0
        if ours:
            predict: Callable[[], np.ndarray] = partial(ours_whole, net, image)
        else:
            predict = partial(ua_mt, net, image)
        whole = Timed(predict)
        prediction = whole() > 0
    scorer = Timed(partial(mask_metrics, spacing=SPACING) if ours else medpy)
    metrics = scorer(prediction, label)
    np.save(out, prediction)
    parts = {"network": net.seconds, "windows": whole.seconds - net.seconds, "metrics": scorer.seconds}
    return {
        "parts": parts,
        "metrics": {name: metrics[name] for name in METRICS},
        "windows": math.prod(len(starts(n, p, s)) for n, p, s in zip(image.shape, PATCH, STRIDE, strict=True)),
        "compiling": compiling.seconds,
    }


def _compiled(predict: Callable[[torch.Tensor], torch.Tensor], place: Path) -> Callable[[torch.Tensor], torch.Tensor]:
    """With weights as constants, for whole batches; what is left of a volume goes through the network as it is."""
    os.environ["TORCHINDUCTOR_CACHE_DIR"] = tempfile.mkdtemp(dir=place)  # nothing compiled before is found
    fast = torch.compile(predict, fullgraph=True, dynamic=False, options={"freezing": True})
    fast(torch.zeros(BATCH, 1, *PATCH))
    return lambda x: fast(x) if len(x) == BATCH else predict(x)


def ours_whole(net: Callable[[torch.Tensor], torch.Tensor], image: np.ndarray) -> np.ndarray:
    """Labels (*S) as `cclmpc eval` finds them."""
    found = sliding_window(net, torch.from_numpy(image)[None], PATCH, STRIDE, classes=CLASSES, batch=BATCH)
    return likeliest(found[None])[0].to(torch.uint8).numpy()


def measure(volumes: list[Path], steps: int, rounds: int) -> list[Record]:
    told = []
    with tempfile.TemporaryDirectory() as place:
        weights = Path(place) / "weights.pt"
        torch.save(lesson(volumes, steps), weights)
        for volume in volumes:
            turn = partial(_in_process, volume=volume, weights=weights, place=Path(place))
            told += _records(volume.name, [_values({name: turn(name) for name in VARIANTS}) for _ in range(rounds)])
    return told


def _in_process(variant: str, volume: Path, weights: Path, place: Path) -> tuple[dict[str, Any], np.ndarray]:
    prediction = place / "prediction.npy"
    told = alone(score, variant=variant, volume=str(volume), weights=str(weights), out=str(prediction))
    return told, np.load(prediction)


def _values(found: dict[str, tuple[dict[str, Any], np.ndarray]]) -> dict[str, dict[str, tuple[float, str]]]:
    """Of one round: variant -> metric -> value and unit."""
    first, truth = found[THEIRS]
    kept = {}
    for variant, (told, prediction) in found.items():
        seconds = sum(told["parts"].values())
        apart = max(abs(told["metrics"][name] - first["metrics"][name]) for name in METRICS)
        values = {"seconds": (seconds, "s"), "speedup": (sum(first["parts"].values()) / seconds, "x")}
        for part in PARTS:
            values[part] = (told["parts"][part], "s")
            values[f"{part}_speedup"] = (first["parts"][part] / told["parts"][part], "x")
        values |= {
            "number_of_windows": (told["windows"], "1"),
            "voxels_otherwise": (int((prediction != truth).sum()), "1"),
            "largest_metric_difference": (apart, "fraction or voxel"),
            "dice": (told["metrics"]["dice"], "fraction"),
        }
        if variant == COMPILED:
            values["compile_seconds"] = (told["compiling"], "s")
        kept[variant] = values
    return kept


def _records(case: str, rounds: list[dict[str, dict[str, tuple[float, str]]]]) -> list[Record]:
    """Medians over rounds, with the samples."""
    return [
        one | repeated([found[variant][one["metric"]][0] for found in rounds])
        for variant, values in rounds[0].items()
        for one in records("evaluate_la", case, variant, values)
    ]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("la", type=Path, help="folder of <case>/mri_norm2.h5")
    parser.add_argument("--volumes", type=int, default=2)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--steps", type=int, default=60, help="of training before")
    parser.add_argument("--out", type=Path, required=True)
    arguments = parser.parse_args()
    volumes = [path.parent for path in sorted(arguments.la.glob("*/mri_norm2.h5"))[: arguments.volumes]]
    tell(measure(volumes, arguments.steps, arguments.rounds), arguments.out)


if __name__ == "__main__" and not answer(score):
    main()
