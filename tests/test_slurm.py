"""slurm/train_la.sh on a real Slurm: whatever ends it, it comes back and ends with the same bits."""

import json
import os
import re
import shutil
import socket
import sys
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import psutil
import pytest
import toy
import yaml
from slurm_cluster import Cluster, until

from cclmpc_dist.benching.served import free_port

ROOT = Path(__file__).resolve().parent.parent
SCRIPT, ON_RAY = "slurm/train_la.sh", "slurm/train_la_ray.sh"
LAST = "checkpoints/step-000000020"

pytestmark = [pytest.mark.cluster, pytest.mark.timeout(600)]
needs_ray = pytest.mark.skipif(find_spec("ray") is None, reason="needs the ray extra, which make test-cluster installs")


@pytest.fixture(scope="module")
def straight(slurm: Cluster, toy_corpus: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """Every tensor of the last checkpoint of a run that nothing interrupted."""
    run = Run(slurm, toy_corpus, tmp_path_factory.mktemp("straight"))
    job = run.cluster.wait_for(run.submit(), "COMPLETED", "FAILED", "NODE_FAIL")
    assert job["JobState"] == "COMPLETED", run.said()
    assert job["Restarts"] == "0"
    assert "on 2 processes" in run.said()
    return toy.tensors(run.folder / LAST)


class Run:
    """A toy run of the batch script: its configuration, its folder, what it said."""

    def __init__(self, cluster: Cluster, corpus: Path, runs: Path, **changes: Any) -> None:
        self.cluster, self.folder, self.output = cluster, runs / "toy", runs / "output"
        raw = toy.settings(corpus, runs, ema=0.9, model__dropout=0.5, **changes)
        self.configuration = runs / "c.yaml"
        self.configuration.write_text(yaml.safe_dump(raw))

    def submit(self, *overrides: str, option: str = "--requeue", script: str = SCRIPT, **environment: str) -> int:
        """Its job's number."""
        return self.cluster.submit(
            f"--output={self.output}", option, script, str(self.configuration), *overrides, cwd=ROOT,
            **{"PYTHON": sys.executable, "INTERFACE": "lo"} | environment,
        )  # fmt: skip

    def said(self) -> str:
        return self.output.read_text() if self.output.exists() else "nothing was printed"

    def reach(self, step: int) -> None:
        until(lambda: toy.steps_logged(self.folder) >= step, f"step {step}", 150, detail=self.said)

    def end(self, number: int) -> None:
        state = self.cluster.wait_for(number, "COMPLETED", "FAILED", "NODE_FAIL", "CANCELLED")["JobState"]
        assert state == "COMPLETED", self.said()

    def finish(self, number: int, straight: dict[str, Any]) -> None:
        """It comes to its end, with the bits of a run that nothing interrupted."""
        self.end(number)
        toy.assert_same(straight, toy.tensors(self.folder / LAST))

    def ranks(self) -> dict[int, psutil.Process]:
        """Its processes by rank."""
        found = {}
        for one in psutil.process_iter():
            try:
                if str(self.configuration) in one.cmdline() and "RANK" in one.environ():
                    found[int(one.environ()["RANK"])] = one
            except psutil.Error:
                continue
        return found


@pytest.fixture
def run(slurm: Cluster, toy_corpus: Path, tmp_path: Path) -> Run:
    return Run(slurm, toy_corpus, tmp_path)


def test_asked_to_go_it_saves_is_queued_again_and_ends_alike(
    slurm: Cluster, toy_corpus: Path, tmp_path: Path, straight: dict[str, Any]
) -> None:
    """The signal that Slurm sends to the batch shell before the time is up. Only the request makes it save."""
    run = Run(slurm, toy_corpus, tmp_path, checkpoint__every_steps=0)
    number = run.submit()
    run.reach(3)
    assert run.ranks()[0].environ()["CCLMPC_GRACE_SECONDS"] == "180"
    slurm.ask("scancel", "--signal=USR2", "--batch", str(number))
    slurm.start_again(number)
    stopped = int(re.findall(r"saved at step (\d+): queued again", run.said())[0])
    assert 3 <= stopped < 20
    run.finish(number, straight)
    assert f"going on from step {stopped}" in run.said(), "nothing is lost"
    assert "starting at step 0" in run.said(), "the output is continued, not overwritten"
    assert slurm.job(number)["Restarts"] == "1"
    assert not [name for name in ("preempt", "preempted") if (run.folder / name).exists()]


def test_a_job_of_higher_priority_preempts_it(
    slurm: Cluster, toy_corpus: Path, tmp_path: Path, straight: dict[str, Any]
) -> None:
    """Slurm itself sends the signal, ends the grace period early since the job left, and starts the other job."""
    run = Run(slurm, toy_corpus, tmp_path, checkpoint__every_steps=0)
    number = run.submit()
    run.reach(3)
    urgent = slurm.submit(
        "--partition=high", "--nodes=2", "--exclusive", "--output=/dev/null", "--wrap=true", cwd=tmp_path
    )
    slurm.wait_for(urgent, "COMPLETED")
    assert "queued again" in run.said()
    slurm.start_again(number)
    run.finish(number, straight)


@pytest.mark.parametrize("rank", [0, 1])
def test_a_killed_rank_is_started_again_in_the_job(rank: int, run: Run, straight: dict[str, Any]) -> None:
    number = run.submit()
    run.reach(6)
    run.ranks()[rank].kill()
    run.finish(number, straight)
    assert run.cluster.job(number)["Restarts"] == "0"
    assert re.search(r"going on from step (4|8|12|16)", run.said())


def test_a_killed_agent_ends_the_job_and_it_is_queued_again(run: Run, straight: dict[str, Any]) -> None:
    number = run.submit()
    run.reach(6)
    agent = run.ranks()[1].parent()
    assert agent is not None
    agent.kill()
    run.cluster.start_again(number)
    assert "after a new checkpoint: queued again" in run.said()
    run.finish(number, straight)


def test_sigterm_to_the_agents_costs_the_steps_since_the_checkpoint(run: Run, straight: dict[str, Any]) -> None:
    """What a cluster sends that preempts without the signal of --signal."""
    number = run.submit()
    run.reach(6)
    run.cluster.ask("scancel", "--signal=TERM", str(number))
    run.cluster.start_again(number)
    assert "after a new checkpoint: queued again" in run.said()
    run.finish(number, straight)


def test_a_node_lost_during_a_save_costs_that_save(run: Run, straight: dict[str, Any], tmp_path: Path) -> None:
    """Slurm queues the job again by itself; rank 1 hangs in its second save until its node is gone."""
    script = tmp_path / "train_la.sh"
    script.write_text((ROOT / SCRIPT).read_text().replace("launch/train.py", "tests/faulty.py"))
    happened = tmp_path / "happened"
    number = run.submit(script=str(script), FAULT=f"hang:file:1:8:{happened}")
    until(happened.exists, "rank 1 hangs in a save", 150, detail=run.said)
    run.cluster.lose("node2")
    run.cluster.wait_for(number, "PENDING")
    assert not (run.folder / "checkpoints/step-000000008").exists()
    run.cluster.start("slurmd-node2", "-D", "-N", "node2")
    run.cluster.start_again(number)
    run.finish(number, straight)
    assert "going on from step 4" in run.said()


def test_after_the_loss_of_a_node_it_goes_on_with_the_one_that_is_left(run: Run) -> None:
    """Each step is taken once, on the stream positions that its number says."""
    number = run.submit()
    run.reach(6)
    run.cluster.lose("node2")
    run.cluster.wait_for(number, "PENDING")
    run.cluster.ask("scontrol", "update", f"JobId={number}", "NumNodes=1", "NumTasks=1", "NumCPUs=1")
    run.cluster.start_again(number)
    run.end(number)
    run.cluster.start("slurmd-node2", "-D", "-N", "node2")
    first, second = run.said().split("going on from step ")
    assert "on 2 processes" in first
    assert "on 1 process," in second
    logged = [json.loads(line) for line in (run.folder / "metrics.jsonl").read_text().splitlines()]
    assert [line["step"] for line in logged] == list(range(1, 21))
    assert all(line["data/unlabelled_epoch"] == line["step"] / 2 for line in logged)


def test_a_cancelled_job_stays_cancelled(run: Run) -> None:
    number = run.submit()
    run.reach(6)
    run.cluster.ask("scancel", str(number))
    run.cluster.wait_for(number, "CANCELLED")
    until(lambda: not run.ranks(), "its processes are gone")
    assert "queued again" not in run.said()
    assert run.cluster.job(number)["JobState"] == "CANCELLED"


def test_a_taken_port_gives_way_to_the_next(run: Run) -> None:
    number = run.submit("budget.images=24", option="--hold")
    with socket.create_server(("", 20_000 + number % 10_000)):
        run.cluster.ask("scontrol", "release", str(number))
        run.end(number)


def image(folder: Path) -> dict[str, str]:
    """What makes a job take an image: a stand-in for apptainer notes in `calls` what it was asked for, and runs it."""
    tool = folder / "apptainer"
    tool.write_text(f'#!/bin/bash\necho "$1 $2 $3 $4" >> {folder}/calls\nexec {sys.executable} "${{@:4}}"\n')
    tool.chmod(0o755)
    return {"CONTAINER": "our.sif", "PYTHON": "/nowhere/python", "PATH": f"{folder}:{os.environ['PATH']}"}


def test_with_an_image_all_python_runs_in_it(run: Run, tmp_path: Path) -> None:
    number = run.submit("budget.images=24", **image(tmp_path))
    run.end(number)
    programs = ["launch/run_folder.py", "launch/rendezvous.py", "-m", "-m"]
    assert (tmp_path / "calls").read_text().splitlines() == [f"exec our.sif python {name}" for name in programs]


@pytest.mark.parametrize(
    ("script", "override", "head", "said"),
    [
        (SCRIPT, "optim.lr=0.01", "nowhere.invalid", "nowhere.invalid: the first node's name has no address here"),
        (ON_RAY, "optim.lr=0.01", "nowhere.invalid", "nowhere.invalid: the first node's name has no address here"),
        (SCRIPT, "optim.lr=fast", "127.0.0.1", "optim.lr = 'fast'"),
    ],
)
def test_what_cannot_work_ends_in_one_line(script: str, override: str, head: str, said: str, run: Run) -> None:
    number = run.submit(override, script=script, HEAD=head)
    assert run.cluster.wait_for(number, "FAILED", "COMPLETED")["ExitCode"] == "2:0"
    assert said in run.said()
    assert run.said().count("\n") == 1


def test_doctor_looks_at_both_nodes(slurm: Cluster, tmp_path: Path) -> None:
    agents = (
        f"{sys.executable} -m torch.distributed.run --nnodes 2 --nproc-per-node 1 --node-rank $SLURM_NODEID "
        f"--master-addr 127.0.0.2 --master-port {free_port()} -m cclmpc_dist doctor --folder {tmp_path}"
    )
    script, output = tmp_path / "doctor.sh", tmp_path / "output"
    script.write_text(f"#!/bin/bash\nexport GLOO_SOCKET_IFNAME=lo OMP_NUM_THREADS=1\nsrun bash -c '{agents}'\n")
    nodes = ("--nodes=2", "--ntasks-per-node=1", f"--output={output}")
    job = slurm.wait_for(slurm.submit(*nodes, str(script), cwd=ROOT), "COMPLETED", "FAILED", "NODE_FAIL")
    assert job["JobState"] == "COMPLETED", output.read_text()
    assert output.read_text().count("2 ranks on 1 machine met") == 1  # both nodes are this host
    assert "taken by rank 0 and refused to the others" in output.read_text()


def test_plain_srun_is_told_of_torchrun(slurm: Cluster, tmp_path: Path) -> None:
    output = tmp_path / "output"
    command = f"srun --ntasks=2 {sys.executable} -m cclmpc_dist doctor --folder {tmp_path / 'runs'}"
    number = slurm.submit("--nodes=2", f"--output={output}", f"--wrap={command}", cwd=ROOT)
    assert slurm.wait_for(number, "COMPLETED", "FAILED")["ExitCode"] == "2:0", output.read_text()
    assert output.read_text().count("cclmpc: srun started 2 processes that do not know of one another") == 2


# ---- the same job on a Ray cluster of its own --------------------------------------------------------------------


@needs_ray
def test_on_ray_asked_to_go_it_comes_back_and_ends_with_the_bits_of_torchrun(
    slurm: Cluster, toy_corpus: Path, tmp_path: Path, straight: dict[str, Any]
) -> None:
    run = Run(slurm, toy_corpus, tmp_path, checkpoint__every_steps=0)
    number = run.submit(script=ON_RAY)
    run.reach(3)
    daemons = slurm.of(number)
    assert {one.name() for one in daemons} >= {"gcs_server", "raylet"}
    slurm.ask("scancel", "--signal=USR2", "--batch", str(number))
    slurm.start_again(number)
    stopped = int(re.findall(r"saved at step (\d+): queued again", run.said())[0])
    assert 3 <= stopped < 20
    assert not [one for one in daemons if one.is_running()], "the second start has a Ray of its own"
    run.reach(stopped + 1)
    daemons = slurm.of(number)
    run.finish(number, straight)
    assert f"going on from step {stopped}" in run.said(), "nothing is lost"
    assert "starting at step 0" in run.said(), "the output is continued, not overwritten"
    assert_gone(daemons)
    assert not Path(f"/tmp/ray-{number}").exists()


@needs_ray
def test_on_ray_a_killed_driver_fails_the_job_and_leaves_no_daemon(
    slurm: Cluster, toy_corpus: Path, tmp_path: Path
) -> None:
    """All of whose Python runs in an image. Without a checkpoint of its own it is not queued again."""
    run = Run(slurm, toy_corpus, tmp_path, checkpoint__every_steps=0)
    number = run.submit(script=ON_RAY, **image(tmp_path))
    run.reach(2)
    daemons = slurm.of(number)
    driver = next(one for one in daemons if "launch/ray_train.py" in one.cmdline())
    driver.kill()
    assert slurm.wait_for(number, "FAILED", "COMPLETED", "PENDING")["ExitCode"] == "137:0", run.said()
    assert_gone(daemons)
    programs = ["launch/run_folder.py", "launch/rendezvous.py", "-m", "-m", "launch/ray_train.py"]
    asked = (tmp_path / "calls").read_text().splitlines()
    assert sorted(asked) == sorted(f"exec our.sif python {name}" for name in programs)


@needs_ray
def test_on_ray_a_node_that_loses_its_ray_ends_the_job_and_it_is_queued_again(run: Run) -> None:
    number = run.submit(script=ON_RAY)
    run.reach(6)
    daemons = run.cluster.of(number)
    next(one for one in run.cluster.on("node2") if one.name() == "raylet").kill()
    run.cluster.wait_for(number, "PENDING")
    assert "Ray ended before the run" in run.said()
    assert "after a new checkpoint: queued again" in run.said()
    assert_gone(daemons)
    assert "raylet [exit code=-9]" in (run.folder / "ray.log").read_text()
    run.cluster.ask("scancel", str(number))
    shutil.rmtree(f"/tmp/ray-{number}")


def assert_gone(daemons: list[psutil.Process]) -> None:
    assert not psutil.wait_procs(daemons, 30)[1]


def test_bench_scaling_makes_one_report_of_one_and_two_nodes(slurm: Cluster, toy_corpus: Path, tmp_path: Path) -> None:
    batches = {"data__batch_labelled": 2, "data__batch_unlabelled": 2}
    run = Run(slurm, toy_corpus, tmp_path, **batches)
    environment = {"STEPS": "2", "ROUNDS": "1", "RESULTS": str(tmp_path / "results")}
    number = run.submit(script="slurm/bench_scaling.sh", **environment)
    job = slurm.wait_for(number, "COMPLETED", "FAILED", "NODE_FAIL")
    assert job["JobState"] == "COMPLETED", run.said()
    report = json.loads((tmp_path / "results" / "scale.json").read_text())
    assert {r["case"] for r in report["records"] if r["variant"] == "sizes"} == {"weak 1", "weak 2"}
    assert {r["case"] for r in report["records"] if r["variant"] == "predicted"} == {"weak 2"}
    assert "Predicted weak scaling" in run.said()
    assert (tmp_path / "results" / "scale.png").exists()
    assert not run.folder.exists(), "the run of that name is left alone"
