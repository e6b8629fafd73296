"""A real Slurm on the loopback: munged, slurmctld and two slurmd, all state in one folder, ended by their ids.

Needs root and Debian's munge and slurm-wlm; no systemd, no cgroups.
"""

import os
import shutil
import socket
import subprocess
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import psutil

from cclmpc_dist.benching.served import free_port

NODES = {"node1": "127.0.0.2", "node2": "127.0.0.3"}
CONFIGURATION = """
ClusterName=loopback
SlurmctldHost={host}(127.0.0.1)
SlurmctldPort={port}
SlurmUser=root
SlurmdUser=root
AuthType=auth/munge
CredType=cred/munge
AuthInfo=socket={folder}/munge.sock
StateSaveLocation={folder}/state
SlurmdSpoolDir={folder}/spool-%n
SlurmctldPidFile={folder}/slurmctld.pid
SlurmdPidFile={folder}/slurmd-%n.pid
SlurmctldLogFile={folder}/slurmctld.log
SlurmdLogFile={folder}/slurmd-%n.log
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
JobAcctGatherType=jobacct_gather/none
AccountingStorageType=accounting_storage/none
JobCompType=jobcomp/none
SwitchType=switch/none
MpiDefault=none
SelectType=select/cons_tres
SelectTypeParameters=CR_CPU
SchedulerParameters=batch_sched_delay=0,sched_interval=1
SlurmctldParameters=preempt_send_user_signal
PreemptType=preempt/partition_prio
PreemptMode=REQUEUE
KillWait=5
ReturnToService=2
SlurmdTimeout=10
"""


class Cluster:
    """The daemons, and the commands of Slurm against them."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.daemons: dict[str, subprocess.Popen[bytes]] = {}
        self.environment = os.environ | {"SLURM_CONF": str(folder / "slurm.conf")}

    def up(self) -> None:
        """Start the daemons and wait until both nodes are idle."""
        for name in ("state", "munge", *(f"spool-{node}" for node in NODES)):
            (self.folder / name).mkdir(mode=0o700)
        (self.folder / "slurm.conf").write_text(self._configuration())
        key = self.folder / "munge" / "key"
        key.write_bytes(os.urandom(1024))
        key.chmod(0o600)
        self.start(
            "munged", "--foreground", "--force", f"--key-file={key}", f"--socket={self.folder}/munge.sock",
            f"--pid-file={self.folder}/munged.pid", f"--log-file={self.folder}/munged.log",
            f"--seed-file={self.folder}/munge/seed",
        )  # fmt: skip
        until(lambda: (self.folder / "munge.sock").exists(), "munged listens")
        self.start("slurmctld", "-D")
        for node in NODES:
            self.start(f"slurmd-{node}", "-D", "-N", node)
        until(lambda: self.ask("sinfo", "-h", "-N", "-p", "low", "-t", "idle", "-o", "%N").split() == [*NODES], "idle")

    def down(self) -> None:
        """Cancel what runs, then end the daemons, munged last."""
        self.ask("scancel", "--user=root")
        until(lambda: not self.ask("squeue", "-h"), "the queue is empty", patient=30, strict=False)
        for daemon in reversed(self.daemons.values()):
            daemon.terminate()
            try:
                daemon.wait(20)
            except subprocess.TimeoutExpired:
                daemon.kill()
                daemon.wait()

    def start(self, name: str, *options: str) -> None:
        """Start a daemon in the foreground; slurmd-NODE is slurmd."""
        with (self.folder / f"{name}.out").open("ab") as output:
            self.daemons[name] = subprocess.Popen(
                [name.partition("-")[0], *options], env=self.environment, stdout=output, stderr=output
            )

    def ask(self, *command: str) -> str:
        """Output of a command of Slurm, empty where it fails."""
        done = self._run(*command)
        return done.stdout.strip() if done.returncode == 0 else ""

    def _does(self, *command: str) -> bool:
        return self._run(*command).returncode == 0

    def _run(self, *command: str) -> subprocess.CompletedProcess[str]:
        return subprocess.run(command, env=self.environment, capture_output=True, text=True, check=False, timeout=60)

    def submit(self, *command: str, cwd: Path, **environment: str) -> int:
        """The number of the job that `sbatch COMMAND` made."""
        done = subprocess.run(
            ["sbatch", "--parsable", *command], cwd=cwd, env=self.environment | environment, capture_output=True,
            text=True, check=False, timeout=60,
        )  # fmt: skip
        assert done.returncode == 0, done.stderr
        return int(done.stdout)

    def job(self, number: int) -> dict[str, str]:
        """What `scontrol show job` says, by name."""
        words = self.ask("scontrol", "--oneliner", "show", "job", str(number)).split()
        return dict(word.split("=", 1) for word in words if "=" in word)

    def wait_for(self, number: int, *states: str, patient: float = 150) -> dict[str, str]:
        """What the job says once it is in one of the states."""
        until(lambda: self.job(number).get("JobState") in states, f"job {number} is {states}", patient,
              detail=lambda: str(self.job(number)))  # fmt: skip
        return self.job(number)

    def start_again(self, number: int) -> None:
        """Shorten the two minutes that a requeued job waits; its nodes refuse it in the second in which it ended."""
        self.wait_for(number, "PENDING")
        until(lambda: self._does("scontrol", "update", f"JobId={number}", "StartTime=now+3"), "it may start")
        until(lambda: self.job(number)["JobState"] != "PENDING", f"job {number} starts again")

    def lose(self, node: str) -> None:
        """SIGKILL to everything that runs as `node`, its daemon first."""
        self.daemons[f"slurmd-{node}"].kill()
        self.daemons[f"slurmd-{node}"].wait()
        for process in self.on(node):
            process.kill()

    def on(self, node: str) -> list[psutil.Process]:
        """A job's processes on a node, with the slurmstepd above each of its tasks."""
        found = [one for one in psutil.process_iter() if _variables(one, "SLURMD_NODENAME") == (node,)]
        parents = {parent for one in found if (parent := one.parent()) and parent.name().startswith("slurmstepd")}
        return [*parents, *found]

    def of(self, number: int) -> list[psutil.Process]:
        """A job's processes, whatever they made of their environment."""
        mine = (str(number), self.environment["SLURM_CONF"])
        found = [one for one in psutil.process_iter() if _variables(one, "SLURM_JOB_ID", "SLURM_CONF") == mine]
        return list({*found, *(child for one in found for child in _children(one))})

    def _configuration(self) -> str:
        host = socket.gethostname().partition(".")[0]
        lines = [CONFIGURATION.format(host=host, port=free_port(), folder=self.folder)]
        for node, address in NODES.items():
            lines.append(f"NodeName={node} NodeHostname={host} NodeAddr={address} Port={free_port()} CPUs=1\n")
        nodes = ",".join(NODES)
        lines.append(f"PartitionName=low Nodes={nodes} Default=YES PriorityTier=1 PreemptMode=REQUEUE GraceTime=120\n")
        lines.append(f"PartitionName=high Nodes={nodes} PriorityTier=10 PreemptMode=OFF\n")
        return "".join(lines)


@contextmanager
def cluster(folder: Path) -> Iterator[Cluster]:
    """A cluster that is up, and down again at the end."""
    slurm = Cluster(folder)
    try:
        slurm.up()
        yield slurm
    finally:
        slurm.down()


def missing() -> str:
    """What this machine lacks for a cluster, empty where it lacks nothing."""
    absent = [name for name in ("munged", "slurmctld", "slurmd", "sbatch") if shutil.which(name) is None]
    if absent:
        return f"{', '.join(absent)} not found: apt-get install munge slurm-wlm"
    return "" if os.geteuid() == 0 else "munged and slurmd need root"


def until(
    holds: Callable[[], bool], what: str, patient: float = 60, strict: bool = True, detail: Callable[[], str] = str
) -> None:
    """Wait until something holds."""
    deadline = time.monotonic() + patient
    while not holds():
        if time.monotonic() > deadline:
            assert not strict, f"not after {patient:.0f} s: {what} {detail()}"
            return
        time.sleep(0.2)


def _variables(process: psutil.Process, *names: str) -> tuple[str | None, ...]:
    """Of the environment of a process, none where it is dead."""
    try:
        environment = process.environ() if process.status() != psutil.STATUS_ZOMBIE else {}
    except (psutil.NoSuchProcess, psutil.AccessDenied):
        environment = {}
    return tuple(environment.get(name) for name in names)


def _children(process: psutil.Process) -> list[psutil.Process]:
    try:
        return process.children(recursive=True)
    except psutil.NoSuchProcess:
        return []
