"""Sharding by several processes, in parts, and on from a kill: always the same bytes, and no case without account."""

import json
import re
import shutil
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import h5py
import numpy as np
import psutil
import pytest
from corpora import numbered, told, tree, write, write_h5
from stalled import build

from cclmpc_dist import cli
from cclmpc_dist.data import phantom, shards
from cclmpc_dist.data.case import Case
from cclmpc_dist.data.index import Index
from cclmpc_dist.data.merge import merge
from cclmpc_dist.data.parts import Settings
from cclmpc_dist.data.reader import Reader
from cclmpc_dist.data.sources import la_h5
from cclmpc_dist.data.verify import verify
from cclmpc_dist.errors import InputError

HERE = Path(__file__).parent
LIMIT = 12000


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


def test_bytes_do_not_depend_on_the_number_of_workers(tmp_path: Path) -> None:
    one, two, three = (write(tmp_path / str(n), numbered(10), workers=n).path for n in (1, 2, 3))
    assert len(tree(one)) > 4
    assert tree(one) == tree(two) == tree(three)


def test_killed_before_any_file_operation_it_goes_on_to_the_same_bytes(tmp_path: Path) -> None:
    command = [sys.executable, str(HERE / "killed.py"), str(tmp_path)]
    done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=200)
    assert done.returncode == 0, done.stderr
    assert int(done.stdout) > 30, "a kill an operation"


def pieces(out: Path) -> int:
    return len(list(out.glob("parts/*.rows")))


@contextmanager
def stalled(out: Path, gate: Path, shards: int) -> Iterator[tuple[subprocess.Popen[str], list[psutil.Process]]]:
    """A build that waits for a case, with so many shards complete, and its two workers."""
    command = [sys.executable, str(HERE / "stalled.py"), str(out), str(gate), "2"]
    with subprocess.Popen(command, stderr=subprocess.PIPE, text=True) as process:
        try:
            workers: list[psutil.Process] = []
            while pieces(out) < shards or len(workers) < 2:
                assert process.poll() is None, process.communicate()[1]
                time.sleep(0.02)
                workers = [child for child in psutil.Process(process.pid).children() if is_worker(child)]
            yield process, workers
        finally:
            process.kill()


def is_worker(process: psutil.Process) -> bool:
    """Other children come and go while Python's packages are imported."""
    try:
        return "spawn_main" in " ".join(process.cmdline())
    except psutil.NoSuchProcess:
        return False


def test_killed_it_keeps_its_shards_and_its_workers_end(tmp_path: Path) -> None:
    """First the process, then a worker; the third run has one worker."""
    straight = tree(write(tmp_path / "straight", numbered(10)).path)
    out, gate = tmp_path / "out", tmp_path / "gate"
    with stalled(out, gate, 2) as (process, workers):
        process.kill()
        assert not psutil.wait_procs(workers, timeout=30)[1]
    told_of = [out / f"{piece.stem}.tar" for piece in out.glob("parts/*.rows")]  # the kill may fall between the two
    kept = {file: file.stat().st_mtime_ns for file in told_of}
    assert len(kept) >= 2
    assert not (out / "manifest.json").exists()

    with stalled(out, gate, 2) as (process, workers):
        workers[0].kill()
        _, said = process.communicate(timeout=60)
    told = "InputError: a worker was killed, perhaps for want of memory: give fewer --workers"
    assert told in said.splitlines()[-1]
    gate.touch()
    build(out, gate, workers=1)
    assert all(file.stat().st_mtime_ns == then for file, then in kept.items()), "they were not written again"
    assert tree(out) == straight


@pytest.mark.slow
def test_killed_at_random_moments_it_ends_with_the_same_bytes(tmp_path: Path) -> None:
    shards.write(phantom.cases(40, 0, 40), tmp_path / "straight", source="phantom", shard_bytes=1 << 20)
    rng, out = np.random.default_rng(), tmp_path / "out"
    kills = 0
    while not (out / "manifest.json").exists():
        words = ["40", "--format", "phantom", "--size", "40", "--shard-mib", "1", "--out", str(out), "--workers"]
        command = [sys.executable, "-m", "cclmpc_dist", "shard", *words, str(rng.integers(1, 4))]
        process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        time.sleep(rng.uniform(0.5, 3) + kills / 5)
        process.kill()
        process.wait()
        kills += 1
    subprocess.run(command, check=True, timeout=120)
    assert kills > 1
    assert tree(out) == tree(tmp_path / "straight")


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
        ({"options": "label_suffix=_seg"}, "no option of the format, not --label-suffix=_seg"),
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


def test_after_a_failure_it_goes_on_once_the_case_is_repaired_or_may_be_left_out(tmp_path: Path) -> None:
    cases: list[Case] = [*numbered(9), sick("case-009")]
    outs = [tmp_path / name for name in ("repaired", "left")]
    for out in outs:
        with pytest.raises(InputError, match="case-009"):
            write(out, cases, labelled=2)
        assert pieces(out) > 1, "full shards are kept"
    before = [{file: file.stat().st_mtime_ns for file in out.glob("*.tar")} for out in outs]
    write(outs[0], numbered(10), labelled=2)
    write(outs[1], cases, labelled=2, on_error="skip")
    for times in before:
        assert all(file.stat().st_mtime_ns == then for file, then in times.items())
    write(tmp_path / "straight", numbered(10), labelled=2)
    assert tree(outs[0]) == tree(tmp_path / "straight")
    assert Index.open(outs[1]).manifest["skipped"] == 1


def test_a_damaged_shard_and_a_changed_file_are_made_again(tmp_path: Path) -> None:
    image = np.arange(600, dtype=np.float32).reshape(10, 10, 6)
    for number in range(8):
        write_h5(tmp_path / "la", f"case{number}", image=image + number)
    out, plan = tmp_path / "out", settings(parts=1, shard_bytes=6000, labelled=None)
    shards.write_part(la_h5(tmp_path / "la"), out, plan)
    damaged = sorted(out.glob("*.tar"))[2]
    damaged.write_bytes(damaged.read_bytes().replace(b"NUMPY", b"NIMPY"))
    shards.write_part(la_h5(tmp_path / "la"), out, plan)
    with h5py.File(tmp_path / "la/case6/mri_norm2.h5", "a") as file:
        file["image"][:] = image * 3.7
        file["note"] = np.zeros(1000)
    shards.write_part(la_h5(tmp_path / "la"), out, plan)
    merge(out)
    assert verify(out) == []
    shards.write_part(la_h5(tmp_path / "la"), tmp_path / "straight", plan)
    merge(tmp_path / "straight")
    assert tree(out) == tree(tmp_path / "straight")


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
    assert tree(parted) == before
    told(Index.open(parted), settings={})
    with pytest.raises(InputError, match=kept.format("settings that it does not tell", "")):
        shards.write_part(numbered(10), parted, settings(), 2)


def test_labels_beyond_lowered_classes_are_found_again(tmp_path: Path) -> None:
    shards.write_part(numbered(10), tmp_path, settings(parts=1), 1)
    with pytest.raises(InputError) as error:
        shards.write_part(numbered(10), tmp_path, settings(parts=1, classes=2), 1)
    one_line(error, "case-000", "label 2 is not in 0..1")


def test_no_more_cases_are_in_flight_than_the_workers_need(tmp_path: Path) -> None:
    """A corpus may be larger than memory: what was encoded ahead is bounded."""
    from cclmpc_dist.data.workers import AHEAD, ordered

    taken = 0

    def items() -> object:
        nonlocal taken
        for number in range(40):
            taken += 1
            yield number

    results = ordered(abs, items(), 2)
    for number in range(10):
        assert next(results) == number
        assert taken <= number + AHEAD * 2
    results.close()


@pytest.mark.parametrize("part", ["0/3", "4/3", "2", "a/b", "1/0"])
def test_parts_are_counted_from_one(part: str) -> None:
    with pytest.raises(InputError) as error:
        cli._part(part)
    assert str(error.value) == f"--part {part}: give I/N, I from 1 to N, as in 2/8"
