"""Batch norms taken into the convolutions before them: for a network that only predicts."""

from itertools import pairwise

from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.modules.conv import _ConvNd
from torch.nn.utils import fuse_conv_bn_eval


def fold(module: nn.Module) -> None:
    """Fold, in place, each batch norm of a module in evaluation mode into the convolution before it: the same answer
    but for rounding, one pass over each map less. Other norms stay."""
    for part in list(module.modules()):
        if not isinstance(part, nn.Sequential):
            continue
        for place, (layer, norm) in enumerate(pairwise(list(part))):
            if isinstance(layer, _ConvNd) and isinstance(norm, _BatchNorm):
                part[place] = fuse_conv_bn_eval(layer, norm, transpose=layer.transposed)
                part[place + 1] = nn.Identity()
