"""`cclmpc train --dry-run`: what it tells, and that it leaves nothing."""

import re
from pathlib import Path

import pytest
import toy
import yaml

from cclmpc_dist.config import load
from cclmpc_dist.data.index import sha256
from cclmpc_dist.errors import InputError
from cclmpc_dist.training.rehearsal import rehearse


def config(corpus: Path, runs: Path, **changes: object) -> str:
    path = runs / "c.yaml"
    path.write_text(yaml.safe_dump(toy.settings(corpus, runs, ema=0.9, **changes)))
    return str(path)


def number(before: str, said: str) -> float:
    """The number after some words of an output."""
    found = re.search(re.escape(before) + r"([\d.]+)", said)
    assert found, said
    return float(found[1])


@pytest.mark.parametrize("world", [1, 2])
def test_a_dry_run_takes_a_step_and_leaves_nothing(world: int, toy_corpus: Path, tmp_path: Path) -> None:
    sharded = {"ccl_mpc__contrast__bank_layout": "sharded", "data__workers": 1, "checkpoint__every_steps": 1}
    before = {path: sha256(path) for path in toy_corpus.iterdir()}
    said = toy.run(world, "train", config(toy_corpus, tmp_path, **sharded), "--dry-run")
    assert [path.name for path in tmp_path.iterdir()] == ["c.yaml"]
    assert {path: sha256(path) for path in toy_corpus.iterdir()} == before
    assert said.count("dry run: nothing was written") == 1
    assert f"20 steps on {world} process{'es' * (world - 1)}, cpu" in said
    assert "14 cases in " in said
    assert "1 microbatch and 2 repeats an epoch" in said
    assert number("memory: ", said) > 0
    assert "MiB at the step's peak" in said
    assert number("time: ", said) > 0
    assert "20 such steps would take" in said


def test_a_dry_run_leaves_a_run_as_it_is_and_looks_at_it(toy_corpus: Path, tmp_path: Path, alone: None) -> None:
    path = config(toy_corpus, tmp_path, budget__images=24)
    toy.run(1, "train", path)
    run = tmp_path / "toy"
    (run / "preempt").write_text("")  # a request to the run that goes on, not to this one
    before = {file: sha256(file) for file in run.rglob("*") if file.is_file()}
    said = toy.run(1, "train", path, "--dry-run")
    assert {file: sha256(file) for file in run.rglob("*") if file.is_file()} == before
    assert "has a checkpoint of step 2: its budget is spent, training would do nothing" in said
    saved = sum(file.stat().st_size for file in (run / "checkpoints" / "step-000000002").glob("*.safetensors"))
    assert number("checkpoint: ", said) == pytest.approx(saved / 2**20, rel=0.03)
    other = toy.corpus(tmp_path / "other", 12)
    with pytest.raises(InputError, match=f"^{other}: labelled order: corpus is "):
        rehearse(load(path, [f"data.path={other}"]))


def test_a_dry_run_of_a_bad_configuration_ends_with_2(toy_corpus: Path, tmp_path: Path) -> None:
    path = config(toy_corpus, tmp_path)
    for wrong, told in (("data.patch=[64,64,64]", "larger than every volume"), ("data.path=nowhere", "nowhere")):
        code, said = toy.finish(toy.launch(1, "train", path, wrong, "--dry-run"))
        assert code == 2, said
        assert told in said
        assert [path.name for path in tmp_path.iterdir()] == ["c.yaml"]
