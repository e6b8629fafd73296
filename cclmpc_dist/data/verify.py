"""Is a corpus what its index says, and what is in it."""

import hashlib
import io
import json
import tarfile
import tokenize
from collections.abc import Iterator
from contextlib import ExitStack
from dataclasses import dataclass, field
from io import BufferedReader
from itertools import pairwise
from pathlib import Path
from typing import Any, BinaryIO, cast

import numpy as np

from cclmpc_dist.data.columns import INDEX, UNCLIPPED
from cclmpc_dist.data.index import DTYPES, VAL, Index, edited
from cclmpc_dist.data.reader import Reader
from cclmpc_dist.data.remote import visited
from cclmpc_dist.data.splits import Splits
from cclmpc_dist.errors import InputError

LOOKED_AT = 18  # volumes read for the summary, evenly taken
BINS = 32  # of the intensity histogram, from the 1st to the 99th percentile


def verify(*paths: str | Path, cache: Path | None = None, limit: int = 0) -> list[str]:
    """Every problem of some corpora, folders or URLs, one line each: empty when all is well. Reads every byte.

    Of a URL one shard after another is fetched into `cache`, which holds up to `limit` bytes besides it, or into a
    temporary folder; what lies in the cache already is not fetched again.

    An index must be its manifest's, and the manifest say what index and samples say; each shard must be there,
    whole, and hash to what was written; its members must be where the index says, finite, of the shapes, types
    and label range it says. No patient and no image may be in both splits, in those of two corpora neither; there a
    patient counts that the source names, and not one that is but its case.
    """
    problems, indexes = [], []
    with ExitStack() as stack:
        for path in paths:
            try:
                indexes.append(stack.enter_context(visited(str(path), cache, limit, check=False)))
            except InputError as error:
                problems.append(str(error))
        splits = Splits(indexes)
        for corpus, index in enumerate(indexes):
            problems += _problems(index, _Told(splits, corpus))
        problems += splits.problems()
    return list(dict.fromkeys(problems))


@dataclass
class _Told:
    """What concerns more than the sample."""

    splits: Splits
    corpus: int
    cropped: set[bool] = field(default_factory=set)


def _problems(index: Index, told: _Told) -> Iterator[str]:
    """One line a problem; that of a shard which cannot be opened may come twice."""
    problems = index.problems()
    yield from problems
    unsound = index.unsound()
    if unsound or (problems and INDEX in problems[0]):
        yield from [] if problems else [unsound]
        return
    for number, rows in enumerate(_by_shard(index)):
        try:
            with index.open_shard(number) as file:
                yield from _shard(index, number, rows, file, told)
        except InputError as error:
            yield str(error)
    said = index.manifest["cropped_by_label"]
    if told.cropped and any(told.cropped) != said:
        yield edited(index.path, "cropped_by_label", said, any(told.cropped))


def _by_shard(index: Index) -> Iterator[np.ndarray]:
    """The rows of each shard, ascending."""
    order = np.argsort(index["shard"], kind="stable").astype(np.int32)
    stops = np.cumsum(np.bincount(index["shard"], minlength=len(index.manifest["shards"])))
    return (order[start:stop] for start, stop in pairwise([0, *stops.tolist()]))


def _shard(index: Index, number: int, rows: np.ndarray, file: BinaryIO, told: _Told) -> Iterator[str]:
    """Problems of one shard; what concerns other samples too is added to `told`."""
    name = index.shard_name(number)
    digest = hashlib.file_digest(cast(BufferedReader, file), "sha256").hexdigest()
    if digest != index.manifest["shards"][number]["sha256"]:
        yield f"{name}: its bytes are not those that were written (sha256): copy it again or shard again"
    file.seek(0)
    try:
        with tarfile.open(fileobj=file, mode="r:") as tar:
            found = {member.name: (member.offset_data, member.size) for member in tar}
    except tarfile.TarError:
        yield f"{name}: not a readable tar: copy it again or shard again"
        return
    for row in rows.tolist():
        for problem in _sample(index, row, file, found, told):
            yield f"{name}: case {index.key(row)}: {problem}"
    expected = len(rows) * 2 + int((index["label_bytes"][rows] > 0).sum())
    if len(found) != expected:
        yield f"{name}: holds {len(found)} members, the index names {expected}: shard again"


def _sample(index: Index, row: int, file: BinaryIO, found: dict[str, tuple[int, int]], told: _Told) -> Iterator[str]:
    suffix = ".npy.zst" if index.compress == "zstd" else ".npy"
    shape = tuple(index["shape"][row].tolist())
    for part, extension in {"image": suffix, "label": suffix, "json": ""}.items():
        place = (int(index[f"{part}_at"][row]), int(index[f"{part}_bytes"][row]))
        if not place[1]:
            continue
        if found.get(f"{index.key(row)}.{part}{extension}") != place:
            yield f"its {part} is not where the index says: shard again"
        elif part == "image":
            image = _array(file, place, index.compress)
            yield from _image(image, shape, DTYPES[index["dtype"][row]])
            if image is not None:
                told.splits.image(told.corpus, row, image)
        elif part == "label":
            yield from _label(_array(file, place, index.compress), shape[1:], index.classes)
        else:
            yield from _json(_bytes(file, place), index, row, told)


def _bytes(file: BinaryIO, place: tuple[int, int]) -> bytes:
    file.seek(place[0])
    return file.read(place[1])


def _array(file: BinaryIO, place: tuple[int, int], compress: str) -> np.ndarray | None:
    """The member's array, None where it cannot be read."""
    import zstandard

    data = _bytes(file, place)
    try:
        data = zstandard.ZstdDecompressor().decompress(data) if compress == "zstd" else data
        return np.load(io.BytesIO(data), allow_pickle=False)
    except (ValueError, TypeError, SyntaxError, EOFError, tokenize.TokenError, zstandard.ZstdError):
        return None  # numpy reads the header as Python text


def _json(data: bytes, index: Index, row: int, told: _Told) -> Iterator[str]:
    held = {"key": index.key(row), "spacing": index["spacing"][row].tolist(), **index.seen(row).said()}
    for name in ("low", "high") if index.manifest["version"] == UNCLIPPED else ():
        del held[name]
    try:
        meta = json.loads(data)
        said = {name: meta[name] for name in held}
        told.cropped.add(meta["cropped_by_label"])
        told.splits.patient(told.corpus, row, str(meta["patient"]))
    except (ValueError, KeyError, TypeError):
        yield "its JSON cannot be read: copy the shard again"
        return
    for name, value in held.items():
        if said[name] != value:
            yield f"its JSON says {name} = {json.dumps(said[name])}, the index {json.dumps(value)}: shard again"


def _image(image: np.ndarray | None, shape: tuple[int, ...], dtype: np.dtype) -> Iterator[str]:
    if image is None:
        yield "its image cannot be read: copy the shard again"
    elif image.shape != shape or image.dtype != dtype:
        yield f"its image is {image.dtype} {image.shape}, the index says {dtype} {shape}: shard again"
    elif not np.isfinite(image).all():
        yield "its image holds NaN or infinity: repair the source and shard again"


def _label(label: np.ndarray | None, shape: tuple[int, ...], classes: int) -> Iterator[str]:
    if label is None:
        yield "its label cannot be read: copy the shard again"
    elif label.shape != shape or label.dtype != np.uint8:
        yield f"its label is {label.dtype} {label.shape}, the index says uint8 {shape}: shard again"
    elif label.max() >= classes:
        yield f"its label holds {label.max()}, classes end at {classes - 1}: shard again with --classes"


def inspect(index: Index) -> dict[str, Any]:
    """What a person wants to know of a corpus, ready to dump as JSON. Raises InputError.

    Intensities (normalised), their histogram and class fractions come from `volumes_read` volumes, evenly taken;
    all else from the index.
    """
    rows = looked_at(index)
    manifest, shape, spacing = index.manifest, index["shape"][:, 1:], index["spacing"]
    return {
        "source": manifest["source"], "compress": index.compress, "cropped_by_label": manifest["cropped_by_label"],
        "samples": len(index), "with_label": int((index["label_bytes"] > 0).sum()),
        "labelled": int(index["labelled"].sum()), "val": int((index["split"] == VAL).sum()),
        "shards": len(manifest["shards"]), "bytes": sum(shard["bytes"] for shard in manifest["shards"]),
        "channels": index.channels, "classes": index.classes,
        "size_min": shape.min(0).tolist(), "size_max": shape.max(0).tolist(),
        "size_median": np.median(shape, axis=0).tolist(),
        "spacing_min": spacing.min(0).tolist(), "spacing_max": spacing.max(0).tolist(),
        "spacing_unit": Reader(index).unit(rows[0]),
        "stored_as": {str(dtype): int((index["dtype"] == code).sum()) for code, dtype in enumerate(DTYPES)},
        "samples_with_class": _with_class(index), "volumes_read": len(rows), **_intensities(index, rows),
        "first_keys": [index.key(row) for row in range(min(5, len(index)))],
    }  # fmt: skip


def _with_class(index: Index) -> list[int]:
    """Samples whose label holds class 1, 2, ..."""
    return (np.diff(index["voxel_at"]) > 0).reshape(len(index), -1).sum(0).tolist()


def _intensities(index: Index, rows: list[int]) -> dict[str, Any]:
    reader = Reader(index)
    marks = (0, 1, 50, 99, 100)
    marked = np.array([np.percentile(reader.normalised(row), marks) for row in rows])
    edges = np.linspace(marked[:, 1].min(), max(marked[:, 3].max(), marked[:, 1].min() + 1e-6), BINS + 1)
    counts = np.sum([np.histogram(reader.normalised(row), edges)[0] for row in rows], axis=0)
    voxels = np.sum([_voxels(reader, row) for row in rows if index["label_bytes"][row]] or np.zeros((1, 1)), axis=0)
    fractions = voxels / max(1, voxels.sum()) if voxels.sum() else np.zeros(index.classes)
    return {
        "percentiles": {str(mark): round(float(v), 4) for mark, v in zip(marks, marked.mean(0), strict=True)},
        "histogram": {"edges": edges.round(4).tolist(), "counts": counts.tolist()},
        "class_fractions": [round(float(f), 6) for f in fractions],
    }


def _voxels(reader: Reader, row: int) -> np.ndarray:
    """Voxels of each class. Raises InputError where the label holds others."""
    classes = reader.index.classes
    counts = np.bincount(reader.label(row).reshape(-1), minlength=classes)
    if len(counts) > classes:
        raise InputError(f"{reader.index.path}: case {reader.index.key(row)}: its label holds {len(counts) - 1}, "
                         f"classes end at {classes - 1}: look with `cclmpc verify`")  # fmt: skip
    return counts


def looked_at(index: Index) -> list[int]:
    """Up to LOOKED_AT rows, evenly taken."""
    return np.unique(np.linspace(0, len(index) - 1, min(LOOKED_AT, len(index))).round().astype(int)).tolist()


def cases(index: Index) -> Iterator[dict[str, Any]]:
    """What the index says of each case, ready to dump as JSON."""
    names = [shard["name"] for shard in index.manifest["shards"]]
    for row in range(len(index)):
        yield {
            "key": index.key(row), "shard": names[index["shard"][row]],
            "split": "val" if index["split"][row] == VAL else "train", "labelled": bool(index["labelled"][row]),
            "with_label": bool(index["label_bytes"][row]), "size": index["shape"][row, 1:].tolist(),
            "spacing": index["spacing"][row].tolist(), "stored_as": str(DTYPES[index["dtype"][row]]),
            **index.seen(row).said(),
        }  # fmt: skip


def sheet(index: Index) -> list[tuple[str, np.ndarray, np.ndarray | None, list[float]]]:
    """Name, first channel as normalised (*S), label or None, spacing of the same cases. Raises InputError."""
    reader = Reader(index)
    found = []
    for row in looked_at(index):
        label = reader.label(row) if index["label_bytes"][row] else None
        found.append((index.key(row), reader.normalised(row)[0], label, index["spacing"][row].tolist()))
    return found
