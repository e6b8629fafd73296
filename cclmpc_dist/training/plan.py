"""`cclmpc plan`: what a configuration asks of a corpus at a number of ranks, from the index alone."""

import math
from typing import Any

import numpy as np

from cclmpc_dist.config import Config
from cclmpc_dist.data.ahead import blocks
from cclmpc_dist.data.columns import chunks
from cclmpc_dist.data.index import DTYPES, Index
from cclmpc_dist.data.loader import Mixture, Stream
from cclmpc_dist.data.order import rank_lanes
from cclmpc_dist.data.workers import AHEAD
from cclmpc_dist.training import setup

MIB = 2**20


def plan(config: Config, ranks: int) -> dict[str, Any]:
    """Steps, and the share, bytes and memory of each stream and corpus, ready to dump as JSON; of a rank: the most of
    any. Raises InputError as training does.

    Bytes are of whole samples, as remote and compressed shards are read; crops of raw local shards read less.
    """
    indexes, method, cases = setup.corpora(config)
    streams = setup.streams(config, indexes, method, cases, ranks)
    shares = {part.name: _share(config, stream, part, ranks) for stream in streams.values() for part in stream.parts}
    return {
        "corpus": config.data.path, "ranks": ranks, "steps": sum(setup.steps_of_phases(config, method, streams)),
        "index_mib": round(sum(index.file.stat().st_size for index in indexes) / MIB, 2), "streams": shares,
        "cache_mib": round(setup.cache_bytes(streams) / MIB, 1),
        "batches_mib_a_rank": round(sum(share["batches_mib_a_rank"] for share in shares.values()), 1),
    }  # fmt: skip


def _share(config: Config, stream: Mixture, part: Stream, ranks: int) -> dict[str, Any]:
    """cache_mib: what the blocks in use of all lanes take at most, over all ranks; streams of a corpus share shards."""
    index, order, rows = part.index, part.order, part.order.samples
    size = sum(_sum(index, f"{kind}_bytes", rows) for kind in ("image", "json", *["label"][: part.with_label]))
    lanes = max(len(own) for rank in range(ranks) for owner, own in _split(stream, rank, ranks) if owner is part)
    voxel_bytes = index.channels * _itemsize(stream) + part.with_label
    waiting = 2 + AHEAD * config.data.workers  # the one in use, the next, and those read ahead
    return {
        "corpus": str(index.path),
        "samples": order.n, "batch": order.batch_size, "lanes_a_rank": lanes,
        "steps_an_epoch": order.steps, "repeats_an_epoch": order.repeats, "shards": len(order.firsts),
        "read_mib_a_rank_and_epoch": round(size * lanes * order.steps / order.n / MIB, 1),
        "cache_mib": round(blocks(index, order) / MIB, 1),
        "batches_mib_a_rank": round(lanes * math.prod(config.data.patch) * voxel_bytes * waiting / MIB, 1),
    }  # fmt: skip


def _split(stream: Mixture, rank: int, ranks: int) -> list[tuple[Stream, list[int]]]:
    return stream.split(rank_lanes(stream.batch_size, rank, ranks))


def _sum(index: Index, column: str, rows: np.ndarray) -> int:
    return sum(int(index[column][rows[part]].sum()) for part in chunks(len(rows)))


def _itemsize(stream: Mixture) -> int:
    """Bytes a voxel of the type that the samples are stored as; a batch of several types becomes float32."""
    found = [np.unique(part.index.of("dtype", part.order.samples)) for part in stream.parts]
    codes = set(np.concatenate(found).tolist())
    return DTYPES[codes.pop()].itemsize if len(codes) == 1 else DTYPES[2].itemsize
