"""When a step stands still: every rank that can says so in the run folder, one names who did not arrive, all end.

From inside a collective a hang and a long step of another rank look alike. So each rank counts the collectives that it
entered. The program is the same on all ranks, so those with the smallest count are the ones the others wait for; a rank
that cannot even count (stopped, dead, cut off) leaves no file. Nothing is written while steps go on.

RUN/hangs/<start of the job>/rank-00000.json   where the rank stands, collectives entered, torch's flight recorder
                             rank-00000.txt    the Python stack of each of its threads
"""

import faulthandler
import json
import os
import socket
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from cclmpc_dist.distributed import runtime
from cclmpc_dist.distributed.exchange import COLLECTIVE_TIMEOUT
from cclmpc_dist.errors import LostRanks

POLLS = 20  # looks at the step in the time it may stand still
MARGIN = 10.0  # seconds: for reports to be written and read; the process groups' own timeout is later by as much
SHOWN = 8  # ranks named in a line
FAILED = 1  # exit code: the launcher starts all ranks again
HOME = Path(__file__).resolve().parent.parent


class Watch:
    """A thread that ends this process with code 1 once a step has stood still for `seconds`; at 0, or alone, none does.

    It counts from `beat` to `beat` and only between `arm` and `disarm`; elsewhere the process group's own timeout
    holds. It counts its own looks, not the clock: the time in which the whole process was stopped is none of them.
    """

    def __init__(self, run: Path, seconds: float) -> None:
        self.run, self.seconds = run, seconds
        self.rank, self.world = runtime.rank(), runtime.world_size()
        self.active = seconds > 0 and self.world > 1
        self.hosts: list[str] = []
        self.step, self._beats = 0, 0
        self._armed = self._told = False
        self._one = threading.Lock()  # held by whoever ends the process

    def start(self, device: torch.device) -> None:
        """Collective: learn where the ranks run, begin to look. Whoever calls it takes the steps."""
        if not self.active:
            return
        self.hosts = runtime.gather_json(socket.gethostname(), device)
        began = runtime.from_rank_zero(int(time.time()), device)
        self.folder = self.run / "hangs" / time.strftime("%Y%m%d-%H%M%S", time.gmtime(began))
        self._watched = threading.get_ident()
        threading.Thread(target=self._look, name="watch", daemon=True).start()

    def beat(self, step: int) -> None:
        """The step goes on. step: steps done."""
        self.step, self._beats = step, self._beats + 1

    def arm(self) -> None:
        """From here on a step may stand still for `seconds`."""
        if self.active and not self._armed:
            _limit(timedelta(seconds=self.seconds + MARGIN))
            self._armed = True

    def disarm(self) -> None:
        if self._armed:
            self._armed = False
            _limit(COLLECTIVE_TIMEOUT)

    @contextmanager
    def resting(self) -> Iterator[None]:
        """Not watched inside: validation and saves, which differ between ranks."""
        armed = self._armed
        self.disarm()
        yield
        if armed:
            self.arm()

    def lost(self, error: RuntimeError) -> RuntimeError | LostRanks:
        """What to raise for an error of a step: in words where another rank's end broke a collective, else `error`.

        Where the step stood still before, the process ends here, as its thread would end it.
        """
        if not (isinstance(error, dist.DistError) or "gloo" in str(error)):  # gloo's errors have no class of their own
            return error
        if self._told:
            self._end()
        reason = str(error).partition("] ")[2].partition(". ")[0] or error  # without the place in gloo's sources
        return LostRanks(f"rank {self.rank}: another rank left step {self.step + 1} ({reason}): its own message, or "
                         "its launcher, says why")  # fmt: skip

    def _look(self) -> None:
        seen, still = -1, 0
        while True:
            time.sleep(self.seconds / POLLS)
            if not self._armed or self._beats != seen:
                seen, still = self._beats, 0
                if self._told:
                    _aside(self._withdraw)
                continue
            still += 1
            if still == POLLS // 2:
                self._told = True
                _aside(self._report)
            if still == POLLS:
                self._end()

    def _end(self) -> None:
        """Name who did not arrive and end. A run folder that does not answer holds nobody up."""
        self._one.acquire()
        if not _aside(self._name):
            print(f"cclmpc: rank {self.rank}: step {self.step + 1} stands still for {self.seconds:g} s, and the run "
                  f"folder {self.run} does not answer", file=sys.stderr, flush=True)  # fmt: skip
        os._exit(FAILED)

    def _report(self) -> None:
        """Written in half the time, so that it is there when the first rank names the absent."""
        frame = sys._current_frames()[self._watched]
        while frame.f_back is not None and not Path(frame.f_code.co_filename).is_relative_to(HOME):
            frame = frame.f_back
        report = {
            "rank": self.rank,
            "host": self.hosts[self.rank],
            "pid": os.getpid(),
            "step": self.step + 1,
            "entered": sum(_entered().values()),
            "groups": _entered(),
            "stands_in": f"{Path(frame.f_code.co_filename).name}:{frame.f_lineno} {frame.f_code.co_name}",
            "flight_recorder": _flight_recorder(),
        }
        self.folder.mkdir(parents=True, exist_ok=True)
        with self._file("txt").open("w") as file:
            faulthandler.dump_traceback(file)
        part = self._file("part")
        part.write_text(json.dumps(report, indent=1))
        part.rename(self._file("json"))

    def _withdraw(self) -> None:
        self._told = False
        self._file("json").unlink(missing_ok=True)
        self._file("txt").unlink(missing_ok=True)

    def _name(self) -> None:
        """The first of the ranks that reported speaks; the others give it time, as the launcher ends all with one."""
        files = {rank: self._file("json", rank) for rank in range(self.world)}
        reports = {rank: json.loads(file.read_text()) for rank, file in files.items() if file.exists()}
        if self.rank == min(reports, default=self.rank):
            print(f"cclmpc: step {self.step + 1} stands still for {self.seconds:g} s: {self._who(reports)}; "
                  f"stacks and traces: {self.folder}", file=sys.stderr, flush=True)  # fmt: skip
        else:
            time.sleep(MARGIN / 5)

    def _who(self, reports: dict[int, dict[str, Any]]) -> str:
        """The ranks that did not arrive, in words."""
        silent = sorted(set(range(self.world)) - reports.keys())
        if silent:
            return f"no sign of {self._listed(silent)} (stopped, dead or cut off)"
        entered = {rank: report["entered"] for rank, report in reports.items()}
        behind = [rank for rank, count in entered.items() if count < max(entered.values())]
        last = [rank for rank in behind if entered[rank] == min(entered.values())]
        if last:
            place = reports[last[0]]["stands_in"]
            return f"the others wait for {self._listed(last)}, at {place}"
        return "all ranks wait in the same collective: look at the network and the GPUs"

    def _listed(self, ranks: list[int]) -> str:
        told = ", ".join(f"rank {rank} on {self.hosts[rank]}" for rank in ranks[:SHOWN])
        return told + (f" and {len(ranks) - SHOWN} more" if len(ranks) > SHOWN else "")

    def _file(self, kind: str, rank: int | None = None) -> Path:
        return self.folder / f"rank-{self.rank if rank is None else rank:05d}.{kind}"


def _aside(work: Callable[[], None]) -> bool:
    """Run `work`, which touches the run folder, for MARGIN at most. Whether it could."""
    done = threading.Event()

    def run() -> None:
        with suppress(OSError):
            work()
            done.set()

    thread = threading.Thread(target=run, daemon=True)
    thread.start()
    thread.join(MARGIN)
    return done.is_set()


def _limit(timeout: timedelta) -> None:
    """The timeout of collectives entered from here on, in every group of this process."""
    for group in dist.distributed_c10d._world.pg_map:
        group.set_timeout(timeout)


def _entered() -> dict[str, int]:
    """Collectives that this process entered, by group."""
    groups: dict[Any, str] = dict(dist.distributed_c10d._world.pg_names)
    return {name: group._get_sequence_number_for_group() for group, name in groups.items()}


def _flight_recorder() -> Any:
    """torch's record of the last collectives, of NCCL's groups or gloo's."""
    torchs: Any = torch._C._distributed_c10d
    return json.loads((torchs._dump_nccl_trace_json if dist.get_backend() == "nccl" else torchs._dump_fr_trace_json)())
