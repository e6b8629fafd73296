"""Instance norm in either layout: torch's in float64 is the truth."""

import pytest
import torch
from torch import nn

from cclmpc_dist.models.instance_norm import LAYOUTS, InstanceNorm2d, InstanceNorm3d

OURS = {4: InstanceNorm2d, 5: InstanceNorm3d}
TORCHS = {4: nn.InstanceNorm2d, 5: nn.InstanceNorm3d}
TOLERANCE = {torch.float64: 1e-12, torch.float32: 2e-6, torch.bfloat16: 0.01}
SHAPES = [(3, 8, 16, 24, 16), (2, 24, 7, 5, 3), (1, 1, 4, 4, 4), (2, 6, 31, 17), (2, 2048, 2, 3)]


def _run(layer: nn.Module, x: torch.Tensor, grad: torch.Tensor) -> list[torch.Tensor]:
    """Output, and the gradients of input, weight and bias."""
    x = x.detach().requires_grad_()
    y = layer(x)
    return [y.detach(), *torch.autograd.grad(y, (x, layer.weight, layer.bias), grad)]


def _layers(shape: tuple[int, ...]) -> tuple[nn.Module, nn.Module]:
    """Ours in float32, torch's with the same weights in float64."""
    torch.manual_seed(0)
    ours, truth = OURS[len(shape)](shape[1], affine=True), TORCHS[len(shape)](shape[1], affine=True)
    nn.init.uniform_(ours.weight, 0.5, 1.5)
    nn.init.normal_(ours.bias)
    truth.load_state_dict(ours.state_dict())
    return ours, truth.double()


@pytest.mark.parametrize("dtype", TOLERANCE)
@pytest.mark.parametrize("shape", SHAPES)
def test_values_and_gradients_are_torchs(shape, dtype):
    ours, truth = _layers(shape)
    x, grad = torch.randn(2, *shape, dtype=torch.float64)
    x = 0.7 * x + 1
    want = _run(truth, x, grad)
    for layout in (LAYOUTS[len(shape)], torch.contiguous_format):
        arguments = [t.to(dtype).contiguous(memory_format=layout) for t in (x, grad)]
        got = _run(ours.to(torch.promote_types(dtype, torch.float32)), *arguments)
        assert got[0].dtype == dtype
        assert got[0].is_contiguous(memory_format=layout)
        for mine, true in zip(got, want, strict=True):
            assert (mine.double() - true).norm() <= TOLERANCE[dtype] * true.norm()


def test_many_positions_are_summed_as_exactly_as_torchs_own():
    """One after the other, 400,000 numbers of a channel lose four digits."""
    ours, truth = _layers((1, 8, 80, 80, 64))
    x = torch.randn(1, 8, 80, 80, 64).add_(1).contiguous(memory_format=torch.channels_last_3d)
    with torch.no_grad():
        torch.testing.assert_close(ours(x).double(), truth(x.double()), rtol=0, atol=5e-6)


def test_an_image_is_normalised_alike_in_any_batch():
    ours, _ = _layers((4, 8, 16, 16, 8))
    x = torch.randn(4, 8, 16, 16, 8).contiguous(memory_format=torch.channels_last_3d)
    assert torch.equal(ours(x)[2:3], ours(x[2:3]))


def test_a_gradient_in_the_other_layout_is_taken():
    ours, _ = _layers((2, 8, 4, 6, 4))
    x, grad = torch.randn(2, 2, 8, 4, 6, 4)
    x = x.contiguous(memory_format=torch.channels_last_3d)
    other = grad.contiguous(memory_format=torch.channels_last_3d)
    for mine, theirs in zip(_run(ours, x, grad), _run(ours, x, other), strict=True):
        assert torch.equal(mine, theirs)
