"""The interface between the trainer and a training method."""

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor, nn

from cclmpc_dist.config import Config
from cclmpc_dist.losses.terms import Additive, Part

Terms = dict[str, list[Part]]
Metrics = dict[str, Additive]
Batch = Mapping[
    str, Mapping[str, Tensor]
]  # stream -> {image (b,C,*S) float32, label (b,*S) int64, key (b,), lane (b,)}


@dataclass(frozen=True)
class Corpus:
    """What a method has to know of the data: channels C and classes K (0 is background)."""

    channels: int
    classes: int


@dataclass(frozen=True)
class Phase:
    """A stretch of training with its own optimiser, schedule and step count T.

    share: its part of the budget, in (0, 1]. streams: name -> lanes that must stay on one rank together.
    """

    name: str
    share: float
    streams: dict[str, int]


class Method(ABC):
    """A training method: what to optimise, on which streams, and what answers at evaluation.

    It knows nothing of launchers, files and ranks beyond the exchange. Teachers are its own, outside the module.
    """

    phases: ClassVar[list[Phase]]

    def __init__(self, config: Config, corpus: Corpus) -> None:
        self.config = config
        self.corpus = corpus
        self.total = 1

    @abstractmethod
    def build(self) -> nn.Module:
        """The one trainable module: wrapped once, forward once a microbatch."""

    def enter(self, phase: Phase, total: int, module: nn.Module, batches: dict[str, int]) -> None:
        """A phase of `total` optimiser steps begins (again, on resume: before load_state_dict).

        module: the bare module on its device. batches: global batch of each stream.
        """
        self.total = total

    @abstractmethod
    def weights(self, step: int) -> dict[str, float]:
        """Weight of each term at `step` of the phase; a term of weight 0 is not computed and `terms` leaves it out."""

    @abstractmethod
    def terms(self, model: nn.Module, batch: Batch, step: int) -> tuple[Terms, Metrics]:
        """Local sums and counts of this microbatch; `model` is the wrapped module and is called exactly once."""

    def after_step(self, module: nn.Module) -> None:
        """Bank and teacher updates; called on kept steps only."""

    def discard_step(self) -> None:
        """Forget what `terms` put aside for after_step: the step was skipped."""

    def state_dict(self) -> dict[str, Tensor]:
        """Tensors beyond module and optimiser, equal on all ranks."""
        return {}

    def load_state_dict(self, state: dict[str, Tensor]) -> None:
        """Take back what state_dict gave."""

    def rank_state_dict(self) -> dict[str, Tensor]:
        """Tensors of this rank alone."""
        return {}

    def load_rank_state_dict(self, state: dict[str, Tensor]) -> None:
        """Take back what this rank's rank_state_dict gave."""

    def deal(self, states: list[dict[str, Tensor]]) -> str:
        """Take a share of what all ranks' rank_state_dict gave at another world size; returns a line that tells how.

        Called where rank_state_dict is not empty.
        """
        raise AssertionError("a method with a state of its own ranks says how to share it out")

    def notes(self) -> list[str]:
        """Lines for the log at the start of training."""
        return []

    @abstractmethod
    def predictor(self, module: nn.Module) -> Callable[[Tensor], Tensor]:
        """(b, C, *S) float32 images -> (b, K, *S) class probabilities in at least float32."""
