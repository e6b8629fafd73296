"""Training on a GPU: waits for the device once a step, does what a CPU does, goes on after a stop, is measured."""

import json
import math
import shutil
from itertools import repeat
from pathlib import Path
from typing import Any

import pytest
import torch
import toy
import yaml
from torch import Tensor

from cclmpc_dist.benching import step
from cclmpc_dist.config import parse
from cclmpc_dist.data.views import views
from cclmpc_dist.distributed import runtime
from cclmpc_dist.methods.ccl_mpc import CCLMPC
from cclmpc_dist.methods.method import Corpus
from cclmpc_dist.training.monitor import Window
from cclmpc_dist.training.objective import objective
from cclmpc_dist.training.trainer import Trainer, train

pytestmark = pytest.mark.gpu

FEW = {"data__batch_labelled": 2, "data__batch_unlabelled": 2}
LAYOUTS = [{"precision": "fp32"}, {"precision": "bf16", "channels_last": True}]


@pytest.mark.parametrize("changes", [*LAYOUTS, {"ema": 0.9, "optim__name": "adamw", "model__norm": "instance"}])
def test_a_step_waits_for_the_device_once(
    changes: dict[str, Any], toy_corpus: Path, tmp_path: Path, alone: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = toy.config(toy_corpus, tmp_path, **FEW, **changes)
    trainer = Trainer(config, runtime.start(config.precision))
    trainer.build()
    trainer.step = trainer.totals[0] - 1  # where every term counts
    batches = repeat(next(trainer._loader()))
    for _ in range(2):  # the first ones plan and allocate
        trainer._train_step(batches, Window())
    read, waits = Tensor.tolist, []

    def tolist(x: Tensor) -> Any:
        torch.cuda.set_sync_debug_mode("default")
        waits.append(x.numel())
        values = read(x)
        torch.cuda.set_sync_debug_mode("error")
        return values

    monkeypatch.setattr(Tensor, "tolist", tolist)
    torch.cuda.set_sync_debug_mode("error")
    try:
        values = trainer._train_step(batches, Window())
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert waits == [len(values)]
    assert all(math.isfinite(value) for value in values.values())


@pytest.mark.parametrize("name", ["labelled", "unlabelled"])
def test_a_batch_and_its_views_are_a_cpus(name: str, toy_corpus: Path, tmp_path: Path) -> None:
    config = toy.config(toy_corpus, tmp_path)
    found = []
    for device in ("cpu", "cuda"):
        batch = toy.batches(config, device)[name]
        seen = [views(batch["image"], batch["key"], view, config.ccl_mpc.views).cpu() for view in (1, 2)]
        found.append([batch["image"].cpu(), *seen])
    assert torch.equal(found[0][0], found[1][0])
    torch.testing.assert_close(found[1][1:], found[0][1:], rtol=1e-4, atol=1e-4)


def test_every_term_and_the_gradient_are_a_cpus(toy_corpus: Path, tmp_path: Path) -> None:
    """In float64, with the views that both devices compute alike: a rounding may move a position across a threshold."""
    plain = {"noise": 0.0, "gamma": 0.0, "blur": 0.0}
    changes = {"model__norm": "instance", "model__dropout": 0.0, "ccl_mpc__views": plain}
    config = toy.config(toy_corpus, tmp_path, data__patch=[32, 32, 32], **FEW, **changes)
    (values, gradient), (expected, reference) = (_half_way(config, device) for device in ("cuda", "cpu"))
    for name, value in expected.items():
        assert values[name] == pytest.approx(value, rel=1e-5, abs=1e-8), name
    assert (gradient - reference).norm() <= 1e-4 * reference.norm()


def _half_way(config: Any, device: str) -> tuple[dict[str, float], Tensor]:
    """Terms at the middle of ten steps, and the whole gradient."""
    method = CCLMPC(config, Corpus(1, 2))
    torch.manual_seed(3)
    module = method.build().double().to(device)
    method.enter(method.phases[0], 10, module, {"labelled": 2, "unlabelled": 2})
    parts = toy.batches(config, device).items()
    batch = {name: part | {"image": part["image"].double()} for name, part in parts}
    for _ in range(2):  # the second time there are keys in the bank
        terms, metrics = method.terms(module, batch, 5)
        method.after_step(module)
    loss, logged = objective(terms, method.weights(5), metrics)
    loss.backward()
    gradients = [p.grad.flatten().cpu() for p in module.parameters() if p.grad is not None]
    return {name: value.item() for name, value in logged.items()}, torch.cat(gradients)


@pytest.mark.parametrize("changes", LAYOUTS)
def test_a_run_goes_on_from_its_checkpoint_and_is_evaluated(
    changes: dict[str, Any], toy_corpus: Path, tmp_path: Path, alone: None
) -> None:
    """Not bit for bit: sums on a GPU have no fixed order. But with the random state, and so with dropout, of before."""
    raw = toy.settings(
        toy_corpus, tmp_path, **FEW, **changes, budget__images=24, checkpoint__every_steps=3, data__workers=1
    )
    config, run = parse(raw, "toy"), tmp_path / "toy"
    assert train(config)
    whole = _losses(run)
    shutil.rmtree(run / "checkpoints" / "step-000000006")
    assert train(config)
    again = _losses(run)
    assert list(again) == list(whole) == [1, 2, 3, 4, 5, 6]
    assert again[4] == pytest.approx(whole[4], rel=2e-2)
    (tmp_path / "c.yaml").write_text(yaml.safe_dump(raw))
    assert "per case:" in toy.run(1, "eval", str(run))


def _losses(run: Path) -> dict[int, float]:
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    return {line["step"]: line["loss/total"] for line in lines}


def test_a_step_is_measured_in_the_gpus_time(toy_corpus: Path, tmp_path: Path, alone: None) -> None:
    records, meta = step.bench_step(toy.config(toy_corpus, tmp_path, **FEW, precision="bf16"), 3)
    values = {(record["variant"], record["metric"]): record["value"] for record in records}
    parts = [values[step.LOADING, name] for name in step.PARTS]
    assert sum(parts) == pytest.approx(1000 * values[step.LOADING, "seconds"], rel=0.05)
    assert min(values[step.LOADING, name] for name in ("forward", "backward", "optimiser")) > 0
    assert 0 < values[step.LOADING, "mfu"] < 1
    assert meta["machine"]["gpu"] == torch.cuda.get_device_name()
