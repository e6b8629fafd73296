"""What a process sets up before anything else."""

import platform
import resource

import pytest
import torch

from cclmpc_dist.distributed.runtime import keep_memory


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="another C library than glibc")
def test_large_blocks_are_reused_without_page_faults():
    """By default each of these copies is 16,384 pages from the kernel."""
    keep_memory()
    x = torch.zeros(2**24)
    x.clone()
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    for _ in range(5):
        x.clone()
    assert resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before < 2000
