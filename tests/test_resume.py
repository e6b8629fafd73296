"""Killed at a random step, a run ends with the bits of a run that was not."""

import json
import random
import shutil
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import stores
import toy
import yaml
from ranks import run_ranks
from torch import Tensor

from cclmpc_dist.config import parse
from cclmpc_dist.distributed import runtime
from cclmpc_dist.training import setup
from cclmpc_dist.training.checkpoint import pack_optimizer
from cclmpc_dist.training.monitor import Window
from cclmpc_dist.training.trainer import Batches, Trainer


def _write(path: Path, raw: dict) -> str:
    path.write_text(yaml.safe_dump(raw))
    return str(path)


@pytest.mark.parametrize("world", [2, pytest.param(3, marks=pytest.mark.slow)])
def test_killed_run_ends_with_the_same_bits(world: int, toy_corpus: Path, tmp_path: Path) -> None:
    """Every rank's own file too: norm statistics, random state, its shard of the bank."""
    layout = {2: "replicated", 3: "sharded"}[world]
    straight = toy.settings(
        toy_corpus, tmp_path, name="straight", ema=0.9, model__dropout=0.5, ccl_mpc__contrast__bank_layout=layout
    )
    broken = straight | {"name": "broken"}
    toy.run(world, "train", _write(tmp_path / "straight.yaml", straight))
    configuration = _write(tmp_path / "broken.yaml", broken)
    step = random.randint(2, 14)  # a new place every time; the messages name it
    process = toy.launch(world, "train", configuration)
    toy.wait_for_step(process, tmp_path / "broken", step)
    toy.kill(process)
    assert not (tmp_path / "broken" / "checkpoints" / "step-000000020").exists(), f"killed at {step}, too late"
    toy.run(world, "train", configuration)
    last = "checkpoints/step-000000020"
    left, right = toy.tensors(tmp_path / "straight" / last), toy.tensors(tmp_path / "broken" / last)
    assert {f"rank-{rank:05d}.safetensors/rng.cpu" for rank in range(world)} <= left.keys()
    files = {name.split("/")[0] for name in left}
    assert {"model.safetensors", "optimizer.safetensors", "ema.safetensors"} <= files
    bank = ["method.safetensors/bank.keys"]
    if layout == "sharded":
        bank = [f"rank-{rank:05d}.safetensors/method.bank.keys" for rank in range(world)]
    assert all(left[name].any() for name in bank)
    toy.assert_same(left, right)
    states = [json.loads((tmp_path / name / last / "state.json").read_text()) for name in ("straight", "broken")]
    assert states[0]["streams"] == states[1]["streams"], step
    assert _losses(tmp_path / "straight") == _losses(tmp_path / "broken"), step


def _losses(run: Path) -> list[dict[str, float]]:
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    return [{name: value for name, value in line.items() if not name.startswith("perf/")} for line in lines]


@pytest.mark.slow
def test_other_world_size_goes_on_in_the_streams(toy_corpus: Path, tmp_path: Path) -> None:
    """Started on 2 ranks, ended on 1: the same positions, and losses that begin to differ by rounding."""
    raw = toy.settings(toy_corpus, tmp_path, name="elastic", model__norm="instance", model__dropout=0.0)
    whole = _write(tmp_path / "whole.yaml", raw | {"name": "whole"})
    toy.run(2, "train", whole)
    part = _write(tmp_path / "part.yaml", raw)
    process = toy.launch(2, "train", part)
    toy.wait_for_step(process, tmp_path / "elastic", 6)
    toy.kill(process)
    output = toy.run(1, "train", part)
    resumed = int(output.split("going on from step ")[1].split()[0])
    together, apart = _losses(tmp_path / "whole"), _losses(tmp_path / "elastic")
    assert [line["step"] for line in apart] == list(range(1, 21))
    for a, b in zip(together, apart, strict=True):
        assert a["data/unlabelled_epoch"] == b["data/unlabelled_epoch"]
    assert together[:resumed] == apart[:resumed]
    for name in ("loss/sup", "loss/cp", "loss/cgcl"):  # later steps: the test below, in float64
        assert together[resumed][name] == pytest.approx(apart[resumed][name], rel=1e-3)


@pytest.mark.slow
def test_sharded_bank_is_dealt_out_anew_at_another_world_size(toy_corpus: Path, tmp_path: Path) -> None:
    raw = toy.settings(
        toy_corpus, tmp_path, name="dealt", budget__images=96, ccl_mpc__contrast__bank_layout="sharded",
        ccl_mpc__contrast__bank=30,
    )  # fmt: skip
    configuration = _write(tmp_path / "c.yaml", raw)
    process = toy.launch(2, "train", configuration)
    toy.wait_for_step(process, tmp_path / "dealt", 5)
    toy.kill(process)
    output = toy.run(3, "train", configuration)
    assert "bank: the keys of 2 ranks are dealt out anew to 3, newest first; 0 had no room" in output
    assert "cgcl: exchange anchors (the bank is sharded) over 3 ranks" in output
    left = toy.tensors(tmp_path / "dealt" / "checkpoints/step-000000008")
    assert all(left[f"rank-{rank:05d}.safetensors/method.bank.count"].any() for rank in range(3))
    output = toy.run(2, "train", configuration)
    assert "nothing to do" in output
    assert "dealt out anew" not in output


class Double(Trainer):
    """The trainer in float64, asked to stop after `last` steps."""

    def __init__(self, raw: dict[str, Any], last: int) -> None:
        super().__init__(parse(raw, "toy"), runtime.start("fp32"))
        self.last = last

    def build(self) -> None:
        build = self.method.build
        self.method.build = lambda: build().double()  # type: ignore[method-assign]
        super().build()

    def _loader(self) -> Iterator[Batches]:
        for batch in super()._loader():
            yield {name: part | {"image": part["image"].double()} for name, part in batch.items()}

    def _train_step(self, batches: Iterator[Batches], window: Window) -> dict[str, float]:
        values = super()._train_step(batches, window)
        return values | {"flag/preempt": float(self.done + 1 == self.last)}


def train_float64(rank: int, world: int, raw: dict[str, Any], last: int = 0) -> dict[str, Tensor]:
    trainer = Double(raw, last)
    trainer.fit()
    momentum, _ = pack_optimizer(trainer.strategy.optimizer)
    return dict(trainer.module.state_dict()) | momentum | trainer.method.state_dict()


def test_another_world_size_ends_where_one_process_ends(toy_corpus: Path, tmp_path: Path, alone: None) -> None:
    """In float64, where rounding stays below what a threshold or a ReLU would notice: losses, weights, momentum, bank.

    Not with instance norm on this patch: over the two positions of its smallest map that multiplies a difference by up
    to 316 in each of four layers, and float64's rounding reaches the first digits within six steps.
    """
    images = {"data__batch_labelled": 2, "data__batch_unlabelled": 2, "budget__images": 16}
    raw = toy.settings(toy_corpus, tmp_path, model__norm="group", model__dropout=0.0, ccl_mpc__t_contrast=0.0, **images)
    whole = train_float64(0, 1, raw | {"name": "whole"})
    run_ranks(train_float64, 2, raw | {"name": "part"}, 2, timeout=120)
    ended = train_float64(0, 1, raw | {"name": "part"})
    assert whole["bank.count"].min() > 0
    for name, expected in whole.items():
        difference = (ended[name].double() - expected.double()).norm() / expected.double().norm().clamp(min=1e-12)
        assert difference < 1e-9, f"{name}: {difference:.1e}"
    together, apart = _losses(tmp_path / "whole"), _losses(tmp_path / "part")
    assert len(together) == 4
    for a, b in zip(together, apart, strict=True):
        assert a == pytest.approx(b, rel=1e-9)


def test_preempted_run_saves_leaves_a_word_and_goes_on(toy_corpus: Path, tmp_path: Path) -> None:
    raw = toy.settings(toy_corpus, tmp_path, name="asked", checkpoint__every_steps=0)
    configuration = _write(tmp_path / "c.yaml", raw)
    process = toy.launch(2, "train", configuration)
    toy.wait_for_step(process, tmp_path / "asked", 2)
    (tmp_path / "asked" / "preempt").touch()
    code, output = toy.finish(process)
    assert code == 0, output
    stopped = int((tmp_path / "asked" / "preempted").read_text())
    assert 2 <= stopped < 20
    assert not (tmp_path / "asked" / "preempt").exists()
    assert f"going on from step {stopped}" in toy.run(2, "train", configuration)
    assert not (tmp_path / "asked" / "preempted").exists()
    assert "nothing to do" in toy.run(1, "train", configuration)


def test_sigterm_saves_and_exits_75(toy_corpus: Path, tmp_path: Path) -> None:
    raw = toy.settings(toy_corpus, tmp_path, checkpoint__every_steps=0, data__workers=2)
    process = toy.launch(1, "train", _write(tmp_path / "c.yaml", raw))
    toy.wait_for_step(process, tmp_path / "toy", 2)
    process.terminate()
    code, output = toy.finish(process)
    assert code == 75, output
    assert list((tmp_path / "toy" / "checkpoints").glob("step-*/manifest.json"))


@pytest.mark.slow
@pytest.mark.parametrize("workers", [0, 2])
def test_sigterm_while_a_store_hangs_loses_nothing(workers: int, toy_corpus: Path, tmp_path: Path) -> None:
    """In the midst of a step, of three microbatches."""
    shutil.copytree(toy_corpus, tmp_path / "served")
    with stores.fault_server(tmp_path / "served") as url:
        changes = {"data__block": 1, "data__batch_labelled": 1, "data__batch_unlabelled": 1, "accumulate": 3,
                   "budget__images": 30, "checkpoint__every_steps": 0, "model__dropout": 0.5}  # fmt: skip
        raw = toy.settings(url, tmp_path, data__cache=str(tmp_path / "cache"), data__workers=workers, **changes)
        configuration = _write(tmp_path / "c.yaml", raw)
        faults, shard, step = tmp_path / "served" / "faults.json", *_late(toy.settings(toy_corpus, tmp_path, **changes))
        faults.write_text(json.dumps({shard: ["hung"] * 100}))
        process = toy.launch(1, "train", configuration)
        toy.wait_for_step(process, tmp_path / "toy", step // 3)
        time.sleep(1)
        process.terminate()
        code, output = toy.finish(process)
        assert code == 75, output
        assert f"saved at step {step // 3}:" in output
        faults.unlink()
        assert f"going on from step {step // 3}" in toy.run(1, "train", configuration)
        straight = raw | {"name": "straight"}
        toy.run(1, "train", _write(tmp_path / "straight.yaml", straight))
    last = sorted((tmp_path / "toy" / "checkpoints").glob("step-*"))[-1].name
    ended = [toy.tensors(tmp_path / name / "checkpoints" / last) for name in ("toy", "straight")]
    counts = [name for name in ended[0] if name.endswith("num_batches_tracked")]  # which nothing reads
    assert len(counts) < len(ended[0]) / 5
    toy.assert_same(*({name: one[name] for name in one if name not in counts} for one in ended))


def _late(raw: dict[str, Any]) -> tuple[str, int]:
    """A shard that is first needed in the midst of a later step, and the microbatch that needs it."""
    config = parse(raw, "toy")
    index, method, cases = setup.corpora(config)
    first: dict[int, int] = {}
    for stream in setup.streams(config, index, method, cases, 1).values():
        (part,) = stream.parts
        for step in range(part.order.steps):
            for row in part.order.batch(step, range(1))[0]:
                shard = int(part.index["shard"][row])
                first[shard] = min(step, first.get(shard, step))
    shard, step = max(first.items(), key=lambda item: item[1])
    assert step > 3
    assert step % 3
    return index[0].manifest["shards"][shard]["name"], step


def test_two_runs_in_one_folder_are_refused(toy_corpus: Path, tmp_path: Path) -> None:
    configuration = _write(tmp_path / "c.yaml", toy.settings(toy_corpus, tmp_path))
    first = toy.launch(1, "train", configuration)
    toy.wait_for_step(first, tmp_path / "toy", 1)
    code, output = toy.finish(toy.launch(1, "train", configuration))
    toy.kill(first)
    assert code == 2, output
    assert "another process trains there" in output


def test_another_configuration_is_refused_in_words(toy_corpus: Path, tmp_path: Path) -> None:
    raw = toy.settings(toy_corpus, tmp_path, method="supervised", budget__images=12, checkpoint__every_steps=1)
    configuration = _write(tmp_path / "c.yaml", raw)
    toy.run(1, "train", configuration)
    code, output = toy.finish(toy.launch(1, "train", configuration, "optim.lr=0.02", "data.batch_labelled=null",
                                         "data.rotate=false", "model.norm=group"))  # fmt: skip
    assert code == 2
    assert "optim.lr = 0.02 (was 0.01)" in output
    assert "data.batch_labelled = not set (was 6)" in output
    assert "data.rotate = false (was true), model.norm = group (was batch), optim.lr" in output
    assert "Traceback" not in output
