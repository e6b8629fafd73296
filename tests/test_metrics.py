"""Metrics against brute force on small masks and against medpy on LA's labels; their summary."""

import itertools
import math
from pathlib import Path

import numpy as np
import pytest

from cclmpc_dist.evaluation.bench import bench_eval, perturbed
from cclmpc_dist.evaluation.metrics import COLUMNS, case_metrics, defined_mean, mask_metrics, summary, surface

LA = Path(__file__).parents[1].parent / "shared/la/volumes"
ISO = (1.0, 1.0, 1.0)


def surface_points(mask):
    """Voxels with a face neighbour outside the mask or the array."""
    points = []
    for voxel in itertools.product(*map(range, mask.shape)):
        if not mask[voxel]:
            continue
        for axis, side in itertools.product(range(mask.ndim), (-1, 1)):
            near = tuple(v + side * (a == axis) for a, v in enumerate(voxel))
            if any(not 0 <= v < n for v, n in zip(near, mask.shape, strict=True)) or not mask[near]:
                points.append(voxel)
                break
    return points


def percentile_95(values):
    ordered = sorted(values)
    place = 0.95 * (len(ordered) - 1)
    low, part = int(place), place - int(place)
    return ordered[low] + part * (ordered[min(low + 1, len(ordered) - 1)] - ordered[low])


def directed(points, others, spacing):
    return [min(math.dist(np.multiply(p, spacing), np.multiply(q, spacing)) for q in others) for p in points]


def brute_force(prediction, truth, spacing):
    p, t = surface_points(prediction), surface_points(truth)
    one = (1.0,) * truth.ndim
    voxel = directed(p, t, one), directed(t, p, one)
    mm = directed(p, t, spacing), directed(t, p, spacing)
    both = [(prediction & truth).sum(), (prediction | truth).sum()]
    return {
        "dice": 2 * both[0] / (prediction.sum() + truth.sum()),
        "jaccard": both[0] / both[1],
        "hd95_voxel": percentile_95(voxel[0] + voxel[1]),
        "asd_voxel": sum(voxel[0]) / len(voxel[0]),
        "hd95_mm": max(map(percentile_95, mm)),
        "assd_mm": sum(mm[0] + mm[1]) / len(mm[0] + mm[1]),
        "nsd_1mm": sum(d <= 1 + 1e-9 for d in mm[0] + mm[1]) / len(mm[0] + mm[1]),
    }


@pytest.mark.parametrize("spacing", [(0.625,) * 3, (0.5, 0.5, 2.5), (1.5, 0.1, 0.7), (0.8, 1.1), (1.0, 1.0)])
@pytest.mark.parametrize("density", [0.05, 0.5, 0.95])
def test_equals_brute_force(spacing, density):
    rng = np.random.default_rng(int(100 * density))
    shape = (6, 5, 7)[: len(spacing)]
    prediction, truth = rng.random(shape) < density, rng.random(shape) < density
    prediction[0, 0], truth[-1, -1] = True, True
    found = mask_metrics(prediction, truth, spacing)
    assert found == pytest.approx(brute_force(prediction, truth, spacing), abs=1e-12)


def test_turning_an_anisotropic_case_changes_nothing():
    rng = np.random.default_rng(3)
    prediction, truth = rng.random((2, 6, 5, 7)) < 0.3
    found = mask_metrics(prediction, truth, (0.5, 0.9, 3.0))
    turned = mask_metrics(prediction.transpose(2, 0, 1), truth.transpose(2, 0, 1), (3.0, 0.5, 0.9))
    assert found == pytest.approx(turned, abs=1e-12)


def test_surface_counts_the_faces_at_the_border():
    assert surface(np.ones((3, 4, 5), bool)).sum() == 3 * 4 * 5 - 1 * 2 * 3


def test_known_shift():
    truth, prediction = np.zeros((2, 20, 20, 20), bool)
    truth[5:10, 5:10, 5:10] = True
    prediction[5:10, 5:10, 8:13] = True
    found = mask_metrics(prediction, truth, (1.0, 1.0, 0.5))
    assert found["dice"] == pytest.approx(0.4)
    assert found["hd95_voxel"] == 3.0
    assert found["hd95_mm"] == 1.5


def test_tolerance_includes_one_millimetre():
    truth, prediction = np.zeros((2, 30, 3), bool)
    truth[2], prediction[12] = True, True
    assert mask_metrics(prediction, truth, (0.1, 0.1))["nsd_1mm"] == 1.0
    assert mask_metrics(prediction, truth, (0.1001, 0.1001))["nsd_1mm"] == 0.0


def test_empty_masks():
    none, some = np.zeros((2, 4, 4, 4), bool)
    some[1, 2, 3] = True
    agreed = {"dice": 1, "jaccard": 1, "hd95_voxel": 0, "asd_voxel": 0, "hd95_mm": 0, "assd_mm": 0, "nsd_1mm": 1}
    nan = math.nan
    missed = {c: 0 if c in ("dice", "jaccard", "nsd_1mm") else nan for c in COLUMNS}
    assert mask_metrics(none, none, ISO) == agreed
    assert mask_metrics(none, some, ISO) == pytest.approx(missed, nan_ok=True)
    assert mask_metrics(some, none, ISO) == pytest.approx(missed, nan_ok=True)
    assert mask_metrics(some, some, ISO) == agreed


def test_each_class_is_scored_by_itself():
    rng = np.random.default_rng(0)
    prediction, label = rng.integers(0, 4, (2, 5, 6, 4)).astype(np.uint8)
    rows = case_metrics(prediction, label, (1, 1, 2), 4)
    assert [row["class"] for row in rows] == [1, 2, 3]
    for row in rows:
        expected = mask_metrics(prediction == row["class"], label == row["class"], (1, 1, 2))
        assert {column: row[column] for column in COLUMNS} == expected


def row(case, number, **values):
    return {"case": case, "class": number, **dict.fromkeys(COLUMNS, 0.0), **values}


def pick(entries, number, metric):
    return next(e for e in entries if e["class"] == number and e["metric"] == metric)


def test_summary():
    dice = [0.9, 0.8, 0.7, 0.95]
    entries = summary(row(str(i), 1, dice=d, hd95_mm=math.nan if i == 1 else d) for i, d in enumerate(dice))
    assert {(e["class"], e["metric"]) for e in entries} == {(1, column) for column in COLUMNS}
    found = pick(entries, 1, "dice")
    assert found["mean"] == pytest.approx(0.8375)
    assert found["sd"] == pytest.approx(math.sqrt(sum((d - 0.8375) ** 2 for d in dice) / 3))
    assert (found["n"], found["n_excluded"]) == (4, 0)
    distance = pick(entries, 1, "hd95_mm")
    assert distance["mean"] == pytest.approx((0.9 + 0.7 + 0.95) / 3)
    assert (distance["n"], distance["n_excluded"]) == (3, 1)


def test_interval_is_the_bootstraps():
    values = np.random.default_rng(5).normal(0.9, 0.02, 400)
    found = pick(summary(row(str(i), 1, dice=float(d)) for i, d in enumerate(values)), 1, "dice")
    error = values.std() / math.sqrt(len(values))  # the bootstrap's is normal at this size
    assert found["low"] == pytest.approx(values.mean() - 1.96 * error, abs=0.15 * error)
    assert found["high"] == pytest.approx(values.mean() + 1.96 * error, abs=0.15 * error)


def test_summary_of_little():
    assert summary([]) == []
    alone = pick(summary([row("a", 1, dice=0.5)]), 1, "dice")
    assert (alone["mean"], alone["n"]) == (0.5, 1)
    assert math.isnan(alone["sd"])
    dice = [0.9, 0.8, 0.7, 0.95, 0.85, 0.75]
    for number, interval in ((5, False), (6, True)):
        found = pick(summary(row(str(i), 1, dice=d) for i, d in enumerate(dice[:number])), 1, "dice")
        assert [math.isfinite(found[end]) for end in ("low", "high")] == [interval] * 2
    assert 0.7 <= found["low"] < found["mean"] < found["high"] <= 0.95
    nothing = pick(summary([row("a", 1, asd_voxel=math.nan)]), 1, "asd_voxel")
    assert all(math.isnan(nothing[k]) for k in ("mean", "sd", "low", "high"))
    assert (nothing["n"], nothing["n_excluded"]) == (0, 1)


def test_summary_over_classes():
    rows = [row("a", 1, dice=0.9, assd_mm=1.0), row("a", 2, dice=0.5, assd_mm=math.nan)]
    rows += [row("b", 1, dice=0.8, assd_mm=2.0), row("b", 2, dice=0.6, assd_mm=4.0)]
    entries = summary(rows)
    assert pick(entries, 2, "dice")["mean"] == pytest.approx(0.55)
    assert pick(entries, "mean", "dice")["mean"] == pytest.approx(0.7)
    over = pick(entries, "mean", "assd_mm")
    assert over["mean"] == pytest.approx((1.0 + 3.0) / 2)  # case a counts with its defined class
    assert (over["n"], over["n_excluded"]) == (2, 1)
    assert defined_mean(rows[:2], "assd_mm") == 1.0


def medpy_of(prediction, truth):
    binary = pytest.importorskip("medpy.metric.binary", reason="medpy is not installed: pip install -e '.[dev]'")
    functions = {"dice": binary.dc, "jaccard": binary.jc, "hd95_voxel": binary.hd95, "asd_voxel": binary.asd}
    return {column: float(f(prediction, truth)) for column, f in functions.items()}


@pytest.mark.parametrize("seed", range(6))
def test_equals_medpy_on_blobs(seed):
    ndimage = pytest.importorskip("scipy.ndimage")
    fields = np.random.default_rng(seed).normal(size=(2, 30, 26, 22))
    prediction, truth = (ndimage.gaussian_filter(field, 1 + seed / 2) > 0 for field in fields)
    expected = medpy_of(prediction, truth)
    found = mask_metrics(prediction, truth, (0.3, 0.4, 0.5))
    assert {column: found[column] for column in expected} == pytest.approx(expected, abs=1e-6)


@pytest.mark.skipif(not LA.is_dir(), reason="no LA data beside the project (shared/la)")
@pytest.mark.parametrize("change", ["shifted", "dilated", "eroded", "ragged", "stray"])
def test_equals_medpy_on_la(change):
    h5py = pytest.importorskip("h5py")
    folders = sorted(LA.iterdir())
    with h5py.File(folders[len(change) % len(folders)] / "mri_norm2.h5") as file:
        truth = np.asarray(file["label"]) > 0
    prediction = perturbed(truth)[change]
    expected = medpy_of(prediction, truth)
    found = mask_metrics(prediction, truth, (0.625,) * 3)
    assert {column: found[column] for column in expected} == pytest.approx(expected, abs=1e-6)


def test_benchmark_records():
    pytest.importorskip("medpy.metric.binary", reason="medpy is not installed: pip install -e '.[dev]'")
    records = bench_eval(None, volumes=1, repeats=1, size=(24, 20, 16))
    assert {r["case"] for r in records} == {f"blob 0 {c}" for c in perturbed(np.zeros((9, 9, 9), bool))}
    assert all(set(r) - {"samples"} == {"bench", "case", "variant", "metric", "value", "unit"} for r in records)
    assert max(r["value"] for r in records if r["metric"] == "largest_difference") < 1e-6
    assert min(r["value"] for r in records if r["metric"] == "seconds") > 0
