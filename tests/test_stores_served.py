"""Corpora behind real servers, nginx and an S3 of moto's, read by two ranks that share a cache a fifth as large."""

import os
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
import stores
import toy
import yaml
from corpora import numbered, write

from cclmpc_dist.benching.served import free_port, nginx
from cclmpc_dist.data.index import Index
from cclmpc_dist.errors import InputError

pytestmark = pytest.mark.cluster
EPOCHS = 2


def corpus(folder: Path, cases: int, edge: int, shard_bytes: int) -> Index:
    return write(folder, numbered(cases, (edge, edge, edge)), shard_bytes=shard_bytes)


def sizes(index: Index) -> list[int]:
    return [shard["bytes"] for shard in index.manifest["shards"]]


def watched(readers: list[subprocess.Popen[str]], cache: Path, every: float = 0.05) -> list[int]:
    """The cache's bytes while the readers run."""
    held = []
    while any(process.poll() is None for process in readers):
        if (cache / "lock").exists():
            held.append(stores.held(cache))
        time.sleep(every)
    return held


def read_by_two(url: str, cache: Path, limit: int) -> tuple[list[list[str]], list[int]]:
    """Each rank's lines, and the cache's bytes over time."""
    readers = [stores.reader(url, cache, limit, rank, 2, EPOCHS) for rank in range(2)]
    held = watched(readers, cache)
    told = []
    for process in readers:
        said, errors = process.communicate()
        assert process.returncode == 0, errors
        told.append(said.splitlines())
    return told, held


def check(index: Index, url: str, cache: Path) -> None:
    """Every batch is the folder's, the cache keeps its bound, private memory stays as it was."""
    limit = sum(sizes(index)) // 5
    told, held = read_by_two(url, cache, limit)
    memory = []
    for rank, lines in enumerate(told):
        assert [line.split()[0] for line in lines] == stores.batches(index, EPOCHS, rank, 2)
        memory += [[int(line.split()[1]) for line in lines[len(lines) // 4 :]]]
        assert max(memory[rank]) - memory[rank][0] <= 32, "MiB"
    blocks = stores.BATCH * stores.BLOCK * max(sizes(index))
    print(f"{sum(sizes(index)) >> 20} MiB, limit {limit >> 20} MiB, blocks in use {blocks >> 20} MiB, most on disk "
          f"{max(held) >> 20} MiB of {len(held)} looks; private memory from a quarter of the steps on "
          f"{[(min(rank), max(rank)) for rank in memory]} MiB")  # fmt: skip
    assert max(held) <= limit + blocks < sum(sizes(index))


def test_two_ranks_behind_nginx(tmp_path: Path) -> None:
    """About 500 MB in 120 shards."""
    if shutil.which("nginx") is None:
        pytest.skip("nginx is not installed: tests/nginx_install.sh")
    index = corpus(tmp_path / "shards", 240, 100, 4_300_000)
    (tmp_path / "nginx").mkdir()
    with nginx(tmp_path / "shards", tmp_path / "nginx") as url:
        check(index, url, tmp_path / "cache")


def test_a_run_and_its_evaluation_are_those_of_the_folder(
    toy_corpus: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """On two ranks, bit for bit; and a key in the environment is in no file and no message."""
    monkeypatch.setenv("CCLMPC_HTTP_AUTHORIZATION", "Bearer s3cret")
    configuration, said = tmp_path / "c.yaml", ""
    shutil.copytree(toy_corpus, tmp_path / "served")
    with stores.fault_server(tmp_path / "served") as url:
        for place in (str(toy_corpus), url):
            runs = tmp_path / str(len(said))
            raw = toy.settings(place, runs, method="supervised", budget__images=60, data__cache=str(tmp_path / "cache"))
            configuration.write_text(yaml.safe_dump(raw))
            said += toy.run(2, "train", str(configuration)) + toy.run(1, "eval", str(runs / "toy"))
    folder, remote = (runs / "toy" for runs in sorted(tmp_path.glob("[0-9]*"), key=lambda runs: int(runs.name)))
    last = sorted(folder.glob("checkpoints/step-*"))[-1].name
    toy.assert_same(toy.tensors(folder / "checkpoints" / last), toy.tensors(remote / "checkpoints" / last))
    assert (folder / "eval/cases.csv").read_text() == (remote / "eval/cases.csv").read_text()
    assert "the blocks in use take up to" in said
    assert "s3cret" not in said
    assert not [file for file in remote.rglob("*") if file.is_file() and b"s3cret" in file.read_bytes()]


@pytest.fixture
def s3(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """A server of the S3 protocol, with the credentials in the environment."""
    pytest.importorskip("s3fs", reason="needs the extra `remote`")
    pytest.importorskip("moto", reason="needs the extra `s3-test`")
    with stores.moto(tmp_path / "moto.log") as host:
        for name, value in (stores.SECRET | {"AWS_ENDPOINT_URL": f"http://{host}"}).items():
            monkeypatch.setenv(name, value)
        yield


def test_two_ranks_read_from_s3(s3: None, tmp_path: Path) -> None:
    index = corpus(tmp_path / "shards", 60, 40, 270_000)
    check(index, stores.uploaded(tmp_path / "shards"), tmp_path / "cache")


def test_an_s3_that_fails_is_told_without_credentials(
    s3: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    corpus(tmp_path / "shards", 2, 8, 40_000)
    url = stores.uploaded(tmp_path / "shards")
    words = f"^{url}/elsewhere/manifest.json: not there: copy it there, or look at the URL$"
    with pytest.raises(InputError, match=words):
        stores.opened(f"{url}/elsewhere", tmp_path / "cache")
    script = ("import sys, stores\nfrom cclmpc_dist.data import store\nfrom pathlib import Path\n"
              "store.FIRST_WAIT = 0.01\nstores.opened(sys.argv[1], Path(sys.argv[2]))")  # fmt: skip
    nowhere = {"AWS_ENDPOINT_URL": f"http://127.0.0.1:{free_port()}", "PYTHONPATH": os.pathsep.join(sys.path)}
    words = [sys.executable, "-c", script, url, tmp_path / "other"]
    done = subprocess.run(words, capture_output=True, text=True, check=False, env=os.environ | nowhere)
    assert "8 times in a row: see that the server runs and can be reached from here" in done.stderr
    for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY"):
        assert stores.SECRET[name] not in done.stdout + done.stderr
