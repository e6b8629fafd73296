"""Sharding in parts: what is merged and what is refused, and no case without account."""

import json
import re
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from corpora import numbered, told, tree, write

from cclmpc_dist import cli
from cclmpc_dist.data import shards
from cclmpc_dist.data.case import Case
from cclmpc_dist.data.formats.options import Options
from cclmpc_dist.data.index import Index
from cclmpc_dist.data.merge import merge
from cclmpc_dist.data.parts import Settings
from cclmpc_dist.data.reader import Reader
from cclmpc_dist.data.verify import verify
from cclmpc_dist.errors import InputError

LIMIT = 12000
SEVERAL = Options(labels=Path("a b"), spacing=(1.0, 0.5, 2.0), channels=("_t1", "_t2"))


def settings(**changes: object) -> Settings:
    return Settings("test", **({"shard_bytes": LIMIT, "labelled": 3, "val_last": 2, "parts": 3} | changes))


def sick(key: str) -> Case:
    return Case(key, np.full((1, 9, 8, 7), np.nan, np.float32), None, (1.0,) * 3)


def one_line(error: pytest.ExceptionInfo[InputError], *words: str) -> None:
    message = str(error.value)
    assert "\n" not in message
    for word in words:
        assert word in message


@pytest.fixture
def parted(tmp_path: Path) -> Path:
    """Three parts of ten cases, not yet merged."""
    out = tmp_path / "parted"
    for number in (2, 3, 1):
        shards.write_part(numbered(10), out, settings(), number)
    return out


def test_merged_parts_hold_the_samples_of_a_run_in_one_part(parted: Path, tmp_path: Path) -> None:
    """Whatever the order in which they were written; what is said of the whole corpus is right."""
    again = tmp_path / "again"
    for number in (1, 2, 3):
        shards.write_part(numbered(10), again, settings(), number)
    many, one = merge(parted), write(tmp_path / "one", numbered(10), labelled=3, val_last=2)
    merge(again)
    assert tree(parted) == tree(again)
    assert verify(parted) == []
    names = [shard["name"] for shard in many.manifest["shards"]]
    assert names[0] == "shard-0001-000000.tar"
    assert names[-1].startswith("shard-0003-")
    assert sorted(path.name for path in parted.iterdir()) == sorted([*names, "index.safetensors", "manifest.json"])
    assert many.columns.keys() == one.columns.keys()
    for name in many.columns.keys() - {"shard", "image_at", "label_at", "json_at"}:
        np.testing.assert_array_equal(many[name], one[name], err_msg=name)
    left, right = Reader(many), Reader(one)
    for row in range(10):
        np.testing.assert_array_equal(left.image(row), right.image(row))
        np.testing.assert_array_equal(left.label(row), right.label(row))


def test_more_parts_than_cases(tmp_path: Path) -> None:
    for number in range(1, 6):
        shards.write_part(numbered(3), tmp_path, settings(parts=5, labelled=1), number)
    assert [merge(tmp_path).key(row) for row in range(3)] == ["case-000", "case-001", "case-002"]


def edit(file: Path, **entries: object) -> None:
    file.write_text(json.dumps(json.loads(file.read_text()) | entries))


def _missing(out: Path) -> None:
    (out / "parts/0002-of-0003.json").unlink()


def _unfinished(out: Path) -> None:
    edit(out / "parts/0002-of-0003.json", finished=False)


def _other_settings(out: Path) -> None:
    record = out / "parts/0002-of-0003.json"
    edit(record, settings=json.loads(record.read_text())["settings"] | {"labelled": 5})


def _torn_record(out: Path) -> None:
    record = out / "parts/0002-of-0003.json"
    record.write_text(record.read_text()[:-40])


def _torn_piece(out: Path) -> None:
    piece = out / "parts/shard-0002-000000.rows"
    piece.write_bytes(piece.read_bytes()[:-40])


def _no_shard(out: Path) -> None:
    (out / "shard-0002-000000.tar").unlink()


def _duplicate(out: Path) -> None:
    """Part 2 from another corpus, whose record was made to fit."""
    other = out.parent / "other"
    cases = [
        Case(f"case-00{number % 3}", case.image, case.label, case.spacing) for number, case in enumerate(numbered(10))
    ]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(shards, "_check", lambda *_: None)
        shards.write_part(cases[:3] + cases[:3] + cases[:4], other, settings(), 2)
    for file in (*other.glob("*.tar"), *other.glob("parts/*.rows")):
        shutil.copy(file, out / file.relative_to(other))
    record = json.loads((out / "parts/0001-of-0003.json").read_text())
    edit(other / "parts/0002-of-0003.json", settings=record["settings"])
    shutil.copy(other / "parts/0002-of-0003.json", out / "parts")


@pytest.mark.parametrize(
    ("harm", "said"),
    [
        (_missing, r"part 2/3 is missing: run `cclmpc shard` with --part 2/3"),
        (_unfinished, r"part 2/3 is not finished: run"),
        (_other_settings, r"0002-of-0003\.json: made with --labelled 5, not --labelled 3 as 0001-of-0003"),
        (_torn_record, r"0002-of-0003\.json: torn or edited: shard part 2/3 again"),
        (_torn_piece, r"shard-0002-000000\.rows: missing or torn: shard part 2/3 again"),
        (_no_shard, r"shard-0002-000000\.tar: missing or truncated"),
        (_duplicate, r"case case-00\d comes twice in the parts"),
    ],
)
def test_parts_that_cannot_be_merged(
    harm: Callable[[Path], None], said: str, parted: Path, monkeypatch: pytest.MonkeyPatch,
    capfd: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    """One line and exit code 2; the part made again mends it."""
    harm(parted)
    monkeypatch.setattr(sys, "argv", ["cclmpc", "merge", str(parted)])
    with pytest.raises(SystemExit) as caught:
        cli.main()
    assert caught.value.code == 2
    assert re.fullmatch(f"cclmpc: .*{said}.*\n", capfd.readouterr().err)
    assert not (parted / "manifest.json").exists()
    shards.write_part(numbered(10), parted, settings(), 2)
    assert len(merge(parted)) == 10
    assert verify(parted) == []


def test_nothing_to_merge(tmp_path: Path) -> None:
    with pytest.raises(InputError) as error:
        merge(tmp_path)
    one_line(error, "no parts to merge", "--part 1/N")


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"compress": "zstd"}, "--compress none, not --compress zstd"),
        ({"parts": 4}, "--part I/3, not --part I/4"),
        ({"shard_bytes": 9 << 20}, "--shard-mib 0.0114441, not --shard-mib 9"),
        ({"options": {"label_suffix": "_seg"}}, "no --label-suffix, not --label-suffix _seg"),
        (
            {"val_last": 1, "compress": "zstd", "options": SEVERAL.given()},
            "--compress none, not --compress zstd; no --labels, not --labels a b; "
            "no --spacing, not --spacing 1,0.5,2; no --channels, not --channels _t1,_t2: give",
        ),
        ({"options": Options(label_map=((0, 127, 0), (255, 255, 1))).given()}, "not --label-map 0..127=0,255=1: give"),
    ],
)
def test_a_part_of_another_build_is_refused_at_once(changes: dict, said: str, parted: Path) -> None:
    before = tree(parted)
    with pytest.raises(InputError) as error:
        shards.write_part(numbered(10), parted, settings(**changes), 2)
    one_line(error, "begun with", said, "or another --out")
    with pytest.raises(InputError, match="begun with 10 cases, not 9 cases"):
        shards.write_part(numbered(9), parted, settings(), 2)
    assert tree(parted) == before


def test_one_process_a_part(tmp_path: Path) -> None:
    script = (
        "import sys; from pathlib import Path; from cclmpc_dist.data.parts import Part, locked\n"
        "with locked(Part(Path(sys.argv[1]), 2, 3, 10)): print('held', flush=True); sys.stdin.read()"
    )
    shards.write_part(numbered(10), tmp_path, settings(), 1)
    process = subprocess.Popen(
        [sys.executable, "-c", script, str(tmp_path)], stdin=subprocess.PIPE, stdout=subprocess.PIPE
    )
    assert process.stdout is not None
    process.stdout.readline()
    with pytest.raises(InputError) as error:
        shards.write_part(numbered(10), tmp_path, settings(), 2)
    one_line(error, "another process writes part 2/3")
    shards.write_part(numbered(10), tmp_path, settings(), 3)
    process.communicate()
    shards.write_part(numbered(10), tmp_path, settings(), 2)
    assert len(merge(tmp_path)) == 10


def test_a_name_that_comes_twice_is_refused_before_anything_is_read(tmp_path: Path) -> None:
    with pytest.raises(InputError) as error:
        shards.write_part([*numbered(9), sick("case-004")], tmp_path / "out", settings(), 1)
    one_line(error, "case-004", "comes twice")
    assert not (tmp_path / "out").exists()


def test_parts_of_different_form(tmp_path: Path) -> None:
    cases = [*numbered(4), *numbered(8, channels=2)[4:]]
    for number in (1, 2):
        shards.write_part(cases, tmp_path, settings(parts=2), number)
    with pytest.raises(InputError) as error:
        merge(tmp_path)
    one_line(error, "shard-0002-000000.tar", "(2, 3)", "(1, 3)")


def test_a_patient_in_both_splits_is_refused_and_another_split_costs_no_shard(tmp_path: Path) -> None:
    cases = numbered(8)
    for number, case in enumerate(cases):
        case.meta["patient"] = f"patient{number // 2}"
    with pytest.raises(InputError) as error:
        write(tmp_path, cases, val_last=3)
    one_line(error, "patient2", "case-004", "case-005", "--val-last")
    before = {file: file.stat().st_mtime_ns for file in tmp_path.glob("*.tar")}
    assert write(tmp_path, cases, val_last=4).manifest["counts"]["val"] == 4
    assert before == {file: file.stat().st_mtime_ns for file in tmp_path.glob("*.tar")}


def test_too_many_labelled_is_told_and_lowered_without_sharding_again(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="--labelled 3: only 2 training cases have a label"):
        write(tmp_path / "out", numbered(3), labelled=3, val_last=1)
    write(tmp_path / "out", numbered(3), labelled=2, val_last=1)
    write(tmp_path / "straight", numbered(3), labelled=2, val_last=1)
    assert tree(tmp_path / "out") == tree(tmp_path / "straight")


def test_left_out_cases_are_listed_and_counted(tmp_path: Path) -> None:
    """Also where they stand at the borders of shards and of parts; a sick case of --val-last makes no other one val."""
    cases: list[Case] = numbered(10)
    for number in (0, 3, 4, 9):
        cases[number] = sick(f"case-{number:03d}")
    index = write(tmp_path / "one", cases, on_error="skip", val_last=2)
    assert [index.key(row) for row in range(6)] == [f"case-{number:03d}" for number in (1, 2, 5, 6, 7, 8)]
    assert index["split"].tolist() == [0, 0, 0, 0, 0, 1]
    listed = json.loads((tmp_path / "one/skipped.json").read_text())
    assert [entry["case"] for entry in listed] == ["case-000", "case-003", "case-004", "case-009"]
    assert all("NaN" in entry["why"] for entry in listed)
    assert index.manifest["skipped"] == 4
    for number in range(1, 11):  # parts of one case, sick or not
        shards.write_part(cases, tmp_path / "ten", settings(parts=10, on_error="skip", labelled=None), number)
    merged = merge(tmp_path / "ten")
    assert (tmp_path / "ten/skipped.json").read_bytes() == (tmp_path / "one/skipped.json").read_bytes()
    np.testing.assert_array_equal(merged["key_bytes"], index["key_bytes"])
    np.testing.assert_array_equal(merged["split"], index["split"])


def test_nothing_but_sick_cases(tmp_path: Path) -> None:
    with pytest.raises(InputError) as error:
        write(tmp_path, [sick("a"), sick("b")], on_error="skip")
    one_line(error, "all 2 cases were left out", "NaN")


def test_a_finished_corpus_is_left_alone(parted: Path) -> None:
    merge(parted)
    before = tree(parted)
    assert shards.write_part(numbered(10), parted, settings(), 2) is None
    merge(parted)
    kept = "holds a finished corpus made with {}, and is left as it is: give another --out{}$"
    with pytest.raises(InputError, match=kept.format("--val-last 2, not --val-last 1", "")):
        shards.write_part(numbered(10), parted, settings(val_last=1), 2)
    instead = ", or set data.labelled for the run, which needs no new shards"
    with pytest.raises(InputError, match=kept.format("--labelled 3, not no --labelled", instead)):
        shards.write_part(numbered(10), parted, settings(labelled=None), 2)
    with pytest.raises(InputError, match=kept.format("--labelled 3, not no --labelled; .* --compress zstd", "")):
        shards.write_part(numbered(10), parted, settings(labelled=None, compress="zstd"), 2)
    assert tree(parted) == before
    told(Index.open(parted), settings={})
    with pytest.raises(InputError, match=kept.format("settings that it does not tell", "")):
        shards.write_part(numbered(10), parted, settings(), 2)


def test_labels_beyond_lowered_classes_are_found_again(tmp_path: Path) -> None:
    shards.write_part(numbered(10), tmp_path, settings(parts=1), 1)
    with pytest.raises(InputError) as error:
        shards.write_part(numbered(10), tmp_path, settings(parts=1, classes=2), 1)
    one_line(error, "case-000", "label 2 is not in 0..1")


@pytest.mark.parametrize("part", ["0/3", "4/3", "2", "a/b", "1/0"])
def test_parts_are_counted_from_one(part: str) -> None:
    with pytest.raises(InputError) as error:
        cli._part(part)
    assert str(error.value) == f"--part {part}: give I/N, I from 1 to N, as in 2/8"
