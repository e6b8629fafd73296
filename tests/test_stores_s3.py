"""What an S3 server can do wrong: moto's, behind a server that makes the faults. Batches are those of the folder."""

import json
import os
import re
import urllib.request
from collections.abc import Iterator
from pathlib import Path

import pytest
import stores
from corpora import numbered, write
from fault_server import FAULTS, REQUESTS

from cclmpc_dist.data import store
from cclmpc_dist.data.index import INDEX, MANIFEST, Index
from cclmpc_dist.data.verify import inspect, verify
from cclmpc_dist.errors import InputError

pytestmark = pytest.mark.cluster
EPOCHS = 2
PART = 3000  # bytes a request: a shard takes two or three


@pytest.fixture(scope="module")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> Index:
    """About two cases a shard."""
    return write(tmp_path_factory.mktemp("corpus") / "shards", numbered(12), shard_bytes=8000)


@pytest.fixture(scope="module")
def expected(corpus: Index) -> list[str]:
    return stores.batches(corpus, EPOCHS)


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[Path, str]]:
    """Folder of the faults, and HOST:PORT of the S3 server behind them, with credentials in the environment."""
    s3fs = pytest.importorskip("s3fs", reason="needs the extra `remote`")
    pytest.importorskip("moto", reason="needs the extra `s3-test`")
    folder = tmp_path_factory.mktemp("s3")
    with (
        stores.moto(folder / "log") as host,
        stores.fault_server(folder, upstream=host) as front,
        pytest.MonkeyPatch.context() as patch,
    ):
        for name, value in (stores.SECRET | {"AWS_ENDPOINT_URL": front}).items():
            patch.setenv(name, value)
        s3fs.S3FileSystem.clear_instance_cache()
        yield folder, host
        s3fs.S3FileSystem.clear_instance_cache()


@pytest.fixture(scope="module")
def url(server: tuple[Path, str], corpus: Index) -> str:
    return stores.uploaded(Path(corpus.path), f"http://{server[1]}")


@pytest.fixture(autouse=True)
def quickly(server: tuple[Path, str], monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setattr(store, "FIRST_WAIT", 0.01)
    monkeypatch.setattr(store, "S3_PART", PART)
    yield
    (server[0] / FAULTS).write_text("{}")
    (server[0] / REQUESTS).write_text("")


def names(index: Index) -> list[str]:
    return [shard["name"] for shard in index.manifest["shards"]]


def seen(folder: Path) -> list[list[str]]:
    """Requests: name, first byte, fault."""
    return [line.split() for line in (folder / REQUESTS).read_text().splitlines()]


@pytest.mark.parametrize("fault", ["500", "503", "cut", "slow", "wrong"])
def test_a_fault_that_passes_changes_nothing(
    server: tuple[Path, str], url: str, corpus: Index, expected: list[str], tmp_path: Path, fault: str
) -> None:
    folder = server[0]
    harmed = names(corpus)[:3] if fault in ("slow", "wrong") else [*names(corpus), MANIFEST, INDEX]
    (folder / FAULTS).write_text(json.dumps({name: [fault] * 2 for name in harmed}))
    assert stores.batches(stores.opened(url, tmp_path / "cache"), EPOCHS) == expected
    requests = seen(folder)
    assert {name for name, _, word in requests if word.startswith(fault)} == set(harmed)
    if fault == "500":
        starts = [int(start) for name, start, _ in requests if name == names(corpus)[0]]
        assert starts[:3] == [0, 0, 0], "asked for again"
        assert starts[3:] == list(range(PART, corpus.manifest["shards"][0]["bytes"], PART)), "part after part"


@pytest.mark.parametrize(
    ("faults", "words"),
    [
        (["500"] * 8, r".*8 times in a row: see that the server runs and can be reached from here"),
        (["cut"] * 8, r".*8 times in a row: see that the server runs and can be reached from here"),
        (["404"], r"not there: copy it there, or look at the URL"),
        (["wrong"] * 30, r"its bytes are not those that were written \(sha256\), 3 times fetched: copy the corpus.*"),
    ],
)
def test_a_fault_that_lasts_is_told_in_one_line_or_passed_over(
    server: tuple[Path, str], url: str, corpus: Index, tmp_path: Path, faults: list[str], words: str
) -> None:
    index, name = stores.opened(url, tmp_path / "cache"), names(corpus)[1]
    (server[0] / FAULTS).write_text(json.dumps({name: faults}))
    with pytest.raises(InputError) as error:
        stores.batches(index)
    assert re.fullmatch(f"{url}/{name}: {words}, or set data.on_error=skip", str(error.value)), error.value
    data = stores.stream(index, on_error="skip")
    assert sum(batch["skipped"] for batch in stores.loader(data, 0, data.steps, workers=0))


def test_a_shard_that_was_deleted(server: tuple[Path, str], url: str, corpus: Index, tmp_path: Path) -> None:
    """NoSuchKey as the server says it."""
    import fsspec

    files, name = fsspec.filesystem("s3", endpoint_url=f"http://{server[1]}"), names(corpus)[2]
    index = stores.opened(url, tmp_path / "cache")
    files.rm(f"{url}/{name}")
    try:
        with pytest.raises(InputError, match=rf"^{url}/{name}: not there: copy it there, or look at the URL"):
            stores.batches(index)
        assert verify(url) == [f"{url}/{name}: not there: copy it there, or look at the URL"]
    finally:
        files.put(str(Path(corpus.path, name)), f"{url}/{name}")


def allowed(host: str, requests: float) -> None:
    """After so many the server wants credentials that it knows, and it knows none."""
    text = {"Content-Type": "text/plain"}
    call = urllib.request.Request(f"http://{host}/moto-api/reset-auth", str(requests).encode(), text)
    urllib.request.urlopen(call).close()


def test_wrong_credentials_are_told_without_them(
    server: tuple[Path, str], url: str, corpus: Index, tmp_path: Path
) -> None:
    index = stores.opened(url, tmp_path / "cache")
    allowed(server[1], 0)
    try:
        with pytest.raises(InputError) as of_a_shard:
            stores.batches(index)
        with pytest.raises(InputError) as of_all:
            stores.opened(url, tmp_path / "other")
        (verified,) = verify(url)
    finally:
        allowed(server[1], float("inf"))
    assert str(of_a_shard.value).startswith(f"{url}/shard-")
    for said in (str(of_a_shard.value), str(of_all.value), verified):
        assert ": set AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY in the environment" in said
        assert "\n" not in said
        for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY"):
            assert os.environ[name] not in said
    assert str(of_all.value) == verified
    assert verified.startswith(f"{url}/{MANIFEST}: ")


def test_a_bucket_is_verified_and_inspected(server: tuple[Path, str], url: str, corpus: Index, tmp_path: Path) -> None:
    (server[0] / FAULTS).write_text(json.dumps({names(corpus)[0]: ["wrong"] * 30, names(corpus)[1]: ["cut", "503"]}))
    (problem,) = verify(url)
    assert problem.startswith(f"{url}/{names(corpus)[0]}: its bytes are not those that were written (sha256)")
    (server[0] / FAULTS).write_text("{}")
    assert verify(url) == []
    assert inspect(stores.opened(url, tmp_path / "cache")) == inspect(corpus)
