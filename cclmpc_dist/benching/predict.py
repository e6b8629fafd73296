"""What the cost model says of a scaling report: of the world sizes that it measured, and of clusters."""

from typing import Any

from cclmpc_dist.benching import model
from cclmpc_dist.benching.model import Fitted, Step
from cclmpc_dist.config import Config, parse
from cclmpc_dist.losses.costs import Cost
from cclmpc_dist.records import Record, record
from cclmpc_dist.training.throughput import TERA, listed

WORLDS = tuple(2**power for power in range(11))  # 1 to 1024
CALLS = 14  # of CCL-MPC on two ranks and more; where only one was measured


class Point:
    """The records of one case, by variant and metric."""

    def __init__(self, report: dict[str, Any], case: str) -> None:
        self.case, self.config = case, parse(report["meta"]["config"], "the report")
        self.values = {(r["variant"], r["metric"]): r["value"] for r in report["records"] if r["case"] == case}
        self.world = int(self.values["sizes", "ranks"])

    def __call__(self, variant: str, metric: str) -> float:
        return float(self.values[variant, metric])

    def step(self, calls: float, overlap: bool) -> Step:
        """Of a point of one rank."""
        backward = self("with loading", "backward") / 1000
        flops = self("with loading", "step_tflop") * TERA
        return Step(self("with loading", "seconds"), backward, flops, self("sizes", "gradient_bytes"), calls, overlap)


def contrast(config: Config, point: Point, world: int) -> Cost:
    """Of a rank's step on `world` ranks, each with the batch that a rank of the point has."""
    mine = {name: config.batch(name, 1) for name in ("labelled", "unlabelled")}
    return model.contrast_cost(config, int(point("sizes", "classes")), {n: v * world for n, v in mine.items()}, world)


def local(report: dict[str, Any]) -> list[Record]:
    """Weak scaling: of each measured world size the predicted efficiency, and by how much it is off, in points. From
    the step of one rank and the all-reduces of that world size; nothing where one rank was not measured."""
    points = [Point(report, case) for case in _weak(report)]
    if not points or points[0].world != 1:
        return []
    one = points[0]
    on_gpu = report["meta"]["machine"]["gpu"] is not None
    alone = contrast(one.config, one, 1)
    found = []
    for point in points[1:]:
        step = one.step(point("sizes", "collective_calls"), overlap=on_gpu)
        network = Fitted(point("all-reduce fit", "alpha"), point("all-reduce fit", "beta"))
        crowding = 1.0 if on_gpu else point("sizes", "product_seconds") / one("sizes", "product_seconds")
        seconds = step.on(network, point.world, contrast(one.config, one, point.world), alone, crowding)
        efficiency = step.seconds / seconds
        off = efficiency - point("with loading", "efficiency")
        place = {"bench": "scale", "case": point.case}
        found += [record("predicted", "efficiency", efficiency, "fraction", **place),
                  record("predicted", "error", 100 * off, "points", **place)]  # fmt: skip
    return found


def clusters(report: dict[str, Any]) -> tuple[list[Record], dict[str, str]]:
    """Weak scaling on each of model.CLUSTERS, and what each prediction rests on. The step is the measured one where it
    was on a GPU, else assumed from its FLOPs. One rank is among those measured."""
    points = [Point(report, case) for case in _weak(report)]
    one = points[0]
    calls = points[-1]("sizes", "collective_calls") or CALLS
    gpu = report["meta"]["machine"]["gpu"]
    step, basis = one.step(calls, overlap=True), f"the measured step on {gpu}"
    if gpu is None:
        peak = listed(model.ASSUMED_GPU, one.config.precision)
        assert peak is not None
        step = model.assumed_step(step.flops, peak.flops, step.gradient, calls)
        basis = f"no GPU here; assumed: {model.assumption(step.flops, peak.source)}"
    found = []
    alone = contrast(one.config, one, 1)
    for cluster in model.CLUSTERS:
        for world in WORLDS:
            seconds = step.on(cluster, world, contrast(one.config, one, world), alone)
            place = {"bench": "scale", "case": f"weak {world}"}
            found += [record(cluster.name, "efficiency", step.seconds / seconds, "fraction", **place),
                      record(cluster.name, "seconds", seconds, "s", **place)]  # fmt: skip
    return found, {"step": basis} | {cluster.name: cluster.source for cluster in model.CLUSTERS}


def _weak(report: dict[str, Any]) -> list[str]:
    """Measured cases of weak scaling, in the order of their world sizes."""
    found = dict.fromkeys(r["case"] for r in report["records"] if r["case"].startswith("weak "))
    return sorted(found, key=lambda case: int(case.split()[1]))
