"""Whether the file system of the run folder does what checkpoints, flag files and the lock of a run rely on.

Each rank works in one folder of its own name beside or in the run folder, which is gone afterwards. What can fail on
one rank alone lies between the gathers, never around them, so that no rank waits for another in vain.
"""

import errno
import fcntl
import os
import random
import shutil
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import IO

import torch

from cclmpc_dist.distributed import runtime
from cclmpc_dist.distributed.checks import Finding, State, attempt
from cclmpc_dist.words import counted

MIB, GIB = 2**20, 2**30
PROBE = 32 * MIB  # bytes that each rank writes and reads
SLOW = 10.0  # MB/s below which a checkpoint takes minutes [F]
LEAST_FREE = 5.0  # GiB: a few checkpoints and the pictures of an evaluation [F]
RENAMES = 200  # below 256: a page is filled with its number
PAGE = 4096  # bytes
PATIENCE = 60.0  # seconds until every rank must see a change; NFS keeps attributes for up to that by default
LATE = 2.0  # seconds
ELSEWHERE = "name a folder that every node sees (runs=..., --folder)"


def look(folder: Path, device: torch.device) -> list[Finding]:
    """All findings about the file system that `folder` is or would be on. Collective; device: for its tensors."""
    place = next(path for path in (folder.absolute(), *folder.absolute().parents) if path.exists())
    token = runtime.from_rank_zero(random.SystemRandom().getrandbits(32), device)
    room = place / f".cclmpc-doctor-{token:08x}"
    found = attempt(
        "folder write", lambda: _speeds(folder, place, room), f"{folder}: make room or rights, or choose another folder"
    )
    try:
        if not all(runtime.gather_json(found[0].state != "failed", device)):
            why = "not looked at: a rank cannot write there"
            return [*found, *(Finding(check, why, "warning") for check in ("folder rename", "folder lock"))]
        found += attempt("folder shared", lambda: _shared(room), ELSEWHERE)
        return found + _rename(room, device) + _lock(room, device)
    finally:
        try:
            runtime.barrier()
        finally:
            shutil.rmtree(room, ignore_errors=True)


def _speeds(folder: Path, place: Path, room: Path) -> list[Finding]:
    """Write and read speed of this rank's file, all ranks at once; disk space; what kind of file system it is."""
    room.mkdir(exist_ok=True)
    block = random.randbytes(MIB)
    began = time.perf_counter()
    with (room / f"rank-{runtime.rank()}").open("wb", buffering=0) as file:
        for _ in range(PROBE // MIB):
            file.write(block)
        os.fsync(file.fileno())
        written = time.perf_counter() - began
        os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)  # read from the disk where the system agrees
    began = time.perf_counter()
    with (room / f"rank-{runtime.rank()}").open("rb", buffering=0) as file:
        while file.read(MIB):
            pass
    read = time.perf_counter() - began
    free = shutil.disk_usage(room).free / GIB
    little: State = "OK" if free >= LEAST_FREE else "warning"
    return [
        _speed("folder write", written),
        _speed("folder read", read),
        Finding("folder", f"{folder}: {_kind(place)}"),
        Finding("folder space", "{:.1f} GiB free", little, "make room: checkpoints and pictures go there", free),
    ]


def _speed(check: str, seconds: float) -> Finding:
    speed = PROBE / 1e6 / seconds
    state: State = "OK" if speed >= SLOW else "warning"
    text = f"{{:.0f}} MB/s ({PROBE // MIB} MiB a rank, all ranks at once)"
    return Finding(check, text, state, "saving and evaluating will be slow: choose a faster file system", speed)


def _kind(place: Path) -> str:
    """The file system's type, from the longest mount point above `place`."""
    mounts = [line.split()[1:3] for line in Path("/proc/self/mounts").read_text().splitlines()]
    real = place.resolve()
    above = [(len(point), kind) for point, kind in mounts if real.is_relative_to(point)]
    return max(above)[1]


def _shared(room: Path) -> list[Finding]:
    """Whether this rank sees the files of all ranks."""
    wanted = {f"rank-{rank}" for rank in range(runtime.world_size())}
    _until(lambda: wanted <= set(os.listdir(room)))
    missing = sorted(int(name.removeprefix("rank-")) for name in wanted - set(os.listdir(room)))
    if missing:
        return [Finding("folder shared", f"files of rank {', '.join(map(str, missing))} unseen", "failed", ELSEWHERE)]
    return [Finding("folder shared", f"files of {counted(len(wanted), 'rank')} seen")]


def _rename(room: Path, device: torch.device) -> list[Finding]:
    """Rank 0 replaces a file again and again, then renames a folder, while every rank reads."""
    check, remedy = "folder rename", f"checkpoints could be read half written: {ELSEWHERE}"
    runtime.barrier()
    began = time.monotonic()
    with ThreadPoolExecutor(1) as pool:
        writing = pool.submit(attempt, check, lambda: _write_pages(room), remedy) if runtime.rank() == 0 else None
        found = attempt(check, lambda: _read_pages(room, remedy), remedy)
    if writing is not None:
        found += writing.result()
    seconds = time.monotonic() - began
    late = seconds - runtime.gather_json(seconds, device)[0]
    if late > LATE and found[0].state == "OK":
        slowly = "requests to stop are seen as late: a longer grace period, or a mount with less attribute caching"
        return [Finding(check, f"atomic, and seen {late:.0f} s late", "warning", slowly)]
    return found


def _write_pages(room: Path) -> list[Finding]:
    for number in range(1, RENAMES + 1):
        (room / "page.tmp").write_bytes(bytes([number]) * PAGE)
        (room / "page.tmp").replace(room / "page")
        time.sleep(0.001)
    (room / "step.tmp").mkdir()
    (room / "step.tmp").rename(room / "step")
    return []


def _read_pages(room: Path, remedy: str) -> list[Finding]:
    """Until the last page and the folder's final name are there; a page that is missing or mixed is torn."""
    seen, torn = 0, 0

    def ended() -> bool:
        nonlocal seen, torn
        try:
            page = (room / "page").read_bytes()
        except FileNotFoundError:
            torn += bool(seen)
            return False
        except OSError as error:
            if error.errno != errno.ESTALE:  # NFS: replaced while it was open
                raise
            return False
        seen += 1
        torn += len(page) != PAGE or len(set(page)) != 1
        return page[:1] == bytes([RENAMES]) and (room / "step").exists() and not (room / "step.tmp").exists()

    if not _until(ended):
        return [Finding("folder rename", f"not seen after {PATIENCE:.0f} s", "failed", ELSEWHERE)]
    if torn:
        return [
            Finding("folder rename", f"files are missing or torn while they are replaced ({torn})", "failed", remedy)
        ]
    return [Finding("folder rename", f"atomic: {RENAMES} replaced files and a folder, read meanwhile by every rank")]


def _lock(room: Path, device: torch.device) -> list[Finding]:
    """Whether the lock that a run's rank 0 takes exists, and keeps the other ranks out."""
    check, remedy = "folder lock", f"nothing keeps a second run out: mount it with flock, or {ELSEWHERE}"
    alone = runtime.world_size() == 1
    told = "can be taken" if alone else "taken by rank 0 and refused to the others"
    first = runtime.rank() == 0
    with (room / "lock").open("w") as handle:
        found = attempt(check, lambda: _take(handle, told), remedy) if first else []
        held = runtime.gather_json(bool(found) and found[0].state == "OK", device)[0]
        if not first:
            found = [Finding(check, "not looked at: rank 0 cannot take it", "warning")]
            if held:
                found = attempt(check, lambda: _refused(handle, told, remedy), remedy)
        runtime.barrier()
    return found


def _take(handle: IO[str], told: str) -> list[Finding]:
    fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
    return [Finding("folder lock", told)]


def _refused(handle: IO[str], told: str, remedy: str) -> list[Finding]:
    try:
        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return [Finding("folder lock", told)]
    return [Finding("folder lock", "taken by this rank too, while rank 0 holds it", "failed", remedy)]


def _until(holds: Callable[[], bool]) -> bool:
    """Wait for it, at most PATIENCE seconds; whether it came."""
    deadline = time.monotonic() + PATIENCE
    while not (held := holds()) and time.monotonic() < deadline:
        time.sleep(0.002)
    return held
