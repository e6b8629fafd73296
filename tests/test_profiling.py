"""profile.trace and profile.memory: what they write, and that nothing else changes."""

import gc
import gzip
import json
from pathlib import Path
from typing import Any

import pytest
import torch
import toy
import yaml
from torch.autograd import DeviceType
from torch.autograd.profiler_util import EventList, FunctionEvent

from cclmpc_dist.config import parse
from cclmpc_dist.errors import InputError
from cclmpc_dist.training import profiling, throughput, trainer

SHORT = {"data__batch_labelled": 2, "data__batch_unlabelled": 2, "budget__images": 12}  # three steps
WINDOW = {"profile__after": 1, "profile__steps": 1}
OOM = ("CUDA out of memory. Tried to allocate 2.00 GiB. GPU 0 has a total capacity of 79.11 GiB of which 1.20 GiB "
       "is free. Of the allocated memory 70 GiB is allocated by PyTorch.")  # fmt: skip


def config(corpus: Path, runs: Path, **changes: Any) -> Any:
    return parse(toy.settings(corpus, runs, **SHORT, **changes), "toy")


def events(file: Path) -> list[dict[str, Any]]:
    return json.loads(gzip.decompress(file.read_bytes()))["traceEvents"]


def test_a_watched_run_ends_with_the_same_bits_and_leaves_a_trace(
    toy_corpus: Path, tmp_path: Path, alone: None, capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Nor does counting FLOPs change a bit, which the second run does from its second step on."""
    monkeypatch.setattr(throughput, "EDGE", 64)
    watched = {"name": "watched", "profile__trace": True, "profile__memory": True} | WINDOW
    for changes, warmup in (({}, 99), (watched, 1)):
        monkeypatch.setattr(throughput, "WARMUP", warmup)
        assert trainer.train(config(toy_corpus, tmp_path, **changes))
    last = "checkpoints/step-000000003"
    toy.assert_same(toy.tensors(tmp_path / "toy" / last), toy.tensors(tmp_path / "watched" / last))
    assert not (tmp_path / "toy" / "profile").exists()
    found = {path.name for path in (tmp_path / "watched" / "profile").iterdir()}
    assert found == {"trace-step-000000002-rank-00000.json.gz", "operators-step-000000002.txt"}, "no snapshot on a CPU"
    traced = events(tmp_path / "watched" / "profile" / "trace-step-000000002-rank-00000.json.gz")
    names = [event.get("name", "") for event in traced]
    assert {"data wait", "losses", "forward", "contrast", "backward", "optimiser", "[memory]"} <= set(names)
    assert len({name for name in names if name.startswith("ProfilerStep#")}) == 1
    said = capfd.readouterr().err
    assert "aten::convolution_backward" in said
    assert [said.count(text) for text in (" samples/s", " mfu ")] == [6, 2]
    assert said.split("operator ")[1].split()[:4] == ["calls", "ms", "share", "MiB"]
    assert "data wait" in said.split("ms a step on the host")[1].splitlines()[0]


def test_a_run_that_is_too_short_for_its_window_says_so(
    toy_corpus: Path, tmp_path: Path, alone: None, capfd: pytest.CaptureFixture[str]
) -> None:
    short = {"method": "supervised", "budget__images": 4, "profile__trace": True}
    assert trainer.train(parse(toy.settings(toy_corpus, tmp_path, **SHORT | short), "toy"))
    assert "the run ended 11 steps before its window did: lower profile.after" in capfd.readouterr().err
    assert not (tmp_path / "toy" / "profile").exists()


def test_a_run_that_ends_as_its_window_begins_leaves_no_trace(
    toy_corpus: Path, tmp_path: Path, alone: None, capfd: pytest.CaptureFixture[str]
) -> None:
    short = {"method": "supervised", "budget__images": 12, "profile__trace": True, "profile__after": 6}
    assert trainer.train(parse(toy.settings(toy_corpus, tmp_path, **SHORT | short), "toy"))
    assert "the run ended 3 steps before its window did: lower profile.after" in capfd.readouterr().err
    assert not (tmp_path / "toy" / "profile").exists()


def test_memory_that_ran_out_is_one_line_with_what_to_do(
    toy_corpus: Path, tmp_path: Path, alone: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*_: Any) -> None:
        raise torch.OutOfMemoryError(OOM)

    monkeypatch.setattr(trainer, "objective", full)
    with pytest.raises(InputError) as caught:
        trainer.train(config(toy_corpus, tmp_path))
    said = str(caught.value)
    assert "\n" not in said
    assert said.startswith("CUDA out of memory. Tried to allocate 2.00 GiB. GPU 0")
    assert "take model.recompute=[1,2,4,8,16], or in a new run precision=bf16" in said
    assert "profile.memory=true shows what holds it" in said
    assert "/s.pickle shows what held it" in str(profiling.exhausted(torch.OutOfMemoryError(OOM), Path("/s.pickle")))


def test_a_gpus_kernel_counts_once_and_a_part_keeps_the_hosts_time() -> None:
    """torch gives a kernel's time with the operator that launched it and again by itself, a label's on both devices."""
    gpu: dict[str, Any] = {"use_device": "cuda", "thread": 0, "stack": []}
    forward = FunctionEvent(id=1, name="forward", start_us=0, end_us=8000, is_user_annotation=True, **gpu)
    product = FunctionEvent(id=2, name="aten::mm", start_us=0, end_us=10, **gpu)
    product.append_kernel("gemm", 0, 3000)
    fill = FunctionEvent(id=3, name="aten::fill_", start_us=20, end_us=30, **gpu)
    fill.append_kernel("fill", 0, 1000)
    there = gpu | {"device_type": DeviceType.CUDA, "start_us": 0}
    kernels = [
        FunctionEvent(id=4, name="gemm", end_us=3000, **there),
        FunctionEvent(id=5, name="fill", end_us=1000, **there),
        FunctionEvent(id=6, name="forward", end_us=4000, is_user_annotation=True, **there),
    ]
    recorded = EventList([forward, product, fill, *kernels], use_device="cuda")
    recorded._tree_built = True
    parts, _, *rows = profiling.table(recorded.key_averages(), 1, cuda=True, memory=False)
    assert parts.endswith(": forward 8.0")
    assert [row.split() for row in rows] == [
        ["aten::mm", "1.0", "3.00", "75.0%"],
        ["aten::fill_", "1.0", "1.00", "25.0%"],
    ]


@pytest.mark.slow
def test_every_rank_has_its_trace_with_the_exchange_in_it(toy_corpus: Path, tmp_path: Path) -> None:
    (tmp_path / "c.yaml").write_text(yaml.safe_dump(toy.settings(toy_corpus, tmp_path, **SHORT, **WINDOW)))
    said = toy.run(2, "train", str(tmp_path / "c.yaml"), "profile.trace=true")
    folder = tmp_path / "toy" / "profile"
    files = [folder / f"trace-step-000000002-rank-{rank:05d}.json.gz" for rank in range(2)]
    for file in files:
        assert {"exchange", "contrast"} <= {event.get("name", "") for event in events(file)}
    assert said.count("ms a step on the host") == 1, "rank 0 alone"


@pytest.mark.gpu
def test_a_gpu_has_a_snapshot_at_the_end_of_the_window_and_where_memory_runs_out(
    toy_corpus: Path, tmp_path: Path, alone: None
) -> None:
    assert trainer.train(config(toy_corpus, tmp_path, profile__memory=True, **WINDOW))
    assert (tmp_path / "toy" / "profile" / "memory-step-000000002-rank-00000.pickle").stat().st_size > 1000
    gc.collect()
    torch.cuda.empty_cache()  # what the first run kept would do for the second
    torch.cuda.set_per_process_memory_fraction(1e-4)
    try:
        with pytest.raises(InputError, match=r"memory-exhausted-rank-00000\.pickle shows what held it"):
            trainer.train(config(toy_corpus, tmp_path, name="full", profile__memory=True))
    finally:
        torch.cuda.set_per_process_memory_fraction(1.0)
        torch.cuda.memory._record_memory_history(None)
    assert (tmp_path / "full" / "profile" / "memory-exhausted-rank-00000.pickle").exists()
