"""Small corpora for the data tests."""

import json
from collections.abc import Sequence
from pathlib import Path

import h5py
import numpy as np
from safetensors.numpy import load_file, save_file

from cclmpc_dist.data import shards
from cclmpc_dist.data.case import Case
from cclmpc_dist.data.formats.h5 import LA_FILE
from cclmpc_dist.data.index import INDEX, MANIFEST, Index, sha256
from cclmpc_dist.data.seen import AS_STORED, Seen


def numbered(
    count: int, shape: Sequence[int] = (9, 8, 7), channels: int = 1, kind: str = "uint8", labels: bool = True
) -> list[Case]:
    """Random cases case-000, case-001, ... of about `shape`, each of its own size, labels in 0..2. Channels of kind
    "unlike" are each seen in their own way."""
    cases = []
    for number in range(count):
        rng = np.random.default_rng(number)
        size = tuple(n + number % 3 for n in shape)
        image = rng.integers(0, 200, (channels, *size)).astype(np.float32)
        if kind == "scaled":
            image = np.float32(-1.5) + np.float32(0.037) * image
        seen = AS_STORED
        if kind == "unlike":
            seen = Seen.of([(0.01 * (channel + 1), -0.25 * (number + 2) * (channel + 1) ** 2, 20 * channel, 190)
                            for channel in range(channels)])  # fmt: skip
        if kind == "float32":
            image = rng.standard_normal((channels, *size)).astype(np.float32)
        label = rng.integers(0, 3, size).astype(np.uint8) * (rng.random(size) < 0.1)
        cases.append(Case(f"case-{number:03d}", image, label if labels else None, (1.0,) * len(size), seen=seen))
    return cases


def write(out: Path, cases: Sequence[Case], **options: object) -> Index:
    return shards.write(cases, out, **({"source": "test", "shard_bytes": 12000} | options))


def write_h5(folder: Path, key: str, **arrays: np.ndarray) -> Path:
    path = folder / key / LA_FILE
    path.parent.mkdir(parents=True)
    with h5py.File(path, "w") as file:
        for name, values in arrays.items():
            file.create_dataset(name, data=values, compression="gzip")
    return path


def tree(folder: Path) -> dict[str, bytes]:
    """Every file below a folder."""
    return {str(file.relative_to(folder)): file.read_bytes() for file in folder.rglob("*") if file.is_file()}


def told(index: Index, **entries: object) -> None:
    """Change entries of a manifest on disk."""
    file = index.path / MANIFEST
    file.write_text(json.dumps(json.loads(file.read_text()) | entries))


def rewrite(index: Index, **columns: np.ndarray | None) -> None:
    """Change columns of an index on disk, hashes and all; None takes one away."""
    arrays = load_file(index.path / INDEX) | columns
    save_file({name: values for name, values in arrays.items() if values is not None}, index.path / INDEX)
    told(index, index_sha256=sha256(index.path / INDEX))


def rehash(index: Index, shard: int) -> None:
    """Make the manifest agree with a shard that was changed."""
    shards = json.loads((index.path / MANIFEST).read_text())["shards"]
    shards[shard]["sha256"] = sha256(index.shard_path(shard))
    told(index, shards=shards)


def patch(path: Path, at: int, data: bytes) -> None:
    """Overwrite bytes of a file."""
    with open(path, "r+b") as file:
        file.seek(at)
        file.write(data)
