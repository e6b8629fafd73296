"""launch/ray_train.py submitted as a job to a real Ray: it ends with the bits of torchrun, killed workers or not."""

import json
import re
import time
from collections.abc import Iterator
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import psutil
import pytest
import ray_cluster
import toy
import yaml
from ray_cluster import SECOND, Cluster

from cclmpc_dist.data.index import Index, select

LAST = "checkpoints/step-000000020"

pytestmark = [
    pytest.mark.cluster,
    pytest.mark.timeout(900),
    pytest.mark.skipif(find_spec("ray") is None, reason="needs the ray extra, which make test-cluster installs"),
]


@pytest.fixture(scope="module")
def ray() -> Iterator[Cluster]:
    with ray_cluster.cluster(cpus=2) as cluster:
        yield cluster


@pytest.fixture(scope="module")
def straight(toy_corpus: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a run under torchrun on two ranks that nothing interrupted."""
    folder = tmp_path_factory.mktemp("straight")
    (folder / "c.yaml").write_text(yaml.safe_dump(_settings(toy_corpus, folder)))
    toy.run(2, "train", str(folder / "c.yaml"))
    return folder / "toy"


def _settings(corpus: Path, runs: Path, **changes: Any) -> dict[str, Any]:
    return toy.settings(corpus, runs, **({"ema": 0.9, "model__dropout": 0.5} | changes))


class Job:
    """A toy run submitted to Ray: its folder, the streamed log."""

    def __init__(self, cluster: Cluster, corpus: Path, storage: Path, *arguments: str, **changes: Any) -> None:
        self.folder, self.output = storage / "runs" / "toy", storage / "output"
        configuration = storage / "c.yaml"
        configuration.write_text(yaml.safe_dump(_settings(corpus, Path("runs"), **changes)))
        self.process = cluster.submit(
            "--config", str(configuration), "--storage", str(storage), *arguments, output=self.output
        )

    def said(self) -> str:
        return self.output.read_text()

    def says(self, pattern: str, times: int = 1, timeout: float = 300) -> list[Any]:
        """What matches in the log, once there are so many that differ: two nodes on one host show each line twice."""
        deadline = time.monotonic() + timeout
        while len(found := list(dict.fromkeys(re.findall(pattern, self.said())))) < times:
            assert self.process.poll() is None, self.said()
            assert time.monotonic() < deadline, f"{pattern} did not come {times} times\n{self.said()}"
            time.sleep(0.1)
        return found

    def worker(self, rank: int) -> psutil.Process:
        pid = self.says(rf"pid=(\d+)\) world_rank={rank},")[-1]
        return psutil.Process(int(pid))

    def reach(self, step: int) -> None:
        toy.wait_for_step(self.process, self.folder, step, timeout=300)

    def finish(self, code: int = 0) -> str:
        """What it said, once it ended with that exit code."""
        assert self.process.wait(300) == code, self.said()
        return self.said()


def test_a_job_streams_its_log_and_ends_with_the_bits_of_torchrun(
    ray: Cluster, toy_corpus: Path, tmp_path: Path, straight: Path
) -> None:
    job = Job(ray, toy_corpus, tmp_path, "--workers", "2")
    job.says("toy 4/20")
    assert job.process.poll() is None, "lines came while it ran"
    said = job.finish()
    toy.assert_same(toy.tensors(straight / LAST), toy.tensors(job.folder / LAST))
    assert f"Ray's newest checkpoint is {job.folder / LAST}" in said
    assert len(re.findall("toy 7/20", said)) == 1
    record = json.loads((job.folder / "checkpoint_manager_snapshot.json").read_text())
    reported = {result["checkpoint_dir_name"]: result["metrics"] for result in record["checkpoint_results"]}
    logged = [json.loads(line) for line in (job.folder / "metrics.jsonl").read_text().splitlines()]
    assert reported[LAST] == logged[-1]
    assert all(name.startswith("checkpoints/step-") for name in reported)
    copies = [file for file in tmp_path.rglob("model.safetensors") if file.parent.parent.parent != job.folder]
    assert not copies, "the checkpoints lie in the run folder alone"
    assert "ray_train.py" in json.loads((job.folder / "environment.json").read_text())["command"][0]


@pytest.mark.parametrize("rank", [0, 1])
def test_a_killed_worker_costs_the_steps_since_the_checkpoint(
    rank: int, ray: Cluster, toy_corpus: Path, tmp_path: Path, straight: Path
) -> None:
    job = Job(ray, toy_corpus, tmp_path, "--workers", "2", "data.workers=1")
    job.reach(6)
    job.worker(rank).kill()
    said = job.finish()
    toy.assert_same(toy.tensors(straight / LAST), toy.tensors(job.folder / LAST))
    assert re.search(r"going on from step (4|8|12|16)", said)


def test_a_preempted_run_goes_on_by_the_same_command(
    ray: Cluster, toy_corpus: Path, tmp_path: Path, straight: Path
) -> None:
    """Though checkpoints that Ray was told of the first time are gone by then."""
    first = Job(ray, toy_corpus, tmp_path, "--workers", "2", checkpoint__keep=1)
    first.reach(10)
    (first.folder / "preempt").touch()
    assert "failed with exit code 75" in first.finish(1)
    again = Job(ray, toy_corpus, tmp_path, "--workers", "2", checkpoint__keep=1)
    again.finish()
    assert "going on from step" in again.said()
    toy.assert_same(toy.tensors(straight / LAST), toy.tensors(again.folder / LAST))


def test_wrong_input_ends_the_job_before_a_worker_starts(ray: Cluster, toy_corpus: Path, tmp_path: Path) -> None:
    said = Job(ray, toy_corpus, tmp_path, "--workers", "1,4", "data.batch_labelled=4").finish(1)
    assert "cclmpc: data.batch_labelled = 4 does not divide over 3 ranks" in said
    assert "failed with exit code 2" in said
    assert "Traceback" not in said
    process = ray.submit("--config", "configs/la.yaml", "--storage", str(tmp_path), output=tmp_path / "output")
    assert process.wait(120) == 1
    assert f"cclmpc: {tmp_path}/data/la" in (tmp_path / "output").read_text(), "a relative place lies in --storage"


def test_one_workers_wrong_input_is_not_tried_again(ray: Cluster, tmp_path: Path) -> None:
    """One sample is damaged, so one rank finds it in the middle of the run; restarts are not limited here."""
    corpus = toy.corpus(tmp_path / "shards")
    index = Index.open(corpus)
    row = int(select(index, None)["unlabelled"][0])
    shard, start = index.shard_path(int(index["shard"][row])), int(index["image_at"][row])
    data = bytearray(shard.read_bytes())
    data[start : start + 6] = b"broken"
    shard.write_bytes(data)
    said = Job(ray, corpus, tmp_path, "--workers", "2", "--max-failures", "-1").finish(1)
    assert re.search(r"(?m)^cclmpc: .*tar: case .* its image is damaged", said), said
    assert "failed with exit code 2" in said
    assert len(re.findall("Started training worker group", said)) <= 2


@pytest.mark.timeout(480)
def test_elastic_workers_follow_the_nodes(toy_corpus: Path, tmp_path: Path) -> None:
    """One worker, two once there is a second node, one again when that is lost: every step is taken once, on the stream
    positions that its number says."""
    changes = {"budget__images": 120_000, "checkpoint__every_steps": 20}
    alone, together = (rf"RayTrainWorker pid=(\d+).* on {count} process" for count in (1, 2))
    with ray_cluster.cluster(cpus=1) as cluster:
        job = Job(cluster, toy_corpus, tmp_path, "--workers", "1,2", "--resize-seconds", "5", **changes)
        job.says(alone)
        assert cluster.shows(r'(?m)^ray_cclmpc_loss_total\{.*run="toy"'), "Ray's Prometheus page has the scalars"
        cluster.join(cpus=1)
        job.says(together)
        job.reach(toy.steps_logged(job.folder) + 30)
        cluster.lose(SECOND)
        job.says(alone, times=2)
        job.reach(toy.steps_logged(job.folder) + 5)
        (job.folder / "preempt").touch()
        said = job.finish(1)
    assert "failed with exit code 75" in said
    resumed = sorted({int(step) for step in re.findall(r"going on from step (\d+)", said)})
    assert len(resumed) == 2
    assert resumed[0] > 0
    logged = [json.loads(line) for line in (job.folder / "metrics.jsonl").read_text().splitlines()]
    assert [line["step"] for line in logged] == list(range(1, len(logged) + 1))
    assert all(line["data/unlabelled_epoch"] == line["step"] / 2 for line in logged)


def test_a_client_without_the_token_is_refused(ray: Cluster, tmp_path: Path) -> None:
    asked = ray.ask("job", "list", "--address", ray.address, RAY_AUTH_MODE="disabled")
    assert asked.returncode
    assert "Authentication required" in asked.stdout + asked.stderr


def test_doctor_looks_at_the_workers(ray: Cluster, tmp_path: Path) -> None:
    """With the command of the run; the corpus need not be there, and no run folder comes of it. The folder of the runs
    cannot be made here."""
    (tmp_path / "file").touch()
    output = tmp_path / "output"
    process = ray.submit("--doctor", "--config", "configs/la.yaml", "--storage", str(tmp_path), "--workers", "2",
                         "runs=file/runs", output=output)  # fmt: skip
    assert process.wait(120) == 1, output.read_text()
    said = output.read_text()
    assert re.search(r"OK +rendezvous +all +2 ranks on 1 machine met", said), said
    assert re.search(r"OK +all-reduce +all", said)
    assert re.search(r"failed +folder write +all .*Not a directory", said)
    assert sorted(tmp_path.iterdir()) == [tmp_path / "file", output]


def test_the_bench_measures_one_worker_and_two(ray: Cluster, toy_corpus: Path, tmp_path: Path) -> None:
    (tmp_path / "c.yaml").write_text(
        yaml.safe_dump(toy.settings(toy_corpus, Path("runs"), data__batch_labelled=2, data__batch_unlabelled=2))
    )
    options = ["--config", str(tmp_path / "c.yaml"), "--storage", str(tmp_path), "--workers", "1,2"]
    process = ray.submit(
        *options, "--steps", "2", "--rounds", "1", output=tmp_path / "output", script="launch/ray_bench.py"
    )
    assert process.wait(300) == 0, (tmp_path / "output").read_text()
    report = json.loads((tmp_path / "bench_ray" / "toy" / "scale.json").read_text())
    assert {r["case"] for r in report["records"] if r["variant"] == "sizes"} == {"weak 1", "weak 2"}
    assert {r["variant"] for r in report["records"] if r["variant"].startswith("rank 1")}, "two workers met"
