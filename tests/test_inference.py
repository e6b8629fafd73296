"""Sliding window against a plain loop over windows and voxels."""

import itertools
import math

import pytest
import torch

from cclmpc_dist.evaluation.inference import by_slice, sliding_window, starts


@pytest.mark.parametrize(
    ("size", "patch", "stride", "expected"),
    [
        (112, 112, 18, [0]),
        (113, 112, 18, [0, 1]),
        (140, 112, 18, [0, 18, 28]),
        (148, 112, 18, [0, 18, 36]),
        (88, 80, 4, [0, 4, 8]),
        (10, 3, 1, list(range(8))),
        (10, 4, 4, [0, 4, 6]),
    ],
)
def test_starts(size, patch, stride, expected):
    assert starts(size, patch, stride) == expected


def test_starts_reach_every_voxel():
    for size, patch in itertools.product(range(1, 25), range(1, 9)):
        for stride in range(1, patch + 1):
            if size < patch:
                continue
            found = starts(size, patch, stride)
            assert found[0] == 0
            assert found[-1] == size - patch
            assert len(found) == math.ceil((size - patch) / stride) + 1
            assert {a + i for a in found for i in range(patch)} == set(range(size))


def network(classes):
    """Probabilities that depend on where in the window a voxel lies, as padding makes a real network's."""

    def predict(x):
        place = torch.linspace(0, 1, x[0, 0].numel()).view(x.shape[2:])
        logits = torch.stack([(k + 1) * x[:, 0] * place + k * x[:, -1].flip(-1) for k in range(classes)], 1)
        return logits.softmax(1)

    return predict


def gauss(i, patch):
    return math.exp(-0.5 * ((i - (patch - 1) / 2) / (patch / 8)) ** 2)


def oracle(predict, image, patch, stride, classes, blend):
    """Float64, window by window and voxel by voxel; the image is at least as large as the patch."""
    size = image.shape[1:]
    total = torch.zeros(classes, *size, dtype=torch.float64)
    weight = torch.zeros(size, dtype=torch.float64)
    corners = [sorted({min(i * s, n - p) for i in range(n)}) for n, p, s in zip(size, patch, stride, strict=True)]
    for corner in itertools.product(*corners):
        window = tuple(slice(a, a + p) for a, p in zip(corner, patch, strict=True))
        answer = predict(image[(slice(None), *window)][None])[0].double()
        for inside in itertools.product(*map(range, patch)):
            voxel = tuple(a + i for a, i in zip(corner, inside, strict=True))
            w = 1.0 if blend == "uniform" else math.prod(map(gauss, inside, patch))
            total[(slice(None), *voxel)] += w * answer[(slice(None), *inside)]
            weight[voxel] += w
    return total / weight


CASES = [
    ((9, 11), (4, 6), (3, 4)),
    ((8, 8), (4, 4), (2, 2)),
    ((7, 6, 5), (4, 4, 3), (3, 2, 2)),
    ((5, 4, 6), (5, 3, 2), (1, 3, 2)),
]


@pytest.mark.parametrize("blend", ["uniform", "gaussian"])
@pytest.mark.parametrize(("size", "patch", "stride"), CASES)
def test_equals_the_plain_loop(size, patch, stride, blend):
    image = torch.randn(2, *size, generator=torch.Generator().manual_seed(1))
    expected = oracle(network(3), image, patch, stride, 3, blend)
    for batch in (1, 4, 1000):
        found = sliding_window(network(3), image, patch, stride, classes=3, batch=batch, blend=blend)
        assert found.dtype == torch.float32
        torch.testing.assert_close(found.double(), expected, atol=2e-6, rtol=1e-5)
        torch.testing.assert_close(found.sum(0), torch.ones(size), atol=1e-5, rtol=0)


def test_one_window_is_the_network_itself():
    image = torch.randn(1, 6, 5, 4)
    found = sliding_window(network(2), image, (6, 5, 4), (2, 2, 2), classes=2)
    torch.testing.assert_close(found, network(2)(image[None])[0], atol=0, rtol=0)


@pytest.mark.parametrize("blend", ["uniform", "gaussian"])
def test_small_image_is_centred_in_zeros_and_cut_back(blend):
    image = torch.randn(1, 3, 9, 4)
    padded = torch.zeros(1, 8, 9, 7)
    padded[:, 2:5, :, 1:5] = image  # gaps of 5 and 3: two and one before
    found = sliding_window(network(2), image, (8, 4, 7), (4, 3, 2), classes=2, blend=blend)
    expected = oracle(network(2), padded, (8, 4, 7), (4, 3, 2), 2, blend)[:, 2:5, :, 1:5]
    torch.testing.assert_close(found.double(), expected, atol=2e-6, rtol=1e-5)


def test_predict_gets_float32_windows_without_gradient():
    seen = []

    def predict(x):
        seen.append((tuple(x.shape), x.dtype, torch.is_grad_enabled()))
        return x.sigmoid()

    sliding_window(predict, torch.zeros(1, 6, 4, dtype=torch.float64), (4, 4), (1, 1), classes=1, batch=2)
    assert seen == [((2, 1, 4, 4), torch.float32, False), ((1, 1, 4, 4), torch.float32, False)]


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
def test_cuda_equals_cpu():
    image = torch.randn(1, 20, 17, 9)
    arguments = {"patch": (8, 8, 8), "stride": (3, 5, 2), "classes": 2, "blend": "gaussian"}
    found = sliding_window(lambda x: torch.cat([x, -x], 1).softmax(1), image.cuda(), **arguments)
    expected = sliding_window(lambda x: torch.cat([x, -x], 1).softmax(1), image, **arguments)
    assert found.is_cuda
    torch.testing.assert_close(found.cpu(), expected, atol=1e-5, rtol=0)


def test_a_2d_network_sees_each_slice_of_a_volume_by_itself() -> None:
    """And its probabilities lie where the slice does."""
    image = torch.randn(1, 12, 10, 5, generator=torch.Generator().manual_seed(0))
    seen = []

    def predict(windows: torch.Tensor) -> torch.Tensor:
        seen.append(windows.shape)
        return torch.cat([windows.sigmoid(), 1 - windows.sigmoid()], dim=1)

    found = by_slice(predict, image, (8, 8), (4, 4), classes=2)
    assert found.shape == (2, 12, 10, 5)
    torch.testing.assert_close(found[:1], image.sigmoid())
    assert {len(shape) for shape in seen} == {4}
