"""A folder on a local disk that holds shards of remote corpora, for all processes of a node.

A file is named by the sha256 of its bytes, and NAME.BYTES.part until it is whole. Who uses a file holds a shared lock
of it, who fetches one an exclusive lock of its part: flocks, which end with a process, killed or not. What is locked is
never removed; the rest goes, least recently opened first, when room is needed.
"""

import errno
import fcntl
import hashlib
import os
import re
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from io import FileIO
from pathlib import Path
from typing import Any, BinaryIO

from cclmpc_dist.data.store import Patience, Source, Stopped, Url
from cclmpc_dist.errors import InputError

DOWNLOADS = 3  # of a file whose bytes are not the manifest's, before it is given up
FORGET = 300.0  # seconds for which a file that could not be fetched is refused without a try
NAMES = re.compile(r"([0-9a-f]{64})(?:\.(\d+)\.part)?")


@dataclass(frozen=True)
class Blob:
    """A file of a store: where it is, what its bytes are."""

    folder: Url
    name: str
    bytes: int
    sha256: str

    @property
    def url(self) -> Url:
        return self.folder / self.name


class _Full(Exception):
    """The disk has no room and nothing of the cache can go."""


class Cache:
    """The folder, made where it is missing. `limit` is in bytes; parts count as whole.

    It is exceeded only by files that are opened as needed now, while everything else is in use. `spare`: bytes of the
    disk that others than these are not to take, whatever the limit.
    """

    def __init__(self, folder: str | Path, limit: int) -> None:
        self.folder, self.limit, self.spare = Path(folder), limit, 0
        self._checked: set[tuple[int, int, int]] = set()  # inode, time of last change, bytes
        self._failed: dict[str, tuple[float, str]] = {}
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            with self._locked():
                pass
        except OSError as error:
            raise InputError(f"{self.folder}: no cache can be kept there ({error.strerror}): set data.cache to a "
                             "folder on a local disk") from None  # fmt: skip

    def path(self, blob: Blob) -> Path:
        return self.folder / blob.sha256

    def _part(self, blob: Blob) -> Path:
        return self.folder / f"{blob.sha256}.{blob.bytes}.part"

    def open(
        self, source: Source, blob: Blob, now: bool = True, stop: threading.Event | None = None
    ) -> BinaryIO | None:
        """The file, fetched if need be. It stays in the cache for as long as it is open or mapped.

        now: it is needed now, so it may exceed the limit, and is waited for where another process fetches it; else
        None where there is no room or another fetches it. Raises InputError naming the file and what went wrong, and
        again without a try for FORGET seconds; Stopped once `stop` is set.
        """
        stop = stop or threading.Event()
        while True:
            if stop.is_set():
                raise Stopped
            self._raise_again(blob)  # each time: who fetched it while this waited may have given it up
            file = self._opened(blob, now)
            if file is not None:
                return file
            part = self._reserved(blob, now)
            if part is None and not now:
                return self._opened(blob, now)
            if part is not None:
                with part:
                    if not self._fetched(source, blob, part, now, stop):
                        return None

    def _raise_again(self, blob: Blob) -> None:
        at, words = self._failed.get(blob.sha256, (0.0, ""))
        if words and time.monotonic() - at < FORGET:
            raise InputError(words)

    @contextmanager
    def _locked(self) -> Iterator[None]:
        """Alone among all who add files and remove them."""
        with open(self.folder / "lock", "w") as file:
            fcntl.flock(file, fcntl.LOCK_EX)
            yield

    # ---- files that are whole -----------------------------------------------------------------------------------

    def _opened(self, blob: Blob, now: bool) -> BinaryIO | None:
        """The whole file under a shared lock, None where it is missing. One with other bytes is removed. Its bytes are
        looked at when this process first opens it, and when it was changed since."""
        try:
            file = open(self.path(blob), "rb")  # noqa: SIM115 (the caller's)
        except FileNotFoundError:
            return None
        if now:
            fcntl.flock(file, fcntl.LOCK_SH)
        elif not self._kept(file):
            file.close()
            return None
        state = os.fstat(file.fileno())
        if not state.st_nlink:  # removed between opening and locking
            file.close()
            return None
        if _mark(state) not in self._checked:
            if state.st_size != blob.bytes or hashlib.file_digest(file, "sha256").hexdigest() != blob.sha256:
                file.close()
                self._remove(self.path(blob), state.st_ino)
                return None
            self._checked.add(_mark(state))
            file.seek(0)
        os.utime(file.fileno(), ns=(time.time_ns(), state.st_mtime_ns))
        return file

    def _kept(self, file: BinaryIO) -> bool:
        """Take the shared lock of a file that is not needed now, if all that is there is within the limit."""
        with self._locked():
            within = sum(taken for _, taken, _ in self._files()) <= self._limit_ahead()
            if within:
                fcntl.flock(file, fcntl.LOCK_SH)
            return within

    def _remove(self, path: Path, inode: int) -> None:
        """Remove a damaged file, not one that has taken its place."""
        with self._locked():
            if path.exists() and path.stat().st_ino == inode:
                path.unlink()

    # ---- room ---------------------------------------------------------------------------------------------------

    def _reserved(self, blob: Blob, now: bool) -> FileIO | None:
        """The part, locked for this thread, with all that a killed process fetched. None where there is no room, or
        where another fetches it: needed now, that one is waited for."""
        path = self._part(blob)
        with self._locked():
            limit = self.limit if now else self._limit_ahead()
            if self.path(blob).exists() or not (path.exists() or self._make_room(blob.bytes, limit) or now):
                return None
            part = open(path, "a+b", buffering=0)  # noqa: SIM115 (the caller's)
            try:
                fcntl.flock(part, fcntl.LOCK_EX | fcntl.LOCK_NB)
                return part
            except BlockingIOError:
                pass  # another has it
        with part:
            if now:
                fcntl.flock(part, fcntl.LOCK_SH)  # once it is whole others may hold it: an exclusive one would not come
        return None

    def _make_room(self, size: int, limit: int) -> bool:
        """Remove files that nobody uses, least recently opened first, until `size` bytes are free of `limit`. Under
        the folder's lock."""
        files = sorted(self._files())
        held = sum(taken for _, taken, _ in files)
        for _, taken, path in files:
            if held + size <= limit:
                break
            if _removed(path):
                held -= taken
        return held + size <= limit

    def _limit_ahead(self) -> int:
        """The limit for what is not needed now: on a small disk room stays for what will be."""
        disk = os.statvfs(self.folder)
        files = sum(512 * entry.stat().st_blocks for entry in os.scandir(self.folder))
        return min(self.limit, disk.f_bavail * disk.f_frsize + files - self.spare)

    def _files(self) -> Iterator[tuple[int, int, Path]]:
        """(last opened, bytes, path) of everything in the folder; a part counts as the whole."""
        for entry in os.scandir(self.folder):
            if found := NAMES.fullmatch(entry.name):
                state = entry.stat()
                yield state.st_atime_ns, int(found[2] or state.st_size), Path(entry.path)

    # ---- fetching -----------------------------------------------------------------------------------------------

    def _fetched(self, source: Source, blob: Blob, part: FileIO, now: bool, stop: threading.Event) -> bool:
        """Complete a part and give it its name. False where the disk is full and the file is not needed now."""
        path = self._part(blob)
        try:
            self._complete(source, blob, part, stop)
            os.fsync(part.fileno())
            os.fchmod(part.fileno(), 0o444)
            with self._locked():
                path.rename(self.path(blob))
            self._checked.add(_mark(os.fstat(part.fileno())))
            return True
        except InputError as error:
            self._failed[blob.sha256] = (time.monotonic(), str(error))
            raise
        except _Full:
            with self._locked():
                path.unlink(missing_ok=True)
            if now:
                raise InputError(f"{self.folder}: the disk is full: {blob.url} takes {blob.bytes} bytes, and all that "
                                 "is there is in use: make room, or lower data.block") from None  # fmt: skip
            return False

    def _complete(self, source: Source, blob: Blob, part: FileIO, stop: threading.Event) -> None:
        """Fetch what is missing of a part, anew where the bytes turn out to be others than the manifest's."""
        for _ in range(DOWNLOADS):
            part.seek(0)
            digest = hashlib.file_digest(part, "sha256")
            self._append(source, blob, part, digest, stop)
            if digest.hexdigest() == blob.sha256:
                return
            part.truncate(0)
        raise InputError(f"{blob.url}: its bytes are not those that were written (sha256), {DOWNLOADS} times fetched: "
                         "copy the corpus there again")  # fmt: skip

    def _append(self, source: Source, blob: Blob, part: FileIO, digest: Any, stop: threading.Event) -> None:
        """Fetch from where the part ends to where the store's file does, or one piece beyond the manifest's size."""
        patience = Patience(blob.url, stop)
        at, ended = os.fstat(part.fileno()).st_size, False
        while at < blob.bytes and not ended:
            try:
                for data in source.read(blob.name, at):
                    self._write(part, data, blob)
                    digest.update(data)
                    patience.progressed()
                    at += len(data)
                    if stop.is_set():
                        raise Stopped
                    if at > blob.bytes:
                        return
                ended = True
            except OSError as error:
                patience.wait_after(error)

    def _write(self, part: FileIO, data: memoryview | bytes, blob: Blob) -> None:
        left = memoryview(data)
        while left:
            try:
                left = left[part.write(left) :]
            except OSError as error:
                if error.errno not in (errno.ENOSPC, errno.EDQUOT):
                    raise InputError(f"{self.folder}: cannot be written ({error.strerror}): set data.cache to a folder "
                                     "on a local disk") from None  # fmt: skip
                with self._locked():
                    held = sum(taken for _, taken, _ in self._files())
                    self._make_room(blob.bytes, held)
                    if sum(taken for _, taken, _ in self._files()) == held:
                        raise _Full from None


def _mark(state: os.stat_result) -> tuple[int, int, int]:
    return state.st_ino, state.st_mtime_ns, state.st_size


def _removed(path: Path) -> bool:
    """Remove a file unless somebody uses or fetches it."""
    with open(path, "rb") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            return False
        path.unlink()
        return True
