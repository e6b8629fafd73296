"""Several corpora in one stream: whose lanes hold what, at any world size, after a restart, in any stored type."""

import json
import random
import shutil
from pathlib import Path

import numpy as np
import pytest
import stores
import torch
import toy
import yaml
from corpora import numbered, write
from hypothesis import given, settings
from hypothesis import strategies as st
from test_data_loader import damaged, joined, same

from cclmpc_dist.config import load
from cclmpc_dist.data import encode
from cclmpc_dist.data.case import Case
from cclmpc_dist.data.index import Index
from cclmpc_dist.data.loader import Mixture, Stream, loader, to_device
from cclmpc_dist.data.order import rank_lanes
from cclmpc_dist.data.remote import open_corpora
from cclmpc_dist.distributed import runtime
from cclmpc_dist.errors import InputError
from cclmpc_dist.training import plan, run, setup
from cclmpc_dist.training.state import restore
from cclmpc_dist.training.trainer import Trainer

PATCH = (6, 4, 5)
NAMES = ("u", "u.a", "u.b")


@pytest.fixture(scope="module")
def corpora(tmp_path_factory):
    """14 samples stored as uint8, 9 as float32, 4 as uint8 with a scale."""
    folder = tmp_path_factory.mktemp("data")
    kinds = (14, "uint8"), (9, "float32"), (4, "scaled")
    return [write(folder / kind, numbered(count, kind=kind)) for count, kind in kinds]


def part(index, name, lanes, seed=3, block=2, patch=PATCH, **options):
    return Stream(index, name, np.arange(len(index)), lanes, seed, patch, block=block, **options)


def mixture(indexes, sizes, **options):
    shares = zip(indexes, NAMES, sizes, strict=False)
    return Mixture([part(index, name, lanes, **options) for index, name, lanes in shares])


@settings(max_examples=25, deadline=None)
@given(
    sizes=st.lists(st.integers(1, 5), min_size=1, max_size=3), world=st.integers(1, 4), seed=st.integers(0, 99),
    block=st.integers(1, 3), step=st.integers(0, 40), patch=st.sampled_from([PATCH, (12, 9, 5)]),
)  # fmt: skip
def test_a_step_of_all_ranks_is_each_corpus_own_step(corpora, sizes, world, seed, block, step, patch):
    """Against a loop over lanes, each read alone from a stream that knows one corpus only."""
    sizes[-1] += -sum(sizes) % world
    whole, options = sum(sizes), {"seed": seed, "block": block, "patch": patch}
    ranks = [mixture(corpora, sizes, **options) for _ in range(world)]
    parts = [one.batch(step, rank_lanes(whole, rank, world)) for rank, one in enumerate(ranks)]
    found = joined([to_device(one, "cpu") for one in parts])
    expected = []
    for number, lanes in enumerate(sizes):
        alone = Mixture([part(corpora[number], NAMES[number], lanes, **options)])
        expected += [to_device(alone.batch(step, [lane]), "cpu") for lane in range(lanes)]
    expected = joined(expected)
    same(found, expected | {"lane": torch.arange(whole)})
    assert len(set(found["key"].tolist())) == whole, "no two lanes draw alike"


@settings(max_examples=25, deadline=None)
@given(
    sizes=st.lists(st.integers(1, 5), min_size=2, max_size=3), world=st.integers(1, 4), epoch=st.integers(0, 3)
)  # fmt: skip
def test_each_corpus_has_an_epoch_of_its_own(corpora, sizes, world, epoch):
    """Its samples come as often as its own order says, over the lanes of all ranks."""
    sizes[-1] += -sum(sizes) % world
    data = mixture(corpora, sizes)
    assert data.batch_size == sum(sizes)
    assert data.steps == max(-(-len(index) // lanes) for index, lanes in zip(corpora, sizes, strict=False))
    for number, (index, lanes) in enumerate(zip(corpora, sizes, strict=False)):
        length, order = -(-len(index) // lanes), data.parts[number].order
        shares = [share for rank in range(world) for share in data.split(rank_lanes(data.batch_size, rank, world))]
        owned = [own for one, own in shares if one is data.parts[number]]
        steps = range(epoch * length, (epoch + 1) * length)
        rows = np.concatenate([order.batch(step, own)[0] for step in steps for own in owned])
        times = np.bincount(rows, minlength=len(index))
        assert len(rows) == lanes * length
        assert set(times) <= {lanes * length // len(index), -(-lanes * length // len(index))}


def test_a_restart_at_another_world_size_goes_on(corpora):
    sizes = (3, 2, 1)
    whole = list(loader(mixture(corpora, sizes), 0, 9, workers=0))
    first = mixture(corpora, sizes)
    states = [one.order.state(4) for one in first.parts]
    second = mixture([Index.open(index.path) for index in corpora], sizes)
    (start,) = {one.order.position(state) for one, state in zip(second.parts, states, strict=True)}
    ranks = [list(loader(second, start, 5, rank, 3, workers=rank % 2)) for rank in range(3)]
    for parts, expected in zip(zip(*ranks, strict=True), whole[4:], strict=True):
        same(joined([to_device(one, "cpu") for one in parts]), to_device(expected, "cpu"))
    with pytest.raises(InputError, match=r"u\.a order: samples is 9 in the checkpoint and 4 here"):
        mixture([corpora[0], corpora[2]], sizes).parts[1].order.position(states[1])


@pytest.mark.parametrize("patch", [PATCH, (12, 9, 5)])
def test_workers_give_the_same_batches(corpora, tmp_path, patch):
    """Of raw and compressed shards, inside volumes and beyond, from the start and from the middle."""
    indexes, sizes = [*corpora[:2], write(tmp_path / "packed", numbered(5), compress="zstd")], (3, 2, 1)
    expected = list(loader(mixture(indexes, sizes, patch=patch), 0, 30, 1, 2, workers=0))
    for start, workers in ((0, 2), (11, 1), (11, 3)):
        found = list(loader(mixture(indexes, sizes, patch=patch), start, 30 - start, 1, 2, workers=workers))
        for a, b in zip(found, expected[start:], strict=True):
            same(a, b)


@pytest.mark.parametrize("patch", [PATCH, (16, 4, 5)])
def test_stored_types_of_two_corpora_mix(corpora, tmp_path, monkeypatch, patch):
    """One batch of uint8 and float32, against the same corpora all stored as float32; with voxels outside too."""
    narrow = write(tmp_path / "narrow", numbered(14), shard_bytes=1 << 20)
    data = mixture([narrow, corpora[1]], (2, 2), patch=patch)
    batch = data.batch(0, range(4))
    assert batch["image"].dtype == torch.float32
    assert data.batch(0, range(2))["image"].dtype == torch.uint8, "a rank with lanes of one corpus keeps its type"
    monkeypatch.setattr(encode, "quantise", lambda image: (image.astype(np.float32), 1.0, 0.0))
    wide = write(tmp_path / "wide", numbered(14), shard_bytes=1 << 20)
    assert (narrow["dtype"].max(), wide["dtype"].min()) == (0, 2)
    same(to_device(batch, "cpu"), to_device(mixture([wide, corpora[1]], (2, 2), patch=patch).batch(0, range(4)), "cpu"))


def test_an_unreadable_sample_is_replaced_from_its_own_corpus(corpora, tmp_path, capfd):
    broken = damaged(tmp_path, [2])
    data = mixture([corpora[0], broken], (2, 2), on_error="skip")
    order, passed = data.parts[1].order, 0
    for step in range(order.steps):
        batch, (rows, _) = data.batch(step, range(4)), order.batch(step, range(2))
        passed += batch["skipped"]
        for lane in np.flatnonzero(rows == 2).tolist():
            crop = batch["image"][2 + lane]
            row = order.lane(0, (step + 1) % order.steps, lane)[0]
            volume = data.parts[1]._reader.image(row)
            inside = np.isin(volume.reshape(-1), crop.numpy().reshape(-1)).mean()
            assert set(np.unique(crop)) <= set(np.unique(volume))
            assert inside > 0.3
    data.batch(order.steps, range(4))
    assert passed == 1
    (line,) = capfd.readouterr().err.splitlines()
    assert line.startswith(f"cclmpc: {data.parts[1].name}: passed over: {broken.path}/shard-")


def test_one_corpus_behind_a_server_and_one_in_a_folder(corpora, tmp_path):
    """Through a cache with room for little; the same batches."""
    expected = [stores.digest(batch) for batch in loader(mixture(corpora, (2, 1, 1)), 0, 12, workers=0)]
    with stores.fault_server(Path(corpora[1].path)) as one, stores.fault_server(Path(corpora[2].path)) as two:
        urls = {"a": {"path": one, "batch": 1}, "b": {"path": two, "batch": 1}}
        config = toy.config(corpora[0].path, tmp_path, data__further=urls, data__cache=str(tmp_path / "cache"),
                            data__cache_gib=1e-6)  # fmt: skip
        indexes = open_corpora(config.data)
        assert [index.where for index in indexes] == ["all there", *["fetched when they are needed"] * 2]
        assert indexes[1].cache is indexes[2].cache
        batches = loader(mixture(indexes, (2, 1, 1)), 0, 12, workers=0)
        assert [stores.digest(batch) for batch in batches] == expected


# ---- configurations -------------------------------------------------------------------------------------------------


def planned(path, tmp_path, further, **changes):
    ranks = changes.pop("ranks", 1)
    return plan.plan(toy.config(path, tmp_path, data__further=further, **changes), ranks)


def test_the_plan_tells_of_each_corpus(toy_corpus, tmp_path):
    other = toy.corpus(tmp_path / "other", cases=9, labelled=3, val_last=2)
    further = {"z": {"path": str(other), "batch": 4}}
    said = planned(toy_corpus, tmp_path, further, ranks=2, data__batch_unlabelled=6)["streams"]
    assert list(said) == ["labelled", "unlabelled", "unlabelled.z"]
    mine, theirs = said["unlabelled"], said["unlabelled.z"]
    assert (mine["samples"], mine["batch"], mine["lanes_a_rank"]) == (8, 2, 2)
    assert (theirs["samples"], theirs["batch"], theirs["lanes_a_rank"]) == (7, 4, 3), "its training cases, labelled too"
    assert (mine["steps_an_epoch"], theirs["steps_an_epoch"]) == (4, 2)
    assert (mine["corpus"], theirs["corpus"]) == (str(toy_corpus), str(other))
    assert planned(toy_corpus, tmp_path, further, budget__images=None, budget__epochs=3)["steps"] == 12
    only = planned(toy_corpus, tmp_path, further, data__batch_unlabelled=4)["streams"]
    assert list(only) == ["labelled", "unlabelled.z"], "nothing is left to data.path"


def slices(folder, channels=1, shape=(40, 40, 40), top=1, labels=True):
    label = np.zeros(shape, np.uint8)
    for value in range(1, top + 1):
        label[value] = value
    image = np.arange(channels * label.size, dtype=np.float32).reshape(channels, *shape) % 251
    cases = [Case(f"x-{number}", image + number, label if labels else None, (1.0,) * len(shape)) for number in range(4)]
    return write(folder, cases)


@pytest.mark.parametrize(
    ("made", "told"),
    [
        ({"channels": 2}, "{0} and {1} have 2 and 1 channels: shard one of them again to match, or leave it out of"),
        ({"shape": (40, 40)}, "{0} and {1} have 2 and 3 axes: shard one of them again"),
        ({"top": 2}, "{0} and {1} have 3 and 2 classes: shard one of them again"),
        ({"shape": (20, 9, 9)}, "data.patch = [32, 16, 16] is larger than every volume of {0}"),
    ],
)  # fmt: skip
def test_corpora_that_do_not_fit_are_refused_in_one_line(toy_corpus, tmp_path, made, told):
    other = slices(tmp_path / "other", **({"shape": (40, 40, 40)} | made)).path
    with pytest.raises(InputError) as error:
        planned(toy_corpus, tmp_path, {"other": {"path": str(other), "batch": 2}})
    assert str(error.value).startswith(told.format(other, toy_corpus))
    assert "\n" not in str(error.value)


def test_a_method_without_unlabelled_images_opens_no_further_corpus(toy_corpus, tmp_path):
    nowhere = {"other": {"path": str(tmp_path / "nowhere"), "batch": 2}}
    assert list(planned(toy_corpus, tmp_path, nowhere, method="supervised")["streams"]) == ["labelled"]


def test_without_labels_the_number_of_classes_says_nothing(tmp_path):
    many = slices(tmp_path / "many", top=3).path
    other = slices(tmp_path / "other", labels=False).path
    said = planned(many, tmp_path, {"o": {"path": str(other), "batch": 6}}, data__labelled=2)
    assert "unlabelled.o" in said["streams"]


def test_further_settings_that_cannot_be_are_refused(toy_corpus, tmp_path):
    other = {"path": str(tmp_path / "other"), "batch": 8}
    config = toy.config(toy_corpus, tmp_path, data__further={"a": other})
    (line,) = setup.check_world(config, ["labelled", "unlabelled"], 1)
    assert line.startswith("data.batch_unlabelled = 6 is less than the 8 images of data.further: raise it")
    assert not setup.check_world(config, ["labelled"], 1), "a method that takes no unlabelled images does not mind"
    with pytest.raises(InputError, match="are the same corpus, whose labelled cases would be unlabelled too"):
        planned(toy_corpus, tmp_path, {"a": {"path": str(toy_corpus), "batch": 2}})
    copy = shutil.copytree(toy.corpus(tmp_path / "other", cases=4, val_last=0), tmp_path / "copy")
    twice = {name: {"path": str(tmp_path / name), "batch": 1} for name in ("other", "copy")}
    with pytest.raises(InputError, match=f"^{other['path']} and {copy} are the same corpus, whose cases would come"):
        planned(toy_corpus, tmp_path, twice)
    with pytest.raises(InputError, match="leaves no case for the unlabelled stream: change"):
        planned(toy_corpus, tmp_path, {"a": other | {"batch": 2}}, data__labelled=12)
    for wrong, told in (
        ({"a": {"path": "p"}}, r"data\.further\.a\.batch: missing: set it"),
        (
            {"a": {"path": "p", "batch": 1, "pth": 2}},
            r"data\.further\.a\.pth: unknown setting: did you mean data\.further\.a\.path\?",
        ),
        ({"a": {"path": "p", "batch": 0}}, r"data\.further\.a\.batch = 0: input should be greater than 0"),
        ({"a.b": {"path": "p", "batch": 1}}, r"data\.further\.a\.b: a name here has letters, digits, - and _"),
        ([1], r"data\.further = \[1\]: input should be a section of names"),
        ({"a": {"path": "ftp://h/x", "batch": 1}}, r"data\.further\.a\.path is no URL that is known"),
    ):
        with pytest.raises(InputError, match=told):
            toy.config(toy_corpus, tmp_path, data__further=wrong)


@pytest.mark.parametrize(("was", "now"), [(4, 2), (2, 4)])
def test_streams_that_follow_the_ranks_are_refused_at_another_world_size(toy_corpus, tmp_path, alone, was, now):
    """An unset data.batch_unlabelled is max(2, ranks): two ranks leave nothing of it to data.path."""
    other = toy.corpus(tmp_path / "other", cases=9, labelled=3, val_last=2)
    config = toy.config(toy_corpus, tmp_path, data__batch_labelled=4, data__batch_unlabelled=None,
                        data__further={"a": {"path": str(other), "batch": 2}})  # fmt: skip
    trainer = Trainer(config, runtime.start("fp32"))
    made = {ranks: setup.streams(config, trainer.indexes, trainer.method, trainer.cases, ranks) for ranks in (was, now)}
    orders = {part.name: part.order for stream in made[was].values() for part in stream.parts}
    trainer.streams, trainer.world = made[now], now
    saved = {"world_size": was, "streams": {name: order.state(3) for name, order in orders.items()}}
    streams = {4: "4 labelled, 2 unlabelled, 2 unlabelled.a", 2: "4 labelled, 2 unlabelled.a"}
    with pytest.raises(InputError) as error:
        restore(trainer, 3, saved)
    assert str(error.value) == (
        f"{config.folder}: its checkpoint of step 3, by {was} ranks, has {streams[was]} a microbatch, and {now} ranks "
        f"would have {streams[now]}: go on with {was} ranks, or in a new run set data.batch_labelled and "
        "data.batch_unlabelled"
    )


@pytest.mark.parametrize(("was", "now"), [(1, 4), (4, 1)])
def test_unset_batches_are_refused_at_another_world_size(toy_corpus, tmp_path, alone, was, now):
    config = toy.config(toy_corpus, tmp_path, data__batch_labelled=None, data__batch_unlabelled=None)
    trainer = Trainer(config, runtime.start("fp32"))
    made = {ranks: setup.streams(config, trainer.indexes, trainer.method, trainer.cases, ranks) for ranks in (was, now)}
    orders = {part.name: part.order for stream in made[was].values() for part in stream.parts}
    trainer.streams, trainer.world = made[now], now
    saved = {"world_size": was, "streams": {name: order.state(3) for name, order in orders.items()}}
    ranks = {1: "1 rank", 4: "4 ranks"}[was]
    with pytest.raises(InputError, match=f"by {ranks}, has .* labelled, .*: go on with {ranks}, or in a new run"):
        restore(trainer, 3, saved)


def test_a_corpus_of_which_nothing_is_drawn_is_told(toy_corpus, tmp_path, alone):
    other = toy.corpus(tmp_path / "other", cases=9, labelled=3, val_last=2)
    for lanes, told in ((4, []), (6, ["warning: the 8 unlabelled cases of"])):
        config = toy.config(toy_corpus, tmp_path, data__further={"a": {"path": str(other), "batch": lanes}})
        trainer = Trainer(config, runtime.start("fp32"))
        streams = setup.streams(config, trainer.indexes, trainer.method, trainer.cases, 1)
        assert [line[:34] for line in setup.corpus_notes(config, streams, trainer.cases)] == told


# ---- runs -----------------------------------------------------------------------------------------------------------


def logged(folder):
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return [{name: value for name, value in line.items() if not name.startswith("perf/")} for line in lines]


@pytest.mark.slow
def test_a_killed_run_on_two_corpora_ends_with_the_same_bits(toy_corpus, tmp_path):
    """Though the other corpus was moved meanwhile; and on one rank with the same positions."""
    other, elsewhere = toy.corpus(tmp_path / "other", cases=9, labelled=3, val_last=2), tmp_path / "elsewhere"
    names = ("straight", "broken")
    for name in names:
        raw = toy.settings(toy_corpus, tmp_path, name=name, model__dropout=0.5, budget__images=144,
                           data__further={"o": {"path": str(other), "batch": 3}})  # fmt: skip
        (tmp_path / f"{name}.yaml").write_text(yaml.safe_dump(raw))
    straight, broken = (str(tmp_path / f"{name}.yaml") for name in names)
    said = toy.run(2, "train", straight)
    assert "unlabelled: 8 cases, 3 a microbatch over all ranks, 3 microbatches and 1 repeat an epoch" in said
    assert "unlabelled.o: 7 cases, 3 a microbatch over all ranks, 3 microbatches and 2 repeats an epoch" in said
    process = toy.launch(2, "train", broken)
    toy.wait_for_step(process, tmp_path / "broken", random.randint(5, 9))
    toy.kill(process)
    shutil.copytree(tmp_path / "broken", elsewhere / "broken")
    moved = f"data.further.o.path={shutil.move(other, tmp_path / 'moved')}"
    toy.run(2, "train", broken, moved)
    toy.run(1, "train", broken, moved, f"runs={elsewhere}")
    last = "checkpoints/step-000000012"
    toy.assert_same(toy.tensors(tmp_path / "straight" / last), toy.tensors(tmp_path / "broken" / last))
    folders = [tmp_path / "straight", tmp_path / "broken", elsewhere / "broken"]
    states = [json.loads((folder / last / "state.json").read_text())["streams"] for folder in folders]
    assert states[0] == states[1] == states[2]
    assert list(states[0]) == ["labelled", "unlabelled", "unlabelled.o"]
    logs = [logged(folder) for folder in folders]
    assert logs[0] == logs[1]
    for one, two in zip(logs[0], logs[2], strict=True):
        assert [one[f"data/{name}_epoch"] for name in states[0]] == [two[f"data/{name}_epoch"] for name in states[0]]
    with pytest.raises(InputError, match=r"made with other settings: data\.further\.o\.batch = 2 \(was 3\): give"):
        run.resumable_state(load(broken, [moved, "data.further.o.batch=2"]), 12)
