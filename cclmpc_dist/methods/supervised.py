"""The baseline: a V-Net trained on the labelled stream alone."""

from collections.abc import Callable
from typing import ClassVar

from torch import Tensor, nn

from cclmpc_dist.losses.segmentation import log_softmax, seg, softmax
from cclmpc_dist.methods.method import Batch, Method, Metrics, Phase, Terms
from cclmpc_dist.models.dual_branch import DualBranch


class Supervised(Method):
    """Seg on the labelled images as they are: turned and flipped crops, no intensity views, as the LA papers do."""

    phases: ClassVar = [Phase("main", 1.0, {"labelled": 1})]

    def build(self) -> nn.Module:
        return DualBranch(
            self.config.model,
            self.config.dims,
            self.corpus.channels,
            self.corpus.classes,
            swin=False,
            projection=False,
            embedding=False,
        )

    def weights(self, step: int) -> dict[str, float]:
        return {"sup": 1.0}

    def terms(self, model: nn.Module, batch: Batch, step: int) -> tuple[Terms, Metrics]:
        labelled = batch["labelled"]
        log_p = log_softmax(model(labelled["image"])["conv"])
        return {"sup": seg(log_p, labelled["label"])}, {}

    def predictor(self, module: nn.Module) -> Callable[[Tensor], Tensor]:
        return lambda image: softmax(module(image)["conv"])
