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
