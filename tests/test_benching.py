"""`cclmpc bench step, allreduce, scale, gather, report, compare`: arithmetic, and a real measurement of each."""

import json
import math
import time
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch
import toy
import yaml
from ranks import run_ranks
from torch import nn

from cclmpc_dist.benching import allreduce, files, model, predict, scale, step, tables
from cclmpc_dist.benching.model import Cluster, Fitted, Step
from cclmpc_dist.benching.step import LOADING, PARTS, SAME, WITHOUT
from cclmpc_dist.config import parse
from cclmpc_dist.distributed import runtime
from cclmpc_dist.errors import InputError
from cclmpc_dist.losses.costs import Cost
from cclmpc_dist.training import throughput
from cclmpc_dist.training.monitor import Window
from cclmpc_dist.training.throughput import Meter, Peak

FREE = Cost(0, 0, 0)
PEAK = Peak(2e12, "a sheet")


# ---- rates ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("device", "precision", "tflops"),
    [
        ("NVIDIA H100 80GB HBM3", "bf16", 989.4),
        ("NVIDIA H100 PCIe", "bf16", 756),
        ("NVIDIA A100-SXM4-80GB", "fp32", 156),
        ("Tesla V100-SXM2-16GB", "fp32", 15.7),
        ("Tesla V100-SXM2-16GB", "fp16", 125),
    ],
)
def test_a_peak_is_its_data_sheets(device: str, precision: str, tflops: float) -> None:
    peak = throughput.listed(device, precision)
    assert peak is not None
    assert peak.flops == tflops * 1e12
    assert "data sheet" in peak.source


def test_a_device_without_a_data_sheet_is_measured() -> None:
    assert throughput.listed("NVIDIA A10G", "bf16") is None  # not an A10
    cpu = torch.device("cpu")
    seconds = throughput.product_seconds(cpu, "fp32")
    peak = throughput.measured(cpu, "fp32", seconds)
    assert peak.flops == 2 * 2048**3 / min(seconds)
    assert "measured" in peak.source
    assert "torch.float32" in peak.source


def test_flops_and_mfu() -> None:
    layer, x = nn.Linear(30, 40, bias=False), torch.rand(7, 30)
    assert throughput.forward_flops(lambda: layer(x)) == 2 * 7 * 30 * 40
    assert throughput.mfu(3e12, 6.0, PEAK) == 0.25


def test_training_counts_each_set_of_terms_once() -> None:
    layer, x = nn.Linear(30, 40, bias=False), torch.rand(7, 30)
    meter, few, all_ = Meter(torch.device("cpu"), "bf16"), frozenset({"sup"}), frozenset({"sup", "cgcl"})
    assert meter.watch(few, lambda: 5) == 5
    assert meter.performance(1.0) == {}, "it warms up"
    assert meter.peak is None
    meter.peak = PEAK
    for _ in range(3):
        meter.watch(few, lambda: layer(x))
    meter.watch(all_, lambda: (layer(x), layer(x)))
    one = 3 * 2 * 7 * 30 * 40
    assert meter.performance(2.0) == {"perf/mfu": (3 * one + 2 * one) / 2.0 / 2e12}
    assert meter.performance(2.0) == {"perf/mfu": 0.0}, "what was told is not told again"


def test_mfu_begins_after_warm_up_with_a_line_of_its_own(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(throughput, "WARMUP", 2)
    monkeypatch.setattr(throughput, "EDGE", 64)
    layer, x = nn.Linear(30, 40, bias=False), torch.rand(7, 30)
    meter = Meter(torch.device("cpu"), "fp32")
    for _ in range(2):
        assert meter.performance(1.0) == {}
        meter.watch(frozenset(), lambda: layer(x))
    assert meter.performance(1.0) == {}, "its steps were not counted"
    assert meter.peak is not None
    assert "64 x 64" in meter.peak.source
    meter.watch(frozenset(), lambda: layer(x))
    assert meter.performance(2.0) == {"perf/mfu": 3 * 2 * 7 * 30 * 40 / 2.0 / meter.peak.flops}


def test_a_windows_rates() -> None:
    window = Window()
    window.steps, window.seconds, window.waited = 4, 8.0, 2.0
    assert window.performance(6, 1000) == {
        "perf/step_seconds": 2.0,
        "perf/samples_per_second": 3.0,
        "perf/voxels_per_second": 3000.0,
        "perf/data_wait_share": 0.25,
    }


# ---- a step's parts ------------------------------------------------------------------------------------------------


def stretches(own: float, waiting: float, heavy: float = 0.0) -> dict[str, float]:
    """Of a step: 10 % data wait, the rest in equal parts; `heavy` more in backward."""
    parts = dict.fromkeys(step.OWN, 0.225 * own) | {"data wait": 0.1 * own}
    return parts | {"backward": parts["backward"] + heavy, "collectives": waiting}


def everyone(slow: float = 1.0) -> list[Any]:
    """Two ranks of three steps a kind; the second one's own time is `slow` times the first's, who waits for it."""
    ranks = []
    for factor in (1.0, slow):
        full = [stretches(factor, 0.1 + slow - factor, heavy=0.5) for _ in range(3)]
        plain = [stretches(factor, slow - factor) for _ in range(3)]
        ranks.append({"host": "h", "stretches": {LOADING: full, WITHOUT: plain, SAME: full}, "memory": 10.0})
    return ranks


SIZES = {"ranks": 2, "hosts": 1, "threads": 1, "images": 4, "voxels": 4000, "classes": 2, "gradient_bytes": 1000,
         "collective_calls": 3, "product_seconds": 1.0}  # fmt: skip


def test_the_parts_of_a_step_add_up_and_the_contrast_is_the_difference() -> None:
    parts = step.parts(everyone())
    assert list(parts) == list(PARTS)
    assert sum(parts.values()) == pytest.approx(1.6)
    assert parts["contrast"] == pytest.approx(0.5)
    assert parts["collectives"] == pytest.approx(0.1)
    assert parts["other"] == pytest.approx(0.0)


def test_records_of_a_step() -> None:
    records = step.to_records(everyone(), SIZES, {LOADING: 3 * 10**12, WITHOUT: 2 * 10**12}, PEAK)
    value = {(r["variant"], r["metric"]): r["value"] for r in records}
    assert value[LOADING, "images_per_second"] == pytest.approx(4 / 1.6)
    assert value[LOADING, "voxels_per_second"] == pytest.approx(4000 / 1.6)
    assert value[LOADING, "mfu"] == pytest.approx(3 / 1.6 / 2)
    assert value[WITHOUT, "mfu"] == pytest.approx(2 / 1.0 / 2)


@pytest.mark.parametrize(
    ("more", "shown"),
    [
        ((0.5, 0.4, 0.6), "| contrast | 500.0 (400.0 to 600.0) |"),
        ((-0.2, -0.1, 0.3), "| contrast | -100.0 (-200.0 to 300.0, within noise) |"),
    ],
)
def test_the_contrast_is_told_with_its_quartiles(more: tuple[float, ...], shown: str) -> None:
    """Of steps beside each other; the record of the difference stays as it is, less than 0 too."""
    full, plain = [stretches(1.0, 0.1, heavy=seconds) for seconds in more], [stretches(1.0, 0.0) for _ in more]
    ranks = [{"host": "h", "stretches": {LOADING: full, WITHOUT: plain}, "memory": 10.0}]
    records = step.to_records(ranks, SIZES, {LOADING: 1, WITHOUT: 1}, PEAK)
    assert [r["value"] for r in records if r["metric"] == "contrast"] == pytest.approx([1000 * sorted(more)[1]])
    report = {"meta": {}, "records": [{"bench": "step", "case": "x 2"} | record for record in records]}
    assert shown in tables.milliseconds(tables.Cells(report), ["x 2"])


def test_the_slowest_rank_is_the_one_that_waits_least() -> None:
    records = step.to_records(everyone(slow=1.3), SIZES, {LOADING: 1, WITHOUT: 1}, PEAK)
    report = {"meta": {}, "records": [{"bench": "step", "case": "x 2"} | record for record in records]}
    found = tables.Cells(report).slowest("x 2")
    assert found is not None
    who, times = found
    assert who == "rank 1 (h)"
    assert times == pytest.approx(1.8 / 1.5)


# ---- the cost model ------------------------------------------------------------------------------------------------


def test_the_fit_finds_the_line_and_never_goes_below_zero() -> None:
    sizes = (4096, 65536, 1 << 20, 1 << 24)
    assert allreduce.fit(sizes, [2e-4 + 3e-10 * n for n in sizes]) == pytest.approx((2e-4, 3e-10))
    alpha, beta = allreduce.fit(sizes, [1e-9 * n**1.1 for n in sizes])
    assert alpha == 0
    assert beta > 0
    alpha, beta = allreduce.fit(sizes, [5e-4, 4e-4, 3e-4, 2e-4])
    assert beta == 0
    assert 2e-4 < alpha < 5e-4
    assert allreduce.ring_bandwidth(1e-9, 4) == pytest.approx(1.5e9)


CLUSTER = Cluster("c", 8, 100e9, 50e9, 1e-6, 10e-6, 5e-6, 0.5, "nobody")


def test_an_all_reduce_of_nodes() -> None:
    assert CLUSTER.all_reduce(1e9, 1) == 0
    within = 5e-6 + 2 * 7 * (1e9 / 8 / 50e9 + 1e-6)
    assert CLUSTER.all_reduce(1e9, 8) == pytest.approx(within)
    between = 2 * 3 / 4 * 1e9 / 25e9 + 2 * 2 * 10e-6
    assert CLUSTER.all_reduce(1e9, 32) == pytest.approx(within + between)
    assert CLUSTER.gather(31e6, 32) == pytest.approx(31e6 / 50e9 + 24e6 / 25e9)


def test_a_gpus_backward_hides_all_but_the_last_bucket() -> None:
    short, long = (Step(1.0, backward, 1e12, 1e9, 0, overlap=True) for backward in (0.01, 0.5))
    whole = CLUSTER.all_reduce(1e9, 32)
    assert short.exposed(CLUSTER, 32) == pytest.approx(whole - 0.01)
    assert long.exposed(CLUSTER, 32) == CLUSTER.all_reduce(model.BUCKET, 32)


def test_a_cpu_hides_nothing_and_shares_its_cores() -> None:
    network = Fitted(1e-3, 1e-9)
    one = Step(2.0, 1.0, 4e12, 1e8, 10, overlap=False)
    assert one.on(network, 1, FREE, FREE) == 2.0
    latency = 10 * (1e-3 + 8e-9)
    assert one.on(network, 2, FREE, FREE) == pytest.approx(2.0 + 0.101 + latency)
    assert one.on(network, 4, FREE, FREE, crowding=2.0) == pytest.approx(4.0 + 0.101 + latency)
    grown = one.on(network, 2, Cost(10**8, 0, 3 * 10**12), Cost(0, 0, 10**12))
    assert grown == pytest.approx(3.0 + 0.101 + latency + 0.1)


META = {"hosts": ["h"], "command": ["cclmpc"], "peak": "p", "machine": {"gpu": None, "cpu": "c", "cpus": 2},
        "versions": {"torch": "2"}, "commit": "0"}  # fmt: skip


def report_of(rounds: dict[int, list[float]], crowding: float = 1.0) -> list[dict[str, Any]]:
    """Points of weak scaling: by number of ranks the seconds of a step in each round. crowding: of two ranks."""
    config = parse(toy.settings(Path("d"), Path("r"), data__batch_labelled=1, data__batch_unlabelled=1), "toy")
    parts = []
    for world, seconds in rounds.items():
        for value in seconds:
            ranks = [{"host": "h", "stretches": {LOADING: [{"backward": value}] * 2}, "memory": 1.0}] * world
            sizes = SIZES | {"ranks": world, "images": 2 * world, "voxels": world}
            sizes["product_seconds"] = crowding if world == 2 else 1.0
            records = step.to_records(ranks, sizes, {LOADING: 10**9}, PEAK)
            if world > 1:
                records += allreduce.to_records((1000, 10**6), [[1.01e-3], [2e-3]], world)
            parts.append(
                {
                    "meta": META | {"config": config.model_dump(mode="json")},
                    "records": [{"bench": "scale", "case": f"weak {world}"} | r for r in records],
                }
            )
    return parts


def test_efficiency_is_round_by_round_and_the_prediction_stands_beside_it() -> None:
    report = scale.gathered(report_of({1: [1.0, 2.0, 1.0], 2: [1.25, 2.0, 2.0]}), clusters=True)
    value = {(r["case"], r["variant"], r["metric"]): r["value"] for r in report["records"]}
    assert value["weak 1", LOADING, "efficiency"] == 1.0
    found = [value["weak 2", LOADING, name] for name in ("efficiency", "efficiency_low", "efficiency_high")]
    assert found == pytest.approx([0.8, 0.5, 1.0])
    predicted = value["weak 2", "predicted", "efficiency"]
    assert 0.9 < predicted < 1
    assert value["weak 2", "predicted", "error"] == pytest.approx(100 * (predicted - 0.8))
    for cluster in model.CLUSTERS:
        curve = [value[f"weak {world}", cluster.name, "efficiency"] for world in predict.WORLDS]
        assert curve[0] == 1.0
        assert all(0 < after < before for before, after in pairwise(curve))
    page = tables.page(report)
    assert "**0.800** (0.500 - 1.000)" in page
    assert "no GPU here; assumed" in page


def test_a_scaling_page_gives_each_row_the_peak_of_its_mfu() -> None:
    parts = report_of({1: [1.0], 2: [1.0]})
    for part, peak in zip(parts, (0.4, 0.3), strict=True):
        part["meta"]["peak"] = f"measured: {peak} TFLOP/s, product of two matrices"
        next(r for r in part["records"] if r["metric"] == "peak")["value"] = peak
    page = tables.page(scale.gathered(parts, clusters=False))
    assert "over the peak of its row, measured: product of two matrices" in page
    rows = [line.split(" | ") for line in page.splitlines() if " | 1 | 1 (" in line]
    place = next(line for line in page.splitlines() if "| MFU |" in line).split(" | ").index("peak, TFLOP/s")
    assert [row[place] for row in rows] == ["0.4", "0.3"]


def test_a_strong_scaling_leaves_out_ranks_that_do_not_divide_the_batches() -> None:
    config = parse(toy.settings(Path("d"), Path("r"), data__batch_labelled=4, data__batch_unlabelled=2), "toy")
    assert [scale.fits(config, "strong", world) for world in (1, 2, 3, 4)] == [True, True, False, False]
    assert scale.fits(config, "weak", 3)


def test_ranks_that_crowd_their_cores_are_predicted_slower() -> None:
    predicted = []
    for crowding in (1.0, 1.25):
        records = scale.gathered(report_of({1: [1.0], 2: [1.0]}, crowding), clusters=False)["records"]
        (value,) = (r["value"] for r in records if (r["variant"], r["metric"]) == ("predicted", "efficiency"))
        predicted.append(1 / value)
    assert predicted[1] - predicted[0] == pytest.approx(0.25, rel=0.05)


def test_points_of_different_configurations_make_no_report() -> None:
    parts = report_of({1: [1.0], 2: [1.0]})
    parts[1]["meta"]["config"]["precision"] = "bf16"
    with pytest.raises(InputError, match="different configurations"):
        scale.gathered(parts, clusters=False)


# ---- files ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("worlds", "said"), [((), "no point was measured"), ((2,), "rests on the step of one rank")])
def test_points_that_make_no_report(worlds: tuple[int, ...], said: str) -> None:
    with pytest.raises(InputError, match=said):
        scale.gathered(report_of({world: [1.0] for world in worlds}), clusters=True)


def test_two_files_side_by_side(tmp_path: Path) -> None:
    (before,), (after,) = report_of({1: [2.0]}), report_of({1: [1.0]})
    after["meta"]["commit"] = "1"
    for name, part in (("a", before), ("b", after)):
        files.write(part, tmp_path / f"{name}.json")
    said = files.compare(tmp_path / "a.json", tmp_path / "b.json")
    assert "commit: 0 -> 1" in said
    assert f"| weak 1 | {LOADING} | images_per_second | images/s | 1 | 2 | 2.000 |" in said
    (tmp_path / "c.json").write_text('{"records": [1]}')
    with pytest.raises(InputError, match="holds no records"):
        files.compare(tmp_path / "a.json", tmp_path / "c.json")


# ---- real measurements ---------------------------------------------------------------------------------------------


def measured(rank: int, world: int, corpus: str, runs: str) -> dict[str, Any]:
    """A point, in which rank 1 is slow."""
    config = toy.config(Path(corpus), Path(runs), data__batch_labelled=2, data__batch_unlabelled=2)
    accelerator = runtime.start(config.precision)
    build = step.TimedTrainer.build

    def slow(trainer: step.TimedTrainer) -> None:
        build(trainer)
        if rank == 1:
            trainer.module.register_forward_pre_hook(lambda *_: time.sleep(0.1))

    step.TimedTrainer.build = slow  # type: ignore[method-assign]
    records, meta = step.measure(config, accelerator, 2, "scale", f"weak {world}", same=False)
    records += [
        {"bench": "scale", "case": f"weak {world}"} | r for r in allreduce.measure(accelerator.device, (4096, 65536))
    ]
    return {"text": json.dumps({"meta": meta, "records": records})}


def test_two_real_ranks_of_which_one_is_slow(toy_corpus: Path, tmp_path: Path) -> None:
    first, second = (json.loads(one["text"]) for one in run_ranks(measured, 2, str(toy_corpus), str(tmp_path)))
    assert first["records"] == second["records"], "every rank has the same"
    cells = tables.Cells(first)
    found = cells.slowest("weak 2")
    assert found is not None
    assert found[0].startswith("rank 1 ")
    total = 1000 * cells.values["weak 2", LOADING, "seconds"]
    assert sum(cells.values["weak 2", LOADING, part] for part in PARTS) == pytest.approx(total, rel=0.5)
    assert cells.values["weak 2", LOADING, "collectives"] > 0
    assert cells.values["weak 2", "sizes", "collective_calls"] > 3
    assert cells.values["weak 2", WITHOUT, "step_tflop"] < cells.values["weak 2", LOADING, "step_tflop"]
    assert cells.values["weak 2", "all-reduce fit", "ring_bandwidth"] > 0
    assert not list(tmp_path.iterdir()), "nothing is written"


@pytest.mark.slow
def test_bench_scale_starts_its_ranks_and_writes_table_and_plot(toy_corpus: Path, tmp_path: Path) -> None:
    config, out = tmp_path / "c.yaml", tmp_path / "o" / "scale.json"
    batches = {"data__batch_labelled": 2, "data__batch_unlabelled": 2}
    config.write_text(yaml.safe_dump(toy.settings(toy_corpus, tmp_path, **batches)))
    options = ["--ranks", "1,2", "--mode", "both", "--steps", "2", "--rounds", "1", "--predict"]
    said = toy.run(1, "bench", "scale", str(config), *options, "--out", str(out))
    assert "## Strong scaling" in said
    assert said.count("x the fastest's own time") == 2, "the slowest rank of each mode's two"
    assert said.count("## Where the milliseconds go") == 1
    report = files.read(out)
    cases = {r["case"] for r in report["records"] if r["variant"] == "sizes"}
    assert cases == {"weak 1", "weak 2", "strong 1", "strong 2"}
    images = {r["case"]: r["value"] for r in report["records"] if (r["variant"], r["metric"]) == ("sizes", "images")}
    assert images == {"weak 1": 4, "weak 2": 8, "strong 1": 4, "strong 2": 4}
    assert all(math.isfinite(r["value"]) for r in report["records"])
    assert {path.name for path in out.parent.iterdir()} == {"scale.json", "scale.md", "scale.png"}
    assert {path.name for path in tmp_path.iterdir()} == {"c.yaml", "o"}


@pytest.mark.slow
def test_bench_step_and_allreduce_by_their_commands(toy_corpus: Path, tmp_path: Path) -> None:
    config = tmp_path / "c.yaml"
    config.write_text(yaml.safe_dump(toy.settings(toy_corpus, tmp_path, method="supervised")))
    for name, world, arguments in (
        ("step", 2, [str(config), "--steps", "2"]),
        ("allreduce", 1, ["--ranks", "2"]),
    ):
        out = tmp_path / f"{name}.json"
        toy.run(world, "bench", name, *arguments, "--out", str(out))
        assert files.read(out)["records"][0]["bench"] == name
        before = out.with_suffix(".md").read_text()
        out.with_suffix(".md").unlink()
        toy.run(1, "bench", "report", str(out))
        assert out.with_suffix(".md").read_text() == before
    code, said = toy.finish(toy.launch(1, "bench", "allreduce"))
    assert code == 2
    assert "nothing to reduce" in said
