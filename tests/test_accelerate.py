"""configs/accelerate: what accelerate launch makes of them, and the same losses as under torchrun."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import toy
import yaml
from accelerate.commands.config.config_args import load_config_from_file
from accelerate.utils import DistributedType

from cclmpc_dist.benching.served import free_port
from cclmpc_dist.distributed import runtime
from cclmpc_dist.errors import InputError

CONFIGS = Path(__file__).resolve().parent.parent / "configs" / "accelerate"


@pytest.mark.parametrize(
    ("name", "machines", "processes", "precision"),
    [("cpu", 1, 2, "no"), ("one_node", 1, 8, "no"), ("nodes", 2, 16, "no"), ("bf16", 1, 8, "bf16")],
)
def test_accelerate_reads_it(name: str, machines: int, processes: int, precision: str) -> None:
    """Accelerate refuses keys that it does not know; only MULTI_GPU starts several processes."""
    found = load_config_from_file(str(CONFIGS / f"{name}.yaml"))
    assert (found.num_machines, found.num_processes, found.mixed_precision) == (machines, processes, precision)
    assert found.distributed_type == DistributedType.MULTI_GPU
    assert not found.use_cpu


def test_no_file_is_left_out() -> None:
    assert {file.stem for file in CONFIGS.iterdir()} == {"cpu", "one_node", "nodes", "bf16"}


def test_another_precision_than_the_launchers_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("ACCELERATE_MIXED_PRECISION", "bf16")
    with pytest.raises(InputError, match="precision = fp32, and accelerate launch was told mixed_precision = bf16"):
        runtime.start("fp32")


def _launch(name: str, *options: str) -> subprocess.Popen[str]:
    """`accelerate launch` with configs/accelerate/NAME.yaml and further options, which end in the command to run."""
    environment = {key: value for key, value in os.environ.items() if key not in ("RANK", "WORLD_SIZE", "MASTER_ADDR")}
    command = [sys.executable, "-m", "accelerate.commands.launch", "--config_file", str(CONFIGS / f"{name}.yaml")]
    return subprocess.Popen(
        [*command, *options], stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
        env=environment | {"OMP_NUM_THREADS": "1"},
    )  # fmt: skip


def _losses(run: Path) -> list[dict[str, float]]:
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    return [{name: value for name, value in line.items() if not name.startswith("perf/")} for line in lines]


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "precision", "machines"), [("cpu", "fp32", 1), ("bf16", "bf16", 1), ("nodes", "fp32", 2)]
)
def test_twenty_steps_are_those_of_torchrun(
    name: str, precision: str, machines: int, toy_corpus: Path, tmp_path: Path
) -> None:
    """To the last bit; two machines are two agents on the loopback."""
    (tmp_path / "c.yaml").write_text(yaml.safe_dump(toy.settings(toy_corpus, tmp_path, precision=precision)))
    train = ["train", str(tmp_path / "c.yaml")]
    toy.run(2, *train, "name=torchrun")
    meeting = ["--main_process_ip", "127.0.0.1", "--main_process_port", str(free_port())]
    agents = [
        _launch(name, "--num_processes", "2", "--machine_rank", str(rank), *meeting, "-m", "cclmpc_dist", *train)
        for rank in range(machines)  # accelerate's rank 0 alone looks whether the port is free
    ]
    ends = [toy.finish(agent) for agent in agents]
    assert [code for code, _ in ends] == [0] * machines, ends
    assert any("on 2 processes" in output for _, output in ends)
    expected = _losses(tmp_path / "torchrun")
    assert len(expected) == 20
    assert _losses(tmp_path / "toy") == expected
