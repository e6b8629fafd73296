"""A real Ray on the loopback: a head and further nodes, each `ray start --block`, token-authenticated, ended by id."""

import os
import re
import secrets
import shutil
import subprocess
import sys
import tempfile
import time
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import psutil

from cclmpc_dist.benching.served import free_port

ROOT = Path(__file__).resolve().parent.parent
RAY = str(Path(sys.executable).with_name("ray"))
HEAD, SECOND = "127.0.0.2", "127.0.0.3"  # Ray replaces 127.0.0.1 by an address of the machine's own
STORE = "--object-store-memory=100000000"


class Cluster:
    """The nodes by their addresses, and jobs submitted to them."""

    def __init__(self, folder: Path) -> None:
        self.folder, self.port, self.dashboard, self.exporter = folder, free_port(), free_port(), free_port()
        self.nodes: dict[str, subprocess.Popen[bytes]] = {}
        (folder / "token").write_text(secrets.token_hex(32))
        self.environment = os.environ | {
            "RAY_AUTH_MODE": "token",
            "RAY_AUTH_TOKEN_PATH": str(folder / "token"),
            "RAY_USAGE_STATS_ENABLED": "0",
            "RAY_TRAIN_WORKER_GROUP_START_TIMEOUT_S": "20",  # how long it waits for room on a node that was lost
            "RAY_metrics_report_interval_ms": "1000",
            "RAY_worker_niceness": "0",  # at its 15, whatever else runs here starves the workers
        }

    @property
    def address(self) -> str:
        return f"http://127.0.0.1:{self.dashboard}"

    def up(self, cpus: int) -> None:
        """Start the head with that many workers' room and wait until it takes jobs."""
        self._start(
            HEAD, cpus, "--head", f"--port={self.port}", "--dashboard-host=127.0.0.1",
            f"--dashboard-port={self.dashboard}", f"--metrics-export-port={self.exporter}",
            f"--temp-dir={self.folder}/t", "--disable-usage-stats",
        )  # fmt: skip
        deadline = time.monotonic() + 120
        while self.ask("job", "submit", "--address", self.address, "--no-wait", "--", "true").returncode:
            assert time.monotonic() < deadline, (self.folder / f"{HEAD}.log").read_text()
            time.sleep(1)

    def join(self, cpus: int) -> None:
        """Start the second node."""
        self._start(SECOND, cpus, f"--address={HEAD}:{self.port}")

    def lose(self, node: str) -> None:
        """SIGKILL to everything that a node runs."""
        daemon = self.nodes.pop(node)
        everyone = [psutil.Process(daemon.pid), *psutil.Process(daemon.pid).children(recursive=True)]
        for one in everyone:
            one.kill()
        psutil.wait_procs(everyone)
        daemon.wait()

    def down(self) -> None:
        """End the nodes, the head last, and what they leave behind."""
        for daemon in reversed(self.nodes.values()):
            children = psutil.Process(daemon.pid).children(recursive=True)
            daemon.terminate()
            try:
                daemon.wait(10)
            except subprocess.TimeoutExpired:
                daemon.kill()
                daemon.wait()
            for child in psutil.wait_procs(children, timeout=5)[1]:
                child.kill()

    def ask(self, *arguments: str, **environment: str) -> subprocess.CompletedProcess[str]:
        """`ray ARGUMENTS`"""
        return subprocess.run(
            [RAY, *arguments], env=self.environment | environment, capture_output=True, text=True, check=False,
            timeout=120,
        )  # fmt: skip

    def shows(self, pattern: str, timeout: float = 60) -> bool:
        """Whether the head's page for Prometheus, which is some seconds behind, comes to hold the pattern."""
        deadline = time.monotonic() + timeout
        while time.monotonic() < deadline:
            with urllib.request.urlopen(f"http://{HEAD}:{self.exporter}/metrics", timeout=30) as page:
                if re.search(pattern, str(page.read(), "utf-8")):
                    return True
            time.sleep(1)
        return False

    def submit(self, *arguments: str, output: Path, script: str = "launch/ray_train.py") -> subprocess.Popen[str]:
        """`ray job submit` of a script, which streams the job's log to `output`."""
        command = ["job", "submit", "--address", self.address, "--working-dir", ".", "--", sys.executable]
        with output.open("w") as file:
            return subprocess.Popen(
                [RAY, *command, script, *arguments], cwd=ROOT, env=self.environment, stdout=file,
                stderr=subprocess.STDOUT, text=True,
            )  # fmt: skip

    def _start(self, node: str, cpus: int, *options: str) -> None:
        with (self.folder / f"{node}.log").open("ab") as log:
            self.nodes[node] = subprocess.Popen(
                [RAY, "start", "--block", f"--node-ip-address={node}", f"--num-cpus={cpus}", STORE,
                 f"--dashboard-agent-listen-port={free_port()}", *options],
                env=self.environment, stdout=log, stderr=log, start_new_session=True,
            )  # fmt: skip


@contextmanager
def cluster(cpus: int) -> Iterator[Cluster]:
    """A head alone; its folder lies right below the temporary folder, since socket paths are limited to 107 bytes."""
    folder = Path(tempfile.mkdtemp(prefix="ray"))
    one = Cluster(folder)
    try:
        one.up(cpus)
        yield one
    finally:
        one.down()
        shutil.rmtree(folder, ignore_errors=True)
