"""report.html: one file that shows a run, from what lies in its folder. It loads nothing from elsewhere."""

import json
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from cclmpc_dist import config as settings
from cclmpc_dist.errors import InputError
from cclmpc_dist.evaluation import evaluate, page, pictures
from cclmpc_dist.evaluation.metrics import BOOTSTRAP, FEWEST, Metric, Row, by_case, defined_mean, metrics_in, summary

Metrics = dict[str, Metric]  # by column

_GROUPS = {
    "loss": "Losses",
    "weight": "Weights of the losses",
    "train": "Training signals",
    "val": "Validation",
    "optim": "Optimiser",
    "perf": "Speed and memory",
}
_LEAK = (
    "The files of this corpus, test files too, are cropped around their own labels. The numbers share that "
    "leak with the published ones on the same files and do not tell how the network does on a whole scan."
)
_RULES = (
    f"SD over cases (n - 1). Interval of the mean: percentile bootstrap over cases, {BOOTSTRAP} resamples; fewer than "
    f"{FEWEST} cases have none. "
    "P is the prediction, T the truth. Both empty: overlaps 1, distances 0. One empty: overlaps 0, distances "
    "undefined: left out of the mean and counted as excluded. A case without a label is excluded everywhere. "
    "Voxel distances ignore the spacing, as LA papers do."
)


def report(run: str | Path) -> Path:
    """Write <run>/report.html and return its path. What the folder lacks is said in its place.

    Raises InputError where the folder is not a run's or a file in it is damaged.
    """
    run = Path(run)
    if not (run / "config.yaml").is_file():
        raise InputError(f"{run}: no run folder: name one that `cclmpc train` wrote")
    config = settings.load(run / "config.yaml")
    scalars, unreadable = read_scalars(run / "metrics.jsonl")
    sections = [
        _facts(config, scalars),
        *_evaluation(run / "eval"),
        _training(scalars, unreadable),
        _origins(run),
    ]
    path, temporary = run / "report.html", run / "report.tmp"
    temporary.write_text(page.document(config.name, sections), encoding="utf-8")
    os.replace(temporary, path)
    return path


def read_scalars(path: Path) -> tuple[dict[str, pictures.Curve], int]:
    """Steps and values of each scalar of a metrics.jsonl, by step, and how many lines could not be read.

    A step that was logged twice (a run resumed from an earlier checkpoint) counts with its last line.
    """
    found: dict[str, dict[int, float]] = {}
    unreadable = 0
    for line in path.read_text(encoding="utf-8").splitlines() if path.exists() else []:
        try:
            entry = json.loads(line)
            step = int(entry["step"])
        except (ValueError, KeyError, TypeError):
            unreadable += 1
            continue
        for name, value in entry.items():
            if name != "step" and isinstance(value, int | float):
                found.setdefault(name, {})[step] = float(value)
    return {name: _curve(points) for name, points in found.items()}, unreadable


def _curve(points: dict[int, float]) -> pictures.Curve:
    steps = sorted(points)
    return np.array(steps), np.array([points[step] for step in steps])


def _facts(config: settings.Config, scalars: dict[str, pictures.Curve]) -> str:
    facts = _settings(config)
    if scalars:
        facts["Last step logged"] = max(int(steps[-1]) for steps, _ in scalars.values())
    return page.section("Run", page.facts(facts))


def _settings(config: settings.Config) -> dict[str, Any]:
    """The settings a reader asks for first."""
    images, labelled = config.budget.images, config.data.labelled
    chosen = f"the first {labelled}" if isinstance(labelled, int) else f"{len(labelled or ())}, by key"
    return {
        "Method": config.method,
        "Corpus": ", ".join(config.data.paths.values()),
        "Labelled cases": "as the shards say" if labelled is None else chosen,
        "Patch": _size(config.data.patch),
        "Budget": f"{images} images" if images else f"{config.budget.epochs} epochs",
        "Network": f"{config.model.filters} filters, {config.model.norm} norm",
        "Optimiser": f"{config.optim.name}, lr {config.optim.lr:g}, {config.optim.schedule}",
        "Precision": config.precision,
        "Seed": config.seed,
    }


def _evaluation(folder: Path) -> list[str]:
    if not (folder / "meta.json").exists():
        return [page.section("Evaluation", page.para("This run has not been evaluated: run `cclmpc eval`."))]
    rows, meta = evaluate.load(folder)
    metrics = metrics_in(meta.unit)
    results = _results(summary(rows), meta, len(by_case(rows)), metrics)
    return [results, _overlays(folder, rows), _cases(rows, metrics)] if rows else [results]


def _results(entries: list[dict[str, Any]], meta: evaluate.Meta, cases: int, metrics: Metrics) -> str:
    parts = [page.para(_conditions(meta, cases))]
    if meta.cropped_by_label:
        parts.append(page.note(_LEAK))
    if not entries:
        return page.section("Evaluation", *parts, page.para("There was no case to score."))
    meanings = " ".join(f"{_title(metric)}: {metric.text}." for metric in metrics.values())
    explained = page.folded("What the columns mean", page.para(meanings), page.para(_RULES))
    return page.section("Evaluation", *parts, _tiles(entries, metrics), _summary_table(entries, metrics), explained)


def _conditions(meta: evaluate.Meta, cases: int) -> str:
    which = {
        "last": f"the last checkpoint (step {meta.step})",
        "best": f"the best checkpoint on cases cut from the labelled ones (step {meta.step}), not the last",
    }[meta.checkpoint]
    weights = "averaged (EMA) weights" if meta.weights == "ema" else "the network's own weights"
    return (
        f"Cases: {cases}, split {meta.split} of {meta.dataset}. Evaluated: {which}, {weights}. "
        f"Sliding window {_size(meta.patch)}, stride {_size(meta.stride)}, {meta.blend} mean of the class "
        "probabilities, argmax, no post-processing."
    )


def _tiles(entries: list[dict[str, Any]], metrics: Metrics) -> str:
    """Of the last group: the only class, or the mean over classes."""
    last = {entry["metric"]: entry for entry in entries if entry["class"] == entries[-1]["class"]}
    shown = [last[column] for column in ("dice", "jaccard", "hd95_voxel", "asd_voxel")]
    return f'<div class="tiles">{"".join(_tile(entry, metrics) for entry in shown)}</div>'


def _tile(entry: dict[str, Any], metrics: Metrics) -> str:
    metric = metrics[entry["metric"]]
    mean, interval = _number(entry["mean"], metric), _interval(entry, metric)
    return f'<div class="tile">{page.text(_title(metric))}<b>{mean}</b>95 %: {interval}</div>'


def _summary_table(entries: list[dict[str, Any]], metrics: Metrics) -> str:
    head = ["Metric", "Unit", "Class", "Mean", "SD", "95 % interval", "n", "Excluded"]
    return page.table(head, [_summary_line(entry, metrics[entry["metric"]]) for entry in entries])


def _summary_line(entry: dict[str, Any], metric: Metric) -> list[str]:
    mean, sd = (_number(entry[name], metric) for name in ("mean", "sd"))
    counts = [str(entry["n"]), str(entry["n_excluded"])]
    return [metric.title, metric.unit, str(entry["class"]), mean, sd, _interval(entry, metric), *counts]


def _overlays(folder: Path, rows: list[Row]) -> str:
    dice = {case[0]["case"]: defined_mean(case, "dice") for case in by_case(rows)}
    ranked = sorted((key for key in dice if np.isfinite(dice[key])), key=lambda key: dice[key])
    if not ranked:
        return page.section("Pictures", page.para("No case has a label to compare with."))
    picks: dict[str, list[str]] = {}
    for name, place in (("best", -1), ("median", (len(ranked) - 1) // 2), ("worst", 0)):
        picks.setdefault(ranked[place], []).append(name)
    figures = [_overlay(folder, key, " and ".join(names), dice[key]) for key, names in picks.items()]
    legend = (
        f'<p>Contours: <b style="color:{pictures.TRUTH}">label</b>, '
        f'<b style="color:{pictures.PREDICTION}">prediction</b>, in the planes through the centre of mass of '
        "the label. Best, median and worst by mean Dice.</p>"
    )
    return page.section("Pictures", legend, *figures)


def _overlay(folder: Path, key: str, rank: str, dice: float) -> str:
    caption = f"<figcaption><b>{rank.capitalize()}</b>: {page.text(key)}, Dice {dice:.4f}</figcaption>"
    path = evaluate.prediction_file(folder, key)
    if not path.exists():
        return f"<figure>{caption}{page.para('Its prediction was not kept.')}</figure>"
    with np.load(path) as stored:
        picture = pictures.overlay(stored["image"], stored["label"], stored["prediction"], stored["spacing"].tolist())
    return f"<figure>{caption}{page.image(picture, 'png', f'{key}, image with contours')}</figure>"


def _cases(rows: list[Row], metrics: Metrics) -> str:
    head = ["Case", "Class", *map(_title, metrics.values())]
    body = [
        [row["case"], str(row["class"]), *(_number(row[column], metric) for column, metric in metrics.items())]
        for row in rows
    ]
    return page.section("Cases", page.table(head, body))


def _training(scalars: dict[str, pictures.Curve], unreadable: int) -> str:
    if not scalars and not unreadable:
        return page.section("Training", page.para("There is no scalar in metrics.jsonl."))
    drawn = f"Over optimiser steps. Beyond {pictures.POINTS} points the means over equal bins are drawn."
    parts = [page.para(drawn)]
    if unreadable:
        parts.append(page.note(f"Lines of metrics.jsonl that could not be read: {unreadable}."))
    for title, curves in _grouped(scalars).items():
        parts.append(f"<h3>{page.text(title)}</h3>{page.image(pictures.curves(curves), 'svg+xml', title)}")
    return page.section("Training", *parts)


def _grouped(scalars: dict[str, pictures.Curve]) -> dict[str, dict[str, pictures.Curve]]:
    """Scalars by what stands before their slash, the known groups first."""
    groups: dict[str, dict[str, pictures.Curve]] = {title: {} for title in _GROUPS.values()}
    for name in sorted(scalars):
        prefix, slash, _ = name.partition("/")
        title = _GROUPS.get(prefix, prefix.capitalize()) if slash else "Other"
        groups.setdefault(title, {})[name] = scalars[name]
    return {title: curves for title, curves in groups.items() if curves}


def _origins(run: Path) -> str:
    return page.section("Origins", *(_file(run / name) for name in ("config.yaml", "environment.json")))


def _file(path: Path) -> str:
    if not path.exists():
        return page.folded(path.name, page.para("The folder has no such file."))
    return page.folded(path.name, f"<pre>{page.text(path.read_text(encoding='utf-8'))}</pre>")


def _title(metric: Metric) -> str:
    return metric.title if metric.unit == "fraction" else f"{metric.title}, {metric.unit}"


def _number(value: float, metric: Metric) -> str:
    if not np.isfinite(value):
        return "–"
    return f"{value:.4f}" if metric.unit == "fraction" else f"{value:.2f}"


def _interval(entry: dict[str, Any], metric: Metric) -> str:
    low, high = entry["low"], entry["high"]
    return f"{_number(low, metric)} to {_number(high, metric)}" if np.isfinite(low) else "–"


def _size(numbers: Sequence[int]) -> str:
    return " x ".join(map(str, numbers))
