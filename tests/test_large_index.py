"""An index of many samples: nothing is made of Python's a sample, and little of numpy's."""

import tracemalloc
from pathlib import Path

import numpy as np
import pytest

from cclmpc_dist.benching import index as bench
from cclmpc_dist.data.index import Index
from cclmpc_dist.data.merge import merge
from cclmpc_dist.data.splits import Splits

SAMPLES, A_SHARD = 100_000, 1000


@pytest.fixture(scope="module")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("large") / "corpus"
    bench.write_pieces(path, SAMPLES, A_SHARD)
    merge(path)
    return path


def test_a_start_makes_no_object_a_sample(corpus: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Streams hold 4 bytes a sample, their making takes ten times that; mapped pages are not counted."""
    monkeypatch.setattr("cclmpc_dist.data.index.LOOKED_THROUGH", 0)  # as for more than a million
    config = bench._config(str(corpus))
    bench._streams(config)  # imports
    tracemalloc.start()
    try:
        order = bench._streams(config)["unlabelled"].parts[0].order
        _, peak = tracemalloc.get_traced_memory()
        order.batch(order.steps // 2, range(bench.LANES))
        held = tracemalloc.get_traced_memory()[0] - sum(block.nbytes for block in order._blocks.values())
        objects = sum(trace.count for trace in tracemalloc.take_snapshot().statistics("filename"))
    finally:
        tracemalloc.stop()
    assert order.n == SAMPLES - bench.LABELLED - bench.VAL
    assert held < 8 * SAMPLES
    assert peak < 40 * SAMPLES
    assert objects < SAMPLES // 10


def test_the_index_is_that_of_a_real_corpus(corpus: Path) -> None:
    """What the benchmark measures is what `merge` and `Index` make of any corpus."""
    index = Index.open(corpus)
    assert index.unsound() == ""
    assert index.manifest["counts"] == {"samples": SAMPLES, "with_label": A_SHARD, "labelled": 1000, "val": 1000}
    assert index.find(["slice-000054321"]).tolist() == [54321]
    shard = index["shard"] == 7
    ends = index["image_at"][shard] + index["image_bytes"][shard]
    assert (index["json_at"][shard] > ends).all()
    assert np.diff(index["image_at"][shard]).min() == 512 + 66048 + 512 + 512
    assert index.foreground(3)[0].tolist() == [[128, 128]]


def test_verify_holds_no_object_a_sample(corpus: Path) -> None:
    """16 bytes of hashes each, whoever is in which split."""
    index, told = Index.open(corpus), 20_000
    index.columns["split"] = (np.arange(SAMPLES) >= told - 100).astype(np.uint8)
    list(filled(index, 10).problems())  # imports
    tracemalloc.start()
    try:
        splits = filled(index, told)
        assert list(splits.problems()) == []
        held, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert held < 20 * SAMPLES
    assert peak < 60 * SAMPLES


def filled(index: Index, told: int) -> Splits:
    splits = Splits([index])
    for row in range(told):
        splits.patient(0, row, f"patient {row}")
        splits.image(0, row, np.arange(row, row + 4, dtype="<f4"))
    return splits


@pytest.mark.slow
def test_bench_index_tells_of_start_and_order(tmp_path: Path) -> None:
    records = bench.bench_index(tmp_path, SAMPLES, 500, trials=3, repeats=1)
    assert not list(tmp_path.iterdir())
    assert {record["case"] for record in records} == {"100,000 samples in 200 shards"}
    told = {(record["variant"], record["metric"]): record["value"] for record in records}
    wanted = {("start, cached", "seconds"), ("start, from disk", "memory"), ("order, any step", "order, p99")}
    assert wanted | {("verify, no shard read", "private memory")} <= set(told)
    assert {record["unit"] for record in records} == {"s", "ms", "MiB"}
    assert all(value > 0 for (_, metric), value in told.items() if metric != "memory")
