"""benchmarks/gpu.py and gpu_step.py at toy size on the CPU, and their arithmetic."""

import json
import subprocess
import sys
import time
import weakref
from pathlib import Path

import psutil
import pytest
import toy
import yaml

from cclmpc_dist.config import Config

ROOT = Path(__file__).parent.parent
sys.path.append(str(ROOT / "benchmarks"))

import gpu  # noqa: E402
import gpu_step  # noqa: E402


def test_the_floor_is_the_larger_of_two_times() -> None:
    did = {"tflop": 2.0, "kept": 1024.0, "weights": 64.0}
    rate = {"bf16": 500e12, "TF32": 250e12, "float32": 50e12, "copy": 2**40}
    found = gpu_step.floor(did, rate)
    assert found["bf16 arithmetic"] == 0.004
    assert found["bf16 memory"] == found["TF32 memory"] / 2 + 2**20 * 256 / 2**40 == (2 * 1024 + 8 * 64) * 2**20 / 2**40
    assert found["bf16"] == found["bf16 arithmetic"]
    assert found["float32"] == 0.04
    assert gpu_step.floor(did | {"kept": 1e6}, rate)["bf16"] > 1


@pytest.mark.slow
def test_a_part_that_takes_too_long_is_asked_to_stop(tmp_path: Path) -> None:
    """And nothing that it started goes on, though it ignores the request."""
    deaf = "import signal, time; signal.signal(signal.SIGTERM, signal.SIG_IGN); print(flush=True); time.sleep(60)"
    saves = f"""
import signal, subprocess, sys
signal.signal(signal.SIGTERM, lambda *_: sys.exit(75))
child = subprocess.Popen([sys.executable, "-c", {deaf!r}], stdout=subprocess.PIPE)
child.stdout.readline()
print(child.pid, flush=True)
child.wait()"""
    assert gpu.take("train", ["-c", saves], tmp_path, 5.0)[0] == "stopped and saved: call it again"
    child, deadline = int((tmp_path / "train.log").read_text()), time.monotonic() + 10
    while _runs(child):
        assert time.monotonic() < deadline, "the part's child goes on"
        time.sleep(0.05)
    assert gpu.take("eval", ["-c", "print('why'); sys.exit(1)"], tmp_path, 30.0)[0] == "failed with exit code 1"
    assert "why" in (tmp_path / "eval.log").read_text()


def _runs(process: int) -> bool:
    try:
        return psutil.Process(process).status() != psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return False


def test_ua_mt_is_alone_in_memory(
    toy_corpus: Path, tmp_path: Path, alone: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Our trainer gives it its batch and is gone."""
    build, built = gpu_step.trained, []

    def noted(config: Config) -> gpu_step.Trained:
        trainer = build(config)
        built.extend([weakref.ref(trainer), weakref.ref(trainer.module)])
        return trainer

    monkeypatch.setattr(gpu_step, "trained", noted)
    few = {"data__batch_labelled": 2, "data__batch_unlabelled": 2}
    take, _ = gpu_step.step_of(toy.config(toy_corpus, tmp_path, **few), gpu_step.UAMT)
    assert [one() for one in built] == [None, None]
    take()


@pytest.mark.slow
def test_the_parts_of_a_lease(toy_corpus: Path, tmp_path: Path) -> None:
    """Training stops as it is asked to, by the file that stands for the signal, and goes on with the next call."""
    out, config = tmp_path / "out", tmp_path / "c.yaml"
    few = {"data__batch_labelled": 2, "data__batch_unlabelled": 2, "budget__images": 12}
    config.write_text(yaml.safe_dump(toy.settings(toy_corpus, tmp_path, **few)))
    (out / "gpu").mkdir(parents=True)
    (out / "gpu" / "preempt").touch()
    assert "train: stopped and saved" in _lease(config, toy_corpus, out, "gpu_step", "train")
    assert _values(out / "train.json")["ccl_mpc", "steps"] == 1
    said = _lease(config, toy_corpus, out, "train", "eval")
    assert "train: done" in said
    assert "eval: done" in said
    values = _values(out / "train.json")
    assert values["ccl_mpc", "steps"] == 3
    assert values["ccl_mpc", "minutes"] > 0
    values = _values(out / "gpu_step.json")
    assert values["floor", "seconds"] > 0
    assert values[gpu_step.OURS, "over_floor"] > 1
    assert values["all kernels", "milliseconds"] > 0
    assert values[gpu_step.UAMT, "seconds"] > 0


def _lease(config: Path, shards: Path, out: Path, *parts: str) -> str:
    command = [sys.executable, "benchmarks/gpu.py", str(shards), str(out), *parts, "--config", str(config), "--small"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + "".join(log.read_text() for log in out.glob("*.log"))
    return done.stdout


def _values(file: Path) -> dict[tuple[str, str], float]:
    """The first of each variant and metric; a floor's kind counts as "floor"."""
    found: dict[tuple[str, str], float] = {}
    for record in json.loads(file.read_text())["records"]:
        name = record["case"] if record["case"] == "floor" else record["variant"]
        found.setdefault((name, record["metric"]), record["value"])
    return found
