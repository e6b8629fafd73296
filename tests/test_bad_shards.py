"""What can be wrong with shards, as `cclmpc verify` says it: one line for each, exit code 2."""

import json
import re
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from corpora import numbered, patch, rehash, rewrite, told, write
from kinds import registering

from cclmpc_dist import cli
from cclmpc_dist.data.index import INDEX, MANIFEST, Index
from cclmpc_dist.errors import InputError

PAGE = Path(__file__).parents[1] / "docs/formats.md"
HEADER = 128  # bytes of a .npy before its voxels
Harm = Callable[[Index], None]
KINDS: dict[str, Harm] = {}
kind = registering(KINDS)


@pytest.fixture
def corpus(tmp_path: Path) -> Index:
    """Float32 cases over several shards; the first two are of one patient, the fourth has no label."""
    cases = numbered(6, kind="float32")
    cases[0].meta["patient"] = cases[1].meta["patient"] = "A"
    cases[3].label = None
    return write(tmp_path / "out", cases, shard_bytes=20_000)


def shards(index: Index, number: int, **entries: object) -> None:
    """Change entries of a shard in the manifest."""
    known = index.manifest["shards"]
    told(index, shards=[shard | (entries if at == number else {}) for at, shard in enumerate(known)])


def column(index: Index, name: str, row: int, value: object) -> None:
    values = index[name].copy()
    values[row] = value
    rewrite(index, **{name: values})


@kind("a folder that is no corpus")
def _(index):
    (index.path / MANIFEST).unlink()


@kind("another version")
def _(index):
    told(index, version=4)


@kind("a manifest that is no JSON")
def _(index):
    (index.path / MANIFEST).write_text("{")


@kind("a manifest with an entry of another kind")
def _(index):
    told(index, classes="two")


@kind("a manifest with a path for a name")
def _(index):
    shards(index, 0, name="../shard-000000.tar")


@kind("a manifest that the index contradicts")
def _(index):
    told(index, classes=5)


@kind("a manifest that miscounts a shard")
def _(index):
    shards(index, 1, samples=9)


@kind("a manifest that hides the crop by the label")
def _(index):
    told(index, cropped_by_label=True)


@kind("no index")
def _(index):
    (index.path / INDEX).unlink()


@kind("an index that is none")
def _(index):
    (index.path / INDEX).write_bytes(b"no index")


@kind("an index of another corpus, or damaged")
def _(index):
    other = write(index.path.parent / "other", numbered(3))
    (index.path / INDEX).write_bytes((other.path / INDEX).read_bytes())


@kind("an index that lacks a column")
def _(index):
    rewrite(index, scale=None)


@kind("a place outside the shard")
def _(index):
    column(index, "label_at", 1, 1 << 40)


@kind("a scale that cannot be")
def _(index):
    column(index, "scale", 1, 0.0)


@kind("a clip from above to below")
def _(index):
    rewrite(index, low=np.full((6, 1), 3, np.float32), high=np.full((6, 1), 2, np.float32))


@kind("a shard that is missing")
def _(index):
    index.shard_path(1).unlink()


@kind("a shard that is truncated")
def _(index):
    path = index.shard_path(1)
    path.write_bytes(path.read_bytes()[:-2000])


@kind("a byte that was changed")
def _(index):
    at = int(index["image_at"][1]) + 200
    patch(index.shard_path(0), at, bytes([index.shard_path(0).read_bytes()[at] ^ 1]))


@kind("a shard that is no tar")
def _(index):
    patch(index.shard_path(1), 0, b"X" * 512)
    rehash(index, 1)


@kind("a shard with a member more")
def _(index):
    column(index, "label_bytes", 0, 0)
    counts = index.manifest["counts"]
    told(index, counts=counts | {"with_label": counts["with_label"] - 1})


@kind("a sample in another place")
def _(index):
    column(index, "json_at", 3, index["json_at"][3] + 512)


@kind("an image of another shape")
def _(index):
    column(index, "shape", 3, index["shape"][3][[0, 2, 1, 3]])


@kind("an image that cannot be read")
def _(index):
    patch(index.shard_path(0), int(index["image_at"][0]), b"XXXX")
    rehash(index, 0)


@kind("a voxel that is no number")
def _(index):
    patch(index.shard_path(0), int(index["image_at"][1]) + HEADER, np.float32(np.nan).tobytes())
    rehash(index, 0)


@kind("a label that cannot be read")
def _(index):
    patch(index.shard_path(0), int(index["label_at"][0]), b"XXXX")
    rehash(index, 0)


@kind("a label beyond the classes")
def _(index):
    patch(index.shard_path(0), int(index["label_at"][0]) + HEADER, b"\x09")
    rehash(index, 0)


@kind("JSON that cannot be read")
def _(index):
    patch(index.shard_path(0), int(index["json_at"][0]), b"X")
    rehash(index, 0)


@kind("JSON that says otherwise")
def _(index):
    column(index, "low", 1, 3.0)


@kind("patients in both splits")
def _(index):
    column(index, "split", 1, 1)
    told(index, counts=index.manifest["counts"] | {"val": 1})


@kind("an image in both splits")
def _(index):
    cases = numbered(4, kind="float32")
    cases[3].image, cases[3].label = cases[0].image, cases[0].label
    for file in index.path.iterdir():
        file.unlink()
    write(index.path, cases, val_last=1)


def said(corpus: Index, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]) -> list[str]:
    """What `cclmpc verify` says, without the folder."""
    monkeypatch.setattr(sys, "argv", ["cclmpc", "verify", str(corpus.path)])
    with pytest.raises(SystemExit) as caught:
        cli.main()
    lines = capfd.readouterr().err.splitlines()
    assert caught.value.code == 2, lines
    return [line.removeprefix("cclmpc: ").replace(f"{corpus.path.parent}/", "") for line in lines]


@pytest.mark.parametrize("name", KINDS)
def test_one_line_names_shard_and_case(
    name: str, corpus: Index, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    KINDS[name](corpus)
    (line,) = said(corpus, monkeypatch, capfd)
    assert re.fullmatch(re.escape(rows()[name]).replace(r"\.\.\.", ".*"), line), line


def rows() -> dict[str, str]:
    """docs/formats.md: the line of each kind; ... stands for anything."""
    table = PAGE.read_text().partition("## What `cclmpc verify` finds")[2].partition("\n## ")[0]
    return dict(re.findall(r"^\| (?!damage|---)([^|]+?) \| (.+) \|$", table, re.MULTILINE))


def test_the_page_lists_every_kind() -> None:
    """In the order of this file."""
    assert list(rows()) == list(KINDS)


def test_every_problem_is_a_line(corpus: Index, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture) -> None:
    for name in ("a shard that is no tar", "a voxel that is no number", "JSON that cannot be read"):
        KINDS[name](corpus)
    assert sorted(said(corpus, monkeypatch, capfd)) == sorted(
        rows()[name] for name in ("a shard that is no tar", "a voxel that is no number", "JSON that cannot be read")
    )
    assert json.loads((corpus.path / MANIFEST).read_text())["counts"]["samples"] == 6


@pytest.mark.parametrize("name", ["shard", "voxel_at", "key_bytes"])
def test_a_column_that_is_one_number_is_refused(name, tmp_path):
    index = write(tmp_path / "out", numbered(4))
    rewrite(index, **{name: index[name].reshape(-1)[:1].reshape(())})
    with pytest.raises(InputError, match=f"column {name} is missing or of another type"):
        Index.open(index.path)
