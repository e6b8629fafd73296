"""Cases in, rows out: whole volumes predicted and scored, shared over ranks, and the files that the report
reads.

A run's eval/ holds cases.csv (one row a case and class), summary.csv, meta.json (written last: without it
there is no evaluation) and predictions/<key>.npz (image uint8, label and prediction uint8, spacing float64;
all (*S)).
"""

import csv
import json
import math
import os
from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict, dataclass
from itertools import zip_longest
from pathlib import Path
from typing import Any, Literal
from urllib.parse import quote

import numpy as np
import torch
from torch import Tensor

from cclmpc_dist.distributed import runtime
from cclmpc_dist.errors import InputError
from cclmpc_dist.evaluation.inference import Blend, Predict, by_slice, sliding_window
from cclmpc_dist.evaluation.metrics import COLUMNS, STATISTICS, Row, by_case, case_metrics, summary
from cclmpc_dist.losses.certainty import likeliest

Evaluated = tuple[
    str, Tensor, np.ndarray | None, Sequence[float]
]  # key, image (C,*S), label (*S) or None, spacing in mm


@dataclass(frozen=True)
class Meta:
    """How the rows came about. patch and stride are in voxels; unit is the spacing's: mm, voxel or pixel."""

    step: int
    checkpoint: Literal["last", "best"]  # best: on validation cases cut from the labelled ones
    weights: Literal["model", "ema"]
    dataset: str
    split: str
    cropped_by_label: bool
    patch: tuple[int, ...]
    stride: tuple[int, ...]
    blend: Blend
    classes: int
    unit: str = "mm"


def evaluate(
    predict: Predict,
    cases: Iterable[Evaluated],
    patch: Sequence[int],
    stride: Sequence[int],
    classes: int,
    *,
    blend: Blend = "uniform",
    batch: int = 4,
    device: torch.device | str = "cpu",
    folder: Path | None = None,
    done: Callable[[str], None] | None = None,
) -> list[Row]:
    """One row a case and foreground class, in the order of the cases; the prediction is the argmax, nothing
    after it.

    Volumes that a 2D patch meets are predicted slice by slice along their last axis, and scored whole. A case without
    a label has rows of NaN, so that it is listed and counted. `folder` (a run's eval/) gets
    each case's prediction. `done` is called with the key of each finished case.
    """
    assert classes <= 256, "predictions are stored as uint8"
    rows: list[Row] = []
    if folder is not None:  # from here on its predictions are of two evaluations
        (folder / "meta.json").unlink(missing_ok=True)
    for key, image, label, spacing in cases:
        look = by_slice if image.ndim == len(patch) + 2 else sliding_window
        probabilities = look(predict, image.to(device), patch, stride, classes=classes, batch=batch, blend=blend)
        prediction = likeliest(probabilities[None])[0].to(torch.uint8).cpu().numpy()
        rows += [{"case": key, **row} for row in _score(prediction, label, spacing, classes)]
        if folder is not None:
            save_prediction(folder, key, image[0], label, prediction, spacing)
        if done is not None:
            done(key)
    return rows


def _score(prediction: np.ndarray, label: np.ndarray | None, spacing: Sequence[float], classes: int) -> list[Row]:
    if label is not None:
        return case_metrics(prediction, label, spacing, classes)
    return [{"class": c, **dict.fromkeys(COLUMNS, math.nan)} for c in range(1, classes)]


def share(count: int, rank: int, world: int) -> range:
    """The case numbers of a rank: every world-th one; empty where there are fewer cases than ranks."""
    return range(rank, count, world)


def gather_rows(rows: list[Row], device: torch.device | str = "cpu") -> list[Row]:
    """The rows of all ranks on every rank, in the order of the cases as `share` dealt them. Collective.

    `device` is where the backend's tensors live (CUDA for NCCL).
    """
    if runtime.world_size() == 1:
        return rows
    ranks = runtime.gather_json(rows, device)
    turns = zip_longest(*(by_case(part) for part in ranks), fillvalue=[])
    return [row for turn in turns for case in turn for row in case]


def save(folder: Path, rows: list[Row], meta: Meta) -> None:
    """Write cases.csv, summary.csv and, last, meta.json. For one rank only, after gather_rows."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "meta.json").unlink(missing_ok=True)
    write_csv(rows, folder / "cases.csv", ["case", "class", *COLUMNS])
    write_csv(summary(rows), folder / "summary.csv", ["class", "metric", *STATISTICS])
    _write(folder / "meta.json", json.dumps(asdict(meta), indent=1) + "\n")


def load(folder: Path) -> tuple[list[Row], Meta]:
    """Rows and meta that `save` wrote. Raises InputError for a file that is missing or damaged."""
    rows = read_csv(folder / "cases.csv")
    raw = _json(folder / "meta.json")
    try:
        meta = Meta(**raw | {"patch": tuple(raw["patch"]), "stride": tuple(raw["stride"])})
    except (TypeError, KeyError) as error:
        raise InputError(f"{folder / 'meta.json'}: not this version's: {error}: evaluate the run again") from None
    return rows, meta


def write_csv(rows: Iterable[Row], path: Path, columns: Sequence[str]) -> None:
    """One line a row under a header; floats in full precision, undefined ones as nan."""
    with path.open("w", newline="") as file:
        writer = csv.DictWriter(file, columns, lineterminator="\n")
        writer.writeheader()
        writer.writerows(rows)


def read_csv(path: Path) -> list[Row]:
    """The rows of a cases.csv. Raises InputError where the file is missing or damaged."""
    try:
        with path.open(newline="") as file:
            return [_row(line) for line in csv.DictReader(file)]
    except OSError as error:
        raise InputError(f"{path}: cannot read it ({error.strerror}): evaluate the run again") from None
    except (KeyError, TypeError, ValueError) as error:
        raise InputError(f"{path}: damaged or of another version ({error!r}): evaluate the run again") from None


def _row(line: dict[str, str]) -> Row:
    return {
        "case": line["case"],
        "class": int(line["class"]),
        **{column: float(line[column]) for column in COLUMNS},
    }


def prediction_file(folder: Path, key: str) -> Path:
    """Where a case's prediction lies; any key makes a safe file name."""
    return folder / "predictions" / f"{quote(key, safe='')}.npz"


def save_prediction(
    folder: Path,
    key: str,
    image: Tensor,
    label: np.ndarray | None,
    prediction: np.ndarray,
    spacing: Sequence[float],
) -> None:
    """Keep what the report draws: the image's middle 99 % as 8 bits, the prediction, the label if any.

    image, label and prediction are (*S); labels and predictions are below 256.
    """
    path = prediction_file(folder, key)
    path.parent.mkdir(parents=True, exist_ok=True)
    arrays: dict[str, Any] = {
        "image": _grey(image.cpu().numpy()),
        "prediction": prediction,
        "spacing": np.asarray(spacing, float),
    }
    if label is not None:
        arrays["label"] = label.astype(np.uint8)
    np.savez_compressed(path, **arrays)


def _grey(image: np.ndarray) -> np.ndarray:
    low, high = np.percentile(image, [0.5, 99.5])
    return np.round(255 * np.clip((image - low) / max(high - low, 1e-12), 0, 1)).astype(np.uint8)


def _write(path: Path, text: str) -> None:
    temporary = path.with_suffix(".tmp")
    temporary.write_text(text)
    os.replace(temporary, path)


def _json(path: Path) -> Any:
    try:
        return json.loads(path.read_text())
    except OSError as error:
        raise InputError(f"{path}: cannot read it ({error.strerror}): evaluate the run again") from None
    except ValueError as error:
        raise InputError(f"{path}: not JSON ({error}): evaluate the run again") from None
