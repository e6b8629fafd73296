"""`cclmpc doctor`: alone, on two ranks, and what it says where something is wrong."""

import os
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
import toy
from ranks import run_ranks
from torch import Tensor, nn

from cclmpc_dist.benching.served import free_port
from cclmpc_dist.distributed import checks, doctor, folder_checks
from cclmpc_dist.distributed.checks import Finding
from cclmpc_dist.models import vnet

CPU = torch.device("cpu")
CHECKS = ["rendezvous", "versions", "GPUs", "shared memory", "cores", "bf16 conv3d", "folder write", "folder read",
          "folder", "folder space", "folder shared", "folder rename", "folder lock", "all-reduce"]  # fmt: skip


def python(*arguments: str, **environment: str) -> tuple[int, str]:
    """Exit code and output of `python -m ARGUMENTS` on one OMP thread."""
    done = subprocess.run(
        [sys.executable, "-m", *arguments],
        capture_output=True,
        text=True,
        timeout=120,
        env=os.environ | {"OMP_NUM_THREADS": "1"} | environment,
        check=False,
    )
    return done.returncode, done.stdout + done.stderr


def lines(said: str) -> dict[str, str]:
    """Check -> state, ranks and text, of the table in an output."""
    rows = [line for line in said.splitlines() if line.startswith(("OK ", "warning ", "failed "))]
    split = [(row.split("  ", 1)[0], row.split("  ", 1)[1].strip().partition("  ")) for row in rows]
    return {check: f"{state} {rest.strip()}" for state, (check, _, rest) in split}


def test_a_package_that_is_not_installed_is_no_failure(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(checks, "PACKAGES", ("torch", "no-such-package"))
    (found,) = checks.versions()
    assert found.state == "warning"
    assert found.text.endswith(f"torch {torch.__version__}, no-such-package not installed")


def test_alone_it_looks_at_everything_and_leaves_nothing(tmp_path: Path) -> None:
    code, said = toy.finish(toy.launch(1, "doctor", "--folder", str(tmp_path / "runs")))
    found = lines(said)
    assert code == 0, said
    assert list(found) == CHECKS
    assert f"torch {torch.__version__}" in found["versions"]
    assert "atomic: 200 replaced files" in found["folder rename"]
    assert list(tmp_path.iterdir()) == []


def test_two_ranks_meet_and_rank_zero_prints(tmp_path: Path) -> None:
    said = toy.run(2, "doctor", "--folder", str(tmp_path))
    found = lines(said)
    assert set(found) == set(CHECKS)
    assert said.count("rendezvous") == 1
    assert f"2 ranks on 1 machine met: {socket.gethostname()} (ranks 0-1)" in found["rendezvous"]
    assert "refused to the others" in found["folder lock"]
    assert "files of 2 ranks seen" in found["folder shared"]
    assert "GB/s on a ring (gloo, 32 MiB" in found["all-reduce"]
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("world", [1, 2])
def test_a_folder_that_cannot_be_written_fails_and_the_rest_is_told(world: int, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    code, said = toy.finish(toy.launch(world, "doctor", "--folder", str(tmp_path / "file" / "runs")))
    found = lines(said)
    assert code == 1, said
    assert found["folder write"].startswith("failed all")
    assert "Not a directory" in found["folder write"]
    assert "not looked at" in found["folder rename"]
    assert found["all-reduce"].startswith("OK")
    assert "1 failed" in said


def test_a_port_that_is_taken_is_told_in_one_line() -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = str(taken.getsockname()[1])
        where = {"RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
        code, said = python("cclmpc_dist", "doctor", **where)
    assert code == 1, said
    assert "rank 0 of 2 lost the others" in lines(said)["rendezvous"]
    assert "Traceback" not in said


@pytest.mark.slow
def test_a_lost_rank_leaves_the_others_with_what_they_found(tmp_path: Path) -> None:
    where = {"WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port()), "OMP_NUM_THREADS": "1"}
    dies = "import os; from cclmpc_dist.distributed import checks as c, doctor; from pathlib import Path; "
    dies += f"c.bf16_convolution = lambda _: os._exit(9); doctor.examine(Path({str(tmp_path)!r}))"
    environment = os.environ | where | {"RANK": "1", "LOCAL_RANK": "1"}
    with subprocess.Popen([sys.executable, "-c", dies], env=environment) as other:
        code, said = python("cclmpc_dist", "doctor", "--folder", str(tmp_path), **where, RANK="0", LOCAL_RANK="0")
    found = lines(said)
    assert other.returncode == 9
    assert code == 1, said
    assert found["versions"].startswith("OK")
    assert found["bf16 conv3d"].startswith("OK")
    assert "rank 0 of 2 lost the others" in said


def look(rank: int, world: int, folder: str, patience: float, loose_lock: bool) -> dict[str, str]:
    """All checks on a rank; {rank} in `folder` is its number."""
    folder_checks.PATIENCE = patience
    if loose_lock:
        folder_checks.fcntl.flock = lambda *_: None
    found: list[Finding] = []
    doctor._look(Path(folder.format(rank=rank)), CPU, found)
    return {finding.check: f"{finding.state}: {finding.text}" for finding in found}


def test_one_rank_that_cannot_write_holds_up_no_other(tmp_path: Path) -> None:
    (tmp_path / "0").mkdir()
    (tmp_path / "1").write_text("")
    first, second = run_ranks(look, 2, str(tmp_path / "{rank}" / "runs"), 1.0, False)
    assert first["folder write"].startswith("OK")
    assert second["folder write"].startswith("failed")
    assert first["folder rename"] == second["folder rename"] == "warning: not looked at: a rank cannot write there"
    assert first["all-reduce"].startswith("OK")
    assert second["all-reduce"].startswith("OK")


@pytest.mark.slow
def test_ranks_with_folders_of_their_own_are_told(tmp_path: Path) -> None:
    for rank in "01":
        (tmp_path / rank).mkdir()
    first, second = run_ranks(look, 2, str(tmp_path / "{rank}"), 0.5, False)
    assert first["folder shared"] == "failed: files of rank 1 unseen"
    assert second["folder shared"] == "failed: files of rank 0 unseen"
    assert second["folder rename"].startswith("failed: not seen")


def test_a_lock_that_keeps_nobody_out_is_told(tmp_path: Path) -> None:
    first, second = run_ranks(look, 2, str(tmp_path), 30.0, True)
    assert first["folder lock"].startswith("OK")
    assert second["folder lock"] == "failed: taken by this rank too, while rank 0 holds it"


def test_files_torn_while_they_are_replaced_are_told(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    def in_halves(room: Path) -> list[Finding]:
        for number in (1, 2, folder_checks.RENAMES):
            with (room / "page").open("wb", buffering=0) as file:
                file.write(bytes([number]) * (folder_checks.PAGE // 2))
                time.sleep(0.2)
                file.write(bytes([number]) * (folder_checks.PAGE // 2))
        (room / "step").mkdir()
        return []

    monkeypatch.setattr(folder_checks, "_write_pages", in_halves)
    found = {finding.check: finding for finding in folder_checks.look(tmp_path, CPU)}
    assert found["folder rename"].state == "failed"
    assert "missing or torn" in found["folder rename"].text


class Wrong(nn.Conv3d):
    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = super().forward(x)
        return 1.1 * out if torch.is_autocast_enabled("cpu") else out


def test_wrong_bf16_convolutions_of_the_models_fail(monkeypatch: pytest.MonkeyPatch) -> None:
    assert checks.bf16_convolution(CPU)[0].state == "OK"
    monkeypatch.setattr(vnet, "Conv3d", Wrong)
    found = checks.bf16_convolution(CPU)[0]
    assert found.state == "failed"
    assert "wrong for maps of 2x2x1, 2x4x4, 16x16x16" in found.text


def test_wrong_bf16_convolutions_of_torch_are_told(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(checks.nn, "Conv3d", Wrong)
    found = checks.bf16_convolution(CPU)[0]
    assert found.state == "OK"
    assert "torch's own is wrong for 2x2x1, 2x4x4, 16x16x16" in found.text


def test_what_a_check_raises_is_its_finding() -> None:
    found = checks.attempt("x", lambda: [Finding("x", str(1 // 0))], "mend it")
    assert found == [Finding("x", "ZeroDivisionError: integer division or modulo by zero", "failed", "mend it")]


@pytest.mark.parametrize(
    ("threads", "ranks", "state"), [(2, 2, "OK"), (4, 2, "warning"), (1, 2, "warning"), (3, 1, "OK")]
)
def test_threads_that_do_not_fit_the_cores_are_told(threads: int, ranks: int, state: str) -> None:
    everyone = [{"host": host, "device": "cpu", "cores": [0, 1, 2, 3], "quota": 4.0, "threads": threads}
                for host in ["a"] * ranks + ["b"]]  # fmt: skip
    assert checks.cores(everyone[0], everyone)[0].state == state


def test_a_rank_out_of_line_is_named() -> None:
    speeds = [[Finding("speed", "{:.0f} MB/s", value=value)] for value in (100.0, 90.0, 30.0, 110.0)]
    (usual, members), (slow, alone) = doctor.merged(speeds)
    assert (usual.state, usual.text, members) == ("OK", "90 to 110 MB/s", [0, 1, 3])
    assert (slow.state, slow.text, alone) == ("warning", "30 MB/s", [2])
    versions = [[Finding("versions", f"torch {version}")] for version in (1, 1, 2)]
    printed = doctor.table(doctor.merged(versions), 3).splitlines()
    assert printed[0].split() == ["OK", "versions", "ranks", "0-1", "torch", "1"]
    assert printed[1].startswith("warning  versions  rank 2")
    assert printed[2] == "3 ranks: 1 OK, 1 warning, 0 failed"
    assert doctor.ranks([0, 1, 2, 5, 7, 8]) == "ranks 0-2, 5, 7-8"


@pytest.mark.slow
def test_accelerate_launch_starts_it_on_two_ranks(tmp_path: Path) -> None:
    several = ["--multi_gpu", "--num_processes", "2", "--num_machines", "1"]
    fixed = ["--mixed_precision", "bf16", "--dynamo_backend", "no", "-m", "cclmpc_dist", "doctor", "--folder"]
    launcher = "accelerate.commands.launch"
    code, said = python(launcher, *several, *fixed, str(tmp_path), ACCELERATE_USE_CPU="true")
    assert code == 0, said
    assert "2 ranks on 1 machine met" in said
