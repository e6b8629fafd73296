"""A checkpoint is there in full or not at all, whatever the disk does."""

import json
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import toy
from disks import tmpfs

from cclmpc_dist.errors import InputError, LostRanks
from cclmpc_dist.evaluation import held_out
from cclmpc_dist.training.checkpoint import (
    Checkpoints,
    complete_steps,
    pack_optimizer,
    read_group,
    read_rank,
    read_state,
    unpack_optimizer,
)


def _save(folder: Path, step: int, keep: int = 2, size: int = 10, **state: Any) -> Checkpoints:
    checkpoints = Checkpoints(folder, 0, 1, keep)
    checkpoints.prepare()
    groups = {"model": {"w": torch.full((size,), float(step))}}
    checkpoints.save(step, groups, {"rng.cpu": torch.get_rng_state()}, {"note": "x"} | state)
    return checkpoints


def test_what_was_saved_comes_back(tmp_path: Path) -> None:
    _save(tmp_path, 7).wait()
    assert complete_steps(tmp_path) == [7]
    assert read_state(tmp_path, 7)["note"] == "x"
    assert torch.equal(read_group(tmp_path, 7, "model")["w"], torch.full((10,), 7.0))
    assert torch.equal(read_rank(tmp_path, 7, 0)["rng.cpu"], torch.get_rng_state())
    assert read_group(tmp_path, 7, "ema") == {}


def test_the_copy_is_taken_when_save_returns(tmp_path: Path) -> None:
    weights = torch.zeros(1000)
    checkpoints = Checkpoints(tmp_path, 0, 1, 1)
    checkpoints.prepare()
    checkpoints.save(1, {"model": {"w": weights}}, {}, {})
    weights += 1
    checkpoints.wait()
    assert read_group(tmp_path, 1, "model")["w"].sum() == 0


def test_newest_and_best_are_kept(tmp_path: Path) -> None:
    checkpoints = _save(tmp_path, 1)
    for step in (2, 3, 4):
        checkpoints.save(step, {}, {}, {}, best=1)
    checkpoints.wait()
    assert complete_steps(tmp_path) == [1, 3, 4]


def test_half_written_checkpoint_is_not_there(tmp_path: Path) -> None:
    _save(tmp_path, 1).wait()
    shutil.copytree(tmp_path / "step-000000001", tmp_path / "step-000000002.tmp")
    assert complete_steps(tmp_path) == [1]
    Checkpoints(tmp_path, 0, 1, 2).prepare()
    assert not (tmp_path / "step-000000002.tmp").exists()


@pytest.mark.parametrize("name", ["manifest.json", "model.safetensors", "state.json", "rank-00000.safetensors"])
@pytest.mark.parametrize("harm", ["cut", "flip", "remove"])
def test_torn_file_is_named(name: str, harm: str, tmp_path: Path) -> None:
    _save(tmp_path, 1).wait()
    file = tmp_path / "step-000000001" / name
    data = file.read_bytes()
    if harm == "remove":
        file.unlink()
    else:
        file.write_bytes(data[:-1] if harm == "cut" else data[:-1] + bytes([data[-1] ^ 1]))
    with pytest.raises(InputError, match=f"{name}: missing or altered.*remove .*step-000000001 to start at step 0"):
        read_state(tmp_path, 1)


def test_torn_checkpoint_is_told_with_the_one_before_it(tmp_path: Path) -> None:
    for step in (3, 7):
        _save(tmp_path, step).wait()
    (tmp_path / "step-000000007" / "manifest.json").unlink()
    assert complete_steps(tmp_path) == [3, 7]
    with pytest.raises(InputError, match=r"manifest\.json: missing.*step-000000007 to go on from step 3"):
        read_state(tmp_path, 7)
    assert read_state(tmp_path, 3)["step"] == 3


def test_an_evaluation_of_a_torn_checkpoint_is_told_what_else_it_can_take(tmp_path: Path) -> None:
    folder = tmp_path / "checkpoints"
    for step in (3, 7):
        _save(folder, step, best={"step": 3}).wait()
    (folder / "step-000000003" / "model.safetensors").unlink()
    with pytest.raises(InputError, match=r"model\.safetensors: missing.*: take --checkpoint last$"):
        held_out._step(tmp_path, "best")
    (folder / "step-000000007" / "model.safetensors").unlink()
    with pytest.raises(InputError, match=r"remove .*step-000000007 to evaluate step 3$"):
        held_out._step(tmp_path, "last")
    shutil.rmtree(folder / "step-000000007")
    with pytest.raises(InputError, match=r"remove .*step-000000003 and train again$"):
        held_out._step(tmp_path, "last")


def test_a_run_that_nothing_was_selected_in_has_no_best_checkpoint(tmp_path: Path) -> None:
    config = {"data": {"select": 0}, "evaluation": {"every_steps": 5}}
    _save(tmp_path / "checkpoints", 3, best={}, config=config).wait()
    with pytest.raises(
        InputError, match=r"as no validation chose one \(data\.select = 0, evaluation\.every_steps = 5\)"
    ):
        held_out._step(tmp_path, "best")


def test_other_version_is_refused(tmp_path: Path) -> None:
    _save(tmp_path, 1).wait()
    folder = tmp_path / "step-000000001"
    state = json.loads((folder / "state.json").read_text()) | {"version": 99}
    (folder / "state.json").write_text(json.dumps(state))
    from cclmpc_dist.training.checkpoint import _digest

    manifest = json.loads((folder / "manifest.json").read_text())
    manifest["state.json"] = _digest(folder / "state.json")
    (folder / "manifest.json").write_text(json.dumps(manifest))
    with pytest.raises(InputError, match="version 99, this program reads 2"):
        read_state(tmp_path, 1)


def test_absent_checkpoint_is_told_with_those_there_are(tmp_path: Path) -> None:
    _save(tmp_path, 4).wait()
    with pytest.raises(InputError, match=r"no such checkpoint: there are \[4\]"):
        read_state(tmp_path, 5)


def test_rank_zero_waits_for_the_other_ranks_files(tmp_path: Path) -> None:
    first, second = (Checkpoints(tmp_path, rank, 2, 2) for rank in (0, 1))
    first.prepare()
    first.save(1, {"model": {"w": torch.ones(3)}}, {"own": torch.zeros(1)}, {})
    assert complete_steps(tmp_path) == []
    second.save(1, {"model": {"w": torch.ones(3)}}, {"own": torch.ones(1)}, {})
    first.wait()
    second.wait()
    assert complete_steps(tmp_path) == [1]
    assert read_rank(tmp_path, 1, 1)["own"] == 1


def test_rank_zero_gives_lost_ranks_up(tmp_path: Path) -> None:
    first = Checkpoints(tmp_path, 0, 3, 2, patience=0.1)
    first.prepare()
    first.save(1, {"model": {"w": torch.ones(3)}}, {"own": torch.zeros(1)}, {})
    with pytest.raises(LostRanks, match=r"2 ranks wrote no file within 0.1 s, rank-00001.safetensors the first"):
        first.wait()
    assert complete_steps(tmp_path) == []


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A file system of 3 MiB."""
    with tmpfs(tmp_path / "disk", "size=3m") as folder:
        yield folder


def test_full_disk_leaves_the_checkpoint_before_whole(small_disk: Path) -> None:
    _save(small_disk, 1, size=400_000).wait()
    with pytest.raises(InputError, match=r"could not be written.*the checkpoints before it are whole"):
        _save(small_disk, 2, size=400_000).wait()
    assert complete_steps(small_disk) == [1]
    assert not list(small_disk.glob("*.tmp"))
    assert read_state(small_disk, 1)["step"] == 1


def test_run_on_a_full_disk_ends_in_words(small_disk: Path, toy_corpus: Path) -> None:
    """Model, optimiser and method are some 6 MiB: the first save cannot fit."""
    import yaml

    path = small_disk / "c.yaml"
    path.write_text(yaml.safe_dump(toy.settings(toy_corpus, small_disk, checkpoint__every_steps=1)))
    code, output = toy.finish(toy.launch(1, "train", str(path)))
    assert code == 2, output
    assert "could not be written" in output
    assert "Traceback" not in output


@pytest.mark.parametrize("name", ["sgd", "adamw"])
def test_optimiser_goes_on_bit_for_bit(name: str) -> None:
    torch.manual_seed(0)

    def make() -> tuple[torch.nn.Linear, torch.optim.Optimizer]:
        model = torch.nn.Linear(3, 2)
        kind = {"sgd": torch.optim.SGD, "adamw": torch.optim.AdamW}[name]
        return model, kind(model.parameters(), lr=0.1, **({"momentum": 0.9} if name == "sgd" else {}))

    def step(model: torch.nn.Linear, optimizer: torch.optim.Optimizer) -> None:
        model(torch.ones(1, 3)).sum().backward()
        optimizer.step()
        optimizer.zero_grad()

    model, optimizer = make()
    step(model, optimizer)
    other, its = make()
    other.load_state_dict(model.state_dict())
    tensors, values = pack_optimizer(optimizer)
    unpack_optimizer(its, {key: value.clone() for key, value in tensors.items()}, json.loads(json.dumps(values)))
    step(model, optimizer)
    step(other, its)
    toy.assert_same(dict(model.state_dict()), dict(other.state_dict()))
