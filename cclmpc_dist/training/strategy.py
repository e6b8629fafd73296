"""How the ranks share the work of a step: what the trainer asks of DDP and of DeepSpeed (zero.py) alike."""

import copy
import math
from abc import ABC, abstractmethod
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from accelerate import Accelerator
from torch import Tensor, nn

from cclmpc_dist.config import Config
from cclmpc_dist.distributed import runtime
from cclmpc_dist.training.checkpoint import Tensors, pack_optimizer, unpack_optimizer


def start(config: Config) -> Accelerator:
    """The processes that the launcher meant, as the run's strategy needs them. Raises InputError as runtime.start."""
    if config.strategy == "deepspeed":
        from cclmpc_dist.training import zero

        return zero.start(config)
    return runtime.start(config.precision)


def create(config: Config, accelerator: Accelerator, module: nn.Module) -> "Strategy":
    if config.strategy == "deepspeed":
        from cclmpc_dist.training import zero

        return zero.Zero(config, accelerator, module)
    return Ddp(config, accelerator, module)


def optimizer(config: Config, groups: list[dict[str, Any]]) -> torch.optim.Optimizer:
    settings = config.optim
    options: dict[str, Any] = {"lr": settings.lr, "weight_decay": settings.weight_decay, "foreach": True}
    if settings.name == "sgd":
        return torch.optim.SGD(groups, momentum=settings.momentum, **options)
    return torch.optim.AdamW(groups, **options)


class Strategy(ABC):
    """Owns the wrapped module and the optimiser. A step is `backward` for each microbatch, `gradient_norm`, then `step`
    or `discard`, on all ranks alike."""

    wrapped: nn.Module
    optimizer: torch.optim.Optimizer

    def set_rate(self, lr: float) -> None:
        """Learning rate of the step that begins."""
        for group in self.optimizer.param_groups:
            group["lr"] = lr

    @abstractmethod
    def microbatch(self, last: bool) -> AbstractContextManager[Any]:
        """Around forward and backward; gradients are averaged over the ranks with the step's last one."""

    @abstractmethod
    def backward(self, loss: Tensor, total: Tensor) -> None:
        """total: the global loss, for a strategy that itself skips a step: it must where this is not finite."""

    @abstractmethod
    def gradient_norm(self) -> Tensor:
        """Norm of the averaged gradient, in float64, before clipping; the gradient is clipped."""

    @abstractmethod
    def step(self) -> None:
        """The norm was finite: the weights move, the gradients go."""

    @abstractmethod
    def discard(self) -> None:
        """It was not: the gradients go."""

    @abstractmethod
    def plain(self) -> nn.Module:
        """A copy of the module with whole weights and without wrapping. Collective."""

    @abstractmethod
    def whole(self) -> nn.Module:
        """A module with whole weights, to read from: the trained one itself where it has them. Collective."""

    @abstractmethod
    def load(self, weights: Tensors) -> None:
        """Take weights and buffers. Collective."""

    @abstractmethod
    def pack(self) -> tuple[Tensors, Tensors, dict[str, Any]]:
        """The optimiser's tensors that are equal on all ranks, those of this rank, and JSON values."""

    @abstractmethod
    def unpack(self, shared: Tensors, own: Callable[[int], Tensors], values: dict[str, Any], world_size: int) -> None:
        """Take back what `pack` gave on `world_size` ranks; own: what it gave as a rank's own."""

    @abstractmethod
    def held(self, weights: float, model: float, states: int) -> dict[str, float]:
        """What a rank holds between steps. states: copies of the weights that the optimiser keeps."""


class Ddp(Strategy):
    """Whole copies of everything on every rank."""

    def __init__(self, config: Config, accelerator: Accelerator, module: nn.Module) -> None:
        self.accelerator, self.module, self.clip = accelerator, module, config.optim.clip or math.inf
        self.parameters = [parameter for parameter in module.parameters() if parameter.requires_grad]
        self.wrapped = runtime.wrap(accelerator, module)
        self.prepared = accelerator.prepare_optimizer(optimizer(config, [{"params": self.parameters}]))
        self.optimizer = self.prepared.optimizer

    def microbatch(self, last: bool) -> AbstractContextManager[Any]:
        return nullcontext() if last else self.accelerator.no_sync(self.wrapped)

    def backward(self, loss: Tensor, total: Tensor) -> None:
        self.accelerator.backward(loss)

    def gradient_norm(self) -> Tensor:
        norm: Tensor = self.accelerator.clip_grad_norm_(self.parameters, self.clip)
        return norm.double()

    def step(self) -> None:
        self.prepared.step()
        self.prepared.zero_grad(set_to_none=True)

    def discard(self) -> None:
        if self.accelerator.scaler is not None:
            self.accelerator.scaler.update()
        self.prepared.zero_grad(set_to_none=True)

    def plain(self) -> nn.Module:
        return copy.deepcopy(self.module)

    def whole(self) -> nn.Module:
        return self.module

    def load(self, weights: Tensors) -> None:
        self.module.load_state_dict(weights)

    def pack(self) -> tuple[Tensors, Tensors, dict[str, Any]]:
        tensors, values = pack_optimizer(self.optimizer)
        scaler = self.accelerator.scaler
        return tensors, {}, values | {"scaler": scaler.state_dict() if scaler is not None else None}

    def unpack(self, shared: Tensors, own: Callable[[int], Tensors], values: dict[str, Any], world_size: int) -> None:
        unpack_optimizer(self.optimizer, shared, values)
        if self.accelerator.scaler is not None and values["scaler"]:
            self.accelerator.scaler.load_state_dict(values["scaler"])

    def held(self, weights: float, model: float, states: int) -> dict[str, float]:
        return {"model": model, "gradients": weights, "optimiser": states * weights}
