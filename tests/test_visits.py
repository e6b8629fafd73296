"""`cclmpc verify`, `inspect` and `plan` of a corpus behind a web server, with a cache and without one."""

import json
import os
import shutil
import sys
import tempfile
import threading
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import stores
import toy
import yaml
from corpora import numbered, write
from fault_server import FAULTS, REQUESTS

from cclmpc_dist import cli
from cclmpc_dist.data import store
from cclmpc_dist.data.index import INDEX, MANIFEST, VAL, Index
from cclmpc_dist.data.verify import cases, inspect, verify

OTHERS = "its bytes are not those that were written (sha256), 3 times fetched: copy the corpus there again"


@pytest.fixture(scope="module")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> Index:
    """About two cases a shard."""
    return write(tmp_path_factory.mktemp("corpus") / "shards", numbered(24), shard_bytes=8000)


@pytest.fixture
def served(corpus: Index, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[tuple[Path, str]]:
    """A copy of the corpus, and its URL."""
    monkeypatch.setattr(store, "FIRST_WAIT", 0.001)
    (tmp_path / "served").mkdir()
    for file in Path(corpus.path).iterdir():
        os.link(file, tmp_path / "served" / file.name)
    with stores.fault_server(tmp_path / "served") as url:
        yield tmp_path / "served", url


@pytest.fixture
def temporary(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Where temporary folders go."""
    folder = tmp_path / "temporary"
    folder.mkdir()
    monkeypatch.setattr(tempfile, "tempdir", str(folder))
    return folder


@pytest.fixture
def said(alone: None, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> Callable[..., str]:
    """What `cclmpc` prints."""

    def run(*words: object) -> str:
        monkeypatch.setattr(sys, "argv", ["cclmpc", *map(str, words)])
        with pytest.raises(SystemExit):
            cli.main()
        shown = capsys.readouterr()
        return shown.out + shown.err

    return run


def names(index: Index) -> list[str]:
    return [shard["name"] for shard in index.manifest["shards"]]


def asked_for(folder: Path) -> list[str]:
    """The files of all requests until now."""
    return [line.split()[0] for line in (folder / REQUESTS).read_text().splitlines()]


def test_verify_holds_one_shard_at_a_time(served: tuple[Path, str], corpus: Index, temporary: Path) -> None:
    folder, url = served
    most, ended = 0, threading.Event()

    def watch() -> None:
        nonlocal most
        while not ended.wait(0.001):
            sizes = []
            for file in temporary.glob("*/*"):
                try:
                    sizes.append(file.stat().st_size)
                except FileNotFoundError:
                    continue
            most = max(most, sum(sizes))

    watcher = threading.Thread(target=watch)
    watcher.start()
    try:
        assert verify(url) == []
    finally:
        ended.set()
        watcher.join()
    size = max(shard["bytes"] for shard in corpus.manifest["shards"])
    assert 0 < most <= os.path.getsize(folder / INDEX) + 2 * size, "the one before goes when the next is reserved"
    assert sorted(asked_for(folder)) == sorted([MANIFEST, INDEX, *names(corpus)])
    assert not list(temporary.iterdir())


def test_every_shard_that_fails_is_a_line_that_names_it(served: tuple[Path, str], corpus: Index) -> None:
    folder, url = served
    missing, wrong, slow, failing, short = names(corpus)[:5]
    faults = {missing: ["404"], wrong: ["wrong"] * 3, slow: ["500", "cut", "slow"], failing: ["500"] * 8}
    (folder / FAULTS).write_text(json.dumps(faults))
    data = (folder / short).read_bytes()
    (folder / short).unlink()
    (folder / short).write_bytes(data[:-1000])
    assert verify(url) == [
        f"{url}/{missing}: 404 Not Found: copy it there, or look at the URL",
        f"{url}/{wrong}: {OTHERS}",
        f"{url}/{failing}: 500 Internal Server Error, 8 times in a row: see that the server runs and can be reached "
        "from here",
        f"{url}/{short}: {OTHERS}",
    ]


def test_a_manifest_that_the_samples_contradict_is_a_line_too(tmp_path: Path) -> None:
    index = write(tmp_path / "served", numbered(4))
    manifest = json.loads((index.path / MANIFEST).read_text())
    manifest["cropped_by_label"] = True
    (index.path / MANIFEST).write_text(json.dumps(manifest))
    with stores.fault_server(tmp_path / "served") as url:
        assert verify(url) == [
            f"{url}/{MANIFEST}: cropped_by_label = true, written as false: put false back, or shard again"
        ]


def test_a_cache_keeps_what_was_verified(served: tuple[Path, str], corpus: Index, tmp_path: Path) -> None:
    folder, url = served
    assert verify(url, cache=tmp_path / "cache", limit=1 << 30) == []
    before = len(asked_for(folder))
    index = stores.opened(url, tmp_path / "cache")
    assert stores.batches(index) == stores.batches(corpus)
    assert asked_for(folder)[before:] == [MANIFEST], "training finds the shards there"
    assert verify(url, cache=tmp_path / "cache", limit=1 << 30) == []
    assert asked_for(folder)[before:] == [MANIFEST] * 2


def test_inspect_tells_of_a_url_what_it_tells_of_the_folder(
    served: tuple[Path, str], corpus: Index, temporary: Path, tmp_path: Path, said: Callable[..., str]
) -> None:
    folder, url = served
    found = said("inspect", url, "--sheet", tmp_path / "cases.png")
    assert json.loads(found) == inspect(corpus)
    assert len(found.splitlines()) < 30, "an entry a line"
    assert (tmp_path / "cases.png").read_bytes().startswith(b"\x89PNG")
    assert max(map(asked_for(folder).count, names(corpus))) == 1
    assert not list(temporary.iterdir())
    before = len(asked_for(folder))
    lines = said("inspect", url, "--cases").splitlines()
    assert [json.loads(line) for line in lines] == list(cases(corpus))
    assert json.loads(lines[3])["key"] == "case-003"
    assert asked_for(folder)[before:] == [MANIFEST, INDEX]


def test_plan_tells_of_a_url_what_it_tells_of_the_folder(
    toy_corpus: Path, tmp_path: Path, said: Callable[..., str]
) -> None:
    plans = []
    with stores.fault_server(Path(shutil.copytree(toy_corpus, tmp_path / "served"))) as url:
        for place in (str(toy_corpus), url):
            (tmp_path / "c.yaml").write_text(
                yaml.safe_dump(toy.settings(place, tmp_path, data__cache=str(tmp_path / "cache")))
            )
            plans.append(said("plan", tmp_path / "c.yaml", "--ranks", "2"))
        noted = said("train", tmp_path / "c.yaml", "--dry-run")
    assert plans[1].replace(url, str(toy_corpus)) == plans[0]
    told = json.loads(plans[1])
    assert told["corpus"] == url
    index = Index.open(toy_corpus)
    pages = [-(-index.shard_path(shard).stat().st_size // 4096) for shard in set(index["shard"][index["split"] != VAL])]
    assert told["cache_mib"] == round(sum(pages) / 256, 1), "a shard that both streams read is held once"
    assert f"the blocks in use take up to {sum(pages) / 2**18:.2g} GiB over all ranks" in noted


@pytest.mark.parametrize("sheet", [".", "nowhere/cases.png"])
def test_a_sheet_that_cannot_be_written_is_told_first(sheet: str, tmp_path: Path, said: Callable[..., str]) -> None:
    told = said("inspect", tmp_path / "no corpus", "--sheet", tmp_path / sheet)
    assert told.startswith(f"cclmpc: --sheet {tmp_path / sheet}: cannot be written: ")


@pytest.mark.parametrize("verb", ["verify", "inspect"])
def test_what_is_no_corpus_is_told_in_one_line(verb: str, served: tuple[Path, str], said: Callable[..., str]) -> None:
    folder, url = served
    (folder / MANIFEST).unlink()
    assert said(verb, url) == f"cclmpc: {url}/{MANIFEST}: 404 Not Found: copy it there, or look at the URL\n"
    assert "is no URL that is known" in said(verb, "ftp://host/x")
    for place in ("http://me:s3cret@host/x", "https://host/x?sig=s3cret"):
        told = said(verb, place)
        assert "give credentials in the environment" in told
        assert "s3cret" not in told
