"""`cclmpc bench` as a user types it: where its files may go, what it refuses before it measures, how it ends."""

import signal
import time
from collections.abc import Callable
from pathlib import Path

import psutil
import pytest
import toy
import yaml

from cclmpc_dist import cli_bench
from cclmpc_dist.benching import files
from cclmpc_dist.errors import InputError

RESULTS = Path(__file__).resolve().parent.parent / "benchmarks" / "results"
SCALE = RESULTS / "scale_demo.json"


def refused(*arguments: object) -> str:
    """The one line of a command that ends with exit code 2."""
    code, said = toy.finish(toy.launch(1, "bench", *map(str, arguments)))
    assert code == 2, said
    assert said.count("\n") == 1, said
    return said


@pytest.fixture(params=["other", "folder", "foreign", "nowhere"])
def wrong(request: pytest.FixtureRequest, tmp_path: Path) -> tuple[Path, str]:
    """A place for a report that cannot be one, and what is said of it."""
    (tmp_path / "dir.json").mkdir()
    (tmp_path / "manifest.json").write_text("{}")
    cases: dict[str, tuple[Path, str]] = {
        "other": (tmp_path / "b.md", "name a file that ends in .json"),
        "folder": (tmp_path / "dir.json", "name a file that ends in .json"),
        "foreign": (tmp_path / "manifest.json", "is there and no report of cclmpc bench"),
        "nowhere": (tmp_path / "manifest.json" / "b.json", "cannot be written"),
    }
    return cases[request.param]


def test_a_place_that_no_report_can_go_to_is_refused(wrong: tuple[Path, str], tmp_path: Path) -> None:
    out, told = wrong
    with pytest.raises(InputError, match=told) as caught:
        files.check_out(out)
    assert str(out) in str(caught.value)
    assert (tmp_path / "manifest.json").read_text() == "{}"


def test_a_report_may_be_replaced_and_its_folder_is_made(tmp_path: Path) -> None:
    out = tmp_path / "new" / "b.json"
    files.check_out(out)
    assert list(out.parent.iterdir()) == []
    files.write(files.read(SCALE), out)
    files.check_out(out)
    assert files.read(out) == files.read(SCALE)


def test_out_is_looked_at_before_anything_is_measured(tmp_path: Path) -> None:
    assert "b.md: name a file" in refused("allreduce", "--ranks", "2", "--out", tmp_path / "b.md")


def test_a_report_is_gathered_from_points_alone() -> None:
    with pytest.raises(InputError, match="a file holds no point of bench scale"):
        cli_bench.bench_gather([SCALE])


@pytest.mark.parametrize(
    ("arguments", "told"),
    [
        (["contrast", "--tf32"], "bench contrast --tf32: a CPU has no TF32"),
        (["report", "b.md"], "b.md: give a file that ends in .json"),
        (["checkpoint", "--folder", "absent"], "'absent' does not exist"),
        (["scale", "configs/demo.yaml", "data.path=absent"], "absent"),
    ],
)
def test_what_cannot_be_measured_is_refused_in_a_line(arguments: list[str], told: str) -> None:
    assert told in refused(*arguments)


def test_fewer_volumes_than_asked_for_are_refused(tmp_path: Path) -> None:
    (tmp_path / "one").mkdir()
    (tmp_path / "one" / "mri_norm2.h5").touch()
    assert f"--volumes 2: {tmp_path} holds 1 volume: ask for fewer" in refused("eval", "--la", tmp_path)


def wait_until(true: Callable[[], bool], seconds: float = 90) -> None:
    end = time.monotonic() + seconds
    while not true():
        assert time.monotonic() < end
        time.sleep(0.05)


def test_no_rank_outlives_a_benchmark_that_is_ended(toy_corpus: Path, tmp_path: Path) -> None:
    (tmp_path / "c.yaml").write_text(yaml.safe_dump(toy.settings(toy_corpus, tmp_path)))
    bench = toy.launch(1, "bench", "scale", str(tmp_path / "c.yaml"), "--ranks", "2", "--steps", "100000")
    try:
        wait_until(lambda: len(psutil.Process(bench.pid).children(recursive=True)) >= 3)  # torchrun and two ranks
        started = psutil.Process(bench.pid).children(recursive=True)
        bench.send_signal(signal.SIGTERM)
        code = bench.wait(60)
    finally:
        bench.kill()
    _, alive = psutil.wait_procs(started, timeout=30)
    for one in alive:
        one.kill()
    assert not alive
    assert code == 128 + signal.SIGTERM
    assert "cclmpc: bench: ended by SIGTERM" in bench.communicate()[0]
