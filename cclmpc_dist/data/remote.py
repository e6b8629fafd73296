"""Corpora that lie on a web server or in an object store: a manifest is read, index and shards are cached."""

import threading
import weakref
from collections.abc import Callable, Iterator
from concurrent.futures import Future, wait
from contextlib import contextmanager, nullcontext
from functools import partial
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, BinaryIO

from cclmpc_dist.config import Data, url_problems
from cclmpc_dist.data import store
from cclmpc_dist.data.cache import Blob, Cache
from cclmpc_dist.data.index import INDEX, MANIFEST, Index, parsed
from cclmpc_dist.data.store import Stopped, Url
from cclmpc_dist.errors import InputError, refuse

LARGEST_MANIFEST = 1 << 30  # bytes [F]
GIB = 1 << 30
POLL = 0.1  # seconds between looks at whether anybody still waits
NOW = "what is needed now is there or an error"


def open_corpus(data: Data) -> Index:
    """The index of `data.path`, a folder or a URL. Raises InputError."""
    return open_corpora(data.model_copy(update={"further": {}}))[0]


def open_corpora(data: Data) -> list[Index]:
    """The index of `data.path`, then those of `data.further` by name; what is remote shares a cache. Raises
    InputError."""
    cache = Cache(str(data.cache), int(data.cache_gib * GIB)) if data.remote else None
    return [_checked(path, cache) for path in data.paths.values()]


def _checked(path: str, cache: Cache | None) -> Index:
    if "://" not in path:
        return Index.open(path)
    assert cache is not None, "a URL has a cache"
    index = _opened(Url(path), cache)
    refuse(index.path, index.problems())
    return index


@contextmanager
def visited(path: str, cache: Path | None, limit: int, check: bool) -> Iterator[Index]:
    """The index of a folder or a URL for a look at it. Raises InputError, with `check` for problems of the index too.

    Files of a URL come through `cache`, or a temporary folder, of `limit` bytes besides what is in use.
    """
    if "://" not in path:
        yield Index.open(path, check)
        return
    problems = url_problems(path)
    if problems:
        raise InputError(f"the URL {problems[0]}")
    with nullcontext(cache) if cache else TemporaryDirectory(prefix="cclmpc-") as folder:
        index = _opened(Url(path), Cache(folder, limit))
        if check:
            refuse(index.path, index.problems())
        yield index


def _opened(url: Url, cache: Cache) -> "RemoteIndex":
    source = store.source(url)
    manifest = parsed(store.whole(source, url, MANIFEST, LARGEST_MANIFEST), url / MANIFEST)
    return RemoteIndex(url, manifest, store.size(source, url, INDEX), cache)


class RemoteIndex(Index):
    """An index whose shards come through a cache. index_bytes: the index's size."""

    where = "fetched when they are needed"

    def __init__(self, url: Url, manifest: dict[str, Any], index_bytes: int, cache: Cache) -> None:
        self._source, self.cache = store.source(url), cache
        blob = Blob(url, INDEX, index_bytes, manifest["index_sha256"])
        file = self.cache.open(self._source, blob)
        assert file is not None, NOW
        weakref.finalize(self, file.close)  # it stays in the cache for as long as this lives
        super().__init__(url, manifest, self.cache.path(blob))

    def problems(self) -> list[str]:
        """Those of the index; shards are looked at when they come."""
        return self.contradictions()

    def open_shard(self, shard: int, stop: threading.Event | None = None) -> BinaryIO:
        file = _unless(stop, partial(self.fetch, shard, stop=stop)) if stop else self.fetch(shard)
        assert file is not None, NOW
        return file

    def fetch(self, shard: int, now: bool = True, stop: threading.Event | None = None) -> BinaryIO | None:
        """A shard as Cache.open gives it."""
        entry = self.manifest["shards"][shard]
        blob = Blob(Url(self.path), entry["name"], entry["bytes"], entry["sha256"])
        return self.cache.open(self._source, blob, now, stop)


def _unless(stop: threading.Event, fetch: Callable[[], BinaryIO | None]) -> BinaryIO | None:
    """What `fetch` gives. Raises Stopped soon after `stop` is set, whatever the server does: the thread that waits for
    it is left to itself."""
    result: Future[BinaryIO | None] = Future()

    def work() -> None:
        try:
            file = fetch()
        except BaseException as error:
            if result.set_running_or_notify_cancel():
                result.set_exception(error)
            return
        if result.set_running_or_notify_cancel():
            result.set_result(file)
        elif file is not None:
            file.close()

    threading.Thread(target=work, daemon=True).start()
    while not wait([result], POLL).done:
        if stop.is_set() and result.cancel():
            raise Stopped
    return result.result()
