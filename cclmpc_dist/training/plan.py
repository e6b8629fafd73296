"""`cclmpc plan`: what a configuration asks of a corpus at a number of ranks, from the index alone."""

import math
from typing import Any

import numpy as np

from cclmpc_dist.config import Config
from cclmpc_dist.data.index import DTYPES, Index, select
from cclmpc_dist.data.loader import Stream
from cclmpc_dist.data.remote import open_corpus
from cclmpc_dist.methods.method import Corpus
from cclmpc_dist.methods.registry import create
from cclmpc_dist.training import setup

MIB = 2**20
AHEAD = 2  # batches that each worker of torch's DataLoader prepares


def plan(config: Config, ranks: int) -> dict[str, Any]:
    """Steps, and each stream's share, bytes and memory, ready to dump as JSON. Raises InputError as training does.

    Bytes are of whole samples, as remote and compressed shards are read; crops of raw local shards read less.
    """
    index = open_corpus(config.data)
    method = create(config, Corpus(index.channels, index.classes))
    cases = select(index, config.data.labelled, config.data.select)
    streams = setup.streams(config, index, method, cases, ranks)
    shares = {name: _share(config, index, stream, ranks) for name, stream in streams.items()}
    return {
        "corpus": config.data.path, "ranks": ranks, "steps": sum(setup.steps_of_phases(config, method, streams)),
        "index_mib": round(index.file.stat().st_size / MIB, 2), "streams": shares,
        "cache_mib": round(sum(share["cache_mib"] for share in shares.values()), 1),
        "batches_mib_a_rank": round(sum(share["batches_mib_a_rank"] for share in shares.values()), 1),
    }  # fmt: skip


def _share(config: Config, index: Index, stream: Stream, ranks: int) -> dict[str, Any]:
    """cache_mib: the largest that the blocks in use of all lanes can be, over all ranks."""
    order, rows = stream.order, stream.order.samples
    parts = ("image", "label", "json") if stream.with_label else ("image", "json")
    size = sum(int(index[f"{part}_bytes"][rows].sum()) for part in parts)
    held = np.sort([index.manifest["shards"][shard]["bytes"] for shard in np.unique(index["shard"][rows])])[::-1]
    voxels = math.prod(config.data.patch)
    voxel_bytes = index.channels * max(dtype.itemsize for dtype in _stored(index, rows)) + stream.with_label
    waiting = 1 + AHEAD * config.data.workers
    return {
        "samples": order.n, "batch": order.batch_size, "lanes_a_rank": order.batch_size // ranks,
        "steps_an_epoch": order.steps, "repeats_an_epoch": order.repeats, "shards": len(held),
        "read_mib_a_rank_and_epoch": round(size * order.batch_size * order.steps / order.n / ranks / MIB, 1),
        "cache_mib": round(int(held[: order.batch_size * config.data.block].sum()) / MIB, 1),
        "batches_mib_a_rank": round(order.batch_size / ranks * voxels * voxel_bytes * waiting / MIB, 1),
    }  # fmt: skip


def _stored(index: Index, rows: np.ndarray) -> list[np.dtype]:
    """The types the samples are stored as; a batch of several becomes float32."""
    codes = np.unique(index["dtype"][rows]).tolist()
    return [DTYPES[code] for code in codes] if len(codes) == 1 else [DTYPES[2]]
