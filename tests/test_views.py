"""Intensity views: a function of the image's own key, aligned with the image, and what the settings say."""

import numpy as np
import pytest
import torch
from scipy.ndimage import gaussian_filter1d

from cclmpc_dist.config import Views
from cclmpc_dist.data import draws
from cclmpc_dist.data.views import views

OFF = {"brightness": 0.0, "contrast": 0.0, "gamma": 0.0, "noise": 0.0, "blur": 0.0}
KEYS = torch.tensor([11, -5, 987654321, 4])


def _images(*shape: int) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(0)) * 3 + 1


def _only(**strength: float) -> Views:
    return Views(**{**OFF, **strength}, probability=1.0)


@pytest.mark.parametrize("shape", [(4, 1, 17, 9, 12), (4, 3, 33, 21)])
def test_an_image_has_the_same_view_in_whatever_batch(shape):
    images = _images(*shape)
    whole = views(images, KEYS, 1, Views())
    assert whole.shape == images.shape
    assert whole.isfinite().all()
    for i in range(4):
        assert torch.equal(views(images[i : i + 1], KEYS[i : i + 1], 1, Views()), whole[i : i + 1])
    order = torch.tensor([2, 0, 3, 1])
    assert torch.equal(views(images[order], KEYS[order], 1, Views()), whole[order])


def test_views_differ_from_each_other_and_leave_the_image_alone():
    images = _images(4, 1, 16, 16, 16)
    before = images.clone()
    one, two = views(images, KEYS, 1, Views()), views(images, KEYS, 2, Views())
    assert torch.equal(images, before)
    for i in range(4):
        assert not torch.equal(one[i], two[i])


@pytest.mark.parametrize("settings", [Views(probability=0.0), Views(**OFF)])
def test_nothing_applied_is_the_image_itself(settings):
    images = _images(4, 2, 8, 8, 8)
    out = views(images, KEYS, 1, settings)
    assert torch.equal(out, images)
    assert out.data_ptr() != images.data_ptr()


def test_each_operation_is_applied_as_often_as_its_probability_says():
    keys = torch.arange(2000)
    images = _images(1, 1, 4, 4).expand(2000, -1, -1, -1)
    for name in OFF:
        settings = Views(**{**OFF, name: Views.model_fields[name].default}, probability=0.3)
        changed = (views(images, keys, 1, settings) != images).flatten(1).any(1).double().mean()
        assert abs(changed - 0.3) < 5 * (0.21 / 2000) ** 0.5, name


def test_a_landmark_stays_where_it_is():
    images = _images(4, 1, 15, 13, 11) * 0.1
    images[:, :, 4, 9, 6] = 20.0
    for view in (1, 2):
        out = views(images, KEYS, view, Views())
        assert (out.flatten(2).argmax(2) == images.flatten(2).argmax(2)).all()


def test_memory_layout_changes_no_value_and_is_kept():
    images = _images(2, 3, 8, 9, 10)
    last = images.to(memory_format=torch.channels_last_3d)
    out = views(last, KEYS[:2], 1, Views())
    torch.testing.assert_close(out, views(images, KEYS[:2], 1, Views()), rtol=1e-6, atol=1e-6)
    assert out.is_contiguous(memory_format=torch.channels_last_3d)


def _strength(name: str) -> np.ndarray:
    return draws.uniform(KEYS, f"view1.{name}", 2)[:, 1].double().numpy()


def test_brightness_and_contrast_against_a_plain_loop():
    images = _images(4, 2, 6, 7, 5)
    out = views(images, KEYS, 1, _only(brightness=0.4, contrast=0.3)).double().numpy()
    for i, (b, c) in enumerate(zip(_strength("brightness"), _strength("contrast"), strict=True)):
        for channel in range(2):
            x = images[i, channel].double().numpy()
            want = x.mean() + (1 + 0.3 * (2 * c - 1)) * (x - x.mean()) + 0.4 * (2 * b - 1) * x.std()
            np.testing.assert_allclose(out[i, channel], want, rtol=1e-5, atol=1e-5)


def test_gamma_against_a_plain_loop():
    images = _images(4, 2, 6, 7, 5)
    out = views(images, KEYS, 1, _only(gamma=0.3)).double().numpy()
    for i, u in enumerate(_strength("gamma")):
        for channel in range(2):
            x = images[i, channel].double().numpy()
            low, span = x.min(), x.max() - x.min()
            want = low + span * ((x - low) / span) ** np.exp(0.3 * (2 * u - 1))
            np.testing.assert_allclose(out[i, channel], want, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("shape", [(4, 1, 9, 12, 8), (4, 2, 14, 10)])
def test_blur_against_scipy(shape):
    images = _images(*shape)
    out = views(images, KEYS, 1, _only(blur=1.5)).double().numpy()
    for i, u in enumerate(_strength("blur")):
        for channel in range(shape[1]):
            want = images[i, channel].double().numpy()
            for axis in range(want.ndim):
                want = gaussian_filter1d(want, 1.5 * u, axis=axis, mode="nearest", radius=5)
            np.testing.assert_allclose(out[i, channel], want, rtol=1e-5, atol=1e-5)


def test_noise_has_the_deviation_it_should():
    images = _images(4, 1, 32, 32, 16)
    added = views(images, KEYS, 1, _only(noise=0.5)) - images
    want = 0.5 * torch.from_numpy(_strength("noise")) * images.double().std((1, 2, 3, 4))
    torch.testing.assert_close(added.double().std((1, 2, 3, 4)), want, rtol=0.03, atol=0)
    assert abs(torch.corrcoef(added.flatten(1))[0, 1]) < 0.04


def test_a_constant_image_stays_finite():
    out = views(torch.full((4, 1, 8, 8, 8), 2.5), KEYS, 1, _only(**dict.fromkeys(OFF, 0.3)))
    torch.testing.assert_close(out, torch.full_like(out, 2.5), rtol=1e-5, atol=0)
