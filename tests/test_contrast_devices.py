"""The contrast and its collectives on each device: on a GPU, and the same tests on the CPU, which prove the tests."""

from collections.abc import Iterator

import pytest
import torch
import torch.distributed as dist
from ranks import run_ranks
from torch import Tensor

from cclmpc_dist.distributed import exchange
from cclmpc_dist.losses import bench

DEVICES = ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)]
SIZE = {"anchors": 99, "keys": 701, "features": 24, "classes": 3}  # no multiples of the tile
TILE = 64
TOLERANCE = {"float64": (1e-10, 1e-8), "float32": (1e-5, 1e-4), "tf32": (1e-2, 3e-2)}  # value, gradient by norm


@pytest.fixture(params=TOLERANCE)
def precision(request: pytest.FixtureRequest) -> Iterator[str]:
    torch.set_float32_matmul_precision("high" if request.param == "tf32" else "highest")
    yield request.param
    torch.set_float32_matmul_precision("highest")


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("case", bench.CASES)
def test_streamed_equals_naive(case: str, device: str, precision: str) -> None:
    found = []
    for how in ("naive", "keys", "anchors"):
        inputs = bench._inputs(case, **SIZE, device=device)
        if precision == "float64":
            inputs = {name: _double(x) for name, x in inputs.items()}
        found.append(bench._step(case, how, TILE, inputs))
    naive, *streamed = found
    near, norm = TOLERANCE[precision]
    for value, gradients in streamed:
        assert value.device.type == device
        assert abs(value - naive[0]) <= near * naive[0]
        for got, expected in zip(gradients, naive[1], strict=True):
            assert (got - expected).norm() <= norm * expected.norm()


def _double(x: Tensor) -> Tensor:
    return x.detach().double().requires_grad_(x.requires_grad) if x.is_floating_point() else x


@pytest.mark.gpu
def test_bench_measures_a_gpu() -> None:
    values = {
        (r["case"].split(":")[0], r["variant"], r["metric"]): r["value"]
        for r in bench.bench_contrast(512, 8192, 64, 2, tile=256, repeats=1, device="cuda")
    }
    for case in bench.CASES:
        naive, streamed = (values[case, variant, "peak_extra_mib"] for variant in ("naive", "keys"))
        assert 0 < streamed < naive / 2
        assert values[case, "keys", "product_share"] > 0
        assert values[case, "keys", "gradient_difference"] < 1e-4


def collectives(rank: int, world: int, device: str) -> dict[str, Tensor]:
    """Every Function of the exchange and its gradient, world 1 included: these never take the short cut."""
    x = torch.arange(4.0, device=device).view(2, 2).add(4 * rank).requires_grad_()
    out: dict[str, Tensor] = {}
    for name, function in {
        "gather": exchange._Gather,
        "sum": exchange._AllReduceSum,
        "merge": exchange._MergeLSE,
        "scatter": exchange._ScatterSum,
    }.items():
        given = x.repeat(world, 1) if name == "scatter" else x
        result = function.apply(given, dist.group.WORLD)
        gradient = torch.autograd.grad(((rank + 1) * result).sum(), x)[0]
        out |= {name: result.detach().cpu(), f"{name} gradient": gradient.cpu()}
    out["ids"] = exchange._gather(torch.arange(2, device=device) + 2 * rank, dist.group.WORLD).cpu()
    out["bytes"] = exchange._gather(torch.full((1,), rank, dtype=torch.uint8, device=device), dist.group.WORLD).cpu()
    return out


@pytest.mark.parametrize(
    ("world", "device"), [(1, "cpu"), (3, "cpu"), *(pytest.param(n, "cuda", marks=pytest.mark.gpu) for n in (1, 2, 4))]
)
def test_collectives_of_the_backend(world: int, device: str) -> None:
    if device == "cuda" and torch.cuda.device_count() < world:
        pytest.skip(f"needs {world} CUDA devices")
    everything = torch.arange(4.0 * world).view(world, 2, 2)
    weight = sum(range(1, world + 1))  # every rank's loss counts rank + 1 times
    merged = everything.logsumexp(0)
    for rank, got in enumerate(
        run_ranks(collectives, world, device, backend="nccl" if device == "cuda" else "gloo", timeout=180)
    ):
        expected = {
            "gather": everything.flatten(0, 1),
            "gather gradient": torch.full((2, 2), float(weight)),
            "sum": everything.sum(0),
            "sum gradient": torch.full((2, 2), float(weight)),
            "merge": merged,
            "merge gradient": weight * (everything[rank] - merged).exp(),
            "scatter": everything.sum(0),
            "scatter gradient": torch.full((2, 2), float(weight)),
            "ids": torch.arange(2 * world),
            "bytes": torch.arange(world, dtype=torch.uint8),
        }
        torch.testing.assert_close(got, expected, rtol=1e-6, atol=1e-6)
