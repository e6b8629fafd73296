"""File systems of their own, for what a full or a read-only disk does."""

import gc
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest


@contextmanager
def tmpfs(folder: Path, options: str) -> Iterator[Path]:
    """A new folder on a tmpfs mounted with these options; skips the test where that may not be."""
    folder.mkdir()
    mounted = subprocess.run(["mount", "-t", "tmpfs", "-o", options, "tmpfs", str(folder)], capture_output=True)
    if mounted.returncode:
        pytest.skip("mounting a file system needs root")
    try:
        yield folder
    finally:
        gc.collect()  # lets go of maps of its files
        subprocess.run(["umount", "-l", str(folder)], check=True)
