"""What a loss hands to the trainer: local sums and counts, from which W ranks make the value of one process."""

from collections.abc import Callable
from dataclasses import dataclass

from torch import Tensor


@dataclass(frozen=True)
class Additive:
    """A mean over countable items. Over W ranks its value is sum_world(sum) / sum_world(count), 0 where nothing counts.

    sum: scalar, differentiable; it stays attached to the graph even when count is 0. count: scalar without gradient.
    """

    sum: Tensor
    count: Tensor


@dataclass(frozen=True)
class Ratio:
    """A function of global sums (Dice). Its value is finish(sum_world(sums)), the same scalar on every rank.

    sums: 1-D, differentiable. finish: takes the reduced sums (float64), returns a scalar.
    """

    sums: Tensor
    finish: Callable[[Tensor], Tensor]


Part = tuple[float, Additive | Ratio]  # coefficient and value: a term is a weighted list of parts
