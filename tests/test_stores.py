"""A corpus behind a web server: the batches are those of the folder, whatever happens on the way."""

import gc
import json
import os
import signal
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import stores
import toy
from corpora import numbered, write
from disks import tmpfs
from fault_server import FAULTS, REQUESTS

from cclmpc_dist.benching.served import free_port
from cclmpc_dist.data import store
from cclmpc_dist.data.index import INDEX, MANIFEST, Index
from cclmpc_dist.errors import InputError
from cclmpc_dist.training import preemption

COUNT = 24
EPOCHS = 2


@pytest.fixture(scope="module")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> Index:
    """About two cases a shard."""
    return write(tmp_path_factory.mktemp("corpus") / "shards", numbered(COUNT), shard_bytes=8000)


@pytest.fixture(scope="module")
def expected(corpus: Index) -> list[str]:
    return stores.batches(corpus, EPOCHS)


@pytest.fixture(autouse=True)
def quickly(monkeypatch: pytest.MonkeyPatch) -> None:
    """The waits between tries, a tenth as long."""
    monkeypatch.setattr(store, "FIRST_WAIT", 0.05)


@pytest.fixture
def served(corpus: Index, tmp_path: Path) -> Iterator[tuple[Path, str]]:
    """A copy of the corpus, and its URL."""
    folder = tmp_path / "served"
    folder.mkdir()
    for file in Path(corpus.path).iterdir():
        os.link(file, folder / file.name)
    with stores.fault_server(folder) as url:
        yield folder, url


def shards(index: Index) -> list[str]:
    return [shard["name"] for shard in index.manifest["shards"]]


def fetched(folder: Path) -> list[list[str]]:
    """Requests: name, first byte, fault."""
    return [line.split() for line in (folder / REQUESTS).read_text().splitlines()]


def largest(index: Index) -> int:
    return max(shard["bytes"] for shard in index.manifest["shards"])


def blocks_in_use(index: Index) -> int:
    return stores.BATCH * stores.BLOCK * largest(index)


def test_a_served_corpus_gives_the_batches_of_the_folder(served, corpus, expected, tmp_path):
    folder, url = served
    assert stores.batches(stores.opened(url, tmp_path / "cache")) == expected
    names = [name for name, _, _ in fetched(folder)]
    assert sorted(names) == sorted([MANIFEST, INDEX, *shards(corpus)]), "with room for all, each is fetched once"
    assert stores.batches(stores.opened(f"{url}/", tmp_path / "cache"), EPOCHS) == expected
    assert [name for name, _, _ in fetched(folder)][len(names) :] == [MANIFEST], "a later run finds all but that there"


@pytest.mark.parametrize(("room", "workers"), [(5, 0), (0, 0), pytest.param(5, 2, marks=pytest.mark.slow)])
def test_a_small_cache_gives_the_same_batches_within_its_bound(served, corpus, expected, tmp_path, room, workers):
    """room: shards in the limit; 0 has none for more than the index."""
    _, url = served
    limit = os.path.getsize(Path(corpus.path) / INDEX) + room * largest(corpus)
    cache, held, found = tmp_path / "cache", [], []
    data = stores.stream(stores.opened(url, cache, limit))
    for batch in stores.loader(data, 0, EPOCHS * data.steps, workers=workers):
        found.append(stores.digest(batch))
        held.append(stores.held(cache))
    assert found == expected
    ahead = 1 if workers else 0  # a lane's next block, which a worker may have entered
    assert max(held) <= limit + (1 + ahead) * blocks_in_use(corpus)
    assert limit + blocks_in_use(corpus) < sum(shard["bytes"] for shard in corpus.manifest["shards"])
    names = [name for name, _, _ in fetched(served[0])]
    assert max(map(names.count, shards(corpus))) > 1, "some had to go"


def test_this_block_and_the_next_of_each_lane_are_fetched_ahead(served, corpus, tmp_path):
    folder, url = served
    data = stores.stream(stores.opened(url, tmp_path / "cache"))
    batches = stores.loader(data, 0, data.steps, workers=0)
    next(batches)
    wanted = set()
    for lane in range(stores.BATCH):
        now, step = data.parts[0].order.stay(0, lane)
        rows = [*now, *(data.parts[0].order.stay(step, lane)[0] if step < data.steps else [])]
        wanted |= {shards(corpus)[shard] for shard in corpus["shard"][rows]}
    deadline = time.monotonic() + 30
    while (names := {name for name, _, _ in fetched(folder)} - {MANIFEST, INDEX}) < wanted:
        assert time.monotonic() < deadline, wanted - names
        time.sleep(0.01)
    batches.close()
    assert names == wanted != set(shards(corpus))


@pytest.mark.parametrize("fault", ["500", "cut", "slow", "wrong", "whole"])
def test_a_fault_that_passes_changes_nothing(served, corpus, expected, tmp_path, fault):
    folder, url = served
    faults = {"cut": ["cut", "cut"], "whole": ["cut", "whole"]}.get(fault, [fault])
    names = shards(corpus)[:4] if fault in ("slow", "wrong") else [*shards(corpus), MANIFEST, INDEX]
    (folder / FAULTS).write_text(json.dumps(dict.fromkeys(names, faults)))
    assert stores.batches(stores.opened(url, tmp_path / "cache"), EPOCHS) == expected
    seen = fetched(folder)
    assert {name for name, _, word in seen if word == fault} == set(names)
    size = corpus.manifest["shards"][0]["bytes"]
    starts = [int(start) for name, start, _ in seen if name == shards(corpus)[0]]
    if fault == "cut":
        assert starts == [0, size // 2, size // 2 + (size - size // 2) // 2], "a broken body is resumed"
    if fault == "whole":
        assert starts == [0, size // 2]


LASTING = {
    "500": "500 Internal Server Error, 8 times in a row: see that the server runs and can be reached from here",
    "404": "404 Not Found: copy it there, or look at the URL",
    "wrong": "its bytes are not those that were written (sha256), 3 times fetched: copy the corpus there again",
}


@pytest.mark.parametrize("fault", LASTING)
def test_a_fault_that_lasts_is_told_in_one_line_or_passed_over(served, corpus, tmp_path, monkeypatch, fault):
    folder, url = served
    monkeypatch.setattr(store, "FIRST_WAIT", 0.001)
    index, shard = stores.opened(url, tmp_path / "cache"), 1
    name, rows = shards(corpus)[shard], (corpus["shard"] == shard).nonzero()[0]
    (folder / FAULTS).write_text(json.dumps({name: [fault] * 100}))
    with pytest.raises(InputError) as error:
        stores.batches(index)
    assert str(error.value) == f"{url}/{name}: {LASTING[fault]}, or set data.on_error=skip"
    before = len(fetched(folder))
    data = stores.stream(index, on_error="skip")
    skipped = sum(batch["skipped"] for batch in stores.loader(data, 0, data.steps, workers=0))
    assert skipped >= len(rows)
    assert name not in [name for name, _, _ in fetched(folder)[before:]], "it is not asked for again and again"


def test_who_waits_for_a_fetch_that_fails_does_not_try_again(served, corpus, tmp_path, monkeypatch):
    folder, url = served
    monkeypatch.setattr(store, "FIRST_WAIT", 0.01)
    index, name = stores.opened(url, tmp_path / "cache"), shards(corpus)[0]
    (folder / FAULTS).write_text(json.dumps({name: ["500"] * 100}))
    with ThreadPoolExecutor(2) as pool:
        tries = [pool.submit(index.open_shard, 0) for _ in range(2)]
        assert [str(task.exception()) for task in tries] == [f"{url}/{name}: {LASTING['500']}"] * 2
    assert [asked for asked, _, _ in fetched(folder)].count(name) == store.TRIES


def hanging(folder: Path, url: str, corpus: Index, cache: Path, workers: int) -> Iterator[dict]:
    """A loader behind a server that answers for the shards of its first batch alone."""
    data = stores.stream(stores.opened(url, cache))
    (part,) = data.parts
    first = {int(corpus["shard"][part.order.lane(0, 0, lane)[0]]) for lane in range(stores.BATCH)}
    hung = [name for shard, name in enumerate(shards(corpus)) if shard not in first]
    (folder / FAULTS).write_text(json.dumps(dict.fromkeys(hung, ["hung"] * 100)))
    return stores.loader(data, 0, 10 * data.steps, workers=workers)


def await_hung(folder: Path) -> None:
    deadline = time.monotonic() + 30
    while "hung" not in [word for _, _, word in fetched(folder)]:
        assert time.monotonic() < deadline
        time.sleep(0.01)
    time.sleep(0.2)


@pytest.mark.parametrize("workers", [0, 2])
def test_a_signal_ends_the_wait_for_a_server_that_hangs(served, corpus, tmp_path, monkeypatch, workers):
    folder, url = served
    batches = hanging(folder, url, corpus, tmp_path / "cache", workers)
    monkeypatch.setattr(preemption, "_received", [])
    before = signal.getsignal(signal.SIGTERM), signal.getsignal(signal.SIGINT)
    preemption.listen()
    sender = threading.Thread(target=lambda: (await_hung(folder), os.kill(os.getpid(), signal.SIGTERM)))
    try:
        next(batches)
        sender.start()
        with pytest.raises(preemption.Preempted), preemption.interrupting():
            list(batches)
    finally:
        sender.join()
        signal.signal(signal.SIGTERM, before[0])
        signal.signal(signal.SIGINT, before[1])
    assert preemption.signalled()
    with pytest.raises(preemption.Preempted), preemption.interrupting():
        pytest.fail("the signal came before")


def test_a_loader_closes_while_a_server_hangs(served, corpus, tmp_path):
    folder, url = served
    batches = hanging(folder, url, corpus, tmp_path / "cache", 2)
    next(batches)
    await_hung(folder)
    closing = threading.Thread(target=batches.close)
    closing.start()
    closing.join(store.TIMEOUT / 2)
    assert not closing.is_alive()


def gone(url: str, folder: Path, cache: Path, seconds: float) -> list[str]:
    """The batches of a reader whose server dies after the third and comes back."""
    port = int(url.rpartition(":")[2])
    with stores.fault_server(folder, port):
        data = stores.stream(stores.opened(url, cache, 1))
        batches = stores.loader(data, 0, EPOCHS * data.steps, workers=0)
        found = [stores.digest(next(batches)) for _ in range(3)]
    killed = time.monotonic()
    with stores.fault_server(folder, port, after=seconds):
        found += [stores.digest(batch) for batch in batches]
    assert time.monotonic() - killed > seconds, "the reader had to wait"
    return found


@pytest.mark.parametrize("seconds", [0.6, pytest.param(20, marks=pytest.mark.slow)])
def test_a_server_that_is_gone_for_a_while_is_waited_for(corpus, expected, tmp_path, monkeypatch, seconds):
    monkeypatch.setattr(store, "FIRST_WAIT", 0.5 * seconds / 20)
    folder = tmp_path / "served"
    folder.mkdir()
    for file in Path(corpus.path).iterdir():
        os.link(file, folder / file.name)
    url = f"http://127.0.0.1:{free_port()}"
    assert gone(url, folder, tmp_path / "cache", seconds) == expected


def test_files_of_the_cache_that_were_changed_are_fetched_again(served, corpus, expected, tmp_path):
    folder, url = served
    index = stores.opened(url, tmp_path / "cache")
    assert stores.batches(index, EPOCHS) == expected
    harmed = [tmp_path / "cache" / shard["sha256"] for shard in corpus.manifest["shards"][:4]]
    for number, file in enumerate(harmed):
        file.chmod(0o644)
        with file.open("r+b") as data:
            data.truncate(1000) if number % 2 else data.write(b"X")
    before = len(fetched(folder))
    del index
    gc.collect()
    assert stores.batches(stores.opened(url, tmp_path / "cache"), EPOCHS) == expected
    again = [name for name, _, _ in fetched(folder)[before:]]
    assert sorted(again) == sorted([MANIFEST, *shards(corpus)[:4]])


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A disk with room for the blocks in use and little more."""
    with tmpfs(tmp_path / "disk", "size=128k") as folder:
        yield folder


def test_a_full_disk_makes_the_cache_smaller(served, corpus, expected, small_disk):
    _, url = served
    disk = os.statvfs(small_disk)
    assert disk.f_blocks * disk.f_frsize < sum(shard["bytes"] for shard in corpus.manifest["shards"])
    assert stores.batches(stores.opened(url, small_disk / "cache"), EPOCHS) == expected


def test_a_disk_that_others_fill_is_told_in_one_line(served, corpus, small_disk):
    _, url = served
    index = stores.opened(url, small_disk / "cache")
    free = os.statvfs(small_disk)
    (small_disk / "others").write_bytes(b"0" * free.f_bavail * free.f_frsize)
    with pytest.raises(InputError, match=rf"^{small_disk}/cache: the disk is full: {url}/shard-.*: make room, or"):
        stores.batches(index)


def test_what_is_in_use_stays(served, corpus, tmp_path):
    """A limit of a byte, and another job that needs all of the room."""
    _, url = served
    cache = tmp_path / "cache"
    mine, other = (stores.opened(url, cache, 1) for _ in range(2))
    with mine.open_shard(0) as file:
        path, data = cache / corpus.manifest["shards"][0]["sha256"], file.read()
        for shard in range(1, len(shards(corpus))):
            other.open_shard(shard).close()
        assert path.read_bytes() == data
        assert len(list(cache.iterdir())) == 4, "the lock, the index, this one, and the last of the other"
    other.open_shard(1).close()
    assert not path.exists()


def test_what_is_not_needed_now_is_not_held_beyond_the_limit(served, corpus, tmp_path):
    _, url = served
    index = stores.opened(url, tmp_path / "cache", 1)
    index.open_shard(0).close()
    assert (tmp_path / "cache" / corpus.manifest["shards"][0]["sha256"]).exists()
    assert index.fetch(0, now=False) is None, "there, and not fetched, but for another to remove"
    assert index.fetch(1, now=False) is None


def test_the_least_recently_opened_goes_first(served, corpus, tmp_path):
    _, url = served
    index = stores.opened(url, tmp_path / "cache", os.path.getsize(Path(corpus.path) / INDEX) + 3 * largest(corpus))
    for shard in (0, 1, 2, 0, 3):
        index.open_shard(shard).close()
    there = [(tmp_path / "cache" / shard["sha256"]).exists() for shard in corpus.manifest["shards"][:4]]
    assert there == [True, False, True, True]


@pytest.mark.slow
def test_a_killed_reader_leaves_what_the_next_goes_on_from(served, corpus, expected, tmp_path):
    """SIGKILL while files are fetched: the body of the first shard is cut again and again, so that it is under way."""
    folder, url = served
    (folder / FAULTS).write_text(json.dumps({name: ["cut", *["slow"] * 9] for name in shards(corpus)}))
    with stores.reader(url, tmp_path / "cache", 1 << 30) as process:
        while not list((tmp_path / "cache").glob("*.part")):
            assert process.poll() is None, process.stderr.read()
            time.sleep(0.01)
        time.sleep(0.2)
        process.send_signal(signal.SIGKILL)
    parts = [part for part in (tmp_path / "cache").glob("*.part") if part.stat().st_size]
    assert parts
    (folder / FAULTS).unlink()
    before = len(fetched(folder))
    assert stores.batches(stores.opened(url, tmp_path / "cache"), EPOCHS) == expected
    assert sum(int(start) > 0 for _, start, _ in fetched(folder)[before:]) == len(parts)
    assert not list((tmp_path / "cache").glob("*.part"))


@pytest.mark.slow
def test_jobs_share_a_cache(served, corpus, expected, tmp_path):
    """Two with room for all fetch each file once; then two with room for little, whose files the other may take."""
    folder, url = served
    for limit in (1 << 30, 4 * largest(corpus)):
        cache = tmp_path / str(limit)
        readers = [stores.reader(url, cache, limit) for _ in range(2)]
        for process in readers:
            said, errors = process.communicate(timeout=120)
            assert [line.split()[0] for line in said.splitlines()] == expected, errors
        if limit == 1 << 30:
            names = [name for name, _, _ in fetched(folder)]
            assert sorted(names) == sorted([MANIFEST, MANIFEST, INDEX, *shards(corpus)])
        assert not list(cache.glob("*.part"))


def test_an_index_that_is_not_the_manifests_is_refused(served, corpus, tmp_path):
    folder, url = served
    data = bytearray((folder / INDEX).read_bytes())
    data[-1] ^= 1
    (folder / INDEX).unlink()
    (folder / INDEX).write_bytes(data)
    with pytest.raises(InputError, match=rf"^{url}/{INDEX}: its bytes are not those that were written"):
        stores.opened(url, tmp_path / "cache")
    (folder / MANIFEST).unlink()
    with pytest.raises(InputError, match=rf"^{url}/nothing/{MANIFEST}: 404 Not Found"):
        stores.opened(f"{url}/nothing", tmp_path / "cache")


def test_a_manifest_cannot_name_files_outside_the_cache(served, tmp_path):
    folder, url = served
    text = (folder / MANIFEST).read_text()
    manifest = json.loads(text)
    (folder / MANIFEST).unlink()
    manifest["shards"][0]["sha256"] = "../../etc/passwd"
    (folder / MANIFEST).write_text(json.dumps(manifest))
    with pytest.raises(InputError, match=r"manifest\.json: edited or damaged"):
        stores.opened(url, tmp_path / "cache")


def test_credentials_come_from_the_environment_and_are_not_told(served, tmp_path, monkeypatch):
    folder, url = served
    monkeypatch.setenv(store.AUTHORIZATION, "Bearer s3cret")
    (folder / FAULTS).write_text(json.dumps({MANIFEST: ["moved"]}))
    stores.opened(url, tmp_path / "cache")
    words = [word for _, _, word in fetched(folder)]
    assert words == ["moved+key", "ok", "ok+key"], "the manifest, where it was moved to, the index"
    assert "s3cret" not in store._cause(OSError("denied: Bearer s3cret"))
    for place in ("http://me:s3cret@host/x", "https://host/x?sig=s3cret", "s3://key:s3cret@bucket/x"):
        with pytest.raises(InputError) as error:
            toy.config(place, tmp_path, data__cache="c")
        assert "give credentials in the environment" in str(error.value)
        assert "s3cret" not in str(error.value)
    with pytest.raises(InputError, match=r"data\.cache is not set"):
        toy.config(url, tmp_path)
    with pytest.raises(InputError, match=r"data\.path is no URL that is known"):
        toy.config("ftp://host/x", tmp_path, data__cache="c")
