"""One shared encoder, two decoders, two heads: the trainable module of CCL-MPC [P]."""

import torch
from torch import Tensor, nn

from cclmpc_dist import config
from cclmpc_dist.models.heads import Embedding, Projection
from cclmpc_dist.models.vnet import Decoder, Encoder

HEAD_STRIDE = 8  # the heads sit on the encoder's map at this stride [P: pyramid index -3]


def sample(map_: Tensor, positions_BN: Tensor) -> Tensor:
    """(B, N, C): the vectors of a map (B, C, *S) at positions of its flattened S."""
    vectors = map_.flatten(2).transpose(1, 2)
    return vectors.gather(1, positions_BN[..., None].expand(-1, -1, vectors.shape[2]))


class _First(torch.autograd.Function):
    """x[:n]; backward fills in the layout of the gradient, where a slice's would write contiguous zeros."""

    @staticmethod
    def forward(ctx, x, n):  # type: ignore
        ctx.rest = len(x) - n
        return x[:n]

    @staticmethod
    def backward(ctx, grad):  # type: ignore
        return torch.cat([grad, *[torch.zeros_like(grad[:1])] * ctx.rest]), None


class DualBranch(nn.Module):
    """Encoder, convolutional decoder, and where asked the Swin decoder and the heads; with none, the V-Net.

    `dims` is 2 or 3, `channels` the image's, `classes` counts the background. Raises InputError where the norm
    cannot be had.
    """

    def __init__(
        self,
        model: config.Model,
        dims: int,
        channels: int,
        classes: int,
        *,
        swin: bool = True,
        projection: bool = True,
        embedding: bool = True,
    ) -> None:
        super().__init__()
        width = model.filters * HEAD_STRIDE
        self.encoder = Encoder(dims, channels, model.filters, model.norm, model.dropout, model.recompute)
        self.conv = Decoder(dims, classes, model.filters, model.norm, model.dropout, model.recompute)
        self.swin = _swin(model, dims, classes) if swin else None
        self.projection = Projection(width, model.projection) if projection else None
        self.embedding = Embedding(dims, width, model.embedding, model.norm) if embedding else None

    def forward(
        self,
        views: Tensor,
        originals: Tensor | None = None,
        *,
        positions: Tensor | None = None,
        original_positions: Tensor | None = None,
        detach_originals: bool = False,
        embed: bool = False,
        swin: bool = True,
    ) -> dict[str, Tensor]:
        """One encoder pass over views (A, C, *S) and originals (B, C, *S); the rest sees the views only.

        S in multiples of 16. `positions` (A, n) and `original_positions` (B, m) are int64 into the flattened map
        at stride 8. Returns what was asked for and is built: "conv" and "swin" (A, K, *S) logits, "projection"
        (A, n, F), "original_projection" (B, m, F), "embedding" (A, F, *S/8); the last three are unit vectors.
        Detached originals run on their own and without gradient (batch norm then sees them apart).
        """
        maps, original_map = self._maps(views, originals, detach_originals)
        pyramid = [*maps, self.encoder.deep(maps[-1])]
        out = {"conv": self.conv(pyramid)}
        if swin and self.swin is not None:
            out["swin"] = self.swin(pyramid)
        if positions is not None:
            out["projection"] = self._project(maps[-1], positions)
        if original_positions is not None:
            assert original_map is not None, "positions of originals, and no originals"
            with torch.set_grad_enabled(torch.is_grad_enabled() and not detach_originals):
                out["original_projection"] = self._project(original_map, original_positions)
        if embed:
            assert self.embedding is not None, "built without the embedding head"
            out["embedding"] = self.embedding(maps[-1])
        return out

    def _maps(self, views: Tensor, originals: Tensor | None, detach: bool) -> tuple[list[Tensor], Tensor | None]:
        """The views' pyramid down to the heads' map, and the originals' map."""
        if originals is None:
            return self.encoder.shallow(views), None
        if detach:
            with torch.no_grad():
                original_map = self.encoder.shallow(originals)[-1]
            return self.encoder.shallow(views), original_map
        both = self.encoder.shallow(torch.cat([views, originals]))
        last, original_map = both[-1].split([len(views), len(originals)])
        return [*(_First.apply(level, len(views)) for level in both[:-1]), last], original_map

    def _project(self, map_: Tensor, positions: Tensor) -> Tensor:
        assert self.projection is not None, "built without the projection head"
        return self.projection(sample(map_, positions))


def _swin(model: config.Model, dims: int, classes: int) -> nn.Module:
    from cclmpc_dist.models.swin import SwinDecoder  # only a run with two decoders reads it

    own = model.swin
    return SwinDecoder(dims, classes, model.filters, own.depth, own.window, own.head_width, model.recompute)
