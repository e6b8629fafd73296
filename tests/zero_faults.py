"""`cclmpc train` under ZeRO with one thing wrong. FAULT: sum (gradients are summed over the ranks, not averaged), loss
(the loss of step 2 is infinite on rank 1, without a gradient), scale (fp16's loss scale over float32, too large)."""

import os
import sys
from typing import Any

import torch

from cclmpc_dist import cli
from cclmpc_dist.losses.terms import Additive
from cclmpc_dist.methods.ccl_mpc import CCLMPC
from cclmpc_dist.training import zero


def infinite_loss() -> None:
    sound = CCLMPC.terms

    def terms(self: CCLMPC, model: Any, batch: Any, step: int) -> Any:
        found, metrics = sound(self, model, batch, step)
        if step == 2 and os.environ["RANK"] == "1":
            (coefficient, value), *rest = found["sup"]
            infinite = torch.full_like(value.sum, torch.inf).detach()
            found["sup"] = [(coefficient, Additive(value.sum + infinite, value.count)), *rest]
        return found, metrics

    CCLMPC.terms = terms  # type: ignore[method-assign]


def large_scale() -> None:
    build = zero.Zero.__init__

    def scaled(self: zero.Zero, *arguments: Any) -> None:
        build(self, *arguments)
        self.scale = zero.LossScale(self.engine.optimizer, 2.0**66)

    zero.Zero.__init__ = scaled  # type: ignore[method-assign]


if __name__ == "__main__":
    fault = os.environ["FAULT"]
    if fault == "sum":
        zero.MEAN["gradient_allreduce_op"] = "sum"
    {"sum": lambda: None, "loss": infinite_loss, "scale": large_scale}[fault]()
    sys.argv.insert(1, "train")
    cli.main()
