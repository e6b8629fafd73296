"""Shapes of losses/ and distributed/ are checked wherever a test calls them."""

import os
import signal
from collections.abc import Iterator
from pathlib import Path

import jaxtyping
import pytest
import slurm_cluster

os.environ["OMP_NUM_THREADS"] = "1"  # tests run side by side
jaxtyping.install_import_hook(["cclmpc_dist.losses", "cclmpc_dist.distributed.exchange"], "beartype.beartype")


@pytest.fixture(scope="session")
def toy_corpus(tmp_path_factory: pytest.TempPathFactory) -> Path:
    import toy

    return toy.corpus(tmp_path_factory.mktemp("toy") / "shards")


@pytest.fixture
def alone() -> Iterator[None]:
    """Lets a test run the trainer in this process: what it leaves in global places is put back."""
    from accelerate.state import AcceleratorState

    handler = signal.getsignal(signal.SIGTERM)
    yield
    signal.signal(signal.SIGTERM, handler)
    AcceleratorState._reset_state(True)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    import torch

    if not torch.cuda.is_available():
        for item in items:
            if item.get_closest_marker("gpu"):
                item.add_marker(pytest.mark.skip(reason="needs a CUDA device"))


@pytest.fixture(scope="module")
def slurm(tmp_path_factory: pytest.TempPathFactory) -> Iterator[slurm_cluster.Cluster]:
    if lacking := slurm_cluster.missing():
        pytest.skip(lacking)
    with slurm_cluster.cluster(tmp_path_factory.mktemp("slurm")) as cluster:
        yield cluster
