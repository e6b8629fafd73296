"""Faults of processes and files, each with what it costs; those that need a cluster are in test_slurm.py."""

import json
import os
import re
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import psutil
import pytest
import toy
import yaml
from disks import tmpfs

from cclmpc_dist.benching.served import free_port
from cclmpc_dist.training.checkpoint import complete_steps

ROOT = Path(__file__).resolve().parent.parent
LAST = "checkpoints/step-000000020"


def write(folder: Path, raw: dict[str, Any]) -> str:
    path = folder / "c.yaml"
    path.write_text(yaml.safe_dump(raw))
    return str(path)


def settings(corpus: Path, runs: Path) -> dict[str, Any]:
    return toy.settings(corpus, runs, ema=0.9, model__dropout=0.5, data__workers=2)


def torchrun(script: str, *arguments: str, **environment: str) -> subprocess.Popen[str]:
    """Two ranks that are started again once."""
    restartable = {"TORCH_DISABLE_SHARE_RDZV_TCP_STORE": "1"}
    return subprocess.Popen(
        [
            *(sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2", "--max-restarts=1"),
            *(str(ROOT / script), *arguments),
        ],
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        env=os.environ | {"OMP_NUM_THREADS": "1"} | restartable | environment,
    )


@pytest.fixture(scope="module")
def straight(toy_corpus: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """Every tensor of the last checkpoint of a run that nothing interrupted."""
    folder = tmp_path_factory.mktemp("straight")
    code, said = toy.finish(torchrun("launch/train.py", write(folder, settings(toy_corpus, folder))))
    assert code == 0, said
    return toy.tensors(folder / "toy" / LAST)


def ranks(process: subprocess.Popen[str]) -> dict[int, psutil.Process]:
    """The agent's children by rank."""
    children = psutil.Process(process.pid).children()
    return {int(child.environ()["RANK"]): child for child in children if "RANK" in child.environ()}


@pytest.mark.cluster
@pytest.mark.parametrize("victim", [0, 1])
def test_a_killed_rank_costs_the_steps_since_the_checkpoint(
    victim: int, toy_corpus: Path, tmp_path: Path, straight: dict[str, Any]
) -> None:
    """torchrun starts every rank again."""
    process = torchrun("launch/train.py", write(tmp_path, settings(toy_corpus, tmp_path)))
    toy.wait_for_step(process, tmp_path / "toy", 6)
    ranks(process)[victim].kill()
    code, said = toy.finish(process)
    assert code == 0, said
    assert said.count("going on from step") == 1
    toy.assert_same(straight, toy.tensors(tmp_path / "toy" / LAST))


def test_restarts_that_cannot_work_are_refused(toy_corpus: Path, tmp_path: Path) -> None:
    configuration = write(tmp_path, settings(toy_corpus, tmp_path))
    process = torchrun("launch/train.py", configuration, TORCH_DISABLE_SHARE_RDZV_TCP_STORE="0")
    code, said = toy.finish(process)
    assert code == 1
    assert said.count("cclmpc: torchrun --max-restarts 1 cannot start ranks again") == 2, said  # once each attempt


@pytest.mark.cluster
@pytest.mark.parametrize("fault", ["kill:rename:0:8", "kill:file:1:8"])
def test_a_crash_during_a_save_costs_that_save(
    fault: str, toy_corpus: Path, tmp_path: Path, straight: dict[str, Any]
) -> None:
    """Rank 0 between manifest and rename; rank 1 before its file."""
    configuration = write(tmp_path, settings(toy_corpus, tmp_path))
    process = torchrun("tests/faulty.py", configuration, FAULT=f"{fault}:{tmp_path / 'happened'}")
    code, said = toy.finish(process)
    assert code == 0, said
    assert (tmp_path / "happened").exists()
    assert "going on from step 4" in said
    toy.assert_same(straight, toy.tensors(tmp_path / "toy" / LAST))


@pytest.mark.cluster
def test_a_hang_costs_the_steps_since_the_checkpoint(
    toy_corpus: Path, tmp_path: Path, straight: dict[str, Any]
) -> None:
    """The ranks end by themselves, and torchrun starts them again."""
    configuration = write(tmp_path, settings(toy_corpus, tmp_path) | {"hang_seconds": 5})
    process = torchrun("tests/faulty.py", configuration, FAULT=f"hang:batch:1:6:{tmp_path / 'happened'}")
    code, said = toy.finish(process)
    assert code == 0, said
    assert said.count("cclmpc: step 7 stands still for 5 s: the others wait for rank 1") == 1
    assert said.count("going on from step") == 1
    toy.assert_same(straight, toy.tensors(tmp_path / "toy" / LAST))


@pytest.mark.cluster
def test_sigterm_to_the_agent_costs_the_steps_since_the_checkpoint(
    toy_corpus: Path, tmp_path: Path, straight: dict[str, Any]
) -> None:
    configuration = write(tmp_path, settings(toy_corpus, tmp_path))
    process = torchrun("launch/train.py", configuration)
    toy.wait_for_step(process, tmp_path / "toy", 6)
    process.terminate()
    assert toy.finish(process)[0] != 0
    stopped = complete_steps(tmp_path / "toy" / "checkpoints")[-1]
    code, said = toy.finish(torchrun("launch/train.py", configuration))
    assert code == 0, said
    assert f"going on from step {stopped}" in said
    toy.assert_same(straight, toy.tensors(tmp_path / "toy" / LAST))


class Agents:
    """torchrun on one node or two, with a rank each; the first holds the store, the second may come and go."""

    def __init__(self, folder: Path, configuration: str) -> None:
        self.output, self.configuration, self.port = folder / "output", configuration, free_port()

    def start(self, host: bool) -> subprocess.Popen[bytes]:
        conf = f"is_host={str(host).lower()},last_call_timeout=5"  # how long it waits for a second node
        meeting = ["--rdzv-backend=c10d", f"--rdzv-endpoint=localhost:{self.port}", f"--rdzv-conf={conf}"]
        command = [sys.executable, "-m", "torch.distributed.run", "--nnodes=1:2", "--max-restarts=3", *meeting]
        with self.output.open("ab") as output:
            return subprocess.Popen(
                [*command, str(ROOT / "launch/train.py"), self.configuration], stdout=output, stderr=output,
                env=os.environ | {"OMP_NUM_THREADS": "1", "TORCH_DISABLE_SHARE_RDZV_TCP_STORE": "1"},
            )  # fmt: skip

    def starts(self, times: int) -> list[int]:
        """Numbers of ranks that the run was started on so far, once these are so many."""
        deadline = time.monotonic() + 120
        while len(found := re.findall(r"on (\d) process", self.output.read_text())) < times:
            assert time.monotonic() < deadline, self.output.read_text()
            time.sleep(0.1)
        return [int(number) for number in found]


@pytest.mark.cluster
def test_a_node_that_goes_and_one_that_comes_change_the_world_size(toy_corpus: Path, tmp_path: Path) -> None:
    """torchrun --nnodes 1:2. Each step is taken once, on the stream positions that its number says."""
    raw = toy.settings(toy_corpus, tmp_path, budget__images=120_000, checkpoint__every_steps=5)
    agents = Agents(tmp_path, write(tmp_path, raw))
    first, second = agents.start(host=True), agents.start(host=False)
    toy.wait_for_step(first, tmp_path / "toy", 6)
    toy.kill(second)
    assert agents.starts(2) == [2, 1]
    toy.wait_for_step(first, tmp_path / "toy", toy.steps_logged(tmp_path / "toy") + 10)
    second = agents.start(host=False)
    assert agents.starts(3) == [2, 1, 2]
    toy.wait_for_step(first, tmp_path / "toy", toy.steps_logged(tmp_path / "toy") + 10)
    (tmp_path / "toy" / "preempt").touch()
    assert [toy.finish(agent)[0] for agent in (first, second)] == [0, 0], agents.output.read_text()
    logged = [json.loads(line) for line in (tmp_path / "toy" / "metrics.jsonl").read_text().splitlines()]
    assert [line["step"] for line in logged] == list(range(1, len(logged) + 1))
    assert all(line["data/unlabelled_epoch"] == line["step"] / 2 for line in logged)


@pytest.mark.cluster
def test_a_torn_checkpoint_is_refused_and_the_one_before_it_serves(toy_corpus: Path, tmp_path: Path) -> None:
    raw = toy.settings(toy_corpus, tmp_path, method="supervised", budget__images=60)
    configuration = write(tmp_path, raw)
    toy.run(1, "train", configuration)
    before, torn = complete_steps(tmp_path / "toy" / "checkpoints")
    folder = tmp_path / "toy" / "checkpoints" / f"step-{torn:09d}"
    whole = {name: value.clone() for name, value in toy.tensors(folder).items()}  # of a file that is harmed
    model = folder / "model.safetensors"
    model.write_bytes(model.read_bytes()[:-1])
    code, said = toy.finish(toy.launch(1, "train", configuration))
    assert code == 2
    assert f"remove {folder} to go on from step {before}" in said
    for file in folder.iterdir():
        file.unlink()
    folder.rmdir()
    assert f"going on from step {before}" in toy.run(1, "train", configuration)
    toy.assert_same(whole, toy.tensors(folder))


@pytest.fixture
def read_only(tmp_path: Path) -> Iterator[Path]:
    """A file system that nobody can write to."""
    with tmpfs(tmp_path / "disk", "ro") as folder:
        yield folder


@pytest.mark.parametrize("program", [["-m", "cclmpc_dist", "train"], ["launch/run_folder.py"]])
def test_a_read_only_run_folder_is_told_before_the_start(
    program: list[str], toy_corpus: Path, read_only: Path, tmp_path: Path
) -> None:
    configuration = write(tmp_path, toy.settings(toy_corpus, read_only))
    done = run_script(*program, configuration)
    assert done.returncode == 2
    assert done.stderr == f"cclmpc: {read_only}/toy: cannot write there (Read-only file system): " \
                          "choose another name or runs\n"  # fmt: skip


def run_script(*arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run([sys.executable, *arguments], cwd=ROOT, capture_output=True, text=True, check=False)


def test_a_batch_job_finds_its_run_folder_without_old_requests(toy_corpus: Path, tmp_path: Path) -> None:
    configuration = write(tmp_path, toy.settings(toy_corpus, tmp_path))
    folder = tmp_path / "named"
    folder.mkdir()
    for name in ("preempt", "preempted", "metrics.jsonl"):
        (folder / name).touch()
    done = run_script("launch/run_folder.py", configuration, "name=named")
    assert (done.returncode, done.stdout, done.stderr) == (0, f"{folder}\n", "")
    assert os.listdir(folder) == ["metrics.jsonl"]
    done = run_script("launch/run_folder.py", configuration, "optim.lr=-1", "ema=2")
    assert done.returncode == 2
    assert ["optim.lr" in line for line in done.stderr.splitlines()] == [True, False]


def test_the_rendezvous_is_refused_or_moved() -> None:
    done = run_script("launch/rendezvous.py", "nowhere.invalid", "7")
    assert (done.returncode, done.stderr.count("\n")) == (2, 1)
    assert done.stderr.startswith("cclmpc: nowhere.invalid: the first node's name has no address here: set HEAD to")
    job = next(job for job in range(1, 100) if all(free(20_000 + job + more) for more in (0, 1)))
    assert run_script("launch/rendezvous.py", "localhost", str(job)).stdout == f"localhost:{20_000 + job}\n"
    with socket.create_server(("127.0.0.1", 20_000 + job)):
        assert run_script("launch/rendezvous.py", "localhost", str(job)).stdout == f"localhost:{20_001 + job}\n"
    assert run_script("launch/rendezvous.py", "localhost", str(job + 10_000)).stdout == f"localhost:{20_000 + job}\n"


def free(port: int) -> bool:
    with socket.socket() as probe:
        return probe.connect_ex(("127.0.0.1", port)) != 0
