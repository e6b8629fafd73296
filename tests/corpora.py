"""Small corpora for the data tests."""

from collections.abc import Sequence
from pathlib import Path

import h5py
import numpy as np

from cclmpc_dist.data import index, shards
from cclmpc_dist.data.case import Case
from cclmpc_dist.data.formats.h5 import LA_FILE


def numbered(
    count: int, shape: Sequence[int] = (9, 8, 7), channels: int = 1, kind: str = "uint8", labels: bool = True
) -> list[Case]:
    """Random cases case-000, case-001, ... of about `shape`, each of its own size, labels in 0..2."""
    cases = []
    for number in range(count):
        rng = np.random.default_rng(number)
        size = tuple(n + number % 3 for n in shape)
        image = rng.integers(0, 200, (channels, *size)).astype(np.float32)
        if kind == "scaled":
            image = np.float32(-1.5) + np.float32(0.037) * image
        if kind == "float32":
            image = rng.standard_normal((channels, *size)).astype(np.float32)
        label = rng.integers(0, 3, size).astype(np.uint8) * (rng.random(size) < 0.1)
        cases.append(Case(f"case-{number:03d}", image, label if labels else None, (1.0,) * len(size)))
    return cases


def write(out: Path, cases: Sequence[Case], **options: object) -> index.Index:
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
