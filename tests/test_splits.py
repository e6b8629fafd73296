"""What is in both splits, of a corpus or of several that a run would mix."""

import re
import sys
from pathlib import Path

import numpy as np
import pytest
from corpora import numbered, write
from hypothesis import given
from hypothesis import strategies as st

from cclmpc_dist import cli
from cclmpc_dist.data import splits
from cclmpc_dist.data.case import Case
from cclmpc_dist.data.index import Index
from cclmpc_dist.data.verify import verify


def renamed(cases: list[Case], name: str, patient: str | None = None) -> list[Case]:
    told = {} if patient is None else {"patient": patient}
    return [Case(f"{name}-{n}", case.image, case.label, case.spacing, told) for n, case in enumerate(cases)]


@pytest.fixture(scope="module")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> Index:
    """Six cases, the last two for reports only, of patients that the source names."""
    cases = numbered(6, kind="float32")
    for number, case in enumerate(cases):
        case.meta["patient"] = f"P{number}"
    return write(tmp_path_factory.mktemp("splits") / "one", cases, val_last=2)


def test_an_image_of_one_corpus_validation_in_training_of_another(tmp_path: Path, corpus: Index) -> None:
    """Whichever is named first; two splits of one name, or one image twice in one split, are none of it."""
    again = renamed(numbered(7, kind="float32")[2:6:3], "web")
    other = write(tmp_path / "two", renamed(numbered(9, kind="float32")[6:], "mine") + again)
    assert verify(corpus.path) == verify(other.path) == []
    assert verify(corpus.path, other.path) == [
        f"{other.shard_path(int(other['shard'][4]))}: case web-1: its image is that of case case-005 of {corpus.path} "
        "in the other split: leave one of them out and shard again"
    ]
    (line,) = verify(other.path, corpus.path)
    assert line.startswith(
        f"{corpus.shard_path(int(corpus['shard'][5]))}: case case-005: its image is that of case web-1 "
    )


def test_a_patient_whom_the_sources_name_in_two_corpora(tmp_path: Path, corpus: Index) -> None:
    """One that is but a case's name is nobody: many corpora have a 0001."""
    named = write(tmp_path / "named", renamed(numbered(8)[6:7], "x", "P5") + renamed(numbered(8)[7:], "y", "P3"))
    assert verify(corpus.path, named.path) == [
        f"{named.shard_path(0)}: case x-0: its patient P5 is in the other split too (case case-005 of {corpus.path}): "
        "shard again without one of them"
    ]
    unnamed = [Case("P5", case.image, None, case.spacing) for case in numbered(8)[7:]]
    assert verify(corpus.path, write(tmp_path / "unnamed", unnamed).path) == []
    assert verify(corpus.path, write(tmp_path / "same", numbered(7)[6:]).path) == []


def test_each_sample_after_the_first_of_the_other_split_is_told(tmp_path: Path) -> None:
    cases = numbered(6)
    for number in (0, 3, 5):
        cases[number].meta["patient"] = "A"
    index = write(tmp_path / "out", cases)
    index.columns["split"] = np.array([0, 0, 0, 1, 0, 1], np.uint8)
    told = splits.Splits([index])
    for row, case in enumerate(cases):
        told.patient(0, row, str(case.meta.get("patient", case.key)))
        told.image(0, row, cases[row % 4].image)
    found = [re.sub(r".*(case-\d+): its (\w+) .*(case-\d+).*", r"\1 \2 \3", line) for line in told.problems()]
    assert found == ["case-003 patient case-000", "case-005 patient case-000", "case-005 image case-001"]


def test_the_command_takes_several(
    tmp_path: Path, corpus: Index, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    other = write(tmp_path / "two", renamed(numbered(6, kind="float32")[4:], "x"))
    monkeypatch.setattr(sys, "argv", ["cclmpc", "verify", str(corpus.path), str(tmp_path / "none"), str(other.path)])
    with pytest.raises(SystemExit) as caught:
        cli.main()
    lines = capfd.readouterr().err.splitlines()
    assert (caught.value.code, len(lines)) == (2, 3)
    assert "none: no corpus here" in lines[0]
    assert ["its image is that of case case-00" in line for line in lines] == [False, True, True]
    monkeypatch.setattr(sys, "argv", ["cclmpc", "verify", str(other.path), str(other.path)])
    with pytest.raises(SystemExit) as caught:
        cli.main()
    assert caught.value.code == 0
    assert capfd.readouterr().out == f"{other.path}: every shard is as it was written\n" * 2


@given(st.lists(st.tuples(st.integers(0, 4), st.integers(0, 1)), min_size=1, max_size=30))
def test_what_is_in_both_splits_against_sets(samples: list[tuple[int, int]]) -> None:
    hashes, split = np.array(samples, np.uint64).T
    both = {h for h, s in samples if s == 0} & {h for h, s in samples if s == 1} - {0}
    expected = [place for place, (value, _) in enumerate(samples) if value in both]
    assert splits._shared(hashes, split).tolist() == expected
