"""What can be wrong with a corpus, as a user meets it: one line that names the file and what to do, exit code 2."""

import re
import sys
from pathlib import Path

import bad_files  # noqa: F401 (its kinds follow those of bad_volumes)
import inputs
import pytest
from bad_volumes import KINDS, volumes

from cclmpc_dist import cli

PAGE = Path(__file__).parents[1] / "docs/formats.md"


def run(monkeypatch: pytest.MonkeyPatch, *arguments: str) -> int:
    monkeypatch.setattr(sys, "argv", ["cclmpc", *arguments])
    with pytest.raises(SystemExit) as caught:
        cli.main()
    return int(caught.value.code or 0)


@pytest.mark.parametrize("name", KINDS)
def test_one_line_names_file_and_remedy(
    name: str, tmp_path: Path, capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "in").mkdir()
    (format_, source, *more), words = KINDS[name](tmp_path / "in")
    out = str(tmp_path / "out")
    code = run(monkeypatch, "shard", source, "--format", format_, "--out", out, "--workers", "1", *more)
    said = [line for line in capfd.readouterr().err.splitlines() if line.startswith("cclmpc: ")]
    assert code == 2, said
    assert len(said) == 1
    for word in words:
        assert word in said[0]
    line = said[0].removeprefix("cclmpc: ").replace(f"{tmp_path}/in/", "").replace(f"{tmp_path}/", "")
    assert re.fullmatch(re.escape(rows()[name]).replace(r"\.\.\.", ".*"), line), "what the page says"


def rows() -> dict[str, str]:
    """docs/formats.md: the line of each kind; ... stands for anything."""
    table = PAGE.read_text().partition("## What is refused")[2].partition("\n## ")[0]
    return dict(re.findall(r"^\| (?!input|---)([^|]+?) \| (.+) \|$", table, re.MULTILINE))


def test_the_page_lists_every_kind() -> None:
    """In the order of this file."""
    assert list(rows()) == list(KINDS)


def test_one_bad_case_is_left_out_and_listed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    _, source = volumes(tmp_path, 3)
    inputs.cut(tmp_path / "images/c1.nii.gz")
    arguments = ["shard", source, "--format", "nifti", "--out", str(tmp_path / "out"), "--on-error", "skip"]
    assert run(monkeypatch, *arguments, "--workers", "1") == 0
    listed = (tmp_path / "out/skipped.json").read_text()
    assert "c1.nii.gz: not a readable NIfTI file" in listed
