"""The networks: counts, shapes, gradients, heads, and that only what is asked for is computed."""

import math
from itertools import pairwise

import pytest
import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode

from cclmpc_dist.config import Model, Swin, Views
from cclmpc_dist.data import draws
from cclmpc_dist.data.views import views
from cclmpc_dist.errors import InputError
from cclmpc_dist.losses import certainty
from cclmpc_dist.losses.consistency import squared
from cclmpc_dist.losses.segmentation import seg
from cclmpc_dist.models import swin
from cclmpc_dist.models.dual_branch import DualBranch, sample
from cclmpc_dist.models.heads import Projection, unit
from cclmpc_dist.models.vnet import Decoder, Encoder, conv, normalisation

SIZES = {2: (48, 32), 3: (32, 32, 16)}


def _model(dims: int, **changes) -> Model:
    window = (3, 3, 2)[:dims]
    own = {"filters": 4, "projection": 12, "embedding": 20, "swin": Swin(window=window, head_width=8), **changes}
    return Model(**own)


def _network(dims: int, **changes) -> DualBranch:
    torch.manual_seed(0)
    return DualBranch(_model(dims, **changes), dims, 2, 3)


def _count(*modules: nn.Module) -> int:
    return sum(p.numel() for module in modules for p in module.parameters())


def _images(dims: int, n: int) -> torch.Tensor:
    return torch.randn(n, 2, *SIZES[dims], generator=torch.Generator().manual_seed(n))


def _vnet_by_hand(channels: int, classes: int, f: int, dims: int) -> int:
    """Each convolution brings weights and bias, each norm two numbers a channel."""

    def layer(a, b, kernel):
        return a * b * kernel**dims + b + 2 * b

    total = layer(channels, f, 3) + f * classes + classes
    widths = [f * 2**i for i in range(5)]
    for width, depth in zip(widths, (0, 2, 3, 3, 3), strict=True):
        total += depth * layer(width, width, 3)
    for width, depth in zip(widths, (1, 2, 3, 3), strict=False):
        total += depth * layer(width, width, 3)
    for a, b in pairwise(widths):
        total += layer(a, b, 2) + layer(b, a, 2)
    return total


@pytest.mark.parametrize(("dims", "channels", "classes", "filters"), [(3, 1, 2, 16), (2, 3, 4, 8)])
def test_vnet_has_the_parameters_of_the_papers(dims, channels, classes, filters):
    count = _count(Encoder(dims, channels, filters), Decoder(dims, classes, filters))
    assert count == _vnet_by_hand(channels, classes, filters, dims)
    if dims == 3:
        assert count == 9_448_866  # the 9.45 M of UA-MT


@pytest.mark.parametrize("dims", [2, 3])
def test_pyramid_and_logits_have_their_shapes(dims):
    encoder, decoder = Encoder(dims, 2, 4), Decoder(dims, 3, 4)
    pyramid = encoder(_images(dims, 2))
    for level, stride in zip(pyramid, (1, 2, 4, 8, 16), strict=True):
        assert level.shape == (2, 4 * stride, *(n // stride for n in SIZES[dims]))
    assert decoder(pyramid).shape == (2, 3, *SIZES[dims])


@pytest.mark.parametrize("dims", [2, 3])
def test_everything_asked_for_comes_and_gradients_reach_every_parameter(dims):
    network = _network(dims)
    places = math.prod(n // 8 for n in SIZES[dims])
    positions = torch.stack([torch.randperm(places)[:5] for _ in range(4)])
    out = network(_images(dims, 4), _images(dims, 2), positions=positions,
                  original_positions=positions[:2, :3], embed=True)  # fmt: skip
    assert {name: tuple(value.shape) for name, value in out.items()} == {
        "conv": (4, 3, *SIZES[dims]),
        "swin": (4, 3, *SIZES[dims]),
        "projection": (4, 5, 12),
        "original_projection": (2, 3, 12),
        "embedding": (4, 20, *(n // 8 for n in SIZES[dims])),
    }
    for name in ("projection", "original_projection"):
        torch.testing.assert_close(out[name].norm(dim=-1), torch.ones(out[name].shape[:-1]))
    torch.testing.assert_close(out["embedding"].norm(dim=1), torch.ones(4, *out["embedding"].shape[2:]))
    sum((value * torch.randn_like(value)).sum() for value in out.values()).backward()
    for name, parameter in network.named_parameters():
        assert parameter.grad is not None, name
        assert parameter.grad.isfinite().all(), name


def test_only_what_is_asked_for_comes():
    network = _network(2)
    images, positions = _images(2, 2), torch.zeros(2, 1, dtype=torch.int64)
    assert set(network(images)) == {"conv", "swin"}
    assert set(network(images, swin=False)) == {"conv"}
    assert set(network(images, swin=False, positions=positions)) == {"conv", "projection"}
    assert set(network(images, swin=False, embed=True)) == {"conv", "embedding"}
    plain = DualBranch(_model(2), 2, 2, 3, swin=False, projection=False, embedding=False)
    assert set(plain(images)) == {"conv"}
    assert _count(plain) == _vnet_by_hand(2, 3, 4, 2)


@pytest.mark.parametrize("dims", [2, 3])
def test_sampled_projection_is_the_full_maps_at_the_positions(dims):
    network = _network(dims, norm="instance", dropout=0.0).double().eval()
    views, originals = _images(dims, 2).double(), _images(dims, 3).double()
    places = math.prod(n // 8 for n in SIZES[dims])
    positions = torch.stack([torch.randperm(places)[:4] for _ in range(5)])
    out = network(views, originals, positions=positions[:2], original_positions=positions[2:])
    for images, at, name in (
        (views, positions[:2], "projection"),
        (originals, positions[2:], "original_projection"),
    ):
        level = network.encoder(images)[3]
        full = network.projection(level.movedim(1, -1)).flatten(1, -2)
        for i, j in [(0, 0), (1, 3)]:
            torch.testing.assert_close(out[name][i, j], full[i, at[i, j]])


def test_originals_do_not_change_what_the_views_give_without_batch_norm():
    network = _network(3, norm="group", dropout=0.0).double()
    views = _images(3, 2).double()
    alone, beside = network(views), network(views, _images(3, 3).double())
    for name in ("conv", "swin"):
        torch.testing.assert_close(beside[name], alone[name])


@pytest.mark.parametrize("dims", [2, 3])
def test_channels_last_gives_the_same(dims):
    layout = torch.channels_last if dims == 2 else torch.channels_last_3d
    network = _network(dims, norm="instance", dropout=0.0).double()
    images, positions = _images(dims, 2).double(), torch.tensor([[0, 5], [3, 1]])
    plain = network(images, positions=positions, embed=True)
    network = network.to(memory_format=layout)
    other = network(images.to(memory_format=layout), positions=positions, embed=True)
    for name, value in plain.items():
        torch.testing.assert_close(other[name], value)


@pytest.mark.parametrize("dims", [2, 3])
def test_batch_norm_keeps_channels_last(dims):
    layout = torch.channels_last if dims == 2 else torch.channels_last_3d
    network = _network(dims).to(memory_format=layout)
    pyramid = network.encoder(_images(dims, 2).to(memory_format=layout))
    for value in [*pyramid, network.swin(pyramid)]:
        assert value.is_contiguous(memory_format=layout)


def test_bf16_autocast_is_finite_and_the_heads_stay_wide():
    network = _network(3)
    with torch.autocast("cpu", torch.bfloat16):
        out = network(_images(3, 2), positions=torch.zeros(2, 1, dtype=torch.int64), embed=True)
    assert out["conv"].dtype == torch.bfloat16
    assert out["embedding"].dtype == out["projection"].dtype == torch.float32
    sum(value.float().square().sum() for value in out.values()).backward()
    assert all(p.grad.isfinite().all() for p in network.parameters())


@pytest.mark.parametrize("size", [(2, 2, 1), (2, 4, 4)])
def test_bf16_weight_gradients_of_small_maps_are_right(size):
    torch.manual_seed(0)
    layer, x, g = conv(3)(32, 32, 3, padding=1), torch.randn(2, 32, *size), torch.randn(2, 32, *size)
    grads = []
    for bf16 in (False, True):
        layer.zero_grad()
        with torch.autocast("cpu", torch.bfloat16, enabled=bf16):
            out = layer(x)
        (out * g).sum().backward()
        grads.append(layer.weight.grad.clone())
    torch.testing.assert_close(*grads, rtol=0.05, atol=0.05)


def test_the_network_is_repeatable_bit_for_bit():
    grads = []
    for _ in range(2):
        network = _network(3)
        out = network(_images(3, 2), positions=torch.tensor([[0, 5], [3, 1]]), embed=True)
        sum(value.square().mean() + value.mean() for value in out.values()).backward()
        grads.append(torch.cat([p.grad.flatten() for p in network.parameters()]))
    assert torch.equal(*grads)


def test_a_step_reads_no_value_back_from_the_device():
    """Fake tensors hold no values: whatever waits for one raises."""
    with FakeTensorMode():
        images, keys = torch.empty(2, 2, *SIZES[3]), torch.empty(2, dtype=torch.int64)
        positions = draws.subset(keys, "positions", 32, 5)
        network = DualBranch(_model(3), 3, 2, 3)
        out = network(views(images, keys, 1, Views()), images, positions=positions,
                      original_positions=positions, embed=True)  # fmt: skip
        log_c, log_t = out["conv"].log_softmax(1), out["swin"].log_softmax(1)
        log_p = certainty.mean_log(log_c, log_t)
        y = certainty.partition(log_p, 0.9)
        (_, entropy), (_, overlap) = seg(log_p, y)
        total = entropy.sum + overlap.finish(overlap.sums) + squared(log_c.exp(), log_t.exp()).sum
        (total + sum(out[name].sum() for name in ("projection", "original_projection", "embedding"))).backward()
        assert certainty.nearest(y, (4, 4, 2)).shape == (2, 4, 4, 2)
        assert all(p.grad is not None for p in network.parameters())


@pytest.mark.parametrize(("kind", "want"), [("batch", nn.BatchNorm3d), ("instance", nn.InstanceNorm3d)])
def test_norms_by_name(kind, want):
    layer = normalisation(kind, 3, 6)
    assert isinstance(layer, want)
    assert _count(layer) == 12


@pytest.mark.parametrize(("channels", "groups"), [(64, 8), (4, 4), (12, 4)])
def test_group_norm_takes_as_many_groups_as_divide(channels, groups):
    assert normalisation("group", 2, channels).num_groups == groups


def test_sync_batch_says_that_it_needs_cuda(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(InputError, match=r"model\.norm = sync_batch .* take batch"):
        DualBranch(_model(3, norm="sync_batch"), 3, 1, 2)


def test_dropout_acts_in_training_only_and_on_whole_channels():
    encoder = Encoder(3, 1, 4, dropout=0.5)
    s16 = encoder(torch.randn(2, 1, 32, 32, 32))[4]
    dead = (s16 == 0).flatten(2).all(2).double().mean()
    assert 0.3 < dead < 0.7
    encoder.eval()
    x = torch.randn(1, 1, 32, 32, 32)
    assert torch.equal(encoder(x)[4], encoder(x)[4])


def test_a_zero_vector_has_a_finite_gradient():
    x = torch.zeros(2, 3, requires_grad=True)
    out = unit(x, -1)
    out.sum().backward()
    assert torch.equal(out, torch.zeros(2, 3))
    assert x.grad.isfinite().all()
    assert Projection(4, 3)(torch.zeros(2, 4)).isfinite().all()


def test_sample_takes_positions_of_the_flattened_map():
    level = torch.arange(2 * 3 * 2 * 4.0).reshape(2, 3, 2, 4)
    got = sample(level, torch.tensor([[5, 0], [7, 7]]))
    assert torch.equal(got[0, 0], level[0, :, 1, 1])
    assert torch.equal(got[1, 1], level[1, :, 1, 3])


# Swin


@pytest.mark.parametrize(("size", "window"), [((4, 6), (2, 3)), ((4, 2, 6), (2, 2, 3))])
def test_windows_come_apart_and_together(size, window):
    x = torch.arange(2.0 * math.prod(size) * 3).reshape(2, *size, 3)
    apart = swin.to_windows(x, window)
    assert apart.shape == (2, math.prod(size) // math.prod(window), math.prod(window), 3)
    corner = x[(slice(None), *(slice(w) for w in window))]
    assert torch.equal(apart[:, 0], corner.flatten(1, -2))
    assert torch.equal(swin.from_windows(apart, size, window), x)


def _attend_by_loop(block: swin.Block, x: torch.Tensor, window: list[int], shift: list[int]) -> torch.Tensor:
    """Each position of one image (*S, C) looks at those of its window; windows start at -shift + multiples."""
    size, heads = x.shape[:-1], block.heads
    places = [tuple(p) for p in torch.cartesian_prod(*(torch.arange(n) for n in size)).tolist()]
    q, k, v = (part.unflatten(-1, (heads, -1)) for part in block.qkv(x).chunk(3, dim=-1))
    # a window after the roll by -shift holds positions with equal (p - shift) // window: wrapped ones stand apart
    home = {p: tuple((a - s) // w for a, s, w in zip(p, shift, window, strict=True)) for p in places}
    rows = []
    for p in places:
        near = [o for o in places if home[o] == home[p]]
        scores = torch.stack([(q[p] * k[o]).sum(-1) * q.shape[-1] ** -0.5 + _bias(block, p, o) for o in near])
        rows.append((scores.softmax(0)[..., None] * torch.stack([v[o] for o in near])).sum(0).flatten())
    return block.out(torch.stack(rows).reshape(x.shape))


def _bias(block: swin.Block, p: tuple[int, ...], o: tuple[int, ...]) -> torch.Tensor:
    row = 0
    for a, b, w in zip(p, o, block.window, strict=True):
        row = row * (2 * w - 1) + a - b + w - 1
    return block.bias[row]


@pytest.mark.parametrize("shifted", [False, True])
@pytest.mark.parametrize(
    ("size", "window"), [((6, 4), (3, 2)), ((7, 5), (3, 2)), ((4, 3, 5), (2, 4, 3)), ((2, 2), (5, 5))]
)
def test_window_attention_against_a_plain_loop(size, window, shifted):
    torch.manual_seed(0)
    block = swin.Block(8, 4, window, shifted).double()
    nn.init.normal_(block.bias)
    x = torch.randn(2, *size, 8, dtype=torch.float64)
    own = [min(w, n) for w, n in zip(window, size, strict=True)]
    shift = [w // 2 if shifted and w < n else 0 for w, n in zip(own, size, strict=True)]
    want = torch.stack([_attend_by_loop(block, image, own, shift) for image in x])
    torch.testing.assert_close(block.attend(x), want)


def test_expand_puts_each_position_where_it_belongs():
    torch.manual_seed(0)
    expand = swin.Expand(2, 4, 3, 2)
    x = torch.randn(1, 2, 3, 4)
    out, rows = expand(x), expand.linear(x).unflatten(-1, (2, 2, 3))
    assert out.shape == (1, 4, 6, 3)
    for i, j, a, b in [(0, 0, 0, 0), (1, 2, 0, 1), (1, 0, 1, 0)]:
        assert torch.equal(out[0, 2 * i + a, 2 * j + b], rows[0, i, j, a, b])
