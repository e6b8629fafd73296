"""Every problem of a configuration is told at once, with its key and what to do."""

import runpy
from pathlib import Path
from typing import Any

import pytest
import toy
import yaml

from cclmpc_dist.config import Config, dump, load
from cclmpc_dist.errors import InputError
from cclmpc_dist.training.setup import check_world

CONFIGS = Path(__file__).parents[1] / "configs"


def problems(tmp_path: Path, *overrides: str, **changes: Any) -> list[str]:
    path = tmp_path / "c.yaml"
    path.write_text(yaml.safe_dump(toy.settings(tmp_path, tmp_path, **changes)))
    with pytest.raises(InputError) as caught:
        load(path, overrides)
    return str(caught.value).splitlines()


@pytest.mark.parametrize("path", sorted(CONFIGS.glob("*.yaml")), ids=lambda path: path.stem)
def test_shipped_configurations_are_valid(path: Path) -> None:
    assert load(path).name == path.stem


def test_overrides_reach_their_key_and_the_dump_reads_back(tmp_path: Path) -> None:
    path = tmp_path / "c.yaml"
    path.write_text(yaml.safe_dump(toy.settings(tmp_path, tmp_path)))
    config = load(path, ["optim.lr=1e-4", "data.labelled=[a, b]", "ccl_mpc.contrast.negatives=other_class"])
    assert config.optim.lr == 1e-4
    assert config.data.labelled == ["a", "b"]
    path.write_text(dump(config))
    assert load(path) == config


def test_a_short_wrong_key_hides_no_other_problem(tmp_path: Path) -> None:
    assert len(problems(tmp_path, "e=1", "strategy=deepspeed")) == 2


def test_all_problems_are_told_at_once(tmp_path: Path) -> None:
    told = problems(
        tmp_path,
        "optim.momntum=0.9",
        "data.patch=[40,32,32]",
        "data.batch_labelled=two",
        "evaluation.every_steps=5",
        "model.norm=bach",
    )
    text = "\n".join(told)
    assert "optim.momntum: unknown setting: did you mean optim.momentum?" in text
    assert "data.patch[0] = 40 is no multiple of the network's 16: take 32" in text
    assert "data.batch_labelled = 'two'" in text
    assert "evaluation.every_steps needs validation cases" in text
    assert "model.norm = 'bach'" in text
    assert len(told) == 5
    assert all(line.startswith("command line: ") for line in told)


def test_what_the_command_line_gave_is_not_blamed_on_the_file(tmp_path: Path) -> None:
    told = problems(tmp_path, "zzz.qqq=1", "budget.epochs=3", "name=new", optim__momntum=0.9, model__norm="bach")
    places = {line.split(": ")[1].split()[0]: line.split(": ")[0] for line in told}
    file = str(tmp_path / "c.yaml")
    assert places == {"zzz": "command line", "budget": "command line", "optim.momntum": file, "model.norm": file}


@pytest.mark.parametrize(
    ("override", "said"),
    [
        ("data.flip=[0,0]", "data.flip = [0, 0] names an axis twice"),
        ("data.labelled=-3", "data.labelled = -3"),
        ("optim.lr=.inf", "optim.lr = inf"),
        ("data.flip=[3]", "data.flip names axis 3 of 3"),
        ("evaluation.stride=[64,8,8]", "evaluation.stride[0] = 64 is larger than the patch"),
        ("evaluation.stride=[8,8]", "evaluation.stride has 2 numbers and data.patch 3"),
        ("model.swin.window=[2,2]", "model.swin.window has 2 numbers"),
        ("model.swin.head_width=5", "model.swin.head_width = 5 does not divide"),
        ("budget.epochs=3", "exactly one of budget.images and budget.epochs"),
        ("data.oversample_foreground=1.5", "data.oversample_foreground = 1.5"),
        ("data.patch=[32]", "data.patch has 1 numbers"),
        ("data=5", "data = 5: input should be a section"),
        ("data.patch=32", "data.patch = 32: input should be a list"),
        ("data.patch=[a,32,32]", "data.patch[0] = 'a': input should be a valid integer"),
        ("zzz.qqq=1", "zzz: unknown setting: known here: name, runs"),
        ("seed=-1", "seed = -1"),
        ("name=a/b", "name = 'a/b': give letters, digits, _ and -, the first a letter or digit"),
        ("name=..", "name = '..'"),
        ("data.labelled=true", "data.labelled = True"),
    ],
)
def test_bad_setting_is_named(override: str, said: str, tmp_path: Path) -> None:
    assert any(said in line for line in problems(tmp_path, override)), problems(tmp_path, override)


@pytest.mark.parametrize("override", ["budget.images=1.5", "seed=true", "checkpoint.keep=2.0"])
def test_what_is_no_integer_is_one_line(override: str, tmp_path: Path) -> None:
    (line,) = problems(tmp_path, override)
    assert f"{override.split('=')[0]} = " in line
    assert line.endswith("input should be a valid integer")


@pytest.mark.parametrize("value", ["0", "1.5", "x", "[1, 2]", "{a: 1}"])
def test_setting_with_alternatives_is_one_line(value: str, tmp_path: Path) -> None:
    (line,) = problems(tmp_path, f"data.labelled={value}")
    assert f"data.labelled = {yaml.safe_load(value)!r}: not what it takes: labelled training cases: first N" in line


def test_key_that_comes_twice_is_named_with_its_lines(tmp_path: Path) -> None:
    path = tmp_path / "c.yaml"
    text = yaml.safe_dump(toy.settings(tmp_path, tmp_path))
    count = text.count("\n")
    path.write_text(f"{text}log_every: 5\nevaluation:\n  batch: 1\n  stride: [8, 8, 8]\n  batch: 2\n")
    with pytest.raises(InputError) as caught:
        load(path)
    first = text.splitlines().index("log_every: 1") + 1
    assert str(caught.value).splitlines() == [
        f"{path}: line {count + 1}: log_every is set in line {first} already: remove one of the two",
        f"{path}: line {count + 5}: evaluation.batch is set in line {count + 3} already: remove one of the two",
    ]


@pytest.mark.parametrize("override", ["optim.lr", "=3", "name.deep=1", "name=[a"])
def test_bad_override_is_named(override: str, tmp_path: Path) -> None:
    assert override in problems(tmp_path, override)[0]


@pytest.mark.parametrize("text", [b"- a\n- b\n", b"a: [1\n", b"", b"\xff\xfe"])
def test_file_that_holds_no_settings(text: bytes, tmp_path: Path) -> None:
    path = tmp_path / "c.yaml"
    path.write_bytes(text)
    with pytest.raises(InputError, match=r"c\.yaml"):
        load(path)


def test_absent_file() -> None:
    with pytest.raises(InputError, match=r"nowhere\.yaml: cannot read"):
        load("nowhere.yaml")


def test_batches_must_divide_over_the_ranks(tmp_path: Path) -> None:
    config = toy.config(tmp_path, tmp_path, data__batch_labelled=6, data__batch_unlabelled=4)
    assert check_world(config, ["labelled", "unlabelled"], 2) == []
    (line,) = check_world(config, ["labelled", "unlabelled"], 3)
    said = "data.batch_unlabelled = 4 does not divide over 3 ranks: start 2, or in a new run take 6"
    assert line == said, "the batches of a run that goes on cannot change"
    assert [said.partition(": ")[2] for said in check_world(config, ["labelled", "unlabelled"], 8)] == [
        "start 2, or in a new run take 8"
    ] * 2


def test_bank_must_hold_a_step(tmp_path: Path) -> None:
    config = toy.config(tmp_path, tmp_path, ccl_mpc__contrast__bank=10)
    (line,) = check_world(config, ["labelled", "unlabelled"], 1)
    assert "holds less than one step's 60 offers a class: take bank_layout: sharded, or set it to 60 or more" in line
    config = toy.config(tmp_path, tmp_path, ccl_mpc__contrast__bank=100, accumulate=2)
    (line,) = check_world(config, ["labelled", "unlabelled"], 1)
    assert "less than one step's 120 offers" in line


def test_a_shard_of_the_bank_must_hold_a_ranks_step(tmp_path: Path) -> None:
    config = toy.config(
        tmp_path, tmp_path, ccl_mpc__contrast__bank=30, ccl_mpc__contrast__bank_layout="sharded"
    )  # 12 images offer 60 keys a class
    assert check_world(config, ["labelled", "unlabelled"], 2) == []
    (line,) = check_world(config, ["labelled", "unlabelled"], 1)
    assert "less than one step's 60 offers a class: start more ranks, or in a new run set it to 60 or more" in line


def test_instance_norm_wants_more_than_one_position(tmp_path: Path) -> None:
    changes = {"data__patch": [16, 16, 16], "model__norm": "instance"}
    with pytest.raises(InputError, match=r"leaves one position at the network's bottom.*take 32 along an axis"):
        toy.config(tmp_path, tmp_path, **changes)
    toy.config(tmp_path, tmp_path, **changes | {"data__patch": [32, 16, 16]})
    toy.config(tmp_path, tmp_path, **changes | {"model__norm": "group"})


def test_a_group_must_divide_the_ranks(tmp_path: Path) -> None:
    config = toy.config(tmp_path, tmp_path, ccl_mpc__contrast__group=2)
    assert check_world(config, ["labelled", "unlabelled"], 6) == []
    (line,) = check_world(config, ["labelled", "unlabelled"], 3)
    assert "ccl_mpc.contrast.group = 2 does not divide over 3 ranks: start a multiple of 2, or in a new run" in line


@pytest.mark.parametrize("exchange", ["auto", "naive", "keys", "anchors"])
def test_a_sharded_bank_wants_anchors_to_travel(exchange: str, tmp_path: Path) -> None:
    changes = {"ccl_mpc__contrast__exchange": exchange, "ccl_mpc__contrast__bank_layout": "sharded"}
    if exchange in ("auto", "anchors"):
        toy.config(tmp_path, tmp_path, **changes)
        return
    with pytest.raises(InputError, match=f"exchange = {exchange} does not reach the keys of a sharded bank: take auto"):
        toy.config(tmp_path, tmp_path, **changes)
    toy.config(tmp_path, tmp_path, ccl_mpc__contrast__bank=0, **changes)
    toy.config(tmp_path, tmp_path, ccl_mpc__lambda_cgcl=0, **changes)


def test_batch_not_set_follows_the_ranks(tmp_path: Path) -> None:
    config = toy.config(tmp_path, tmp_path, data__batch_labelled=None)
    assert [config.batch("labelled", world) for world in (1, 2, 5)] == [2, 2, 5]


def test_the_page_of_settings_is_up_to_date() -> None:
    docs = CONFIGS.parent / "docs"
    made = runpy.run_path(str(docs / "settings.py"))["page"]()
    assert (docs / "configuration.md").read_text() == made, "run: python docs/settings.py > docs/configuration.md"


def test_the_page_of_costs_is_up_to_date() -> None:
    docs = CONFIGS.parent / "docs"
    made = runpy.run_path(str(docs / "costs.py"))["page"]()
    assert (docs / "costs.md").read_text() == made, "run: python docs/costs.py > docs/costs.md, and again with --plot"


def test_every_setting_is_documented() -> None:
    def undocumented(section: Any, prefix: str) -> list[str]:
        found = []
        for name, field in section.model_fields.items():
            kind = field.annotation
            if hasattr(kind, "model_fields"):
                found += undocumented(kind, f"{prefix}{name}.")
            elif not field.description:
                found.append(f"{prefix}{name}")
        return found

    assert undocumented(Config, "") == []
