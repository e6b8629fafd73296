"""The two contrastive heads on the encoder's map at stride 8. Both give unit vectors."""

from torch import Tensor, nn

from cclmpc_dist.dtypes import wide
from cclmpc_dist.models.vnet import conv, normalisation


def unit(x: Tensor, dim: int) -> Tensor:
    """x over its norm along `dim`, in at least float32. A zero vector stays zero, with a finite gradient."""
    x = x.to(wide(x))
    return x * (x.square().sum(dim, keepdim=True) + 1e-12).rsqrt()


class Projection(nn.Module):
    """SBCL's head g: MLP - PReLU - MLP per position [P], 128 wide [F]. (..., C) -> (..., F)."""

    def __init__(self, channels: int, features: int = 128) -> None:
        super().__init__()
        self.mlp = nn.Sequential(nn.Linear(channels, channels), nn.PReLU(), nn.Linear(channels, features))

    def forward(self, x: Tensor) -> Tensor:
        return unit(self.mlp(x), -1)


class Embedding(nn.Module):
    """CGCL's head e: MLP - norm - PReLU - MLP over the whole map, 256 wide [P]. (B, C, *S) -> (B, F, *S)."""

    def __init__(self, dims: int, channels: int, features: int = 256, norm: str = "batch") -> None:
        super().__init__()
        self.mlp = nn.Sequential(
            conv(dims)(channels, channels, 1),
            normalisation(norm, dims, channels),
            nn.PReLU(),
            conv(dims)(channels, features, 1),
        )

    def forward(self, x: Tensor) -> Tensor:
        return unit(self.mlp(x), 1)
