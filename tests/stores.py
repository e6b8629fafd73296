"""Servers in processes of their own, and readers of a corpus that print what they were given.

python tests/stores.py PATH CACHE BYTES RANK WORLD EPOCHS prints a line a step: the batch's sha256 and this process's
private memory in MiB.
"""

import fcntl
import hashlib
import os
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np

from cclmpc_dist.benching.served import free_port, listens
from cclmpc_dist.config import Data
from cclmpc_dist.data.index import Index
from cclmpc_dist.data.loader import Mixture, Stream, loader
from cclmpc_dist.data.remote import GIB, open_corpus

os.environ["no_proxy"] = "127.0.0.1,localhost"
HERE = Path(__file__).resolve().parent
PATCH = (4, 4, 4)
BATCH, BLOCK = 4, 2  # lanes, and shards shuffled together


@contextmanager
def fault_server(folder: Path, port: int = 0, after: float = 0, upstream: str = "") -> Iterator[str]:
    """The URL of a folder on tests/fault_server.py; with a port it may start `after` some seconds. upstream: the S3
    server that it stands before."""
    command = ["sh", "-c", 'sleep "$1"; shift; exec "$@"', "sh", str(after)]
    command += [sys.executable, HERE / "fault_server.py", folder, str(port), *([upstream] if upstream else [])]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as server:
        assert server.stdout is not None
        try:
            if port and not after:
                server.stdout.readline()  # it listens
            yield f"http://127.0.0.1:{port or server.stdout.readline().strip()}"
        finally:
            server.kill()


SECRET = {"AWS_ACCESS_KEY_ID": "AKIAUSER", "AWS_SECRET_ACCESS_KEY": "s3cret/Key", "AWS_DEFAULT_REGION": "us-east-1"}


@contextmanager
def moto(log: Path) -> Iterator[str]:
    """HOST:PORT of a server of the S3 protocol. It takes any credentials until its /moto-api/reset-auth is called."""
    port = free_port()
    command = [sys.executable, "-m", "moto.server", "-H", "127.0.0.1", "-p", str(port)]
    with log.open("w") as file, subprocess.Popen(command, stdout=file, stderr=file) as server:
        try:
            assert listens(port, server), log.read_text()
            yield f"127.0.0.1:{port}"
        finally:
            server.kill()


def uploaded(folder: Path, endpoint: str | None = None) -> str:
    """The URL of a copy in a bucket of the S3 server there; unset: the one that the environment names."""
    import fsspec

    files = fsspec.filesystem("s3", skip_instance_cache=True, endpoint_url=endpoint)
    files.mkdir("bucket")
    files.put(str(folder), "bucket/corpus", recursive=True)
    return "s3://bucket/corpus"


def opened(path: str | Path, cache: Path | None = None, size: int = GIB) -> Index:
    """A corpus by folder or URL, with a cache of `size` bytes."""
    return open_corpus(Data(path=str(path), patch=PATCH, cache=cache and str(cache), cache_gib=size / GIB))


def stream(index: Index, **options: object) -> Mixture:
    defaults = {"block": BLOCK, "with_label": True}
    return Mixture([Stream(index, "labelled", np.arange(len(index)), BATCH, 7, PATCH, **(defaults | options))])


def digest(batch: dict) -> str:
    arrays = [value.numpy().tobytes() for value in batch.values() if hasattr(value, "numpy")]
    return hashlib.sha256(b"".join(arrays)).hexdigest()


def batches(index: Index, epochs: int = 2, rank: int = 0, world: int = 1, **options: object) -> list[str]:
    """The digest of each batch."""
    data = stream(index, **options)
    return [digest(batch) for batch in loader(data, 0, epochs * data.steps, rank, world, workers=0)]


def reader(url: str, cache: Path, size: int, rank: int = 0, world: int = 1, epochs: int = 2) -> subprocess.Popen[str]:
    """This file as a process."""
    words = [sys.executable, __file__, url, str(cache), str(size), str(rank), str(world), str(epochs)]
    environment = os.environ | {"PYTHONPATH": os.pathsep.join([str(HERE.parent), os.environ.get("PYTHONPATH", "")])}
    return subprocess.Popen(words, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=environment)


def private_mib() -> int:
    """Memory of this process that no file stands behind."""
    status = Path("/proc/self/status").read_text().split()
    return int(status[status.index("RssAnon:") + 1]) >> 10


def held(cache: Path) -> int:
    """Bytes of the files of a cache, at a moment at which none comes or goes."""
    with (cache / "lock").open() as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        return sum(file.stat().st_size for file in cache.iterdir())


def main() -> None:
    path, cache, size, rank, world, epochs = sys.argv[1:]
    data = stream(opened(path, Path(cache), int(size)))
    for batch in loader(data, 0, int(epochs) * data.steps, int(rank), int(world), workers=0):
        print(digest(batch), private_mib(), flush=True)


if __name__ == "__main__":
    main()
