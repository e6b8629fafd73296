"""strategy: deepspeed computes what DDP computes, and says what it cannot have."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import toy
import yaml

from cclmpc_dist.config import parse
from cclmpc_dist.distributed import runtime
from cclmpc_dist.errors import InputError
from cclmpc_dist.training import zero
from cclmpc_dist.training.checkpoint import complete_steps

ROOT = Path(__file__).resolve().parent.parent
CONFIGS = ROOT / "configs" / "deepspeed"
STAGES = [1, 2, 3]


def settings(corpus: Path, folder: Path, **changes: Any) -> dict[str, Any]:
    """Group norm and no dropout: batch norm over this patch's two positions multiplies a rounding by up to 316."""
    return toy.settings(corpus, folder, model__norm="group", model__dropout=0.0, **changes)


def command(folder: Path, raw: dict[str, Any], stage: int, *overrides: str) -> list[str]:
    """Arguments of `cclmpc` for a stage of ZeRO; 0 is DDP."""
    file = folder / f"{raw['name']}.yaml"
    file.write_text(yaml.safe_dump(raw))
    chosen = ["strategy=deepspeed", f"deepspeed={CONFIGS / f'zero{stage}.json'}"] if stage else []
    return ["train", str(file), f"name=stage{stage}", *chosen, *overrides]


def losses(run: Path) -> list[dict[str, float]]:
    """Of each step; lines of a validation are left out."""
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    found = [{name: value for name, value in line.items() if name.startswith(("loss/", "train/"))} for line in lines]
    return [line for line in found if line]


# ---- without DeepSpeed ----------------------------------------------------------------------------------------------


def config(folder: Path, tree: Any, **changes: Any) -> Any:
    file = folder / "ds.json"
    file.write_text(tree if isinstance(tree, str) else json.dumps(tree))
    return parse(toy.settings(folder, folder, strategy="deepspeed", deepspeed=str(file), **changes), "toy")


@pytest.mark.parametrize("stage", STAGES)
def test_the_repositorys_files_are_accepted_in_every_precision(stage: int, tmp_path: Path) -> None:
    for precision in ("fp32", "bf16", "fp16"):
        tree = (CONFIGS / f"zero{stage}.json").read_text()
        assert zero.read(config(tmp_path, tree, precision=precision))["stage"] == stage
    assert {file.name for file in CONFIGS.iterdir()} == {f"zero{stage}.json" for stage in STAGES}


@pytest.mark.parametrize(
    ("tree", "problem"),
    [
        ("{", "not JSON"),
        ({"zero_optimization": {"stage": 0}}, "stage is not 1, 2 or 3"),
        ({}, "stage is not 1, 2 or 3"),
        ({"bf16": {"enabled": True}}, 'bf16: the setting precision decides: remove it, or write "auto"'),
        ({"gradient_clipping": 1.0}, "gradient_clipping: the setting optim.clip decides"),
        ({"gradient_allreduce_op": "sum"}, "gradient_allreduce_op: not supported here"),
        (
            {"zero_optimization": {"stage": 2, "offload_optimizer": {"device": "cpu"}}},
            "offload_optimizer: not supported",
        ),
    ],
)
def test_a_file_that_would_change_the_numbers_is_refused(tree: Any, problem: str, tmp_path: Path) -> None:
    whole = tree if isinstance(tree, str) or not tree else {"zero_optimization": {"stage": 2}} | tree
    with pytest.raises(InputError, match=r"ds\.json") as raised:
        zero.read(config(tmp_path, whole))
    assert problem in str(raised.value)


def test_what_zero_cannot_have_is_told_before_the_start(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    stage3 = {"zero_optimization": {"stage": 3}}
    with pytest.raises(InputError, match=r"ema = 0\.9 averages whole weights"):
        zero.start(config(tmp_path, stage3, ema=0.9))
    with pytest.raises(InputError, match="channels_last = true, and DeepSpeed"):
        zero.start(config(tmp_path, stage3, channels_last=True))
    with pytest.raises(InputError, match=r"set deepspeed=configs/deepspeed/zero2\.json"):
        parse(toy.settings(tmp_path, tmp_path, strategy="deepspeed"), "toy")
    monkeypatch.setenv("LOCAL_RANK", "0")
    monkeypatch.setitem(sys.modules, "deepspeed", None)
    with pytest.raises(InputError, match=r"not installed here: pip install '\.\[deepspeed\]'"):
        zero.start(config(tmp_path, stage3))
    monkeypatch.setenv("ACCELERATE_USE_DEEPSPEED", "true")
    with pytest.raises(InputError, match="accelerate launch was told use_deepspeed"):
        runtime.start("fp32")


@pytest.mark.parametrize(
    ("stage", "world", "problem"), [(1, 1, "ZeRO-1's and"), (3, 2, "the 2 ranks of its checkpoint")]
)
def test_a_checkpoint_of_another_stage_or_of_other_ranks_is_refused(stage: int, world: int, problem: str) -> None:
    """Neither needs more of the engine than its stage."""
    strategy = zero.Zero.__new__(zero.Zero)
    strategy.stage = 3
    with pytest.raises(InputError, match=problem):
        strategy.unpack({}, lambda rank: {}, {"stage": stage}, world)


def test_an_optimisers_parts_are_dealt_out_anew() -> None:
    """Two groups of 10 and 3 numbers, over two ranks and then over three and one."""
    groups = {"0": torch.arange(1.0, 11.0), "1": torch.arange(1.0, 4.0)}

    def parts(world: int) -> list[dict[str, torch.Tensor]]:
        dealt: list[dict[str, torch.Tensor]] = [{"0.step": torch.tensor(7.0)} for _ in range(world)]
        for name, group in groups.items():
            size = -(-len(group) // world)
            for rank, part in enumerate(torch.nn.functional.pad(group, (0, size * world - len(group))).split(size)):
                dealt[rank][f"{name}.exp_avg"] = part
        return dealt

    for then, now in ((2, 3), (3, 1), (2, 4)):
        sizes = [-(-len(group) // now) for group in groups.values()]
        for rank, expected in enumerate(parts(now)):
            toy.assert_same(zero.reshare(parts(then), sizes, rank), expected)


# ---- with it: real processes ----------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def runs(toy_corpus: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The same 20 steps under DDP and each stage, SGD with momentum and weight decay; the heads are without gradient
    in the first two."""
    folder = tmp_path_factory.mktemp("zero")
    for stage in (0, *STAGES):
        toy.run(2, *command(folder, settings(toy_corpus, folder), stage))
    return folder


def furthest(runs: Path, name: str, reference: str = "stage0") -> float:
    """Largest relative difference of a loss or gradient norm over the steps of two runs."""
    worst = 0.0
    ours, theirs = losses(runs / name), losses(runs / reference)
    assert len(ours) == len(theirs) >= 6
    for a, b in zip(ours, theirs, strict=True):
        assert a.keys() == b.keys()
        worst = max(worst, *(abs(a[key] - b[key]) / max(abs(b[key]), 1e-3) for key in a))
    return worst


@pytest.mark.cluster
@pytest.mark.parametrize("stage", [1, 2])
def test_losses_of_twenty_steps_are_ddps(stage: int, runs: Path) -> None:
    """Half of a gradient is exact, so that on two ranks stages 1 and 2 add the same numbers as DDP; only the norm is
    summed in another order, in float32. Twenty times float32's rounding, one for each step."""
    assert furthest(runs, f"stage{stage}") < 20 * 2**-23


@pytest.mark.cluster
def test_losses_of_twenty_steps_of_stage_three_are_ddps(toy_corpus: Path, tmp_path: Path, runs: Path) -> None:
    """Its weights lie elsewhere in memory, where the CPU's convolutions add in another order. Supervised, as a pixel
    that crosses CCL-MPC's threshold of certainty by a rounding makes another loss; that one's first step agrees. Its
    stages computed anew gather their weights once more."""
    raw = settings(toy_corpus, tmp_path, method="supervised", budget__images=120)
    for stage, strides in ((0, []), (3, [1, 2, 4, 8, 16])):
        toy.run(2, *command(tmp_path, raw, stage, f"model.recompute={strides}"))
    assert len(losses(tmp_path / "stage3")) == 20
    assert furthest(tmp_path, "stage3") < 1e-5
    assert losses(runs / "stage3")[0] == pytest.approx(losses(runs / "stage0")[0], rel=1e-6)


@pytest.mark.cluster
@pytest.mark.parametrize("stage", [1, 2])
def test_weights_end_with_ddps_bits(stage: int, runs: Path) -> None:
    """The heads' too, which ZeRO's zeros in place of no gradient would have moved by weight decay."""
    last = "checkpoints/step-000000020"
    whole, shared = toy.tensors(runs / "stage0" / last), toy.tensors(runs / f"stage{stage}" / last)
    names = [name for name in whole if name.startswith(("model.", "method."))]
    assert any("embedding" in name for name in names)
    toy.assert_same({name: whole[name] for name in names}, {name: shared[name] for name in names})


def faulty(fault: str, arguments: list[str]) -> str:
    """Output of a run on two ranks with a fault of zero_faults.py."""
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    done = subprocess.run(
        [*torchrun, str(Path(__file__).with_name("zero_faults.py")), *arguments[1:]],
        capture_output=True, text=True, timeout=120,
        env=os.environ | {"OMP_NUM_THREADS": "1", "FAULT": fault},
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    return done.stderr


@pytest.mark.cluster
def test_summed_gradients_show(runs: Path, toy_corpus: Path) -> None:
    raw = settings(toy_corpus, runs, name="sum")
    faulty("sum", command(runs, raw, 2, "name=sum"))
    assert furthest(runs, "sum") > 0.5
    first, mean = losses(runs / "sum")[0], losses(runs / "stage2")[0]
    assert first["train/gradient_norm"] == pytest.approx(2 * mean["train/gradient_norm"], rel=1e-5)
    assert abs(losses(runs / "sum")[-1]["loss/total"] / losses(runs / "stage0")[-1]["loss/total"] - 1) > 0.01


@pytest.mark.cluster
def test_accumulation_clipping_average_and_autocast_mean_the_same(toy_corpus: Path, tmp_path: Path) -> None:
    """ZeRO-2 reduces each microbatch, so that float32's sums differ by a rounding, which bf16 makes 2^-8 where it tips
    one. The Dice is that of the averaged weights."""
    raw = settings(
        toy_corpus, tmp_path, method="supervised", accumulate=2, precision="bf16", optim__clip=0.1, budget__images=72,
        ema=0.9, data__select=1, evaluation__every_steps=3,
    )  # fmt: skip
    for stage in (0, 2):
        toy.run(2, *command(tmp_path, raw, stage))
    assert min(line["train/gradient_norm"] for line in losses(tmp_path / "stage2")) > 0.1
    assert furthest(tmp_path, "stage2") < 2**-8
    best = [
        json.loads((tmp_path / f"stage{stage}/checkpoints/step-000000006/state.json").read_text())["best"]
        for stage in (0, 2)
    ]
    assert best[1] == pytest.approx(best[0], abs=2**-8)


@pytest.mark.cluster
def test_an_infinite_loss_skips_the_step_on_all_ranks(toy_corpus: Path, tmp_path: Path) -> None:
    """Its gradient is finite: the loss alone must tell."""
    raw = settings(toy_corpus, tmp_path, budget__images=72)
    faulty("loss", command(tmp_path, raw, 3))
    found = losses(tmp_path / "stage3")
    assert [line["train/skipped_steps"] for line in found] == [0, 0, 1, 1, 1, 1]
    assert found[-1]["loss/total"] < 10


@pytest.mark.cluster
def test_the_scale_of_fp16_is_found(toy_corpus: Path, tmp_path: Path) -> None:
    """Too large at first, it is halved until the gradient is finite; norm and steps are then those without it."""
    raw = settings(toy_corpus, tmp_path, method="supervised", budget__images=60, optim__schedule="constant")
    faulty("scale", command(tmp_path, raw, 2))
    skipped = [int(line["train/skipped_steps"]) for line in losses(tmp_path / "stage2")]
    assert skipped[0] == 1
    assert skipped[-1] == skipped[-2] < 9
    state = json.loads((tmp_path / "stage2/checkpoints/step-000000010/state.json").read_text())
    assert state["optimizer"]["scaler"] == {"value": 2.0 ** (66 - skipped[-1]), "kept": 10 - skipped[-1]}
    kept = [line for line in losses(tmp_path / "stage2") if "loss/total" in line]
    assert len(kept) == 10 - skipped[-1]
    assert all(0.1 < line["train/gradient_norm"] < 100 for line in kept)
    assert kept[-1]["loss/total"] < kept[0]["loss/total"] * 1.5


@pytest.fixture(scope="module")
def killed(runs: Path, toy_corpus: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Runs of each stage that were killed at step 10 or a little later."""
    folder = tmp_path_factory.mktemp("killed")
    for stage in STAGES:
        process = toy.launch(2, *command(folder, settings(toy_corpus, folder), stage))
        toy.wait_for_step(process, folder / f"stage{stage}", 10)
        toy.kill(process)
        assert complete_steps(folder / f"stage{stage}/checkpoints")[-1] < 20, "killed too late"
    return folder


@pytest.mark.cluster
@pytest.mark.parametrize("stage", STAGES)
def test_a_killed_run_ends_with_the_same_bits(
    stage: int, runs: Path, killed: Path, toy_corpus: Path, tmp_path: Path
) -> None:
    shutil.copytree(killed / f"stage{stage}", tmp_path / f"stage{stage}")
    output = toy.run(2, *command(tmp_path, settings(toy_corpus, tmp_path), stage))
    assert "going on from step" in output
    last = f"stage{stage}/checkpoints/step-000000020"
    left, right = toy.tensors(runs / last), toy.tensors(tmp_path / last)
    parts = [name for name in left if name.startswith("rank-00001.safetensors/optimizer.")]
    assert parts
    parts += [name for name in left if name.startswith("rank-00000.safetensors/optimizer.")]
    assert all(left[name].any() for name in parts)
    if stage == 3:  # it fills the last part of a weight that the ranks do not divide with memory as it was
        left, right = ({name: value for name, value in one.items() if name not in parts} for one in (left, right))
    toy.assert_same(left, right)
    assert losses(runs / f"stage{stage}") == losses(tmp_path / f"stage{stage}")


@pytest.mark.cluster
def test_another_world_size_shares_the_states_out_anew(
    runs: Path, killed: Path, toy_corpus: Path, tmp_path: Path
) -> None:
    """Three ranks go on with the momentum of two."""
    shutil.copytree(killed / "stage2", tmp_path / "stage2")
    at = complete_steps(tmp_path / "stage2/checkpoints")[-1]
    toy.run(3, *command(tmp_path, settings(toy_corpus, tmp_path), 2))
    for step in range(at, at + 3):
        ours, theirs = losses(tmp_path / "stage2")[step], losses(runs / "stage2")[step]
        assert ours["loss/sup"] == pytest.approx(theirs["loss/sup"], rel=1e-3), step


WITHOUT = "import sys; sys.modules['deepspeed'] = None; from cclmpc_dist.cli import main; main()"


@pytest.mark.cluster
@pytest.mark.parametrize("stage", [1, 3])
def test_evaluation_needs_no_deepspeed(stage: int, runs: Path) -> None:
    """One process, on which the package is not to be had."""
    run = runs / f"stage{stage}"
    done = subprocess.run(
        [sys.executable, "-c", WITHOUT, "eval", str(run)], capture_output=True, text=True, timeout=120
    )
    assert done.returncode == 0, done.stderr
    assert (run / "eval" / "cases.csv").is_file()


@pytest.mark.cluster
def test_without_a_launcher_it_is_refused(toy_corpus: Path, tmp_path: Path) -> None:
    code, output = toy.finish(toy.launch(1, *command(tmp_path, settings(toy_corpus, tmp_path), 1)))
    assert code == 2
    assert "strategy = deepspeed needs ranks to share with: start it with torchrun" in output
