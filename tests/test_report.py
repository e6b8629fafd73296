"""Evaluation of cases, its files, the gathering over ranks, and the report that is drawn from them."""

import csv
import json
import math
import re
from html.parser import HTMLParser
from io import BytesIO

import matplotlib.image
import numpy as np
import pytest
import torch
from ranks import run_ranks

from cclmpc_dist import config
from cclmpc_dist.errors import InputError
from cclmpc_dist.evaluation import pictures
from cclmpc_dist.evaluation.evaluate import (
    Meta,
    evaluate,
    gather_rows,
    load,
    prediction_file,
    read_csv,
    save,
    share,
    write_csv,
)
from cclmpc_dist.evaluation.metrics import COLUMNS, case_metrics, summary
from cclmpc_dist.evaluation.report import read_scalars, report

META = Meta(7, "last", "ema", "shards/x", "val", True, (8, 8, 8), (4, 4, 4), "uniform", 3)


def predict(x):
    """Class 1 where the first channel is high, class 2 where it is low."""
    return torch.stack([torch.zeros_like(x[:, 0]), x[:, 0] - 1, -x[:, 0] - 1], 1).softmax(1)


def case(number, size=(12, 10, 9)):
    rng = np.random.default_rng(number)
    image = torch.from_numpy(rng.normal(0, 2, (2, *size)).astype(np.float32))
    label = np.zeros(size, np.uint8)
    label[2:7, 3:8], label[8:10, 3:8] = 1, 2
    image[0] = torch.from_numpy((label == 1) * 3.0 - (label == 2) * 3.0 + rng.normal(0, 0.3 + number, size))
    return f"case/{number} <b>", image, label, (0.5,) * (len(size) - 1) + (1.5,)


def evaluated(folder, count=4, size=(12, 10, 9)):
    patch = (8,) * len(size)
    return evaluate(predict, [case(n, size) for n in range(count)], patch, (4,) * len(size), 3, folder=folder)


def equal(rows, others):
    """Equality that takes NaN for equal."""
    return json.dumps(rows) == json.dumps(others)


def test_evaluate_scores_the_argmax(tmp_path):
    finished = []
    key, image, label, spacing = case(1, (8, 8, 8))
    rows = evaluate(
        predict, [(key, image, label, spacing)], (8, 8, 8), (4, 4, 4), 3, folder=tmp_path, done=finished.append
    )
    expected = predict(image[None])[0].argmax(0).numpy()
    assert equal(rows, [{"case": key, **row} for row in case_metrics(expected, label, spacing, 3)])
    assert finished == [key]
    with np.load(prediction_file(tmp_path, key)) as stored:
        np.testing.assert_array_equal(stored["prediction"], expected)
        np.testing.assert_array_equal(stored["label"], label)
        np.testing.assert_array_equal(stored["spacing"], spacing)
        grey, raw = stored["image"], image[0].numpy()
    assert (grey.dtype, grey.min(), grey.max()) == (np.uint8, 0, 255)
    assert np.corrcoef(grey.ravel(), raw.ravel())[0, 1] > 0.99


def test_a_case_without_a_label_is_listed_and_counted():
    key, image, _, spacing = case(0)
    rows = evaluate(predict, [(key, image, None, spacing), case(1)], (8, 8, 8), (4, 4, 4), 3)
    assert [(row["case"], row["class"]) for row in rows] == [(key, 1), (key, 2), (case(1)[0], 1), (case(1)[0], 2)]
    assert all(math.isnan(rows[0][column]) for column in COLUMNS)
    assert {entry["n_excluded"] for entry in summary(rows) if entry["class"] == 1} == {1}


def test_files_give_back_what_was_saved(tmp_path):
    rows = evaluated(None, 2)
    rows[1]["hd95_mm"] = math.nan
    save(tmp_path / "eval", rows, META)
    back, meta = load(tmp_path / "eval")
    assert equal(back, rows)
    assert meta == META
    with (tmp_path / "eval" / "summary.csv").open() as file:
        entries = list(csv.DictReader(file))
    expected = [{name: str(value) for name, value in entry.items()} for entry in summary(rows)]
    assert [dict(sorted(entry.items())) for entry in entries] == [dict(sorted(entry.items())) for entry in expected]


def test_no_row_at_all(tmp_path):
    assert evaluate(predict, [], (8, 8), (4, 4), 2) == []
    save(tmp_path, [], META)
    assert load(tmp_path) == ([], META)


def test_a_new_evaluation_withdraws_the_old_one(tmp_path):
    save(tmp_path, [], META)
    evaluate(predict, [], (8, 8), (4, 4), 2, folder=tmp_path)
    assert not (tmp_path / "meta.json").exists()


@pytest.mark.parametrize(
    ("file", "text"),
    [
        ("cases.csv", None),
        ("cases.csv", "case,class\na,1\n"),
        ("cases.csv", "case,class," + ",".join(COLUMNS) + "\na,1,x,0,0,0,0,0,0\n"),
        ("meta.json", "{}"),
        ("meta.json", json.dumps({"patch": [1], "stride": [1], "novel": 1})),
    ],
)
def test_damaged_files_are_named(tmp_path, file, text):
    save(tmp_path, evaluated(None, 1), META)
    (tmp_path / file).unlink()
    if text is not None:
        (tmp_path / file).write_text(text)
    with pytest.raises(InputError, match=rf"{file}: .*evaluate the run again"):
        load(tmp_path)


def test_shares_are_disjoint_and_complete():
    for count, world in [(0, 2), (1, 3), (7, 3), (8, 4)]:
        assert sorted(i for rank in range(world) for i in share(count, rank, world)) == list(range(count))


def rows_of(numbers):
    nan = {"hd95_mm": math.nan}
    return [{"case": f"é{n}", "class": c, **dict.fromkeys(COLUMNS, n / 3 + c), **nan} for n in numbers for c in (1, 2)]


def gathered(rank, world, counts):
    return [gather_rows(rows_of(share(count, rank, world))) for count in counts]


def test_gathered_rows_have_the_order_of_the_cases(tmp_path):
    counts = [0, 2, 5]  # of three ranks: all, one and none have no case
    for found in run_ranks(gathered, 3, counts):
        for count, rows in zip(counts, found, strict=True):
            assert equal(rows, rows_of(range(count)))
    write_csv(rows_of(range(5)), tmp_path / "cases.csv", ["case", "class", *COLUMNS])
    assert equal(read_csv(tmp_path / "cases.csv"), rows_of(range(5)))


def test_without_a_process_group_rows_stay(tmp_path):
    rows = rows_of(range(2))
    assert gather_rows(rows) is rows


class Page(HTMLParser):
    """What a browser would load, the tags left open, and the text outside of scripts and styles."""

    def __init__(self, text):
        super().__init__()
        self.sources, self.open, self.text = [], [], ""
        self.feed(text)

    def handle_starttag(self, tag, attrs):
        self.sources += [value for name, value in attrs if name in ("src", "href")]
        if tag not in ("meta", "img", "br", "link"):
            self.open.append(tag)
        assert tag not in ("script", "link", "iframe")

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        if self.open and self.open[-1] != "style":
            self.text += data + "\n"


def page(run):
    path = report(run)
    assert path == run / "report.html"
    parsed = Page(path.read_text(encoding="utf-8"))
    assert parsed.open == []
    assert all(source.startswith("data:image/") for source in parsed.sources)
    return parsed


@pytest.fixture
def bare_run(tmp_path):
    """A run folder with no more than its settings."""
    settings = {
        "name": "a_run",
        "data": {"path": "x<script>y", "patch": [16, 16, 16], "labelled": 8},
        "budget": {"images": 100},
    }
    (tmp_path / "config.yaml").write_text(config.dump(config.parse(settings, "test")))
    return tmp_path


@pytest.fixture
def run(bare_run, tmp_path):
    """A run folder with everything in it."""
    (tmp_path / "environment.json").write_text(json.dumps({"host": "<script>alert(1)</script>"}))
    lines = [
        {"step": s, "loss/total": 1 / s, "loss/<i>": math.nan if s % 2 else s, "optim/lr": 0.1, "perf/note": "x"}
        for s in range(1, 1001)
    ]
    (tmp_path / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    save(tmp_path / "eval", evaluated(tmp_path / "eval"), META)
    return tmp_path


def test_report_shows_the_run(run):
    shown = page(run)
    for words in (
        "a_run",
        "the first 8",
        "the last checkpoint (step 7)",
        "averaged (EMA) weights",
        "no post-processing",
        "cropped around their own labels",
        "x<script>y",
        "case/3 <b>",
        "Losses",
        "Optimiser",
    ):
        assert words in shown.text, words
    assert "could not be read" not in shown.text
    kinds = [re.match(r"data:image/([a-z+]+);base64,", source).group(1) for source in shown.sources]
    assert sorted(kinds) == ["png"] * 3 + ["svg+xml"] * 2
    entries = summary(load(run / "eval")[0])
    for entry in entries:
        if entry["metric"] == "dice":
            assert f"{entry['mean']:.4f}" in shown.text


def test_report_picks_best_median_and_worst(run):
    rows, _ = load(run / "eval")
    for row in rows:
        row["dice"] = {"0": 0.2, "1": 0.9, "2": 0.5, "3": 0.6}[row["case"][5]]
    save(run / "eval", rows, META)
    text = " ".join(page(run).text.split())
    for rank, key, dice in (("Best", 1, 0.9), ("Median", 2, 0.5), ("Worst", 0, 0.2)):
        assert f"{rank} : case/{key} <b>, Dice {dice:.4f}" in text


def test_report_of_one_case_draws_it_once(run):
    save(run / "eval", evaluated(run / "eval", 1), META)
    shown = page(run)
    assert "Best and median and worst" in shown.text
    assert "95 %: –" in shown.text
    assert sum(source.startswith("data:image/png") for source in shown.sources) == 1


def test_report_says_what_is_missing(bare_run):
    text = page(bare_run).text
    for words in ("has not been evaluated", "no scalar", "has no such file"):
        assert words in text


def test_report_without_cases_or_labels_or_predictions(run):
    save(run / "eval", [], META)
    assert "no case to score" in page(run).text
    key, image, _, spacing = case(0)
    save(run / "eval", evaluate(predict, [(key, image, None, spacing)], (8, 8, 8), (4, 4, 4), 3), META)
    assert "No case has a label" in page(run).text
    save(run / "eval", [{"case": "lost", "class": 1, **dict.fromkeys(COLUMNS, 0.5)}], META)
    assert "Its prediction was not kept" in page(run).text


def test_report_of_images(run):
    save(run / "eval", evaluated(run / "eval", 2, (12, 10)), META)
    assert sum(source.startswith("data:image/png") for source in page(run).sources) == 2


@pytest.mark.parametrize("name", ["nowhere", "empty", "other"])
def test_report_of_no_run_folder(name, tmp_path):
    (tmp_path / "empty").mkdir()
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "manifest.json").write_text("{}")
    with pytest.raises(InputError, match=f"{name}: no run folder: name one that"):
        report(tmp_path / name)
    assert not (tmp_path / name / "report.html").exists()


def test_resumed_steps_count_once_and_torn_lines_are_told(bare_run):
    (bare_run / "metrics.jsonl").write_text(
        '{"step": 1, "a": 1.0}\n{"step": 2, "a": 2.0}\n{"step": 2, "a": 5, "b": NaN}\n[3]\n{"step": 3, "a":'
    )
    scalars, unreadable = read_scalars(bare_run / "metrics.jsonl")
    assert unreadable == 2
    assert [x.tolist() for x in scalars["a"]] == [[1, 2], [1.0, 5.0]]
    assert "could not be read: 2" in page(bare_run).text


def test_overlay_marks_label_and_prediction_where_they_are():
    image, label, prediction = np.zeros((3, 40, 30, 20), np.uint8)
    label[5:15, 5:15, 5:15], prediction[25:35, 5:15, 5:15] = 1, 1
    spacing = (1.0, 1.0, 2.0)
    picture = read_png(pictures.overlay(image, label, prediction, spacing))
    height, width = picture.shape[:2]
    first = picture[:, : round(width * (40 / 30) / (40 / 30 + 40 / 40 + 30 / 40))]  # x across, y up
    green, red = (first[..., 1] > 1.5 * first[..., 0]), (first[..., 0] > 1.5 * first[..., 1])
    across, up = np.nonzero(green.any(0))[0] / first.shape[1], 1 - np.nonzero(green.any(1))[0] / height
    assert (across.min(), across.max()) == pytest.approx((5 / 40, 15 / 40), abs=0.04)
    assert (up.min(), up.max()) == pytest.approx((5 / 30, 15 / 30), abs=0.04)
    assert np.nonzero(red.any(0))[0].mean() / first.shape[1] == pytest.approx(30 / 40, abs=0.04)
    assert width / height == pytest.approx(40 / 30 + 1 + 30 / 40, abs=0.1)  # millimetres, not voxels


def test_overlay_of_empty_and_full_masks():
    image, none = np.zeros((2, 8, 9, 10), np.uint8)
    for label, prediction in [(none, none), (none, none + 1), (none + 1, none)]:
        assert read_png(pictures.overlay(image, label, prediction, (1.0, 1.0, 1.0))).size


def read_png(data):
    return matplotlib.image.imread(BytesIO(data))[..., :3]


def test_long_curves_are_thinned_by_means():
    steps = np.arange(10_007)
    thin_steps, thin_values = pictures._thin(steps, steps * 2.0)
    assert len(thin_steps) == pictures.POINTS
    np.testing.assert_allclose(thin_values, 2 * thin_steps)
    assert thin_steps[0] == pytest.approx(np.arange(25).mean())
    assert abs(thin_steps.mean() - steps.mean()) < 20


def test_curves_of_any_length_draw():
    empty = np.array([]), np.array([])
    lost = np.arange(3), np.full(3, math.nan)
    one = np.array([5]), np.array([0.5])
    svg = pictures.curves({"empty": empty, "lost": lost, "$one_": one, "flat": (np.arange(4), np.zeros(4))})
    assert svg.startswith(b"<?xml")
