"""Files of a corpus that lies on a web server or in an object store, read from any byte on.

Credentials come from the environment alone and are in no message.
"""

import os
import random
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from http.client import HTTPException, HTTPResponse
from typing import Any, Protocol
from urllib.error import HTTPError, URLError
from urllib.parse import quote
from urllib.request import Request, urlopen

from cclmpc_dist.errors import InputError

PART = 1 << 20  # bytes of a body held in memory at a time
S3_PART = 8 << 20  # the same for s3, where each part is a request
TIMEOUT = 30.0  # seconds without a byte
TRIES = 8  # failures in a row, without a byte between them, after which a file is given up
FIRST_WAIT, LONGEST_WAIT = 0.5, 30.0  # seconds before a second try, doubled before each further one: 30 to 60 in all
PATIENCE = TRIES * TIMEOUT + 2 * LONGEST_WAIT  # seconds after which a file is surely given up
AUTHORIZATION = "CCLMPC_HTTP_AUTHORIZATION"
SECRETS = (AUTHORIZATION, "AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY", "AWS_SESSION_TOKEN")
PASSING = (408, 425, 429)  # answers below 500 that another try may mend

_jitter = random.Random()  # not the generator that a training script may have seeded


class Url(str):
    """A folder's or a file's URL; `/` joins as it does for a Path."""

    __slots__ = ()

    def __truediv__(self, name: str) -> "Url":
        return Url(f"{self.rstrip('/')}/{quote(name)}")


class Stopped(Exception):
    """Nobody waits for the file any more."""


class Source(Protocol):
    """The files of one folder. Raises OSError where another try may help, InputError where it cannot."""

    def size(self, name: str) -> int:
        """Bytes of a file."""

    def read(self, name: str, start: int = 0) -> Iterator[memoryview | bytes]:
        """A file from byte `start` to its end, in parts, each good until the next is asked for."""


def source(url: Url) -> Source:
    return S3(url) if url.startswith("s3://") else Http(url)


class Http:
    """http and https, a request a file; a proxy is taken from the environment. The server should know `Range`."""

    def __init__(self, url: Url) -> None:
        self.url = url

    def size(self, name: str) -> int:
        with self._ask(name, "HEAD", 0) as response:
            if "Content-Length" not in response.headers:
                raise InputError(f"{self.url / name}: the server does not tell its size: have it send Content-Length")
            return int(response.headers["Content-Length"])

    def read(self, name: str, start: int = 0) -> Iterator[memoryview]:
        part = memoryview(bytearray(PART))
        with self._ask(name, "GET", start) as response:
            skip = start if response.status == 200 else 0  # the server sends all of it
            length = response.length
            while got := response.readinto(part):
                length = None if length is None else length - got
                if got > skip:
                    yield part[skip:got]
                skip = max(0, skip - got)
            if length:
                raise ConnectionError(f"the body ended {length} bytes too early")

    @contextmanager
    def _ask(self, name: str, method: str, start: int) -> Iterator[HTTPResponse]:
        request = Request(self.url / name, method=method)
        if start:
            request.add_header("Range", f"bytes={start}-")
        if value := os.environ.get(AUTHORIZATION):
            request.add_unredirected_header("Authorization", value)  # for this server, not for one it points to
        try:
            with urlopen(request, timeout=TIMEOUT) as response:
                yield response
        except HTTPError as error:
            error.close()
            if error.code < 500 and error.code not in PASSING:
                raise InputError(f"{self.url / name}: {_cause(error)}: {_remedy(error.code)}") from None
            raise
        except HTTPException as error:
            raise ConnectionError(f"the answer broke off ({type(error).__name__})") from None


def _remedy(code: int) -> str:
    if code in (401, 403):
        return f"set {AUTHORIZATION} in the environment, or open the folder"
    if code == 416:
        return "it is shorter than the manifest says: copy it there again"
    return "copy it there, or look at the URL"


class S3:
    """Amazon's S3 and what speaks its protocol, through fsspec. Credentials, region and endpoint are AWS's usual
    variables (AWS_ACCESS_KEY_ID, AWS_SECRET_ACCESS_KEY, AWS_ENDPOINT_URL, ...)."""

    def __init__(self, url: Url) -> None:
        try:
            import fsspec

            limits = {"connect_timeout": TIMEOUT, "read_timeout": TIMEOUT, "retries": {"max_attempts": 0}}
            self.files: Any = fsspec.filesystem("s3", config_kwargs=limits, use_listings_cache=False)
        except ImportError:
            raise InputError(f"{url}: s3:// needs the extra `remote`: pip install '.[remote]'") from None
        self.files.retries = 1  # tries are counted here
        self.url = url

    def size(self, name: str) -> int:
        with self._words(name):
            return int(self.files.info(self.url / name)["size"])

    def read(self, name: str, start: int = 0) -> Iterator[bytes]:
        size = self.size(name)
        while start < size:
            with self._words(name):
                part = self.files.cat_file(self.url / name, start=start, end=min(start + S3_PART, size))
            yield part
            start += len(part)

    @contextmanager
    def _words(self, name: str) -> Iterator[None]:
        from aiohttp import ClientError
        from botocore.exceptions import BotoCoreError, NoCredentialsError
        from botocore.exceptions import ClientError as Refusal

        try:
            yield
        except FileNotFoundError:
            raise InputError(f"{self.url / name}: not there: copy it there, or look at the URL") from None
        except (PermissionError, NoCredentialsError) as error:
            raise InputError(f"{self.url / name}: {_cause(error)}: set AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY in "
                             "the environment, or FSSPEC_S3_ANON=true for a public bucket") from None  # fmt: skip
        except (BotoCoreError, Refusal, ClientError) as error:
            raise ConnectionError(_cause(error)) from None


class Patience:
    """Waits between tries for one file, each time longer, by a random part of it so that ranks do not come together."""

    def __init__(self, what: str, stop: threading.Event) -> None:
        self.what, self.stop, self.failed = what, stop, 0

    def progressed(self) -> None:
        self.failed = 0

    def wait_after(self, error: OSError) -> None:
        """Raises InputError when it is enough, Stopped when nobody waits any more."""
        self.failed += 1
        if self.failed == TRIES:
            raise InputError(f"{self.what}: {_cause(error)}, {TRIES} times in a row: see that the server runs and can "
                             "be reached from here") from None  # fmt: skip
        if self.stop.wait(min(LONGEST_WAIT, FIRST_WAIT * 2 ** (self.failed - 1)) * _jitter.uniform(0.5, 1)):
            raise Stopped


def whole(source: Source, url: Url, name: str, limit: int) -> bytes:
    """A small file, at most `limit` bytes of it. Raises InputError."""
    patience = Patience(url / name, threading.Event())
    while True:
        data = bytearray()
        try:
            for part in source.read(name):
                data += part
                if len(data) > limit:
                    raise InputError(f"{url / name}: has more than {limit} bytes: shard again")
            return bytes(data)
        except OSError as error:
            patience.wait_after(error)


def size(source: Source, url: Url, name: str) -> int:
    """Bytes of a file. Raises InputError."""
    patience = Patience(url / name, threading.Event())
    while True:
        try:
            return source.size(name)
        except OSError as error:
            patience.wait_after(error)


def _cause(error: Exception) -> str:
    """What went wrong in one line, without credentials."""
    if isinstance(error, HTTPError):
        text = f"{error.code} {error.reason}"
    elif isinstance(error, URLError):
        text = str(error.reason)
    else:
        text = str(error) or type(error).__name__
    for name in SECRETS:
        if value := os.environ.get(name):
            text = text.replace(value, "***")
    return " ".join(text.split())
