"""Cases -> WebDataset shards and their index. Two builds of the same cases are the same bytes.

A sample is `<key>.image.npy` (C, *S), `<key>.label.npy` (*S) where there is a label, and `<key>.json`;
compressed shards hold `.npy.zst`. Workers read, check and encode; one process writes, in the order of the cases, and
a shard's first case is the first that the shard before had no room for: so bytes depend neither on the workers nor on
where a build was stopped.
"""

import errno
import hashlib
import io
import os
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import closing, contextmanager, suppress
from functools import partial
from pathlib import Path
from typing import Any, BinaryIO, Literal

from cclmpc_dist.data.case import Handle
from cclmpc_dist.data.encode import Compression, Sample, encode
from cclmpc_dist.data.index import MANIFEST, Index, sha256
from cclmpc_dist.data.merge import merge
from cclmpc_dist.data.parts import PARTS, Part, Piece, Rows, Settings, difference, inputs, locked, read_record, settled
from cclmpc_dist.data.progress import Progress
from cclmpc_dist.data.workers import ordered
from cclmpc_dist.errors import InputError

MIB = 1 << 20
TAR_BLOCK = 512


def write(
    cases: Sequence[Handle],
    out: str | Path,
    *,
    source: str,
    classes: int | None = None,
    labelled: int | None = None,
    val_last: int = 0,
    shard_bytes: int = 64 * MIB,
    compress: Compression = "none",
    on_error: Literal["fail", "skip"] = "fail",
    workers: int = 1,
) -> Index:
    """Write a corpus to the empty or new folder `out`, or finish the one that was begun there, and open its index.

    classes: labels lie in [0, classes); unset is the largest label + 1, at least 2. labelled: the first N
    training cases count as labelled, unset every one that has a label; runs can choose otherwise. val_last:
    the last N cases are for reports only. A shard closes before it would exceed `shard_bytes`. on_error: a case
    that cannot be used ends the build, or is left out and listed. workers: processes that read and encode.
    Raises InputError naming the case; a build that fails before its first shard is full leaves nothing.
    """
    settings = Settings(source, classes, labelled, val_last, shard_bytes, compress, on_error)
    write_part(cases, out, settings, workers=workers)
    return merge(out)


def write_part(
    cases: Sequence[Handle], out: str | Path, settings: Settings, number: int = 1, workers: int = 1
) -> dict[str, Any] | None:
    """Write part `number` of `settings.parts`, counted from 1, or what is missing of it, for `merge`.

    cases: of the whole corpus; a part takes a run of them. Shards that are there with the right hash are kept
    unless a case in them has changed. Returns the part's record: shards, cases `written` and `left_out`; None
    where the merged corpus is there already. Raises InputError.
    """
    part = Part(Path(out), number, settings.parts, len(cases))
    said = settings.of(cases)
    _check(cases, settings)
    own = cases[part.first : part.stop]
    if (part.out / MANIFEST).is_file():
        _same_as_complete(part, said, inputs(own))
        return None
    with _workplace(part, said):
        part.write(said)
        try:
            found = _Build(part, own, settings, said, workers).finish()
        except OSError as error:
            if error.errno not in (errno.ENOSPC, errno.EDQUOT):
                raise
            raise InputError(f"{out}: {error.strerror}: make room, and the same command goes on") from None
        part.write(said, inputs=inputs(own), **found)
    return read_record(part.record)


def _check(cases: Sequence[Handle], settings: Settings) -> None:
    """Refuse at once what can be told before a case is read."""
    if not cases:
        raise InputError("the corpus holds no cases: nothing to write")
    if settings.val_last >= len(cases):
        raise InputError(f"--val-last {settings.val_last} leaves none of {len(cases)} cases to train on: lower it")
    key, count = Counter(case.key for case in cases).most_common(1)[0]
    if count > 1:
        raise InputError(f"case {key}: comes {'twice' if count == 2 else f'{count} times'}: rename one")


def _same_as_complete(part: Part, said: dict[str, Any], own: str) -> None:
    """Refuse to write to a corpus that was made of other cases or with other settings."""
    manifest = Index.open(part.out, check=False).manifest
    settings, hashes = manifest.get("settings", {}), manifest.get("inputs", [])
    if settings != said or hashes[part.number - 1] != own:
        what = difference(settings, said) if settings != said else "files of other sizes or times of change"
        what = what if settings else "settings that it does not tell"
        only = settings != said and settings | {"labelled": said["labelled"]} == said
        instead = ", or set data.labelled for the run, which needs no new shards" if only else ""
        raise InputError(f"{part.out}: holds a finished corpus made with {what}, and is left as it is: "
                         f"give another --out{instead}")  # fmt: skip


@contextmanager
def _workplace(part: Part, said: dict[str, Any]) -> Iterator[None]:
    """Make the folder if need be. Where the block fails before there is a shard to keep, take back what was made."""
    out = part.out
    if out.is_file():
        raise InputError(f"{out}: is a file: give another --out, a folder that is made")
    if out.is_dir() and any(out.iterdir()) and not (out / PARTS).is_dir():
        raise InputError(f"{out}: is not empty, and what is there is no corpus: give another --out")
    made = [folder for folder in (out / PARTS, out, *out.parents) if not folder.exists()]
    (out / PARTS).mkdir(parents=True, exist_ok=True)
    _same_as_begun(part, said)
    with locked(part):
        try:
            yield
        except BaseException:
            if not any(part.pieces()):
                part.forget()
                for folder in made if part.count == 1 else ():
                    if not any(folder.iterdir()):
                        folder.rmdir()
            raise


def _same_as_begun(part: Part, said: dict[str, Any]) -> None:
    """Compare with what the parts that were begun here say; the part's own record may be torn."""
    for file in sorted((part.out / PARTS).glob("*-of-*.json")):
        try:
            begun = settled(read_record(file)["settings"])
        except InputError:
            continue
        if begun != settled(said):
            what = difference(begun, settled(said))
            raise InputError(f"{part.out}: begun with {what}: give what was given, or another --out")


class _Build:
    """One part in the making."""

    def __init__(
        self, part: Part, own: Sequence[Handle], settings: Settings, said: dict[str, Any], workers: int
    ) -> None:
        self.part, self.own, self.settings, self.workers = part, own, settings, workers
        self.settled = settled(said)
        self.judged = [settings.classes, settings.on_error]
        self.form: list[int] = []  # channels, axes
        self.written = 0

    def finish(self) -> dict[str, Any]:
        """Write what is missing; the part's number of shards, and the cases that no shard's piece can list."""
        number, at = self._kept()
        for leftover in self.part.leftovers(number):
            leftover.unlink()
        work = partial(_try, classes=self.settings.classes, compress=self.settings.compress)
        todo = self._cases(at, self.part.stop)
        shards = _Shards(self, number, at)
        title = "shard" if self.part.count == 1 else f"shard {self.part}"
        outcomes = ordered(work, todo, min(self.workers, max(1, len(todo))))
        with Progress(title, len(self.own), len(self.own) - len(todo)) as progress, shards, closing(outcomes):
            for case, (handle, outcome) in enumerate(zip(todo, outcomes, strict=True), at):
                sample = self._alike(outcome)
                if isinstance(sample, Sample):
                    self.written += 1
                    progress.step(shards.add(case, sample))
                elif self.settings.on_error == "fail":
                    raise InputError(sample)
                else:
                    progress.step(shards.skip(handle.key, sample))
        counts = {"written": self.written, "left_out": len(self.own) - self.written}
        return {"shards": shards.number, "skipped": shards.rows.skipped, **counts}

    def _alike(self, sample: Sample | str) -> Sample | str:
        """The sample, or why there is none that goes with those before."""
        if isinstance(sample, str):
            return sample
        form = [sample.shape[0], len(sample.shape) - 1]
        self.form = self.form or form
        if form == self.form:
            return sample
        said = f"(channels, axes) are {tuple(form)}, those before have {tuple(self.form)}"
        return f"case {sample.key}: {said}: make them alike"

    def _kept(self) -> tuple[int, int]:
        """(number of shards that need not be written again, first case that is in none of them)."""
        entries: list[dict[str, Any]] = []
        stops = [self.part.first]
        while told := self._fitting(len(entries), stops[-1]):
            entries.append(told["shard"])
            stops.append(told["stop"])
            self.form = told["form"]
        files = [self.part.shard(number) for number in range(len(entries))]
        whole = 0
        with closing(ordered(sha256, files, self.workers if len(files) > 1 else 1)) as digests:
            while whole < len(files) and next(digests) == entries[whole]["sha256"]:
                self.written += entries[whole]["samples"]
                whole += 1
        return whole, stops[whole]

    def _fitting(self, number: int, first: int) -> dict[str, Any] | None:
        """What the piece of a shard that begins with case `first` tells, if this build would write the same."""
        piece = Piece.load(self.part.piece(number))
        file = self.part.shard(number)
        if piece is None or not file.is_file() or file.stat().st_size != piece.told["shard"]["bytes"]:
            return None
        told = piece.told
        judged_alike = told["judged"] == self.judged
        fits = judged_alike or (not told["skipped"] and told["top"] < (self.settings.classes or 256))
        same = (told["settings"], told["first"]) == (self.settled, first)
        return told if fits and same and told["inputs"] == inputs(self._cases(first, told["stop"])) else None

    def _cases(self, first: int, stop: int) -> Sequence[Handle]:
        """The cases of these numbers in the corpus."""
        return self.own[first - self.part.first : stop - self.part.first]

    def keep(self, rows: Rows, number: int, stop: int, entry: dict[str, Any]) -> None:
        """Write the piece of shard `number`, which holds cases up to `stop`."""
        rows.save(
            self.part.piece(number), shard=entry, stop=stop, inputs=inputs(self._cases(rows.first, stop)),
            settings=self.settled, judged=self.judged,
        )  # fmt: skip


def _try(handle: Handle, classes: int | None, compress: Compression) -> Sample | str:
    """The sample, or why there is none."""
    try:
        return encode(handle, classes, compress)
    except InputError as error:
        return str(error)


class _Hashing:
    """The file that a tar is written to, hashed on the way."""

    def __init__(self, file: BinaryIO) -> None:
        self.file = file
        self.hash = hashlib.sha256()
        self.bytes = 0

    def write(self, data: bytes) -> int:
        self.hash.update(data)
        self.bytes += len(data)
        return self.file.write(data)


class _Shards:
    """Tar files of at most `shard_bytes`, each under a temporary name until it is complete."""

    def __init__(self, build: _Build, number: int, first: int) -> None:
        self.build, self.limit, self.number = build, build.settings.shard_bytes, number
        self.rows = Rows(first)
        self._tar: Any = None

    def __enter__(self) -> "_Shards":
        return self

    def __exit__(self, kind: type | None, *_: object) -> None:
        if self._tar is None:
            return
        if kind is None:
            self._close(self.build.part.stop)
            return
        self._sink.file = io.BytesIO()  # the tar's end goes nowhere: the disk may be full
        self._tar.close()
        with suppress(OSError):  # what is left in the buffer
            self._file.close()
        self._path.unlink()

    def skip(self, key: str, why: str) -> int:
        """List a case that is left out."""
        self.rows.skipped.append({"case": key, "why": why})
        return 0

    def add(self, case: int, sample: Sample) -> int:
        """Write a sample; its bytes."""
        members = sample.members
        size = sum(TAR_BLOCK + _padded(len(data)) for data in members.values())
        if self._tar is not None and self._tar.tarstream.offset + size + 2 * TAR_BLOCK > self.limit:
            self._close(case)
        if self._tar is None:
            self._begin()
        places, at = {}, self._tar.tarstream.offset
        for name in sorted(members):  # the order in which TarWriter writes them
            places[name.partition(".")[0]] = (at + TAR_BLOCK, len(members[name]))
            at += TAR_BLOCK + _padded(len(members[name]))
        self._tar.write({"__key__": sample.key, **members})
        assert self._tar.tarstream.offset == at, "a member's header is not one tar block"
        self._tar.tarstream.members.clear()  # tarfile keeps them all
        self.rows.add(case, sample, places)
        return size

    def _begin(self) -> None:
        from webdataset import TarWriter

        path = self.build.part.shard(self.number)
        self._path = path.with_name(path.name + ".part")
        self._file = open(self._path, "wb")  # noqa: SIM115 (closed when the shard is full)
        self._sink = _Hashing(self._file)
        self._tar = TarWriter(self._sink, mtime=0, encoder=False, compress=False)

    def _close(self, stop: int) -> None:
        """Complete the open shard: end of archive, flush to disk, its final name, its piece."""
        self._tar.close()
        self._file.flush()
        os.fsync(self._file.fileno())
        self._file.close()
        path = self._path.with_suffix("")
        self._path.rename(path)
        digest, samples = self._sink.hash.hexdigest(), len(self.rows.keys)
        entry = {"name": path.name, "bytes": self._sink.bytes, "samples": samples, "sha256": digest}
        self.build.keep(self.rows, self.number, stop, entry)
        self._tar, self.number, self.rows = None, self.number + 1, Rows(stop)


def _padded(size: int) -> int:
    return -(-size // TAR_BLOCK) * TAR_BLOCK
