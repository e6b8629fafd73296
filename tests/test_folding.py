"""Batch norms taken into the convolutions before them."""

import pytest
import torch
from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm

from cclmpc_dist import config
from cclmpc_dist.models.dual_branch import DualBranch
from cclmpc_dist.models.folding import fold

LAYOUTS = {2: torch.channels_last, 3: torch.channels_last_3d}


def network(norm: str, dims: int) -> DualBranch:
    """With statistics, weights and biases as after training."""
    torch.manual_seed(1)
    module = DualBranch(config.Model(filters=4, norm=norm), dims, 1, 2, swin=False, projection=False).eval()
    for part in module.modules():
        if isinstance(part, _BatchNorm):
            part.running_mean.normal_(0, 0.3)
            part.running_var.uniform_(0.3, 3)
            nn.init.uniform_(part.weight, 0.5, 1.5)
        if getattr(part, "bias", None) is not None:
            nn.init.normal_(part.bias, 0, 0.2)
    return module.to(memory_format=LAYOUTS[dims])


@pytest.mark.parametrize("dims", [2, 3])
def test_folded_batch_norms_leave_the_answer_and_the_layout(dims: int) -> None:
    module, x = network("batch", dims), torch.randn(2, 1, *(32, 16, 16)[:dims])
    expected = module(x, embed=True)
    fold(module)
    assert not [part for part in module.modules() if isinstance(part, _BatchNorm)]
    assert module.conv.blocks[0][0][0].weight.is_contiguous(memory_format=LAYOUTS[dims])
    torch.testing.assert_close(module(x, embed=True), expected, atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("norm", ["instance", "group"])
def test_other_norms_are_not_folded(norm: str) -> None:
    module = network(norm, 2)
    before = list(module.modules())
    fold(module)
    assert list(module.modules()) == before
