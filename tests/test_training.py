"""The trainer: what every rank does alike, and the small parts around the loop."""

import json
import math
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import toy
import yaml
from ranks import run_ranks
from torch import Tensor, nn

from cclmpc_dist.config import Optim, parse
from cclmpc_dist.data import phantom, shards
from cclmpc_dist.data.case import Case
from cclmpc_dist.data.index import Index, select
from cclmpc_dist.data.order import Order
from cclmpc_dist.distributed import runtime
from cclmpc_dist.errors import InputError
from cclmpc_dist.losses.terms import Additive, Ratio
from cclmpc_dist.methods.ccl_mpc import CCLMPC
from cclmpc_dist.training import plan, preemption
from cclmpc_dist.training.checkpoint import complete_steps, read_state
from cclmpc_dist.training.ema import Ema
from cclmpc_dist.training.objective import objective
from cclmpc_dist.training.schedule import rate
from cclmpc_dist.training.trainer import Trainer


def train_with_a_bad_step(rank: int, world: int, raw: dict[str, Any], bad_rank: int, bad_step: int) -> dict[str, Any]:
    """Trains with embeddings that are NaN on one rank at one step; returns weights, norm statistics and bank around
    that step."""
    trainer = Trainer(parse(raw, "toy"), runtime.start("fp32"))
    seen: dict[str, Any] = {}
    terms = CCLMPC.terms

    def spoilt(self: CCLMPC, model: nn.Module, batch: Any, step: int) -> Any:
        seen[f"before.{step}"] = _everything(trainer)
        if step != bad_step or rank != bad_rank:
            return terms(self, model, batch, step)

        def broken(*args: Any, **options: Any) -> Any:
            out = model(*args, **options)
            return out | {name: value * math.nan for name, value in out.items() if name in BROKEN}

        return terms(self, broken, batch, step)  # type: ignore[arg-type]

    CCLMPC.terms = spoilt  # type: ignore[method-assign]
    trainer.fit()
    before, after = seen[f"before.{bad_step}"], seen[f"before.{bad_step + 1}"]
    return {"before": before, "after": after, "end": _everything(trainer), "skipped": trainer.skipped}


def _everything(trainer: Trainer) -> dict[str, Tensor]:
    state = dict(trainer.module.state_dict()) | trainer.method.state_dict() | trainer.method.rank_state_dict()
    return {name: value.detach().clone() for name, value in state.items()}


BROKEN = ("embedding", "projection", "original_projection")


@pytest.mark.parametrize("layout", ["replicated", "sharded"])
def test_all_ranks_skip_a_non_finite_step_together(layout: str, toy_corpus: Path, tmp_path: Path) -> None:
    raw = toy.settings(toy_corpus, tmp_path, budget__images=60, checkpoint__every_steps=0, data__batch_labelled=2,
                       data__batch_unlabelled=2, ccl_mpc__contrast__bank_layout=layout)  # fmt: skip
    first, second = run_ranks(train_with_a_bad_step, 2, raw, 1, 5)
    for seen in (first, second):
        assert seen["skipped"] == 1
        counters = [name for name in seen["before"] if name.endswith("num_batches_tracked")]
        for name in seen["before"].keys() - set(counters):
            assert torch.equal(seen["before"][name], seen["after"][name]), f"{name} changed in a skipped step"
            assert torch.isfinite(seen["end"][name]).all(), name
        assert not torch.equal(seen["after"]["bank.keys"], seen["end"]["bank.keys"])
    own = ("running_",) if layout == "replicated" else ("running_", "bank.")
    shared = [name for name in first["end"] if not any(part in name for part in own)]
    toy.assert_same({name: first["end"][name] for name in shared}, {name: second["end"][name] for name in shared})
    if layout == "sharded":
        one, other = (_stored(seen["end"]) for seen in (first, second))
        assert one
        assert other
        assert not one & other, "a rank keeps the keys of its own images"
    lines = [json.loads(line) for line in (tmp_path / "toy" / "metrics.jsonl").read_text().splitlines()]
    assert [line["train/skipped_steps"] for line in lines][4:7] == [0, 1, 1]


def _stored(state: dict[str, Tensor]) -> set[tuple[float, ...]]:
    """The bank's keys, of all classes."""
    pairs = zip(state["bank.keys"], state["bank.count"], strict=True)
    return {tuple(key) for keys, count in pairs for key in keys[:count].tolist()}


def test_a_run_that_is_never_finite_gives_up_in_words(
    toy_corpus: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, alone: None, capsys: pytest.CaptureFixture
) -> None:
    raw = toy.settings(toy_corpus, tmp_path, data__batch_labelled=2, data__batch_unlabelled=2, log_every=20)
    trainer = Trainer(parse(raw, "toy"), runtime.start("fp32"))
    terms = CCLMPC.terms

    def spoilt(self: CCLMPC, model: nn.Module, batch: Any, step: int) -> Any:
        found, metrics = terms(self, model, batch, step)
        (coefficient, value), *rest = found["hdc"]
        assert isinstance(value, Additive)
        return found | {"hdc": [(coefficient, Additive(value.sum * math.nan, value.count)), *rest]}, metrics

    monkeypatch.setattr(CCLMPC, "terms", spoilt)
    with pytest.raises(InputError, match=r"50 steps in a row had no finite gradient.*lower optim\.lr"):
        trainer.fit()
    assert (
        "and skipped: 20 steps of 20 since the last line: look for NaN with `cclmpc verify`" in capsys.readouterr().err
    )


def train_quietly(rank: int, world: int, raw: dict[str, Any]) -> dict[str, Tensor]:
    trainer = Trainer(parse(raw, "toy"), runtime.start(raw.get("precision", "fp32")))
    trainer.fit()
    assert trainer.ema is not None
    return {name: value.detach().clone() for name, value in trainer.ema.module.state_dict().items()}


def test_bf16_accumulation_clipping_and_adamw_train(toy_corpus: Path, tmp_path: Path) -> None:
    raw = toy.settings(
        toy_corpus, tmp_path, precision="bf16", accumulate=2, optim__name="adamw", optim__clip=1.0, optim__lr=3e-3,
        ema=0.5, channels_last=True, data__workers=1, data__select=1, evaluation__every_steps=5, budget__images=240,
        checkpoint={"every_steps": 5, "keep": 1},
    )  # fmt: skip
    averaged = run_ranks(train_quietly, 2, raw)
    lines = [json.loads(line) for line in (tmp_path / "toy" / "metrics.jsonl").read_text().splitlines()]
    losses = [line["loss/sup"] for line in lines if "loss/sup" in line]
    assert len(losses) == 10  # 240 images, 12 a microbatch, 2 microbatches a step
    assert sum(losses[-3:]) < sum(losses[:3])
    assert [line["step"] for line in lines if "val/dice" in line] == [5, 10]
    state = read_state(tmp_path / "toy" / "checkpoints", 10)  # validated and due at one step: saved once, the best kept
    assert set(complete_steps(tmp_path / "toy" / "checkpoints")) == {10, state["best"]["step"]}
    assert all(torch.isfinite(value).all() for value in averaged[0].values())
    needed = {
        "train/certain_fraction",
        "train/gamma",
        "train/gradient_norm",
        "optim/lr",
        "weight/cgcl",
        "perf/data_wait_share",
    }
    assert needed <= lines[-2].keys()
    assert list((tmp_path / "toy" / "tensorboard").iterdir())


def test_objective_weighs_means_and_ratios() -> None:
    a = torch.tensor(6.0, dtype=torch.float64, requires_grad=True)
    sums = torch.tensor([1.0, 4.0], dtype=torch.float64, requires_grad=True)
    terms: Any = {
        "mean": [(0.5, Additive(a, torch.tensor(3)))],
        "ratio": [(1.0, Ratio(sums, lambda s: s[0] / s[1]))],
        "empty": [(1.0, Additive(a * 0, torch.tensor(0)))],
    }
    metrics = {"share": Additive(torch.tensor(1.0), torch.tensor(4))}
    loss, logged = objective(terms, {"mean": 2.0, "ratio": 3.0, "empty": 1.0}, metrics)
    assert loss.item() == pytest.approx(2.0 * 0.5 * 2.0 + 3.0 * 0.25)
    assert {name: value.item() for name, value in logged.items()} == pytest.approx(
        {"loss/mean": 1.0, "loss/ratio": 0.25, "loss/empty": 0.0, "loss/total": 2.75, "share": 0.25}
    )
    loss.backward()
    assert a.grad is not None
    assert a.grad.item() == pytest.approx(1.0 / 3.0)
    assert sums.grad is not None
    assert sums.grad.tolist() == pytest.approx([0.75, -3.0 / 16.0])


def test_schedules() -> None:
    assert rate(Optim(lr=0.1, schedule="constant"), 70, 100, 4) == pytest.approx(0.1)
    assert rate(Optim(lr=0.1), 50, 100, 4) == pytest.approx(0.1 * 0.5**0.9)
    assert rate(Optim(lr=0.1, schedule="constant", warmup=4), 1, 100, 4) == pytest.approx(0.05)
    assert rate(Optim(lr=0.1, schedule="constant", lr_rule="linear", lr_batch=4), 0, 100, 16) == pytest.approx(0.4)
    assert rate(Optim(lr=0.1, schedule="constant", lr_rule="sqrt", lr_batch=4), 0, 100, 16) == pytest.approx(0.2)


def test_average_covers_parameters_and_norm_statistics() -> None:
    module = nn.Sequential(nn.Linear(2, 2), nn.BatchNorm1d(2))
    ema = Ema(module, 0.8)
    expected = {name: value.clone().double() for name, value in module.state_dict().items()}
    for update in range(60):
        with torch.no_grad():
            for parameter in module.parameters():
                parameter += 0.1
            module[1].running_mean += 1.0
            module[1].num_batches_tracked += 1
        ema.update(module, update)
        decay = min(0.8, (1 + update) / (10 + update))
        for name, value in module.state_dict().items():
            expected[name] = decay * expected[name] + (1 - decay) * value.double()
    state = ema.module.state_dict()
    for name in expected.keys() - {"1.num_batches_tracked"}:
        assert torch.allclose(state[name].double(), expected[name], rtol=1e-5), name
    assert state["1.num_batches_tracked"] == 60


def test_one_norm_average_over_ranks() -> None:
    assert run_ranks(_average, 2) == [[1.5, 3.0], [1.5, 3.0]]


def _average(rank: int, world: int) -> list[float]:
    tensors = [torch.tensor([1.0 + rank]), torch.tensor(2.0 * (rank + 1))]
    runtime.average_(tensors)
    return [tensors[0].item(), tensors[1].item()]


def test_checkpoints_by_the_clock(toy_corpus: Path, tmp_path: Path) -> None:
    """Every step is late for a clock of a millisecond; the ranks act on rank 0's."""
    raw = toy.settings(toy_corpus, tmp_path, budget__images=48, ema=0.5,
                       checkpoint={"every_steps": 0, "every_minutes": 1e-5, "keep": 9})  # fmt: skip
    run_ranks(train_quietly, 2, raw)
    assert complete_steps(tmp_path / "toy" / "checkpoints") == [1, 2, 3, 4]


def test_two_dimensional_images_train(tmp_path: Path, alone: None) -> None:
    """Slices of the phantom with two channels."""
    cases = [
        Case(case.key, np.concatenate([case.image[..., 16], case.image[..., 17]]), case.label[..., 16], (1.0, 1.0), {})
        for case in (handle.read() for handle in phantom.cases(6, 0, 40))
        if case.label is not None
    ]
    shards.write(cases, tmp_path / "slices", source="test", labelled=2)
    raw = toy.settings(tmp_path / "slices", tmp_path, data__patch=[32, 32], data__batch_labelled=2,
                       data__batch_unlabelled=2, budget__images=40, model__swin__window=[2, 2], ema=0.5)  # fmt: skip
    train_quietly(0, 1, raw)
    losses = [json.loads(line)["loss/total"] for line in (tmp_path / "toy" / "metrics.jsonl").read_text().splitlines()]
    assert len(losses) == 10
    assert all(math.isfinite(loss) for loss in losses)


def test_skipped_samples_are_counted_over_microbatches_and_ranks(tmp_path: Path) -> None:
    """One unlabelled image's header is damaged: its lane's next sample stands in, as often as it comes."""
    folder = toy.corpus(tmp_path / "shards")
    index = Index.open(folder)
    row = int(select(index, None)["unlabelled"][0])
    shard = index.shard_path(int(index["shard"][row]))
    data = bytearray(shard.read_bytes())
    start = int(index["image_at"][row])
    data[start : start + 6] = b"broken"
    shard.write_bytes(data)
    raw = toy.settings(folder, tmp_path, method="ccl_mpc", accumulate=2, budget__images=96, ema=0.5,
                       data__on_error="skip")  # fmt: skip
    run_ranks(train_quietly, 2, raw)
    lines = [json.loads(line) for line in (tmp_path / "toy" / "metrics.jsonl").read_text().splitlines()]
    assert sum(line["data/skipped"] for line in lines) == _times(index, row, batch=6, microbatches=8, seed=1337)


def _times(index: Index, row: int, batch: int, microbatches: int, seed: int) -> int:
    samples = select(index, None)["unlabelled"]
    order = Order(samples, index["shard"][samples], batch, seed, "unlabelled", 16, index.identity)
    return sum((order.batch(step, range(batch))[0] == row).sum() for step in range(microbatches))


def test_a_grace_period_shorter_than_two_saves_is_warned_of(
    toy_corpus: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """After the first save, and at the start of a run that goes on; not where it suffices."""
    raw = toy.settings(toy_corpus, tmp_path, method="supervised", budget__images=48, checkpoint__every_steps=1)
    configuration = str(tmp_path / "c.yaml")
    Path(configuration).write_text(yaml.safe_dump(raw))
    monkeypatch.setenv("CCLMPC_GRACE_SECONDS", "0.000001")
    said = toy.run(1, "train", configuration)
    assert said.count("warning: 1e-06 s of grace are too few: a save takes") == 1
    lines = [json.loads(line) for line in (tmp_path / "toy" / "metrics.jsonl").read_text().splitlines()]
    assert lines[-1]["perf/save_seconds"] > 0
    last = tmp_path / "toy/checkpoints/step-000000008"
    shutil.rmtree(last)
    assert "warning: 1e-06 s of grace" in toy.run(1, "train", configuration)
    shutil.rmtree(last)
    monkeypatch.setenv("CCLMPC_GRACE_SECONDS", "3600")
    assert "warning" not in toy.run(1, "train", configuration)
    assert toy.run(1, "train", configuration) == f"{tmp_path / 'toy'}: its budget is spent, nothing to do\n"


def test_a_grace_period_that_is_no_number_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    assert preemption.grace() is None
    monkeypatch.setenv("CCLMPC_GRACE_SECONDS", "soon")
    with pytest.raises(InputError, match="CCLMPC_GRACE_SECONDS = 'soon': give seconds"):
        preemption.grace()


@pytest.mark.gpu
@pytest.mark.parametrize("precision", ["bf16", "fp16"])
def test_gpu_trains_in_mixed_precision(precision: str, toy_corpus: Path, tmp_path: Path) -> None:
    """Under DDP and NCCL, which one GPU is enough for."""
    raw = toy.settings(toy_corpus, tmp_path, precision=precision, ema=0.5, budget__images=120)
    (averaged,) = run_ranks(train_quietly, 1, raw, backend="nccl", timeout=180)
    assert all(torch.isfinite(value).all() for value in averaged.values())


def test_the_plan_is_what_the_streams_do(toy_corpus: Path, tmp_path: Path) -> None:
    """Counted by walking an epoch of every lane."""
    config = toy.config(toy_corpus, tmp_path, data__workers=1)
    said = plan.plan(config, 3)
    index = Index.open(toy_corpus)
    part = said["streams"]["unlabelled"]
    assert (part["samples"], part["batch"], part["lanes_a_rank"]) == (8, 6, 2)
    order = Order(select(index, None)["unlabelled"], index["shard"][select(index, None)["unlabelled"]], 6, 1337, "x")
    rows = [order.lane(0, t, lane)[0] for t in range(part["steps_an_epoch"]) for lane in range(6)]
    assert len(rows) - len(set(rows)) == part["repeats_an_epoch"]
    size = int(sum(index["image_bytes"][rows] + index["json_bytes"][rows])) / 3 / 2**20
    assert part["read_mib_a_rank_and_epoch"] == pytest.approx(size, rel=0.2, abs=0.1)
    assert part["batches_mib_a_rank"] == round(2 * 32 * 16 * 16 * 1 * 4 / 2**20, 1)
    assert said["steps"] == 240 // 12
    with pytest.raises(InputError, match="does not divide over 5 ranks"):
        plan.plan(config, 5)
