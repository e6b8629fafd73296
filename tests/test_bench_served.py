"""benchmarks/served.py: what it counts, and the whole of it on a small corpus behind a real nginx."""

import importlib.util
import json
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from cclmpc_dist.data import shards

SCRIPT = Path(__file__).resolve().parents[1] / "benchmarks" / "served.py"
specification = importlib.util.spec_from_file_location("served", SCRIPT)
assert specification is not None
served = importlib.util.module_from_spec(specification)
sys.modules["served"] = served
specification.loader.exec_module(served)  # type: ignore[union-attr]


def test_a_crop_tells_its_case() -> None:
    image = served.Numbered(37, (12, 10, 8)).read().image
    for start in (0, 1):
        crop = np.rot90(image[:, 2:9, 1:8, start : start + 5], 1, (1, 2))[:, ::-1]
        assert served.number_of(crop) == 37
    mixed = image.copy()
    mixed[0, 3, 3, 4] += 1
    assert served.number_of(mixed) == -1


def test_what_the_order_does_not_say_is_counted(tmp_path: Path) -> None:
    cases = [served.Numbered(number, (8, 8, 6)) for number in range(6)]
    index = shards.write(cases, tmp_path / "shards", source="served", shard_bytes=6000)
    told = [{"seen": served.expected(index, number)} for number in range(served.RANKS)]
    values = {metric: value for _, metric, value, _ in served.counted(index, told)}
    assert values["other than the order says"] == 0
    assert values["given"] == served.EPOCHS * 8  # two steps of four
    assert values["given least often"] == values["due least often"] == 2
    first = told[0]["seen"][0]
    first[0], first[1] = first[1], -1
    values = {metric: value for _, metric, value, _ in served.counted(index, told)}
    assert values["other than the order says"] == 2


@pytest.mark.cluster
def test_two_ranks_beside_curl(tmp_path: Path) -> None:
    if shutil.which("nginx") is None or shutil.which("curl") is None:
        pytest.skip("nginx or curl is not installed: tests/nginx_install.sh")
    words = ["--gb", "0.02", "--edge", "40", "--shard-mib", "0.5", "--folder", tmp_path, "--out", tmp_path / "s.json"]
    subprocess.run([sys.executable, SCRIPT, *words], check=True)
    found = json.loads((tmp_path / "s.json").read_text())
    values = {(record["variant"], record["metric"]): record["value"] for record in found["records"]}
    assert values["samples", "other than the order says"] == 0
    assert values["samples", "given least often"] == values["samples", "due least often"] >= 2
    assert values["cache", "limit"] < 5  # MB, a fifth
    assert values["cache", "most on disk"] <= values["cache", "limit and blocks in use"]
    assert all(values[variant, "rate"] > 0 for variant in ("two ranks", "curl", "curl to files"))
    assert {"cache", "rank 0, private", "rank 1, resident"} <= found["series"].keys()
    assert (tmp_path / "s.png").exists()
    assert not list(tmp_path.glob("tmp*")), "the corpus is removed"
