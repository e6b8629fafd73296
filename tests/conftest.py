"""Shapes of losses/ and distributed/ are checked wherever a test calls them."""

import os
from pathlib import Path

import jaxtyping
import pytest

os.environ.setdefault("OMP_NUM_THREADS", "2")
jaxtyping.install_import_hook(["cclmpc_dist.losses", "cclmpc_dist.distributed.exchange"], "beartype.beartype")


@pytest.fixture(scope="session")
def toy_corpus(tmp_path_factory: pytest.TempPathFactory) -> Path:
    import toy

    return toy.corpus(tmp_path_factory.mktemp("toy") / "shards")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    import torch

    if not torch.cuda.is_available():
        for item in items:
            if item.get_closest_marker("gpu"):
                item.add_marker(pytest.mark.skip(reason="needs a CUDA device"))
